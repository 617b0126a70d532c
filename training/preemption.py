"""Save between the usual steps: on a signal, which also ends the run, or after some minutes.

SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) mean, from `listen` on,
    before the first step   end at once with EXIT_CODE: there is nothing to save yet
    during the steps        save after this step and exit with EXIT_CODE; a second signal, SECOND_AFTER seconds later or
                            more, ends at once, which is safe: files get their names only when complete
    after them              nothing: the run is over and keeps its exit status
"""
import contextlib
import logging
import os
import signal
import threading
import time

import torch
import torch.distributed as dist

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, give the same command again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SECOND_AFTER = 1.0  # a cluster and a launcher may both pass one signal on: a second one sooner than this is ignored
SAVE, STOP = 1, 2
BEFORE, STEPS, AFTER = range(3)
STOPPED_EARLY = "stopped by a signal before the first step; the same command continues"
HEARD = b"\nA signal: saving after this step. Another one ends the run at once, without saving.\n"

logger = logging.getLogger("haste")


def ignore_signals(_worker=None):
    """For loader processes: a signal to the whole process group must leave them alive for the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Listener:
    """The thread that acts on signals, one per process, and the signals it received."""

    def __init__(self):
        # Python runs its handlers only between bytecodes, so never while a collective hangs. The wakeup descriptor is
        # written by the C handler at once, and the thread reads it.
        self.phase, self.heard, self.first = BEFORE, None, None
        # A shell starts background jobs with SIGINT ignored: Ctrl-C is not for them.
        self.numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.writer, False)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        while True:
            number = os.read(self.reader, 1)[0]
            if number not in SIGNALS or self.phase == AFTER:
                continue
            if self.phase == BEFORE:
                try:
                    if not logger.isEnabledFor(logging.INFO):
                        os.write(2, f"{STOPPED_EARLY}\n".encode())
                    logger.info(STOPPED_EARLY)  # to stderr, by the root's handler, and into log.txt
                    for handler in logger.handlers:
                        handler.flush()
                finally:
                    os._exit(EXIT_CODE)
            if self.heard is None:
                self.heard, self.first = signal.Signals(number), time.monotonic()
                if logger.isEnabledFor(logging.INFO):  # on one process
                    with contextlib.suppress(OSError):
                        os.write(2, HEARD)
            elif time.monotonic() - self.first >= SECOND_AFTER:
                os._exit(128 + number)


_listener = None


def listen():
    """Take over the signals. The main thread calls this before anything else."""
    global _listener
    _listener = _listener or Listener()
    _listener.phase, _listener.heard = BEFORE, None
    signal.set_wakeup_fd(_listener.writer, warn_on_full_buffer=False)
    for number in _listener.numbers:
        signal.signal(number, lambda *_: None)


class Preemption:
    """Context of the steps. Every process calls `decide` after every step, and `was_saved` after saving."""

    def __init__(self, processes, minutes=0, patience=None):
        self.seconds, self.saved = 60 * minutes or float("inf"), time.monotonic()
        # A separate group on the CPU: agreeing must neither wait for the device nor mix with the gradients' all-reduce.
        self.group = dist.new_group(backend="gloo", timeout=patience) if processes > 1 else None
        self.pending, self.stale, self.is_first = None, False, processes == 1 or dist.get_rank() == 0

    def __enter__(self):
        _listener.phase = STEPS
        return self

    def decide(self):
        """STOP, SAVE or 0, the same on all processes.

        One process decides at once. Several decide on what each wanted one step ago: the all-reduce runs during a
        step, so nobody waits for it.
        """
        late = self.is_first and time.monotonic() - self.saved >= self.seconds  # others do not wait for its write
        wanted = STOP if _listener.heard else SAVE if late else 0
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
        """Restart the clock of --checkpoint-minutes."""
        self.saved, self.stale = time.monotonic(), True

    def __exit__(self, kind, *_):
        if kind is None:
            _listener.phase = AFTER
            ignore_signals()
            if self.pending:
                self.pending[0].wait()  # the others still count on this process
