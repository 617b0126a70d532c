"""The order in which training sees its data, the random draws of a step, and batches read ahead."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from preemption import ignore_signals

AHEAD = 2  # batches in preparation per worker, as DataLoader has it


def load_batches(dataset, batches, workers, pin):
    """Read the `batches` of `dataset`, in order and ahead of their use, into pinned memory if `pin` says so.

    Where something has to be decoded, by `workers` processes. Where there is only reading to do, by as many threads:
    between processes each batch would be copied and mapped once more, which takes longer than to read it, and a thread
    that reads does not hold the interpreter. No number of either changes what a batch holds.
    """
    if dataset.decodes:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                              worker_init_fn=ignore_signals)
        return

    def load(visits):
        batch = dataset.batch(visits)
        return {name: value.pin_memory() for name, value in batch.items()} if pin else batch

    if not workers:
        yield from map(load, batches)
        return
    with ThreadPoolExecutor(workers) as threads:
        coming = deque()
        for visits in batches:
            coming.append(threads.submit(load, visits))
            if len(coming) > AHEAD * workers:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


class StepBatches(Sampler):
    """Micro-batches of one process for steps `first` .. `last` - 1: a function of (seed, step, place) alone.

    Global sample g = step * batch_size + place is entry g % n of epoch g // n, and each epoch is a permutation made
    from (seed, epoch). What a batch lists are visits, epoch * n + position in the data set: whatever a data set draws
    anew in each epoch is then a function of (seed, epoch, position), too. Place p belongs to micro-batch
    (p // micro) // processes of process (p // micro) % processes, with micro = batch_size / (processes * accumulation).
    """

    def __init__(self, n, batch_size, seed, first, last, process=0, processes=1, accumulation=1):
        self.n, self.batch_size, self.seed, self.steps = n, batch_size, seed, range(first, last)
        self.accumulation = accumulation
        self.places = [process_places(batch_size, process, processes, accumulation, a) for a in range(accumulation)]

    def __len__(self):
        return len(self.steps) * self.accumulation

    def __iter__(self):
        epoch, order = None, None
        for step in self.steps:
            for places in self.places:
                batch = []
                for g in range(step * self.batch_size + places.start, step * self.batch_size + places.stop):
                    if g // self.n != epoch:
                        epoch = g // self.n
                        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.n)
                    batch.append(epoch * self.n + int(order[g % self.n]))
                yield batch


# Streams of randomness under one seed: data order by epoch, captions and mirroring by epoch and image, all other draws
# by step. 3 is evaluations/during_training.py's.
ORDER, DRAWS, CAPTION, FLIP = 0, 1, 2, 4


def process_places(batch_size, process, processes, accumulation, micro_step):
    """The slice of the global batch that is one process's micro-batch."""
    micro = batch_size // (processes * accumulation)
    start = (micro_step * processes + process) * micro
    return slice(start, start + micro)


def step_draws(seed, step, batch_size, latent_shape):
    """All random numbers of one step, for the whole global batch, so that no process or worker count changes them.

    u, drop: uniform (B,), for the timestep and the condition drop; noise, posterior: standard normal (B, C, h, w).
    """
    rng = np.random.default_rng((seed, DRAWS, step))
    shape = (batch_size, *latent_shape)
    return {"u": torch.from_numpy(rng.random(batch_size, dtype=np.float32)),
            "drop": torch.from_numpy(rng.random(batch_size, dtype=np.float32)),
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "posterior": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))}
