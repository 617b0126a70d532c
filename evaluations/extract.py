"""Feature extraction over one or more processes: each brings its part of the images, process 0 gets the whole set.

Means and covariances are summed on the fly, so memory does not grow with the images, pool features excepted,
and those are kept only where a score needs them. Without torch.distributed everything runs as one process.
"""
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluations.inception import SPATIAL_DIM
from evaluations.metrics import Moments
from files import BadInput
from processes import watch_others


@dataclass
class FeatureSet:
    """What is known of one set of images. None = not known; tensors are on the CPU."""
    name: str
    features: str                        # key of features.FEATURES
    preset: str | None                   # None: a published statistics file, which does not say
    n: int | None = None                 # images behind pool, or behind mu where there is no pool
    pool: torch.Tensor | None = None     # (n, D) float32, in file order
    mu: torch.Tensor | None = None       # (D,) float64
    sigma: torch.Tensor | None = None    # (D, D) float64
    mu_s: torch.Tensor | None = None     # (2023,) float64, the spatial features of sFID
    sigma_s: torch.Tensor | None = None
    classifier: torch.Tensor | None = None      # (1008, 2048) float32, for the Inception Score


def extract(batches, n, extractor, name="samples", keep=True):
    """Features of all processes' images -> FeatureSet on process 0, None on the others.

    batches: this process's n images as an iterator of uint8 (b, H, W, 3), NumPy or tensor; processes may
    bring different numbers, none included, and are put together in rank order. Every process must call this.
    With `keep` the pool features stay in memory (Inception Score, KID, precision and recall need them). Draws
    no random numbers.
    """
    pool_moments = Moments(extractor.dim, extractor.device)
    spatial_moments = Moments(SPATIAL_DIM, extractor.device) if extractor.features == "inception" else None
    kept = torch.empty(n if keep else 0, extractor.dim)
    with tqdm(total=n, desc=f"{extractor.features} features of {name}", unit="image",
              disable=True if rank() else None) as progress:             # None: shown on a terminal only
        for images in batches:
            pool, spatial = extractor(images)
            if keep:
                kept[pool_moments.n:pool_moments.n + len(pool)] = pool
            pool_moments.add(pool)
            if spatial_moments:
                spatial_moments.add(spatial)
            progress.update(len(pool))
    if pool_moments.n != n:
        raise ValueError(f"{n} images were announced for {name}, {pool_moments.n} came")
    for moments in filter(None, (pool_moments, spatial_moments)):
        sum_over_processes(moments)
    kept = gather_rows(kept) if keep else None
    if rank():
        return None
    found = FeatureSet(name, extractor.features, extractor.preset, pool_moments.n, kept)
    found.classifier = extractor.classifier
    if found.n > 1:
        found.mu, found.sigma = pool_moments.result()
        if spatial_moments:
            found.mu_s, found.sigma_s = spatial_moments.result()
    return found


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def shard(n):
    """(start, stop) of this process's contiguous part of n images."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return n * rank() // world, n * (rank() + 1) // world


def sum_over_processes(moments):
    """Add up the Moments of all processes, in place."""
    if not dist.is_initialized():
        return
    count = torch.tensor([moments.n], dtype=torch.float64)
    for total in (count, moments.sum, moments.outer):
        shared = total.to(transport())
        dist.all_reduce(shared)
        total.copy_(shared)
    moments.n = int(count)


def gather_rows(rows):
    """rows (n_r, D) of each process -> (sum of n_r, D) in rank order on process 0, None on the others."""
    if not dist.is_initialized():
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=transport()) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=transport()))
    padded = rows.new_zeros(int(max(counts)), rows.shape[1], device=transport())   # gather wants one size
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts] if rank() == 0 else None
    dist.gather(padded, parts)
    if parts is None:
        return None
    return torch.cat([part[:int(count)].cpu() for part, count in zip(parts, counts, strict=True)])


def transport():
    """Device that the process group moves tensors on: nccl has GPUs only."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def join_processes(device=None):
    """Join torchrun's processes where there are any -> device of this process, CUDA by default if there is one."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda was asked for, but PyTorch sees no GPU; use --device cpu.")
    if "WORLD_SIZE" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        watch_others()
    return device
