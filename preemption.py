"""When to save beside the usual steps: on a signal, which also ends the run, or when some minutes have passed.

The first SIGTERM or SIGUSR1 asks the run to save after the step and to exit with EXIT_CODE; another one, from
SECOND_AFTER seconds later on, ends the process at once, which harms nothing: files have their names only when complete.
"""
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, give the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SECOND_AFTER = 1.0  # a cluster and a launcher may both pass one signal on; what comes this soon is the same request
SAVE, STOP = 1, 2


def ignore_signals(_worker=None):
    """For loader processes: a signal to the whole process group must leave them alive for the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Preemption:
    """Listens while entered; every process calls `decide` after every step, and `was_saved` after saving."""

    def __init__(self, processes, minutes=0, patience=None):
        self.signal, self.seconds, self.saved = None, 60 * minutes or float("inf"), time.monotonic()
        # A group of its own on the CPU: agreeing must neither wait for the device nor mix with the gradients' sums.
        self.group = dist.new_group(backend="gloo", timeout=patience) if processes > 1 else None
        self.pending, self.stale = None, False

    def __enter__(self):
        # Python runs its handlers only between bytecodes, so never while a collective hangs. The wakeup descriptor is
        # written by the C handler at once, and the thread below reads it.
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self.wakeup = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()
        return self

    def _listen(self):
        while number := os.read(self.reader, 1)[0]:
            if number not in SIGNALS:
                continue
            if self.signal is None:
                self.signal, first = signal.Signals(number), time.monotonic()
            elif time.monotonic() - first >= SECOND_AFTER:
                os._exit(128 + number)

    def decide(self):
        """STOP, SAVE or 0, the same on all processes.

        One process answers at once. Several put together what each wanted after the step before: that sum has travelled
        during the step, so that nobody waits for it, and a signal is acted on one step later.
        """
        late = time.monotonic() - self.saved >= self.seconds
        wanted = STOP if self.signal else SAVE if late else 0
        if self.group is None:
            return wanted
        decided = 0
        if self.pending:
            work, flag = self.pending
            work.wait()
            decided = int(flag)
            if decided == SAVE and self.stale:  # wanted before the last save
                decided = 0
        flag, self.stale = torch.tensor(wanted), False
        self.pending = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        return decided

    def was_saved(self):
        """The clock of --checkpoint-minutes starts again."""
        self.saved, self.stale = time.monotonic(), True

    def __exit__(self, kind, *_):
        """Signals mean again what they meant before."""
        if self.pending and kind in (None, SystemExit):
            self.pending[0].wait()  # the others still count on this process
        signal.set_wakeup_fd(self.wakeup)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.write(self.writer, b"\0")
        self.thread.join()
        for end in (self.reader, self.writer):
            os.close(end)
