"""Extract features on one or more processes: each handles a part of the images, process 0 gets all features.

Means and covariances are summed batch by batch, so memory does not grow with the number of images. Pool features are
kept only if a score needs them. Without torch.distributed there is one process.
"""
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from evaluations.inception import SPATIAL_DIM
from evaluations.metrics import Moments
from runtime.errors import UserError
from runtime.setup import PROCESS_GROUP_TIMEOUT, connect, keep_freed_memory


@dataclass
class FeatureSet:
    """Features of one set of images, None where unknown; tensors are on the CPU."""
    name: str
    features: str                        # key of FEATURES
    preset: str | None                   # None: a published statistics file does not name one
    n: int | None = None                 # number of images
    pool: torch.Tensor | None = None     # (n, D) float32, in file order
    mu: torch.Tensor | None = None       # (D,) float64
    sigma: torch.Tensor | None = None    # (D, D) float64
    mu_s: torch.Tensor | None = None     # (2023,) float64, the spatial features of sFID
    sigma_s: torch.Tensor | None = None
    classifier: torch.Tensor | None = None      # (1008, 2048) float32, for the Inception Score
    made_of: str | None = None           # name and sha256 of the images, in a statistics file


def extract(batches, n, extractor, name="samples", keep=True):
    """Features of all processes' images -> FeatureSet on process 0, None on the others. All processes must call it.

    batches: iterator of this process's n images, uint8 (b, H, W, 3), NumPy or tensor. n may differ between processes
    and may be 0; sets are joined in rank order. `keep` keeps the pool features, which Inception Score, KID, precision
    and recall need. Draws no random numbers.
    """
    moments = {("mu", "sigma"): Moments(extractor.dim, extractor.device)}
    if extractor.features == "inception":
        moments["mu_s", "sigma_s"] = Moments(SPATIAL_DIM, extractor.device)
    kept, done = torch.empty(n if keep else 0, extractor.dim), 0
    with tqdm(total=n, desc=f"{extractor.features} features of {name}", unit="image",
              disable=True if rank() else None) as progress:             # None: only on a terminal
        for images in batches:
            found = extractor(images)                                    # pool and, for Inception, spatial features
            if keep:
                kept[done:done + len(images)] = found[0]
            for each, rows in zip(moments.values(), found, strict=False):
                each.add(rows)
            done += len(images)
            progress.update(len(images))
    for each in moments.values() if dist.is_initialized() else ():
        count = torch.tensor([each.n], dtype=torch.float64, device=each.sum.device)
        for total in (count, each.sum, each.outer):
            dist.all_reduce(total)
        each.n = int(count)
    kept = gather_rows(kept) if keep else None
    if rank():
        return None
    total, known = moments["mu", "sigma"].n, {}
    if total > 1:
        for names, each in moments.items():
            known |= dict(zip(names, each.result(), strict=True))
    return FeatureSet(name, extractor.features, extractor.preset, total, kept, **known, classifier=extractor.classifier)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def shard(n):
    """(start, stop) of this process's contiguous part of n images."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    return n * rank() // world, n * (rank() + 1) // world


def gather_rows(rows):
    """rows (n_r, D) of each process -> (sum of n_r, D) in rank order on process 0, None on the others."""
    if not dist.is_initialized():
        return rows
    parts = None if rank() else [None] * dist.get_world_size()
    dist.gather_object(rows, parts)
    return parts and torch.cat(parts)


def join_processes(device=None):
    """Join torchrun's processes, if there are any -> this process's device: `device`, or CUDA if there is a GPU."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was asked for, but PyTorch sees no GPU; use --device cpu.")
    if device.type == "cpu":
        keep_freed_memory()  # else each batch waits to get it back
    if os.environ.get("WORLD_SIZE", "1") != "1":
        connect(lambda: dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                                timeout=PROCESS_GROUP_TIMEOUT))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    return device
