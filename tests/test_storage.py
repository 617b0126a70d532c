"""Folder, zip and packed hold one data set: the same samples, fingerprint and order; the index; mirrored latents."""
import hashlib
import json
import logging
import os
import pickle
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import synthetic
from benchmarks.data import Published
from data_io import index as index_module
from data_io import storage
from data_io.loader import StepBatches, load_batches
from dataset import LatentImages
from preprocessing import dataset_tools
from runtime import images
from runtime.errors import UserError
from runtime.images import decode_image
from tests.conftest import CLASSES, call_main, write_tiny_data

KINDS = {"images": ".png", "vae-sd": ".npy", "vae-sd-hflip": ".npy"}


def write_zips(source, dest, method=zipfile.ZIP_STORED, extra=b""):
    """Write a zip of each kind in `source`, members unordered."""
    dest.mkdir(parents=True, exist_ok=True)
    for kind in KINDS:
        if (source / kind).is_dir():
            with zipfile.ZipFile(dest / f"{kind}.zip", "w") as archive:
                for path in sorted((source / kind).rglob("*.*"), reverse=True):
                    member = zipfile.ZipInfo(path.relative_to(source / kind).as_posix())
                    member.compress_type, member.extra = method, extra
                    archive.writestr(member, path.read_bytes())
    return dest


def write_mirrored(folder):
    """Write vae-sd-hflip, the latents of the mirrored images; here just all numbers plus one."""
    for path in (folder / "vae-sd").rglob("*.npy"):
        to = folder / "vae-sd-hflip" / path.relative_to(folder / "vae-sd")
        to.parent.mkdir(parents=True, exist_ok=True)
        np.save(to, np.load(path) + 1)
    return folder


