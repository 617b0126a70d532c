"""Several processes as one run: when one of them ends before its time, the others end too, soon and with a sentence.

A collective does not see to that: with NCCL the others would wait for the one that is gone until its timeout.
"""
import contextlib
import datetime
import os
import sys
import threading
import time

import torch
import torch.distributed as dist

FOREVER = datetime.timedelta(days=3650)
GRACE = 5.0  # seconds that a process has to end in its own way, after another one has ended
ENDED = "error: another process of this run has ended before its time; what it says tells why."


WELL, ILL = 0.0, 1.0


class Ring:
    """Every process waits, in a thread, for a word from the one before it: WELL at the run's orderly end.

    An error comes instead when that process is gone; then ILL goes around, and all end.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=FOREVER)
        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.over, self.lost = threading.Event(), threading.Event()  # one of them is set at the end
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.thread.start()

    def _listen(self):
        word = torch.tensor([ILL])
        with contextlib.suppress(RuntimeError):
            dist.recv(word, src=(self.rank - 1) % self.count, group=self.group)
        if word.item() == WELL:
            return self.over.set()
        self.lost.set()
        with contextlib.suppress(RuntimeError):
            self.tell(ILL)
        time.sleep(GRACE)  # for the sentence of a main thread that has failed as well
        end_at_once(ENDED)

    def tell(self, word):
        dist.send(torch.tensor([word]), dst=(self.rank + 1) % self.count, group=self.group)


_ring = None


def watch_others():
    """From here on no process of this run outlives another by more than a few seconds, until `leave`. All call it."""
    global _ring
    if _ring is None and dist.is_initialized() and dist.get_world_size() > 1:
        _ring = Ring()


def leave():
    """The orderly end of a run of several processes: returns when all have come to it, without process group."""
    global _ring
    if _ring is not None:
        dist.barrier(group=_ring.group)
        _ring.tell(WELL)
        _ring.over.wait()
        _ring.thread.join()  # it must not be the one that takes the group apart: Python may be gone by then
        _ring = None
    if dist.is_initialized():
        dist.destroy_process_group()


def is_watched():
    return _ring is not None


def others_ended():
    """Whether an error in this process came of another one that is gone."""
    return _ring is not None and _ring.lost.wait(GRACE)


def end_at_once(sentence):
    """End with exit status 1, whatever other threads wait for: Python's own end would have to wait for them."""
    print(sentence, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
