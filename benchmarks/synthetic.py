"""Make a synthetic data set in ImageNet's layout, in every form that train.py reads, for loader benchmarks.

    python benchmarks/synthetic.py DEST --n 50000
    python benchmarks/synthetic.py DEST --n 8 --resolution 128 --forms folder

writes DEST/folder (images/ and vae-sd/), DEST/zip (images.zip and vae-sd.zip, stored) and DEST/packed with the same
entries. Contents repeat after --distinct pictures and latents, names and labels do not. At 256 px a picture is a PNG of
about 95 kB: smooth colours under grain, as hard for deflate and the decoder as a photograph.
"""
import argparse
import io
import json
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocessing import pack
from runtime.errors import UserError, run_script
from runtime.flags import Parser, whole

FACTOR, CLASSES, FORMS = 8, 1000, ("folder", "zip", "packed")


def make_png(resolution, rng):
    colours = Image.fromarray(rng.integers(0, 256, (17, 17, 3), np.uint8))
    colours = colours.resize((resolution, resolution), Image.BICUBIC)
    pixels = np.clip(np.asarray(colours) + rng.normal(0, 1.2, (resolution, resolution, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_latent(resolution, rng):
    side = resolution // FACTOR
    file = io.BytesIO()
    np.save(file, np.concatenate([rng.normal(0, 5, (4, side, side)), np.full((4, side, side), 0.1)]).astype(np.float32))
    return file.getvalue()


def entries(kind, args):
    """(relative path, bytes) of each entry of one kind, and dataset.json."""
    rng, make = np.random.default_rng(0), make_png if kind == "images" else make_latent
    contents, labels = [make(args.resolution, rng) for _ in range(args.distinct)], []
    for i in tqdm(range(args.n), desc=kind, mininterval=2):
        idx8 = f"{i:08d}"
        name = f"{idx8[:5]}/img{idx8}.png" if kind == "images" else f"{idx8[:5]}/img-mean-std-{idx8}.npy"
        labels.append([name, i % CLASSES])
        yield name, contents[i % args.distinct]
    yield "dataset.json", json.dumps({"labels": labels}).encode()


def write_folder(dest, kind, args):
    for name, content in entries(kind, args):
        path = dest / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_zip(dest, kind, args):
    dest.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(dest / f"{kind}.zip", "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries(kind, args):
            archive.writestr(name, content)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("dest", type=Path, help="folder to write")
    parser.add_argument("--n", type=whole(1, 10 ** 8), default=50_000, help="entries (default 50000)")
    parser.add_argument("--resolution", type=whole(FACTOR, 1 << 14), default=256,
                        help=f"image side, a multiple of {FACTOR} (default 256)")
    parser.add_argument("--distinct", type=whole(1, 1 << 16), default=64, help="different contents (default 64)")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS,
                        help="packed is made of the folder (default all)")
    args = parser.parse_args()
    if args.resolution % FACTOR:
        raise UserError(f"--resolution {args.resolution} is no multiple of {FACTOR}, the latents' factor; choose one.")
    for form, write in (("folder", write_folder), ("zip", write_zip)):
        if form in args.forms:
            for kind in ("images", "vae-sd"):
                write(args.dest / form, kind, args)
    if "packed" in args.forms:
        options = argparse.ArgumentParser()
        pack.add_arguments(options.add_argument)
        pack.run(options.parse_args([f"--source={args.dest / 'folder'}", f"--dest={args.dest / 'packed'}",
                                     f"--resolution={args.resolution}"]))


if __name__ == "__main__":
    run_script(main)
