"""Images/s of the loader, and what it takes to start, for each form of the data beside the published loader's way.

    python benchmarks/synthetic.py DATA --n 50000
    python benchmarks/data.py DATA [--workers 2] [--batch-size 256]
    python benchmarks/synthetic.py DATA --n 1281167 --resolution 8
    python benchmarks/data.py DATA --resolution 8 --start
    python benchmarks/data.py --noise --batch-size 256 [--processes 8]

Published: what the released loader does, in our words - lists of names, Pillow, np.load, a DataLoader that shuffles. It
reads the image in both phases; "latent only" is the same without its images, which the release has not. That of
loader.py comes in Phase I (image and latent) and Phase II (latent), a form at a time: all files are read once, so that
they come from memory if they fit, then everything is timed in turn, --rounds times, and the medians are printed. With
--start each row is a process of its own: seconds to the first entry, without and with the index; MiB that this adds at its
peak, and keeps; and MiB that a loader process forked from it shares with no other after some visits to entries, which
must not grow with their number. Linux only. With --noise: what the random numbers of a step cost one of several
processes, for latents of 4 x 32 x 32, in steps that are --step-ms of waiting, as for a GPU.
"""
import argparse
import functools
import json
import os
import random
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
from benchmarks.measure import machine, status, table
from benchmarks.synthetic import CLASSES, FORMS
from data_io import loader
from data_io.loader import StepBatches, load_batches, load_noise, step_noise
from dataset import LatentImages
from runtime.images import open_image

VISITS = (1_000, 50_000)
WARM_UP = 3  # batches


class Published(Dataset):
    """Pairs images and latents by sort order; an item is image uint8 (3, R, R), moments, label."""

    def __init__(self, folder, images=True):
        self.folder, self.with_images = folder, images
        self.images, self.latents = (sorted(os.path.relpath(os.path.join(root, name), folder / kind)
                                            for root, _, names in os.walk(folder / kind) for name in names
                                            if name.endswith(suffix)) for kind, suffix in (("images", ".png"), ("vae-sd", ".npy")))
        labels = dict(json.loads((folder / "vae-sd/dataset.json").read_text())["labels"])
        self.labels = np.array([labels[name] for name in self.latents])

    def __len__(self):
        return len(self.latents)

    def __getitem__(self, i):
        moments = np.load(self.folder / "vae-sd" / self.latents[i], allow_pickle=False)
        item = torch.from_numpy(moments), torch.tensor(self.labels[i])
        if self.with_images:
            pixels = np.array(open_image(self.folder / "images" / self.images[i]))
            item = torch.from_numpy(pixels.transpose(2, 0, 1)), *item
        return item


