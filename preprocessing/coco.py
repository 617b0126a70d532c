"""Captioned images to the text-to-image layout: pictures, moments of a VAE, hidden states of a text encoder.

    python preprocessing/coco.py --coco COCO --dest ../data/coco256_features
    torchrun --nproc_per_node=8 preprocessing/coco.py --coco COCO --dest ../data/coco256_features
    python preprocessing/coco.py --images PHOTOS --captions-json captions.json --split train --dest DEST

COCO holds train2014/, val2014/ and annotations/captions_{train,val}2014.json. Any other folder works with a json of the
same form: {"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}. It writes
    DEST/{train,val}/{i}.png          R x R RGB: centre square of the short side, LANCZOS; i counts images by id from 0
    DEST/{train,val}/{i}.npy          float32 (2 C, R/f, R/f): mean and log-variance of the VAE's posterior
    DEST/{train,val}/{i}_{k}.npy      float32 (L, C): the text encoder's last hidden state of caption k, in file order
    DEST/{train,val}/captions.json    {"0": [caption, ...], ...}, written when everything else of the split is there
    DEST/empty_context.npy            (L, C), of the empty caption
    DEST/latents.json                 the VAE, its scale and shift
Images without a caption or a file are left out before numbering, and named. Captions too long for the text encoder are
cut, and counted. Files are written atomically: after any stop the same command makes only what is missing. The number
of processes changes nothing.
COCO's captions take 146 GB (77 x 768 float32 for each of 617,000).
"""
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from data_io.captions import clean, scan_numbered
from data_io.latent_scale import check_note, write_note
from dataset import digest
from encoders.text import TextEncoder
from encoders.vae import VAE
from evaluations.images import SUFFIXES, decode
from preprocessing.convert import in_groups
from preprocessing.destinations import NAMED, begin, check_older, check_settings, check_space
from preprocessing.encode import encoded, filled, npy_bytes, start
from preprocessing.pixels import center_crop, read_rgb
from preprocessing.sources import MADE, Piece, Source, read
from runtime.errors import UserError, run_script
from runtime.files import (
    atomic_write,
    check_inside,
    check_output,
    read_json,
    reading,
    remove_temporaries,
    weights_key,
    write_json,
)
from runtime.flags import Parser, pixels, whole
from runtime.images import write_png
from runtime.progress import progress
from runtime.setup import end_processes

SPLITS = ("train", "val")


