"""Files made to do harm: they claim too much, hold code, or are damaged anywhere. Nothing read is executed."""
import ast
import contextlib
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import evaluations.images
from data_io import storage
from data_io.captions import scan_numbered
from dataset import LatentImages
from evaluations import statistics_file
from evaluations.images import decode, open_images
from models.checkpoint import load_checkpoint
from preprocessing import coco
from runtime.errors import UserError
from runtime.files import load_array, load_tensors
from runtime.images import decode_image
from sampling.images import is_finished
from tests.conftest import CLASSES, ROOT
from tests.damage import blank
from tests.test_generate import make_checkpoint
from tests.test_storage import write_zips


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, samples and statistics."""
    folder = tmp_path_factory.mktemp("files")
    make_checkpoint(folder / "0000005.pt", "SiT-N/2")
    np.savez(folder / "samples.npz", arr_0=np.zeros((7, 24, 24, 3), np.uint8))
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return folder


def test_statistics_that_unpack_to_too_much_or_are_damaged(monkeypatch, files, tmp_path):
    """An npz of zeros unpacks to a thousand times its size: it is refused by the size it claims."""
    damaged = tmp_path / "statistics.npz"
    damaged.write_bytes((files / "statistics.npz").read_bytes())
    blank("statistics.npz", b"}", "mu.npy")(tmp_path)
    with pytest.raises(UserError, match="The statistics in .* cannot be read"):
        statistics_file.read_statistics(damaged, None, required=True)
    monkeypatch.setattr(statistics_file, "LARGEST", 1 << 20)
    with pytest.raises(UserError, match="sigma of .* has 33554560 bytes, far more than statistics have"):
        statistics_file.read_statistics(files / "statistics.npz", None, required=True)


def test_images_that_unpack_to_too_much(monkeypatch, files):
    """A thousand black images fit into a tiny file: the batch size is checked before allocating memory."""
    images = open_images(files / "samples.npz")
    size = 3 * 24 * 24
    monkeypatch.setattr(evaluations.images, "LARGEST", 2 * size)
    assert len(next(images.batches(0, 7, 2))) == 2
    with pytest.raises(UserError, match=f"3 images of .* take {3 * size} bytes at a time, more than {2 * size}; give"):
        next(images.batches(0, 3, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UserError, match="images of 24x24, more than 500 pixels"):
        open_images(files / "samples.npz")


def test_formats_that_pillow_hands_to_other_programs(monkeypatch, tmp_path):
    """An EPS named .png would reach Ghostscript; the fake one here leaves a file behind."""
    picture, ran = tmp_path / "img00000003.png", tmp_path / "gs-was-run"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    picture.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n")
    for read in (lambda: decode_image(picture.read_bytes(), picture, 64), lambda: decode(picture),
                 lambda: coco.centre_square(picture, 32)):
        with pytest.raises(UserError, match="img00000003.png (is no readable image|cannot be decoded)"):
            read()
    assert not is_finished(picture, 64) and not ran.exists()


@pytest.mark.parametrize("kind", [">f4", ">i8", "g", "c16", "U9"])
def test_numbers_that_pytorch_does_not_know(tmp_path, kind):
    """As captions or latents: refused by name, not by a TypeError of torch.from_numpy."""
    np.save(tmp_path / "0_0.npy", np.zeros((6, 16), kind))
    with pytest.raises(UserError, match="0_0.npy is no readable .npy file .numbers of type .*; save them as float32"):
        load_array(tmp_path / "0_0.npy")


def test_weights_that_unpack_to_too_much(tmp_path):
    """torch.save never compresses; a file that does is no checkpoint."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * 10_000_000)
    with pytest.raises(UserError, match="claims to unpack to far more than it holds"):
        load_tensors(tmp_path / "bomb.pt")


def test_a_listing_that_unpacks_to_too_much(monkeypatch, tiny_data, tmp_path):
    write_zips(tiny_data, tmp_path, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(storage, "LARGEST_LISTING", 100)
    with pytest.raises(UserError, match=r"vae-sd.zip/dataset.json claims \d+ bytes, more than any listing has"):
        LatentImages(tmp_path, 64, CLASSES)


def test_pipes_and_devices_are_passed_over(data, tiny_captions, tmp_path):
    """They would block their reader or never end; links to files count as files."""
    images, latent = data / "images/00000", data / "vae-sd/00000/img-mean-std-00000003.npy"
    latent.rename(tmp_path / "moved.npy")
    latent.symlink_to(tmp_path / "moved.npy")
    os.mkfifo(images / "img00000099.png")
    os.mkfifo(latent.with_name("img-mean-std-00000099.npy"))
    (images / "img00000098.png").symlink_to("/dev/zero")
    dataset = LatentImages(data, 64, CLASSES)
    assert len(dataset) == 8 and torch.equal(dataset.moments(3), torch.from_numpy(np.load(tmp_path / "moved.npy")))
    captions = shutil.copytree(tiny_captions / "train", tmp_path / "train")
    expected = scan_numbered(captions)
    for name in ("99.png", "98.npy", "0_99.npy"):
        os.mkfifo(captions / name)
    assert scan_numbered(captions) == expected


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_to_a_checkpoint_is_a_sentence(files, tmp_path, seed):
    """Cut at 25 places, and bytes overwritten at 25: never another exception, whatever part is hit."""
    data, rng, path = (files / "0000005.pt").read_bytes(), np.random.default_rng(seed), tmp_path / "torn.pt"
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
            assert name not in ("eval", "exec", "compile", "pickle.load", "pickle.loads", "torch.hub.load",
                                "os.system"), where
            assert not name.endswith((".extractall", ".extract")), where
            if name.endswith("import_module"):  # modules of encoders, loaded at first use
                assert path == ROOT / "encoders/__init__.py", where
            if name == "Image.open":
                assert keywords.get("formats") in ("IMAGE_FORMATS", "FORMATS"), where  # FORMATS: of preprocessing
            if name.endswith("from_pretrained"):  # diffusers' model classes load no code
                own = name.startswith(("AutoencoderKL", "AutoencoderDC"))
                assert own or keywords.get("trust_remote_code") == "False", where
                assert "onfig" in name or "Tokenizer" in name or keywords.get("use_safetensors") == "True", where
