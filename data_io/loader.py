"""Data order, the noise of each step, and loading both ahead of the training step."""
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

# Random streams under one seed: data order by epoch; captions, mirroring and cropping by epoch and image; all other
# draws by step and place. evaluations/during_training.py uses stream 3, evaluations/student.py stream 5.
ORDER, DRAWS, CAPTION, FLIP, CROP = 0, 1, 2, 4, 6
NOISE_STREAM = 2  # saved in checkpoints; those without it used one stream for a whole batch
AHEAD = 2  # batches in preparation per worker, as in DataLoader


def work_ahead(work, items, threads, ahead=None):
    """work(item) of each item, in order, by `threads` threads while the caller uses earlier results.

    `ahead`: most results that wait for the caller (default: AHEAD per thread).
    """
    with ThreadPoolExecutor(threads) as pool:
        coming = deque()
        for item in items:
            coming.append(pool.submit(work, item))
            if len(coming) > (ahead or AHEAD * threads):
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def pinned(batch, pin):
    return {name: value.pin_memory() for name, value in batch.items()} if pin else batch


def load_batches(dataset, batches, workers, pin, worker_init=None):
    """The `batches` of a LatentDataset, in order and read ahead, in pinned memory if `pin`; the same for any `workers`.

    Processes decode images, so they do not hold the training step's interpreter lock. Threads read packed rows:
    reading releases the lock, and no batch is copied between processes (benchmarks/README.md). `worker_init` is
    DataLoader's worker_init_fn.
    """
    if dataset.decodes:
        return iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                               worker_init_fn=worker_init))

    def load(sample_ids):
        return pinned(dataset.batch(sample_ids), pin)

    return work_ahead(load, batches, workers) if workers else map(load, batches)


class StepBatches(Sampler):
    """Micro-batches of one process for steps `first` .. `last` - 1: a function of (seed, step, place) alone.

    Place p of step s is global sample g = s * batch_size + p: entry g % n of epoch g // n, whose permutation is made
    from (seed, epoch). A batch lists sample ids, epoch * n + position in the data set, so that a data set's own
    draws are functions of (seed, epoch, position) too. microbatch_slice says which places a process has.
    """

    def __init__(self, n, batch_size, seed, first, last, process=0, processes=1, accumulation=1):
        self.n, self.batch_size, self.seed, self.steps = n, batch_size, seed, range(first, last)
        self.places = [microbatch_slice(batch_size, process, processes, accumulation, a) for a in range(accumulation)]

    def __len__(self):
        return len(self.steps) * len(self.places)

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


def microbatch_slice(batch_size, process, processes, accumulation, micro_step):
    """The slice of the global batch that is one process's micro-batch."""
    micro = batch_size // (processes * accumulation)
    start = (micro_step * processes + process) * micro
    return slice(start, start + micro)


def step_noise(seed, step, places, latent_shape):
    """The random numbers of one step for n places of the global batch, a slice or range -> float32 CPU tensors by name.

    u, drop: uniform (n,), for the timestep and the condition drop; noise, posterior: standard normal (n, C, h, w).
    Each place has its own stream, so its numbers do not depend on how the batch is split: Philox with a key from the
    seed and a counter from (0, 0, place, step) on. Setting the counter costs a sixth of making a generator.
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
    """step_noise of each micro-batch of `batches`, a StepBatches, drawn ahead; pinned if `pin`.

    A thread draws 0.11 ms an image for latents of 256 px, but 5 ms for its pixels, so a GPU gets four threads.
    """
    def draw(micro_batch):
        return pinned(step_noise(batches.seed, *micro_batch, latent_shape), pin)

    return work_ahead(draw, ((step, places) for step in batches.steps for places in batches.places),
                      threads=4 if pin else 1)
