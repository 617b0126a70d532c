"""pack: kills change no byte, refusals, and a run that moves from folder to packed data."""
import json
import random
import shutil
import signal
import time

import numpy as np
import pytest
from PIL import Image

import train
from dataset import LatentImages
from preprocessing import pack as pack_module
from runtime.errors import UserError
from runtime.files import read_json
from tests.conftest import CLASSES, SERVER, call_main, contents, metrics, write_tiny_data
from tests.test_resume import assert_same_run
from tests.test_storage import packed_into, write_mirrored, write_zips
from tests.test_train import train_arguments

KILLS = 5


def slow_rows():
    """The script calls this before it starts: each entry is slow enough to be killed in."""
    for name in ("image", "moments"):
        read = getattr(LatentImages, name)
        setattr(LatentImages, name, lambda *args, read=read, **more: time.sleep(0.004) or read(*args, **more))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_mirrored(write_tiny_data(tmp_path_factory.mktemp("source") / "data", count=40))


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """From one uninterrupted call; tests must not change it."""
    return packed_into(source, tmp_path_factory.mktemp("packed") / "packed", "--rows", 3)


def test_rows_are_plain_arrays(source, packed):
    """NumPy alone reads them: entries in the order of their numbers, at most --rows per file."""
    files = sorted(path for path in (packed / "vae-sd").glob("*.npy") if path.name != "index.npy")
    parts = [np.load(path, mmap_mode="r", allow_pickle=False) for path in files]
    assert [len(part) for part in parts] == [3] * 13 + [1] and parts[0].dtype == np.float32
    expected = [np.load(path) for path in sorted((source / "vae-sd").rglob("*.npy"))]
    assert np.array_equal(np.concatenate(parts), expected)
    table = np.load(packed / "images/index.npy", allow_pickle=False)
    sizes = [path.stat().st_size for path in sorted((source / "images").rglob("*.png"))]
    assert np.array_equal(table, np.stack([np.arange(40), sizes], axis=1))
    pixels = np.load(packed / "images/00002.npy", allow_pickle=False)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 3, 64, 64)