def read_captions(path):
    """[(file name, [caption, ...])] of a COCO captions file, by image id; captions in file order, no blank ones."""
    content, unknown = read_json(path), []
    try:
        names = {image["id"]: check_inside(image["file_name"], path) for image in content["images"]}
        captions = {image_id: [] for image_id in sorted(names)}
        for k, entry in enumerate(content["annotations"]):
            image_id = entry["image_id"]
            text = clean(entry["caption"], f"{path}: the caption of annotation {k} (image id {image_id})")
            if image_id not in captions:
                unknown.append(image_id)
            elif text:
                captions[image_id].append(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is not of the form {{"images": [{{"id", "file_name"}}, ...], "annotations": '
                        f'[{{"image_id", "caption"}}, ...]}} ({type(error).__name__}: {error}); correct it.') from error
    if len(names) < len(content["images"]):
        raise UserError(f"{path} lists {len(content['images'])} images under {len(names)} different ids; every image "
                        "needs its own.")
    tell(unknown, f"captions in {path} are of no image listed there and are left out, the first of image id")
    return [(names[image_id], texts) for image_id, texts in captions.items()]


def with_both(images, entries):
    """The `entries` with captions and a file in the folder `images`. Reports how many others are left out."""
    with reading(images):
        if not images.is_dir():
            raise UserError(f"{images} is no folder; give the one that holds the images of the captions file.")
        there = {path.relative_to(images).as_posix() for path in images.rglob("*") if path.suffix.lower() in SUFFIXES}
        captioned = [entry for entry in entries if entry[1]]
        kept = [entry for entry in captioned if (images / entry[0]).is_file()]
    bare = [name for name, captions in entries if not captions] + sorted(there - {name for name, _ in entries})
    tell(bare, f"images of {images} have no caption and are left out, the first being")
    names = {name for name, _ in kept}
    absent = [name for name, _ in captioned if name not in names]
    tell(absent, f"images with captions are not in {images} and are left out, the first being")
    if not kept:
        raise UserError(f"No image of the captions file lies in {images}; give the folder that its file names start "
                        "from.")
    return kept


def tell(names, message):
    """The main process writes one line to stderr if there are any `names`."""
    if names and PartialState().is_main_process:
        print(f"{len(names)} {message} {names[0]}.", file=sys.stderr)


def centre_square(path, resolution):
    """Image file -> uint8 (R, R, 3): the centre square of the short side, resized with LANCZOS, upon white.

    Raises UserError if the file is no picture.
    """
    image = read_rgb(read(Piece(str(path)), path), path, background="white")
    return np.asarray(center_crop(image, resolution))


def save_array(path, array):
    with atomic_write(path) as file:
        file.write(npy_bytes(array))


def write_pictures(folder, todo, have, picture, vae, args):
    """Write PNG and moments of the images `todo`, except files in `have` -> sentences about unreadable pictures."""
    def load(i):
        png = folder / f"{i}.png"
        try:
            pixels = decode(png) if png.name in have else picture(i)
        except UserError as error:
            return error
        if png.name not in have:
            write_png(png, pixels)
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    failures, groups = [], in_groups(todo, args.batch_size)
    with progress(len(todo), f"{folder.name} images", "image", shown=PartialState().is_main_process) as bar:
        results = encoded(vae, groups, load, args.batch_size, args.num_workers, spread="logvar")
        for group, moments in zip(groups, results, strict=True):
            for i, array in zip(group, moments, strict=True):
                if isinstance(array, UserError):
                    failures.append(str(array))
                elif not {f"{i}.png", f"{i}.npy"} <= have:  # a new picture's moments, too
                    save_array(folder / f"{i}.npy", array)
            bar.update(len(group))
    return failures


def write_contexts(folder, todo, captions, encoder, args):
    """Write {i}_{k}.npy for the pairs (i, k) in `todo` -> number of captions that were cut."""
    cut = 0
    with progress(len(todo), f"{folder.name} captions", "caption", shown=PartialState().is_main_process) as bar:
        for group in in_groups(todo, args.batch_size):
            texts = [captions[i][k] for i, k in group]
            cut += encoder.count_cut(texts)
            states = encoder(filled(texts, args.batch_size)).numpy()
            for (i, k), array in zip(group, states[:len(group)], strict=True):
                save_array(folder / f"{i}_{k}.npy", array)
            bar.update(len(group))
    return cut


def build_split(folder, names, captions, picture, vae, encoder, args):
    """Write or complete one split. names, captions: name and texts of each image; picture(i): uint8 (R, R, 3).

    Process p makes the images i with i % processes = p and their captions. Returns a sentence for each picture that
    could not be read; captions.json is then left out. Raises UserError if `folder` was begun with other settings.
    """
    state = PartialState()
    if state.is_main_process:
        settings = {"resolution": args.resolution, "length": encoder.length, "vae": weights_key(args.vae),
                    "text_encoder": weights_key(args.text_encoder), "images and captions": digest([names, captions])}
        if not (folder / MADE).is_file() and folder.is_dir() and any(scan_numbered(folder)):
            raise UserError(f"{folder} holds files that were not made by this tool; name another --dest, or remove "
                            "them.")
        empty = folder.with_name("empty_context.npy")
        if empty.exists() and not any((folder.with_name(split) / MADE).is_file() for split in SPLITS):
            raise UserError(f"{empty} was not made by this tool, and would be replaced; name another --dest.")
        for other in (folder.with_name(split) for split in SPLITS):  # one empty caption serves both
            if (other / MADE).is_file():
                of_text = {key: settings[key] for key in ("text_encoder", "length")}
                check_settings(other, read_json(other / MADE), of_text)
        begin(folder / MADE, settings)
        remove_temporaries(folder)
    state.wait_for_everyone()
    have = set(os.listdir(folder))
    missing = sum(f"{i}_{k}.npy" not in have for i, texts in enumerate(captions) for k in range(len(texts)))
    check_space(folder, missing * 4 * encoder.length * encoder.width)
    share = range(state.process_index, len(names), state.num_processes)
    todo = [(i, k) for i in share for k in range(len(captions[i])) if f"{i}_{k}.npy" not in have]
    cut = sum(gather_object([write_contexts(folder, todo, captions, encoder, args)]))
    todo = [i for i in share if not {f"{i}.png", f"{i}.npy"} <= have]
    failures = gather_object(write_pictures(folder, todo, have, picture, vae, args))
    if state.is_main_process and cut:
        print(f"{cut} captions for {folder} are longer than {encoder.length} tokens: their ends are not seen.")
    if state.is_main_process and not failures:
        write_json(folder / "captions.json", {str(i): texts for i, texts in enumerate(captions)})
        print(f"{folder}: {len(names)} images, {sum(map(len, captions))} captions of {encoder.length} tokens")
    return failures


def build(args, splits):
    """Write the whole layout to args.dest. splits: {name: (image names, captions, picture)}, see build_split."""
    device = PartialState().device
    vae = VAE(args.vae, device)
    if args.resolution % vae.factor:
        raise UserError(f"--resolution {args.resolution} is no multiple of {vae.factor}, the VAE's factor; choose one.")
    check_note(args.dest, vae, weights_key(args.vae))
    encoder = TextEncoder(args.text_encoder, device, args.text_length)
    failures = []
    for split, (names, captions, picture) in splits.items():
        failures += build_split(args.dest / split, names, captions, picture, vae, encoder, args)
    if PartialState().is_main_process:
        remove_temporaries(args.dest)
        write_note(args.dest, vae, weights_key(args.vae))
        save_array(args.dest / "empty_context.npy", encoder(filled([""], args.batch_size))[0])
    PartialState().wait_for_everyone()
    if failures and PartialState().is_main_process:
        first = " ".join(failures[:NAMED]) + " ..." * (len(failures) > NAMED)
        raise UserError(f"{len(failures)} images could not be read, all else is done: {first} Replace them and run the "
                        f"same command, or take them out of the captions file, delete {args.dest} and run it.")
    end_processes()


def add_encoder_arguments(add):
    """Add the arguments shared by the scripts that write this layout."""
    add("--batch-size", type=whole(1), default=64, help="images or captions at a time and process (default 64)")
    add("--num-workers", type=whole(1), default=8, help="threads that read and write pictures (default 8)")
    add("--text-length", type=whole(1),
        help="tokens a caption is padded or cut to (default: the text encoder's maximum)")
    add("--allow-tf32", action="store_true", help="TF32 in both encoders on Ampere and newer: faster, less exact")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--coco", type=Path, help="folder with train2014, val2014 and annotations")
    add("--images", type=Path, help="instead of --coco: folder of images")
    add("--captions-json", type=Path, help="with --images: their captions, in COCO's form")
    add("--split", choices=SPLITS, help="with --images: which split to write")
    add("--dest", type=Path, required=True, help="folder to write")
    add("--resolution", type=pixels, default=256, help="side of the square in pixels (default 256)")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="VAE: hub name or diffusers folder (default sd-vae-ft-mse)")
    add("--text-encoder", default="openai/clip-vit-large-patch14",
        help="CLIP or a BERT-like encoder: hub name or folder (default CLIP ViT-L/14)")
    add_encoder_arguments(add)
    return parser.parse_args()


def main():
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("haste").setLevel(logging.INFO)  # progress in the log if there is no terminal
    alone = (args.images, args.captions_json, args.split)
    if bool(args.coco) == any(alone) or any(alone) != all(alone):
        raise UserError("Give --coco alone, or --images, --captions-json and --split together.")
    start(args.allow_tf32)
    sources = {args.split: (args.images, args.captions_json)}
    if args.coco:
        sources = {split: (args.coco / f"{split}2014", args.coco / f"annotations/captions_{split}2014.json")
                   for split in SPLITS}
    splits = {}
    for split, (images, path) in sources.items():
        check_output(args.dest / split, (), [images, path])
        names, captions = zip(*with_both(images, read_captions(path)), strict=True)
        made = {f"{i}.png": Piece(str(file)) for i in range(len(names))
                if (file := args.dest / split / f"{i}.png").exists()}
        check_older(made, [f"{i}.png" for i in range(len(names))],
                    Source(names, [Piece(str(images / name)) for name in names], None, None))
        splits[split] = names, captions, (
            lambda i, images=images, names=names: centre_square(images / names[i], args.resolution))
    build(args, splits)


if __name__ == "__main__":
    run_script(main, continues=True)
