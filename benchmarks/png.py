"""Who should write the PNGs of a batch while the device goes on: the sampling loop itself, threads, or processes?

    python benchmarks/png.py [--batch-size 32] [--writers 4] [--rounds 5]

Each way writes batches as generate.py does, to disk. `alone`: images/s when nothing else runs. `held up`: milliseconds a
batch that the loop cannot go on, to hand the pictures over. `loop`: small products that the loop makes in the meantime, as
it would start kernels, against how many it makes when nobody writes; 1.00 is undisturbed. On a CPU the writers take time on
the cores that the loop needs, however they are made.
"""
import argparse
import io
import statistics
import sys
import tempfile
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
from benchmarks.measure import machine, table
from benchmarks.synthetic import make_png
from runtime.images import open_image
from sampling.images import write_png

SECONDS = 3  # of each count of products


class AtOnce(Executor):
    """The loop itself: what is handed over is done before it goes on."""

    def submit(self, work, *arguments):
        done = Future()
        done.set_result(work(*arguments))
        return done


def products(keep_busy=lambda: None):
    """Small products a second, over SECONDS, keep_busy() being called between them."""
    a, count, begin = torch.ones(64, 64), 0, time.perf_counter()
    while (seconds := time.perf_counter() - begin) < SECONDS:
        for _ in range(50):
            a = (a @ a).clamp(max=1)
        count += 50
        keep_busy()
    return count / seconds


def measure(pool, write):
    """(images/s alone, milliseconds held up, products a second meanwhile) for a `pool`, whose batch write() hands over."""
    begin, tasks = time.perf_counter(), write(pool)
    held_up = time.perf_counter() - begin
    for task in tasks:
        task.result()
    alone = len(tasks) / (time.perf_counter() - begin)

    def keep_busy():
        if all(task.done() for task in tasks):
            tasks[:] = write(pool)
    return alone, 1000 * held_up, products(keep_busy)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32, help="pictures of a batch (default 32)")
    parser.add_argument("--resolution", type=int, default=256, help="default 256")
    parser.add_argument("--writers", type=int, default=4, help="threads or processes (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    images = [np.asarray(open_image(io.BytesIO(make_png(args.resolution, rng)))) for _ in range(args.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i:06d}.png" for i in range(args.batch_size)]

        def submit(pool):
            return [pool.submit(write_png, path, image) for path, image in zip(paths, images, strict=True)]

        with ThreadPoolExecutor(args.writers) as threads, ProcessPoolExecutor(args.writers) as processes:
            pools = {"the loop itself": AtOnce(), "threads": threads, "processes": processes}
            found = {way: [] for way in pools}
            for turn in range(args.rounds + 1):  # the first does not count
                free = products()
                for way, pool in pools.items():
                    alone, held_up, meanwhile = measure(pool, submit)
                    if turn:
                        found[way].append((alone, held_up, meanwhile / free))
    print(machine())
    print()
    print(table(["writers", "images/s alone", "ms held up, a batch", "loop"],
                [[way, *(f"{statistics.median(values):.{digits}f}" for values, digits in
                         zip(zip(*rows, strict=True), (0, 1, 3), strict=True))] for way, rows in found.items()]))


if __name__ == "__main__":
    main()