def test_killed_at_any_moment(source, packed, tmp_path):
    """kill -9 after some files: the same command goes on, keeps what was whole, and ends with the same bytes."""
    rng, dest, kills, killed_inside = random.Random(0), tmp_path / "dest", 0, 0
    arguments = ["pack", "--source", source, "--dest", dest, "--resolution", 64, "--rows", 3, "--num-workers", 2]
    while kills < KILLS:
        before = {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")}
        process = SERVER.start("preprocessing/dataset_tools.py", *arguments, before="tests.test_pack.slow_rows")
        goal, deadline = len(before) + rng.randint(1, 4), time.monotonic() + 60
        while len(list(dest.rglob("*.npy"))) < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        assert process.kill() == -signal.SIGKILL, process.stderr
        kills += 1
        killed_inside += bool(list(dest.rglob(".*.tmp")))
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert killed_inside >= KILLS // 2  # half-written files with temporary names
    assert SERVER.start("preprocessing/dataset_tools.py", *arguments).wait() == 0
    assert contents(dest) == contents(packed)
    stamps = {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")}
    packed_into(source, dest, "--rows", 3)  # done: nothing is written again
    assert contents(dest) == contents(packed) and all(path.stat().st_mtime_ns == old for path, old in stamps.items())


def test_images_come_later(source, packed, tmp_path):
    """--latents-only first, then the whole command adds the images: the same files."""
    put_there = tmp_path / "dest/vae-sd/.made.json.99.tmp"  # by a process killed in its first moment
    put_there.parent.mkdir(parents=True)
    put_there.touch()
    dest = packed_into(source, tmp_path / "dest", "--rows", 3, "--latents-only")
    assert not (dest / "images").exists()
    stamps = {path: path.stat().st_mtime_ns for path in dest.rglob("*.npy")}
    packed_into(source, dest, "--rows", 3)
    assert contents(dest) == contents(packed) and all(path.stat().st_mtime_ns == old for path, old in stamps.items())


def test_files_of_a_large_set_stay_few(source, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module, "ROWS", 2)
    monkeypatch.setattr(pack_module, "FILES", 5)
    assert len(list(packed_into(source, tmp_path / "dest").glob("images/0*.npy"))) == 5


def test_a_bad_entry_ends_it_without_harm(source, packed, tmp_path):
    """It is named; whole files stay, no partial file is left; with a good file the same command completes."""
    copy = shutil.copytree(source, tmp_path / "copy")
    path = copy / "images/00000/img00000020.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="img00000020.png is no readable image"):
        packed_into(copy, tmp_path / "dest", "--rows", 3)
    there, expected = contents(tmp_path / "dest"), contents(packed)
    assert not (tmp_path / "dest/images/dataset.json").exists() and not any(name.endswith(".tmp") for name in there)
    assert all(content == expected[name] for name, content in there.items()
               if name not in ("images/index.npy", "images/made.json"))
    path.write_bytes(whole)
    packed_into(copy, tmp_path / "dest", "--rows", 3)
    assert contents(tmp_path / "dest") | {"images/made.json": b""} == expected | {"images/made.json": b""}


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_entries_replaced_after_they_were_packed(source, packed, tmp_path, form):
    """Only their rows files are made again, for replacements of another and of equal size."""
    copy, dest = shutil.copytree(source, tmp_path / "copy"), shutil.copytree(packed, tmp_path / "dest")
    data = copy
    if form == "zip":
        data, dest = write_zips(copy, tmp_path / "zips"), tmp_path / "other"
        packed_into(data, dest, "--rows", 3)
    stamps = {path: path.stat().st_mtime_ns for path in dest.rglob("0*.npy")}
    Image.new("RGB", (64, 64), "red").save(copy / "images/00000/img00000020.png")
    latent = copy / "vae-sd/00000/img-mean-std-00000030.npy"
    np.save(latent, np.load(latent) + 1)
    if form == "zip":
        write_zips(copy, data)
    packed_into(data, dest, "--rows", 3)
    made = LatentImages(dest, 64, CLASSES)
    assert (made.image(20)[0] == 255).all() and np.array_equal(made.moments(30), np.load(latent))
    assert sorted(path.relative_to(dest).as_posix() for path, old in stamps.items()
                  if path.stat().st_mtime_ns != old) == ["images/00006.npy", "vae-sd/00010.npy"]


def test_a_folder_of_an_older_pack_is_kept(source, packed, tmp_path):
    """Its note has no hashes of the source's files."""
    dest = shutil.copytree(packed, tmp_path / "dest")
    for path in dest.rglob("made.json"):
        path.write_text(json.dumps({name: value for name, value in read_json(path).items() if name != "files"}))
    before = contents(dest)
    packed_into(source, dest, "--rows", 3)
    assert contents(dest) == before
    copy = shutil.copytree(source, tmp_path / "copy")
    Image.new("RGB", (64, 64), "red").save(copy / "images/00000/img00000020.png")
    with pytest.raises(UserError, match="copy has changed while it was packed; delete .*dest and pack it again"):
        packed_into(copy, dest, "--rows", 3)


def test_stopped_between_its_lists(source, packed, tmp_path, monkeypatch):
    """After a picture was replaced: the same command goes on."""
    dest, copy = shutil.copytree(packed, tmp_path / "dest"), shutil.copytree(source, tmp_path / "copy")
    Image.new("RGB", (64, 64), "red").save(copy / "images/00000/img00000020.png")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(np, "save", lambda *_: 1 / 0)
        packed_into(copy, dest, "--rows", 3)
    packed_into(copy, dest, "--rows", 3)
    assert (LatentImages(dest, 64, CLASSES).image(20)[1:] == 0).all()


def test_no_room(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 10 ** 5}))
    with pytest.raises(UserError, match="327.7 KB are needed in .*vae-sd, which has 100.0 KB free; make room, or name"):
        packed_into(source, tmp_path / "dest")


def test_a_run_goes_on_from_the_folder_to_packed_data(monkeypatch, source, packed, teacher_file, tmp_path):
    """Also mirrored: bit for bit the run on the folder, across the early stop."""
    more = ["--enc-weights", teacher_file, "--early-stop-point", 4, "--hflip", "--num-workers", 2]
    for part, data, steps in (("whole", source, 6), ("parts", source, 3), ("parts", packed, 6)):
        call_main(monkeypatch, train, *train_arguments(data, tmp_path / part, *more, "--max-train-steps", steps))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)
    call_main(monkeypatch, train, *train_arguments(source, tmp_path / "plain", *more[:4], "--max-train-steps", 1))
    assert metrics(tmp_path / "plain")[0]["loss"] != metrics(tmp_path / "whole")[0]["loss"]
