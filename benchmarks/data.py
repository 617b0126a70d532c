"""Images/s of the loader for each form of the data, beside the published loader.

    python benchmarks/synthetic.py DATA --n 50000
    python benchmarks/data.py DATA [--workers 2] [--batch-size 256]

"published" restates the released loader: lists of names, Pillow, np.load, a DataLoader that shuffles. It reads the
image in both phases; "latent only" is the same without the image. Ours is timed in Phase I (image and latent) and Phase
II (latent). All files are read once first, to fill the page cache; then the loaders take turns, --rounds times, and the
medians are printed.
"""
import argparse
import json
import os
import shutil
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.measure import machine, table
from benchmarks.synthetic import CLASSES, FORMS
from data_io.loader import StepBatches, load_batches
from dataset import LatentImages
from runtime.images import open_image

WARM_UP = 3  # batches


class Published(Dataset):
    """Pairs images and latents by sort order; an item is image uint8 (3, R, R), moments, label."""

    def __init__(self, folder, images=True):
        self.folder, self.with_images = folder, images
        self.images, self.latents = self.names("images", ".png"), self.names("vae-sd", ".npy")
        labels = dict(json.loads((folder / "vae-sd/dataset.json").read_text())["labels"])
        self.labels = np.array([labels[name] for name in self.latents])

    def names(self, kind, suffix):
        return sorted(os.path.relpath(os.path.join(root, name), self.folder / kind)
                      for root, _, names in os.walk(self.folder / kind) for name in names if name.endswith(suffix))

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
    data = Published(folder, images)
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
    while True:
        yield from loader


def our_batches(folder, images, args):
    data = LatentImages(folder, args.resolution, CLASSES, images=images)
    return load_batches(data, StepBatches(len(data), args.batch_size, 0, 0, 1 << 30), args.workers, pin=False)


def rate(batches, args):
    """Images a second."""
    for _ in range(WARM_UP):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + args.seconds:
        next(batches)
        count += args.batch_size
    return count / (time.perf_counter() - start)


def show_speed(args):
    """The table of images a second."""
    rows = []
    for form in FORMS:
        folders = {published_batches: args.data / "folder", our_batches: args.data / form}
        for folder in set(folders.values()):
            for path in folder.rglob("*.*"):
                if path.is_file():
                    with open(path, "rb") as file, open(os.devnull, "wb") as nowhere:
                        shutil.copyfileobj(file, nowhere)
        rounds = [[rate(way(folders[way], images, args), args) for way in folders for images in (True, False)]
                  for _ in range(args.rounds)]
        print(f"rounds, {form}: {[list(map(round, values)) for values in rounds]}", file=sys.stderr, flush=True)
        medians = [statistics.median(values) for values in zip(*rounds, strict=True)]
        published, latent_only, first, second = medians
        ratios = [f"{ratio:.1f}" for ratio in (first / published, second / published, second / latent_only)]
        rows.append([form, *(round(value) for value in medians), *ratios])
    print(table(["form", "published", "the same, latent only", "Phase I", "Phase II", "Phase I to published",
                 "Phase II to published", "Phase II to latent only"], rows))


def main():
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of synthetic.py")
    parser.add_argument("--resolution", type=int, default=256, help="of the images (default 256)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes or threads (default 2)")
    parser.add_argument("--batch-size", type=int, default=64, help="default 64")
    parser.add_argument("--seconds", type=float, default=8, help="of each timing (default 8)")
    parser.add_argument("--rounds", type=int, default=3, help="timings of each (default 3)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine(), flush=True)
    show_speed(args)


if __name__ == "__main__":
    main()