def packed_into(source, dest, *more):
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, dataset_tools, "pack", "--source", source, "--dest", dest, "--resolution", 64,
                  "--num-workers", 2, *more)
    return dest


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{form: folder} of one data set of 24 entries, with gaps in the numbers; tests must not change it."""
    world = tmp_path_factory.mktemp("forms")
    folder = write_tiny_data(world / "folder", count=26)
    for kind in ("images", "vae-sd"):
        path = folder / kind / "dataset.json"
        labels = [entry for entry in json.loads(path.read_text())["labels"] if entry[0][-6:-4] not in ("03", "25")]
        path.write_text(json.dumps({"labels": labels[::-1]}))
        for number in (3, 25):
            next((folder / kind).rglob(f"*{number:08d}{KINDS[kind]}")).unlink()
    write_mirrored(folder)
    mixed = packed_into(folder, world / "mixed", "--latents-only")
    shutil.copy(write_zips(folder, world / "zip") / "images.zip", mixed)
    extra = b"\x99\x99\xff\0" + bytes(255)  # an unused field, longer than the reader expects
    return {"folder": folder, "zip": world / "zip", "mixed": mixed,
            "deflated": write_zips(folder, world / "deflated", zipfile.ZIP_DEFLATED),
            "extra": write_zips(folder, world / "extra", extra=extra),
            "packed": packed_into(folder, world / "packed", "--rows", 7),
            "packed zip": packed_into(world / "zip", world / "packed zip")}


@pytest.mark.parametrize("form", ["folder", "zip", "deflated", "extra", "packed", "packed zip", "mixed"])
def test_every_form_is_the_same_data_set(forms, form):
    """Compared with the files themselves, paired and labelled by a loop over dataset.json."""
    data, folder = LatentImages(forms[form], 64, CLASSES), forms["folder"]
    entries = sorted(json.loads((folder / "images/dataset.json").read_text())["labels"])
    assert len(data) == len(entries) == 24 and data.decodes == (not form.startswith("packed"))
    for i, (name, label) in enumerate(entries):
        with Image.open(folder / "images" / name) as picture:
            image = np.asarray(picture)
        moments = np.load(folder / "vae-sd" / name.replace("img", "img-mean-std-").replace(".png", ".npy"))
        for item in (data[i], {name: value[1] for name, value in data.batch([0, i + 24]).items()}):
            assert np.array_equal(item["image"].permute(1, 2, 0), image) and np.array_equal(item["moments"], moments)
            assert (int(item["y"]), int(item["position"])) == (label, i)
        assert torch.equal(data.image(i), data[i]["image"]) and torch.equal(data.moments(i), data[i]["moments"])
        assert data.condition(i) == label
    plain = LatentImages(folder, 64, CLASSES)
    assert data.fingerprint() == plain.fingerprint()
    assert np.array_equal(data.pictures.stamps()[:, 0], plain.pictures.stamps()[:, 0])  # sizes
    without = LatentImages(forms[form], 64, CLASSES, images=False)
    assert without.fingerprint() == plain.fingerprint() and "image" not in without[3] and not without.decodes
    pickled = pickle.loads(pickle.dumps(data))  # as for a spawned loader process
    assert_same_batches([pickled.batch([1, 30])], [data.batch([1, 30])])
    for owner in (data, data.latents, data.pictures, data.latents.index, data.pictures.index):
        for value in owner if isinstance(owner, tuple) else vars(owner).values():  # no tables of Python objects
            assert not isinstance(value, (list, dict)) or len(value) < 24
            assert not isinstance(value, np.ndarray) or not value.dtype.hasobject


def test_the_fingerprint_written_out(tiny_data):
    """Checkpoints hold it: the hash of numbers, labels and three of the moments as JSON."""
    moments = [np.load(tiny_data / f"vae-sd/00000/img-mean-std-{i:08d}.npy").flatten().tolist() for i in (0, 32, 63)]
    text = json.dumps([list(range(64)), [i % CLASSES for i in range(64)], moments])
    assert LatentImages(tiny_data, 64, CLASSES).fingerprint() == hashlib.sha256(text.encode()).hexdigest()


def batches_of(data, workers, first=0):
    return list(load_batches(data, StepBatches(len(data), 8, 0, first, 9), workers, pin=False))


def assert_same_batches(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("form", ["folder", "zip", "packed"])
def test_workers_and_forms_change_nothing(forms, form):
    """Processes, threads or neither, with mirroring: the same batches as reading the folder one by one."""
    expected = batches_of(LatentImages(forms["folder"], 64, CLASSES, hflip=True), 0)
    assert [len(batch["y"]) for batch in expected] == [8] * 9
    assert {int(p) for b in expected[:3] for p in b["position"]} == {*range(24)}
    data = LatentImages(forms[form], 64, CLASSES, hflip=True)
    for workers in (0, 2):
        assert_same_batches(batches_of(data, workers), expected)
    assert_same_batches(batches_of(data, 1, first=5), expected[5:])
    data.images = False
    for batch in expected:
        del batch["image"]
    for workers in (0, 2):
        assert_same_batches(batches_of(data, workers), expected)


def test_mirrored_latents_come_with_mirrored_images(forms):
    """Seed, epoch and image decide which of the two is shown; each is half of the samples."""
    plain, data = (LatentImages(forms["folder"], 64, CLASSES, seed=5, hflip=hflip) for hflip in (False, True))
    shown = []
    for sample_id in range(24 * 20):
        item, expected = data[sample_id], plain[sample_id]
        mirrored = not torch.equal(item["moments"], expected["moments"])
        assert torch.equal(item["moments"], expected["moments"] + mirrored)
        assert torch.equal(item["image"], expected["image"].flip(-1) if mirrored else expected["image"])
        assert item["y"] == expected["y"]
        shown.append(mirrored)
    assert 0.4 < np.mean(shown) < 0.6
    assert len({tuple(shown[24 * epoch:24 * epoch + 24]) for epoch in range(20)}) == 20
    other = LatentImages(forms["folder"], 64, CLASSES, seed=6, hflip=True)
    assert [other.is_mirrored(sample_id) for sample_id in range(48)] != shown[:48]
    assert data.fingerprint() == plain.fingerprint()
    assert torch.equal(data.moments(3), plain.moments(3)) and torch.equal(data.image(3), plain.image(3))  # of previews


def test_threads_that_fail(data):
    """An error is raised at its own batch."""
    dataset = LatentImages(data, 64, CLASSES, images=False)
    path = data / "vae-sd/00000/img-mean-std-00000003.npy"
    np.save(path, np.load(path) * np.nan)
    with pytest.raises(UserError, match="00000003.npy holds float32 .*expected finite float32"):
        batches_of(dataset, 2)


# ---- pictures and names ----

def test_decoders_agree(tmp_path, monkeypatch, tiny_data):
    """imagecodecs and Pillow agree; plain PNGs skip Pillow, other pictures use it."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))
    kinds = {"rgb": image, "grey": image.convert("L"), "palette": image.convert("P")}
    for name, picture in kinds.items():
        picture.save(tmp_path / f"{name}.png")
    image.save(tmp_path / "marked.png", transparency=image.getpixel((0, 0)))
    image.save(tmp_path / "profile.png", icc_profile=b"x" * 500, compress_level=0)
    for path in tmp_path.iterdir():
        expected = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        assert np.array_equal(decode_image(path.read_bytes(), path, 64), expected), path
        with monkeypatch.context() as patch:
            patch.setattr(images, "imagecodecs", None)
            assert np.array_equal(decode_image(path.read_bytes(), path, 64), expected), path
    pytest.importorskip("imagecodecs")
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("Pillow was asked"))
    LatentImages(tiny_data, 64, CLASSES)


