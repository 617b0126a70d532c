"""The order in which training sees its data, the noise of a step, and both made ahead of their use."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

AHEAD = 2  # batches in preparation per worker, as DataLoader has it


def work_ahead(work, items, threads):
    """work(item) of each item, in order, done by `threads` threads while the caller is busy with the results before."""
    with ThreadPoolExecutor(threads) as pool:
        coming = deque()
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > AHEAD * threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def load_batches(dataset, batches, workers, pin, worker_init=None):
    """Read the `batches` of `dataset`, in order and ahead of their use, into pinned memory if `pin` says so.

    Where something has to be decoded, by `workers` processes. Where there is only reading to do, by as many threads:
    between processes each batch would be copied and mapped once more, which takes longer than to read it, and a thread
    that reads does not hold the interpreter. No number of either changes what a batch holds. `worker_init` is DataLoader's worker_init_fn.
    """
    if dataset.decodes:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                              worker_init_fn=worker_init)
        return

    def load(visits):
        batch = dataset.batch(visits)
        return {name: value.pin_memory() for name, value in batch.items()} if pin else batch

    yield from work_ahead(load, batches, workers) if workers else map(load, batches)


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
        self.places = [microbatch_slice(batch_size, process, processes, accumulation, a) for a in range(accumulation)]

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
# by step and place. 3 is evaluations/during_training.py's.
ORDER, DRAWS, CAPTION, FLIP = 0, 1, 2, 4
NOISE_STREAM = 2  # in checkpoints; those without it had one stream for the whole batch of a step


def microbatch_slice(batch_size, process, processes, accumulation, micro_step):
    """The slice of the global batch that is one process's micro-batch."""
    micro = batch_size // (processes * accumulation)
    start = (micro_step * processes + process) * micro
    return slice(start, start + micro)


def step_noise(seed, step, places, latent_shape):
    """The random numbers of one step for n places of the global batch, a slice or range -> float32 CPU tensors by name.

    u, drop: uniform (n,), for the timestep and the condition drop; noise, posterior: standard normal (n, C, h, w).
    Each place has a stream of its own, so its numbers do not depend on how the batch is split. Philox makes them from a
    key, here of the seed, and a counter that grows from (0, 0, place, step): no two streams meet. Setting its counter
    costs a sixth of making a generator, and numpy lets other threads run while it fills an array.
    """
    places = range(places.start, places.stop)
    bits = np.random.Philox(key=np.random.SeedSequence((seed, DRAWS)).generate_state(2, np.uint64))
    rng, start = np.random.Generator(bits), bits.state
    uniform = np.empty((2, len(places)), np.float32)
    normal = np.empty((2, len(places), *latent_shape), np.float32)
    for i, place in enumerate(places):
        start["state"]["counter"] = np.array((0, 0, place, step), np.uint64)
        bits.state = start
        uniform[:, i] = rng.random(2, dtype=np.float32)
        for values in normal:
            rng.standard_normal(out=values[i], dtype=np.float32)
    (u, drop), (noise, posterior) = torch.from_numpy(uniform), torch.from_numpy(normal)
    return {"u": u, "drop": drop, "noise": noise, "posterior": posterior}


def load_noise(batches, latent_shape, pin):
    """step_noise of each micro-batch of `batches`, a StepBatches, drawn ahead by a thread; pinned if `pin`."""
    def draw(micro_batch):
        noise = step_noise(batches.seed, *micro_batch, latent_shape)
        return {name: value.pin_memory() for name, value in noise.items()} if pin else noise

    return work_ahead(draw, ((step, places) for step in batches.steps for places in batches.places), threads=1)
