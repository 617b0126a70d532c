"""Pictures a second of dataset_tools.py: convert with one and two processes, encode on the embedded VAE.

    python benchmarks/preprocessing.py [--images 512] [--rounds 3]

The source is a folder of synthetic JPEGs of 500 x 375 pixels, ImageNet's usual size, and 77 KB. They are converted to 256 px
by center-crop-dhariwal, and to 64 px for the embedded VAE. Each row is a whole command but for the imports: list, work,
flush every file to the disk, check. Variants take turns, so compare within one run; on a busy machine the CPU time, of all
processes and for each picture, says more.
"""
import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from accelerate import PartialState
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
from benchmarks.measure import alternate, machine, spread, table
from preprocessing import convert, encode

VAE = str(Path(__file__).resolve().parents[1] / "assets/vae-emoji")


def write_source(folder, count):
    """Ten classes of smooth colours with noise, which JPEG compresses about as it does photographs."""
    for i in range(count):
        rng = np.random.default_rng(i)
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((500, 375), Image.BICUBIC)
        pixels = np.asarray(colours) + rng.normal(0, 12, (375, 500, 3))
        (folder / f"class{i % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"class{i % 10}/{i}.JPEG", quality=90)


def command(module, source, dest, *more):
    """(a run of a command from nothing, the list of its CPU seconds)."""
    cpu, parser = [], argparse.ArgumentParser()
    module.add_arguments(parser.add_argument)
    args = parser.parse_args([f"--source={source}", f"--dest={dest}", *more])

    def run():
        shutil.rmtree(dest, ignore_errors=True)  # a folder; below, a zip
        dest.unlink(missing_ok=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            before = sum(os.times()[:4])
            module.run(args)
            cpu.append(sum(os.times()[:4]) - before)

    return run, cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="pictures (default 512)")
    parser.add_argument("--rounds", type=int, default=3, help="times each variant runs (default 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_source(folder / "source", args.images)
        size = sum(path.stat().st_size for path in (folder / "source").rglob("*.JPEG")) / args.images
        crop = "--transform=center-crop-dhariwal"
        command(convert, folder / "source", folder / "small", "--resolution=64x64", crop)[0]()
        variants = {f"convert to 256 px, {name}": command(convert, folder / "source", folder / dest, "--resolution=256x256",
                                                        crop, f"--num-workers={workers}")
                    for name, dest, workers in (("1 process", "one", 1), ("2 processes", "two", 2),
                                                ("2 processes, zip", "two.zip", 2))}
        for batch in (1, 64):
            variants[f"encode 64 px, 1 process, batch {batch}"] = command(
                encode, folder / "small", folder / f"vae-{batch}", f"--model-url={VAE}", f"--batch-size={batch}")
        seconds = alternate({name: run for name, (run, _) in variants.items()}, args.rounds)
    rows = [(name, spread([args.images / value for value in seconds[name]]),
             spread([1000 * value / args.images for value in cpu[1:]])) for name, (_, cpu) in variants.items()]
    print(f"{machine()}; {args.images} JPEGs of {size / 1000:.0f} KB; load {os.getloadavg()[0]:.1f}\n")
    print(table(("command", "images/s", "CPU ms an image"), rows))


if __name__ == "__main__":
    PartialState(cpu=True)
    main()