def test_numbers_of_names():
    names = ["00000/img00000012.png", "1.png", "a2.npy", "x12y3.png", "0" * 17 + "4.png", "\u00e95.png"]
    found = index_module.numbers_of(np.array([os.fsencode(name) for name in names]))
    assert found.tolist() == [12, 1, 2, 3, 4, 5]
    for name in ("a/xx.png", "1png.", "1.n.y", "0" * 18 + "2.png"):
        with pytest.raises(UserError, match=f"{name} has no index in its name"):
            index_module.numbers_of(np.array([b"7.png", name.encode()]))


# ---- the index ----

@pytest.fixture
def indexed(monkeypatch):
    """Cache the index of data sets of any size and age. Returns the kinds listed so far."""
    made, cached_index = [], index_module.cached_index
    monkeypatch.setattr(index_module, "CACHED_FROM", 1)
    monkeypatch.setattr(index_module, "SETTLED", -1e9)
    monkeypatch.setattr(storage, "cached_index", lambda cache, key, make: cached_index(
        cache, key, lambda: made.append(cache.name.removeprefix(".index-")) or make()))
    return made


@pytest.mark.parametrize("form", ["folder", "zip", "packed"])
def test_listed_once(forms, form, indexed, tmp_path):
    folder = shutil.copytree(forms[form], tmp_path / "data")
    first = LatentImages(folder, 64, CLASSES, hflip=True)
    again = LatentImages(folder, 64, CLASSES, hflip=True)
    assert_same_batches([again.batch(range(24))], [first.batch(range(24))])
    assert again.fingerprint() == first.fingerprint()
    moved = LatentImages(folder.rename(tmp_path / "moved"), 64, CLASSES, hflip=True)
    assert sorted(indexed) == sorted(KINDS)
    assert torch.equal(moved.image(3), LatentImages(forms["folder"], 64, CLASSES).image(3))


def new_entry(folder):
    for kind, name in (("images", "00007/img00007000.png"), ("vae-sd", "00007/img-mean-std-00007000.npy")):
        (folder / kind / "00007").mkdir()
        shutil.copy(next((folder / kind).rglob(f"*0{KINDS[kind]}")), folder / kind / name)
        path = folder / kind / "dataset.json"
        path.write_text(json.dumps({"labels": [*json.loads(path.read_text())["labels"], [name, 1]]}))


def replaced_latent(folder):
    path = folder / "vae-sd/00000/img-mean-std-00000002.npy"
    path.with_name("new").write_bytes(path.read_bytes()[:-4])
    path.with_name("new").replace(path)


def removed_image(folder):
    (folder / "images/00000/img00000002.png").unlink()


def relabelled(folder):
    path = folder / "images/dataset.json"
    path.write_text(path.read_text().replace("2]", "1]"))


def cut_in_place(folder):  # changes no folder
    os.truncate(folder / "vae-sd/00000/img-mean-std-00000003.npy", 4000)


