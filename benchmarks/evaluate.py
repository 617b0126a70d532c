"""Time and peak memory of scoring, on random features: no weights, no images, no downloads.

    python benchmarks/evaluate.py [--n 10000] [--dim 2048] [--threads 1]

Each stage runs in a process of its own, which prints a table row: seconds, CPU seconds (more than the former
with several threads, less on a busy machine), MiB held before the stage (features included) and MiB it adds
at its highest. The `stream` stages read an npz of 64-pixel images into statistics, with a random projection
in place of Inception: what they add must not depend on the count. Linux only.
"""
import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only

from evaluations import metrics
from evaluations.images import NpzImages


def make_features(n, dim, seed):
    """Non-negative and correlated, as pooled ReLU features are. (n, dim) float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / dim ** 0.5
    return (torch.randn(n, dim, generator=generator) @ mixing).relu_()


def statistics(features):
    moments = metrics.Moments(features.shape[1])
    for rows in features.split(64):
        moments.add(rows)
    return moments.result()


def stream(path, dim):
    images = NpzImages(path)
    projection = torch.randn(64 * 64 * 3, dim) / 256
    moments = metrics.Moments(dim)
    for batch in images.batches(0, images.n, 64):
        moments.add(torch.tensor(batch).flatten(1).float() @ projection)
    moments.result()


def stages(n, dim):
    """Name -> function that prepares and returns the work to be timed."""
    def on_features(work):
        def prepare(folder):
            pair = [make_features(n, dim, seed) for seed in (0, 1)]
            return lambda: work(*pair)
        return prepare

    def frechet(folder):
        pair = [statistics(make_features(n, dim, seed)) for seed in (0, 1)]
        return lambda: metrics.frechet_distance(*pair[0], *pair[1])

    def stream_of(count):
        def prepare(folder):
            path = Path(folder) / "images.npz"
            with open(path, "wb") as file:
                np.savez(file, arr_0=np.zeros((count, 64, 64, 3), np.uint8))
            return lambda: stream(path, dim)
        return prepare

    return {
        "statistics": on_features(lambda x, y: statistics(x)),
        "frechet": frechet,
        "precision-recall float16": on_features(metrics.precision_recall),
        "precision-recall float32": on_features(lambda x, y: metrics.precision_recall(x, y, torch.float32)),
        "kid": on_features(metrics.kernel_distance),
        f"stream {n} images": stream_of(n),
        f"stream {2 * n} images": stream_of(2 * n),
    }


def resident(peak):
    """MiB of memory of this process, now or at its highest (Linux)."""
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=10_000, help="images per set; default 10000")
    parser.add_argument("--dim", type=int, default=2048, help="features per image; default 2048")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--stage", help="run this one only, in this process")
    args = parser.parse_args()
    if args.stage is None:
        for name in stages(args.n, args.dim):
            sizes = ["--n", str(args.n), "--dim", str(args.dim), "--threads", str(args.threads)]
            subprocess.run([sys.executable, __file__, *sizes, "--stage", name], check=True)
        return
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        work = stages(args.n, args.dim)[args.stage](folder)
        Path("/proc/self/clear_refs").write_text("5")       # the peak counts from here (Linux)
        before = resident(peak=False)
        start, cpu_start = time.perf_counter(), time.process_time()
        work()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        added = resident(peak=True) - before
    print(f"| {args.stage} | {seconds:.1f} | {cpu:.1f} | {before:.0f} | {added:.0f} |", flush=True)


if __name__ == "__main__":
    main()