def published_batches(folder, images, args):
    loader = DataLoader(Published(folder, images), args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    while True:
        yield from loader


def our_batches(folder, images, args):
    data = LatentImages(folder, args.resolution, CLASSES, images=images)
    return load_batches(data, StepBatches(len(data), args.batch_size, 0, 0, 1 << 30), args.workers, pin=False)


def rate(batches, args):
    """Images a second."""
    for _ in range(WARM_UP):
        next(batches)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() < start + args.seconds:
        next(batches)
        count += args.batch_size
    return count / (time.perf_counter() - start)


def read_all(folder):
    for path in folder.rglob("*.*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 20):
                    pass


def speed(args):
    """The table of images a second."""
    ways = [(way, images) for way in (published_batches, our_batches) for images in (True, False)]
    rows = []
    for form in FORMS:
        folders = {published_batches: args.data / "folder", our_batches: args.data / form}
        for folder in set(folders.values()):
            read_all(folder)
        rounds = [[rate(way(folders[way], images, args), args) for way, images in ways] for _ in range(args.rounds)]
        print(f"rounds, {form}: {[[round(value) for value in values] for values in rounds]}", file=sys.stderr, flush=True)
        medians = published, latent_only, first, second = [statistics.median(values) for values in zip(*rounds, strict=True)]
        ratios = [f"{ratio:.1f}" for ratio in (first / published, second / published, second / latent_only)]
        rows.append([form, *(round(value) for value in medians), *ratios])
    print(table(["form", "published", "the same, latent only", "Phase I", "Phase II", "Phase I to published",
                 "Phase II to published", "Phase II to latent only"], rows))


def in_child(work):
    """What work() gives, plain values, in a forked process."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        result = json.loads(file.read())
    os.wait()
    return result


def visits(data):
    """MiB that this process shares with no other, after each number of VISITS to random entries."""
    order, found = random.Random(0), []
    for n in range(1, max(VISITS) + 1):
        data[order.randrange(len(data))]
        if n in VISITS:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            found.append(sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024)
    return found


def begin(make):
    """[seconds to the first entry, MiB added at the peak, MiB kept, MiB of a loader process after each of VISITS]."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, started = status("VmRSS"), time.perf_counter()
    data = make()
    data[0]
    seconds, memory = time.perf_counter() - started, [status(name) - before for name in ("VmHWM", "VmRSS")]
    return [seconds, *(size / 2 ** 20 for size in memory), *in_child(lambda: visits(data))]


def start(args):
    """The table of --start."""
    print(table(["form", "start", "seconds", "MiB at its peak", "MiB kept", *(f"loader process, {n:,} visits" for n in VISITS)],
                []), flush=True)
    for form in ("published", *FORMS):
        folder = args.data / ("folder" if form == "published" else form)
        for index in folder.glob(".index-*"):
            index.unlink()
        for name in ["every"] if form == "published" else ["first", "with the index"]:
            make = functools.partial(Published, folder) if form == "published" else functools.partial(
                LatentImages, folder, args.resolution, CLASSES)
            seconds, *sizes = in_child(lambda make=make: begin(make))
            print(f"| {form} | {name} | {seconds:.2f} | {' | '.join(f'{size:.0f}' for size in sizes)} |", flush=True)


def milliseconds(clock, work):
    """Of one call, by a clock in seconds, and what the call gave."""
    begin = clock()
    result = work()
    return 1000 * (clock() - begin), result


def noise(args):
    """The table of --noise. `before` is the way of older checkpoints: each process drew the whole batch."""
    shape, drawn, holding = (4, 32, 32), [], []
    batches = StepBatches(args.batch_size, args.batch_size, 0, 0, 1 << 30, 0, args.processes)

    def before():
        rng = np.random.default_rng((0, 1, 0))
        return [rng.random(2 * args.batch_size, dtype=np.float32),
                rng.standard_normal((2, args.batch_size, *shape), dtype=np.float32)]

    def timed(seed, step, places, latent_shape):
        took, result = milliseconds(time.thread_time, lambda: step_noise(seed, step, places, latent_shape))
        drawn.append(took)
        holding.append(milliseconds(time.thread_time, lambda: step_noise(seed, step, places, (0,)))[0])
        return result

    loader.step_noise = timed
    ahead, waited, old = load_noise(batches, shape, pin=False), [], []
    for _ in range(args.rounds * 50):
        waited.append(milliseconds(time.perf_counter, lambda: next(ahead))[0])
        time.sleep(args.step_ms / 1000)
    for _ in range(args.rounds * 50):
        old.append(milliseconds(time.thread_time, before)[0])
    title = f"batch {args.batch_size} over {args.processes} processes, ms a step"
    print(table([title, "median", "90 % below", "highest"],
                [[name, *(f"{np.quantile(values, q):.3f}" for q in (0.5, 0.9, 1))] for name, values in (
                    ("before: main thread, drawing (CPU time)", old), ("main thread, waiting", waited[1:]),
                    ("thread, drawing (CPU time)", drawn),
                    ("of which without the filling of arrays, which lets the main thread run", holding))]))


def main():
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder of synthetic.py")
    parser.add_argument("--resolution", type=int, default=256, help="of the images (default 256)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes or threads (default 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--seconds", type=float, default=8, help="of each timing (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each (default 3)")
    parser.add_argument("--start", action="store_true", help="measure the start instead")
    parser.add_argument("--noise", action="store_true", help="measure the noise instead")
    parser.add_argument("--processes", type=int, default=8, help="with --noise: that share the batch (default 8)")
    parser.add_argument("--step-ms", type=float, default=50, help="with --noise: of a step (default 50)")
    args = parser.parse_args()
    if not (args.noise or args.data):
        parser.error("give the folder of synthetic.py")
    torch.set_num_threads(1)
    print(machine(), flush=True)
    (noise if args.noise else start if args.start else speed)(args)


if __name__ == "__main__":
    main()