@pytest.mark.parametrize("change, words", [
    (cut_in_place, "00000003.npy is no readable .npy file .8192 bytes of numbers expected, 3872 there"),
    (new_entry, None), (replaced_latent, "img-mean-std-00000002.npy has 8316 bytes"),
    (removed_image, "images has no .png file of index 00000002"),
    (relabelled, "has label 1 in images/dataset.json and 2 in")])
def test_any_change_is_seen(data, indexed, change, words):
    """Even with a cached index; a file overwritten in place is noticed when it is read."""
    assert len(LatentImages(data, 64, CLASSES)) == 8
    change(data)
    if words:
        with pytest.raises(UserError, match=words):
            LatentImages(data, 64, CLASSES)[3]
    else:
        assert len(LatentImages(data, 64, CLASSES)) == 9
    assert (len(indexed) > 2) == (change is not cut_in_place)


def test_changed_zips_and_packed_data_are_seen(forms, indexed, tmp_path):
    for form, path in (("zip", "images.zip"), ("packed", "images/dataset.json"), ("packed", "images/index.npy")):
        folder = tmp_path / f"{form}{path[-4:]}"
        shutil.copytree(forms[form], folder)
        LatentImages(folder, 64, CLASSES)
        del indexed[:]
        status = (folder / path).stat()
        os.utime(folder / path, ns=(status.st_atime_ns, status.st_mtime_ns + 10 ** 9))  # as any rewriting does
        LatentImages(folder, 64, CLASSES)
        assert indexed == ["images"]
    shutil.rmtree(folder / "images")
    shutil.copytree(forms["folder"] / "images", folder / "images")
    assert LatentImages(folder, 64, CLASSES).decodes and indexed == ["images"] * 2


def test_a_damaged_index_is_made_again(data, indexed):
    LatentImages(data, 64, CLASSES)
    whole = (data / ".index-images").read_bytes()
    for torn in (b"", b"no index", b"PK\3\4 torn", whole[:len(whole) // 2], whole[:-30]):
        (data / ".index-images").write_bytes(torn)
        assert len(LatentImages(data, 64, CLASSES)) == 8
        assert (data / ".index-images").read_bytes() == whole
    assert indexed.count("images") == 6 and indexed.count("vae-sd") == 1


def test_a_folder_that_takes_no_files(data, indexed, caplog):
    """As on a read-only disk: each start lists the data, and the log says why."""
    for kind in ("images", "vae-sd"):
        (data / f".index-{kind}/in the way").mkdir(parents=True)
    with caplog.at_level(logging.INFO, logger="haste"):
        for _ in range(2):
            assert len(LatentImages(data, 64, CLASSES)) == 8
    assert len(indexed) == 4 and "index-images could not be written" in caplog.text and "listed anew" in caplog.text


@pytest.mark.parametrize("form", ["zip", "packed"])
def test_too_many_open_files(forms, form):
    """Not reported as damage: the user need not make the data again."""
    dataset, limits = LatentImages(forms[form], 64, CLASSES), resource.getrlimit(resource.RLIMIT_NOFILE)
    dataset.latents = type(dataset.latents)(dataset.latents.path, dataset.latents.index)  # with no file open
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(UserError, match="vae-sd.* cannot be read .Too many open files"):
            dataset.moments(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_small_and_new_data_are_not_indexed(data, monkeypatch):
    LatentImages(data, 64, CLASSES)
    monkeypatch.setattr(index_module, "CACHED_FROM", 1)
    LatentImages(data, 64, CLASSES)  # written a moment ago: a change within a stamp's grain would not be seen
    assert not list(data.glob(".index*"))


def test_synthetic_data(tmp_path, monkeypatch):
    """The benchmarks' data: three forms of one set; the copy of the published loader reads it as ours does."""
    call_main(monkeypatch, synthetic, tmp_path, "--n", 12, "--resolution", 32, "--distinct", 5)
    published = Published(tmp_path / "folder")
    for form in synthetic.FORMS:
        ours = LatentImages(tmp_path / form, 32, synthetic.CLASSES)
        assert len(ours) == len(published) == 12
        for i in range(12):
            pairs = zip((ours[i]["image"], ours[i]["moments"], ours[i]["y"]), published[i], strict=True)
            assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
