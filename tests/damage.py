"""Ways to damage a script's input: each returns, or is, a function of the folder that holds the input."""
import json
import os
import re
import shutil
import zipfile

import numpy as np
import torch
from PIL import Image

from runtime.files import load_tensors
from tests.conftest import ROOT
from tests.test_storage import packed_into, write_zips

VAE = ROOT / "assets/vae-emoji"
IMAGE, LATENT = "data/images/00000/img00000003.png", "data/vae-sd/00000/img-mean-std-00000003.npy"
LABELS, LATENT_LABELS = "data/images/dataset.json", "data/vae-sd/dataset.json"
RUN, CKPT = "out/run/checkpoints/0000001.pt", "0000005.pt"


def damaged(w, change):
    for one in change if isinstance(change, list) else [change]:
        if one:
            one(w)


def put(name, content):
    """Overwrite or create a file with bytes, text, JSON, an array, an image or anything torch.save takes."""
    def damage(w):
        path = w / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, np.ndarray):
            np.save(path, content, allow_pickle=True)
        elif isinstance(content, Image.Image):
            content.save(path)
        elif path.suffix in (".json", ".csv"):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        else:
            torch.save(content, path)
    return damage


def change_bytes(name, function):
    return lambda w: (w / name).write_bytes(function((w / name).read_bytes()))


def change_json(name, function):
    """`function` changes the value in place."""
    def damage(w):
        value = json.loads((w / name).read_text())
        function(value)
        (w / name).write_text(json.dumps(value))
    return damage


def cut(name):
    return change_bytes(name, lambda data: data[:len(data) // 2])


def remove(name):
    return lambda w: shutil.rmtree(w / name) if (w / name).is_dir() else (w / name).unlink()


def copy(name, to):
    return lambda w: (shutil.copytree if (w / name).is_dir() else shutil.copy)(w / name, w / to)


def label(name, place, value):
    """Change the path (place 0) or label (place 1) of entry 3 in a dataset.json."""
    return change_json(name, lambda content: content["labels"][3].__setitem__(place, value))


def no_labels(w):
    for name in (LABELS, LATENT_LABELS):
        (w / name).write_text('{"labels": null}')


def with_nan(w):
    moments = np.load(w / LATENT)
    moments[0, 0, 0] = np.nan
    np.save(w / LATENT, moments)


def resize_latents(w):
    for path in (w / "data/vae-sd").rglob("*.npy"):
        np.save(path, np.ones((8, 12, 12), np.float32))


def flat_latents(w):
    for path in (w / "data/train").glob("?.npy"):
        np.save(path, np.zeros((8, 16, 8), np.float32))


def mirrored_of_another_size(w):
    for i in range(8):
        put(f"data/vae-sd-hflip/00000/img-mean-std-{i:08d}.npy", np.ones((8, 8, 8), np.float32))(w)


def claims_too_much(w):
    """A .npy file whose header promises a terabyte."""
    with open(w / LATENT, "r+b") as file:
        size = (w / LATENT).stat().st_size
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (8, 200_000, 200_000)})
        file.truncate(size)


class Planted:
    """Leaves a folder behind when it is unpickled unsafely."""

    def __reduce__(self):
        return os.mkdir, ("planted-by-a-checkpoint",)


def change_state(name, key, value):
    return lambda w: torch.save({**load_tensors(w / name), key: value}, w / name)


def shape_of_another_model(w):
    state = load_tensors(w / RUN)
    state["model"]["x_embedder.proj.bias"] = torch.zeros(7)
    torch.save(state, w / RUN)


def captions_file(images=({"id": 1, "file_name": "1.png"},), annotations=({"image_id": 1, "caption": "a"},)):
    return put("captions.json", {"images": list(images), "annotations": list(annotations)})


def dangling(name):
    return lambda w: [(w / name).unlink(), (w / name).symlink_to("/no/such/file")]


def blank(name, what, member):
    """Replace the first `what` in a member of a zip, which is rewritten, by a space."""
    def damage(w):
        with zipfile.ZipFile(w / name) as archive:
            content = {item: archive.read(item) for item in archive.namelist()}
        with zipfile.ZipFile(w / name, "w") as archive:
            for item, data in content.items():
                archive.writestr(item, data.replace(what, b" ", 1) if item == member else data)
    return damage


def zip_field(name, offset, value):
    """A byte in both headers of each member of a zip: its flags at 6, its method at 8."""
    def changed(data):
        data = bytearray(data)
        for signature, place in ((b"PK\x03\x04", offset), (b"PK\x01\x02", offset + 2)):
            for header in re.finditer(signature, data):
                data[header.start() + place] = value
        return data
    return change_bytes(name, changed)


def zipped(change=None, method=zipfile.ZIP_STORED):
    """The data set, changed and then in zips."""
    def damage(w):
        damaged(w, change)
        write_zips(w / "data", w / "zips", method)
        shutil.rmtree(w / "data")
        (w / "zips").rename(w / "data")
    return damage


def one_bit_of_a_zip(w):
    """Flip one bit of a latent's number; it stays finite."""
    content = (w / LATENT).read_bytes()
    changed = bytes([*content[:200], content[200] ^ 1, *content[201:]])
    damaged(w, [zipped(), change_bytes("data/vae-sd.zip", lambda data: data.replace(content, changed))])


def packed(change=None):
    """The data set packed, in files of 3 rows, and then changed."""
    def damage(w):
        packed_into(w / "data", w / "packed", "--rows", 3)
        shutil.rmtree(w / "data")
        (w / "packed").rename(w / "data")
        damaged(w, change)
    return damage


def file_for_folder(name):
    return lambda w: (w / name).write_text("no folder")
