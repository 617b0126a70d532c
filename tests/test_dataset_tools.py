"""convert and encode by their command lines: what is written, what is skipped, stops and continuations, processes."""
import io
import json
import os
import random
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentImages
from encoders.vae import VAE
from preprocessing import convert, dataset_tools, destinations, encode
from preprocessing.destinations import image_name, latent_name
from runtime.errors import UserError
from tests.conftest import ROOT, SERVER, call_main, script
from tests.test_faults import wait_for
from tests.test_sources import adm_crop, class_tars, odd_pictures, write_folder, write_tar, write_zip
from tests.test_storage import packed_into

VAE_FOLDER = ROOT / "assets/vae-emoji"
SIDE, CLASSES, EACH = 16, 3, 16


def picture(i):
    rng = np.random.default_rng(i)
    width, height = rng.integers(20, 50, 2)
    pixels = np.kron(rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3)), np.ones((5, 5, 1)))[:height, :width]
    return Image.fromarray(pixels.astype(np.uint8))


def png(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def content():
    """{name: bytes}: classes whose order of names is not that of their making."""
    return {f"{name}/{i:02d}.png": png(picture(100 * label + i)) for label, name in enumerate(("n02", "n01", "n10"))
            for i in range(EACH)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("imagenet"), content())


def converting(source, dest, *more):
    return ["convert", f"--source={source}", f"--dest={dest}", f"--resolution={SIDE}x{SIDE}",
            "--transform=center-crop-dhariwal", *more]


def encoding(source, dest, *more):
    return ["encode", f"--source={source}", f"--dest={dest}", f"--model-url={VAE_FOLDER}", "--batch-size=4", *more]


def making(kind, source, made, dest):
    """The command that makes what `made` holds as `kind`, images or latents, a folder or a zip, at `dest`."""
    if kind.startswith("images"):
        return converting(source, dest, "--num-workers=2")
    return encoding(made / kind.replace("vae-sd", "images"), dest)


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """images/, vae-sd/, images.zip and vae-sd.zip, each by one uninterrupted command; tests must not change them."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("", ".zip"):
            call_main(patch, dataset_tools, *converting(source, folder / f"images{kind}", "--num-workers=1"))
            call_main(patch, dataset_tools, *encoding(folder / f"images{kind}", folder / f"vae-sd{kind}"))
    return folder


def files(path):
    """{name: bytes} of a zip's entries, or of everything in a folder."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ---- what is written ----

def test_training_reads_what_the_published_commands_make(source, made):
    """Names, order, labels, pixels and moments; the labels are places among the sorted names of the classes."""
    dataset = LatentImages(made, SIDE, CLASSES)
    names = sorted(content())
    assert len(dataset) == len(names) == CLASSES * EACH
    vae = VAE(str(VAE_FOLDER))
    for i in (0, 20, 47):
        item = dataset[i]
        expected = adm_crop(Image.open(source / names[i]).convert("RGB"), SIDE)
        assert np.array_equal(item["image"].permute(1, 2, 0), expected)
        assert item["y"] == i // EACH and names[i].startswith(("n01", "n02", "n10")[i // EACH])
        posterior = vae.vae.encode(item["image"][None] / 127.5 - 1).latent_dist
        expected = torch.cat([posterior.mean, posterior.std], dim=1)[0]
        torch.testing.assert_close(item["moments"], expected, rtol=1e-4, atol=1e-5)
    for kind, name in (("images", "00000/img00000017.png"), ("vae-sd", "00000/img-mean-std-00000017.npy")):
        assert json.loads((made / kind / "dataset.json").read_text())["labels"][17] == [name, 1]


def test_zips_and_notes(source, made):
    """A zip holds what the folder does, stored; made.json says how both were made."""
    for kind in ("images", "vae-sd"):
        folder, archive = files(made / kind), files(made / f"{kind}.zip")
        notes = [json.loads(found.pop("made.json")) for found in (folder, archive)]
        assert folder == archive
        differ = {key for key in notes[0] if notes[0][key] != notes[1][key]}
        assert differ == ({"source"} if kind == "vae-sd" else set())
        with zipfile.ZipFile(made / f"{kind}.zip") as opened:
            assert all(info.compress_type == zipfile.ZIP_STORED for info in opened.infolist())
    assert not list(made.glob("*.parts")) and not list(made.rglob(".*"))
    note = json.loads((made / "vae-sd/made.json").read_text())
    assert note["command"] == "encode" and note["count"] == 48 and note["skipped"] == [] and note["batch_size"] == 4
    assert note["model_url"] == str(VAE_FOLDER) and len(note["vae"]) == len(note["files"]) == 64
    assert f"torch {torch.__version__.partition('+')[0]}" in note["versions"][0]
    note = json.loads((made / "images/made.json").read_text())
    assert (note["source"], note["resolution"], note["transform"]) == (str(source), "16x16", "center-crop-dhariwal")


def test_names_and_order_of_classes(tmp_path, monkeypatch, capsys):
    """classes.json lies in DATA, beside images/ and vae-sd/, wherever these are made; --class-order is the order."""
    path = write_folder(tmp_path / "photos", {f"{name}/a.png": png(picture(0)) for name in ("0", "1", "2", "10")})
    (tmp_path / "order").write_bytes("\ufeff0\r\n1\r\n2\n\n10".encode())
    for order, more, names in (("a", [], ["0", "1", "10", "2"]),
                               ("b", [f"--class-order={tmp_path / 'order'}"], ["0", "1", "2", "10"])):
        data, _ = tmp_path / order, capsys.readouterr()
        call_main(monkeypatch, dataset_tools, *converting(path, data / "images", "--num-workers=1", *more))
        assert ("10 has label 2; convert --class-order FILE" in capsys.readouterr().err) == (order == "a")
        call_main(monkeypatch, dataset_tools, *encoding(data / "images", tmp_path / f"{order}-2/vae-sd.zip"))
        (tmp_path / f"{order}-2/images").symlink_to(data / "images")
        packed_into(tmp_path / f"{order}-2", tmp_path / f"{order}-3", "--resolution", SIDE)
        for folder in (data, tmp_path / f"{order}-2", tmp_path / f"{order}-3"):
            assert json.loads((folder / "classes.json").read_text()) == names
        dataset = LatentImages(tmp_path / f"{order}-3", SIDE, 4)
        assert [dataset.text(i) for i in range(4)] == ["0", "1", "10", "2"]  # pictures stay in alphabetical order
        assert dataset.labels.tolist() == [names.index(name) for name in ("0", "1", "10", "2")]
    (tmp_path / "b/classes.json").write_text('["zero", "one", "two", "ten"]')
    call_main(monkeypatch, dataset_tools, *converting(path, tmp_path / "b/images", "--num-workers=1", *more))
    assert "names other classes than the source; it stays" in capsys.readouterr().err
    for lines, words in (("0\n1\n2", "does not name the class folder 10"), ("0\n1\n2\n10\n1", "names 1 twice")):
        (tmp_path / "order").write_text(lines)
        with pytest.raises(UserError, match=words):
            call_main(monkeypatch, dataset_tools, *converting(path, tmp_path / "b/images", *more))


@pytest.mark.parametrize("kind", ["tar of tars", "zip"])
def test_archives_give_the_same_pictures(made, tmp_path, monkeypatch, kind):
    path = (write_tar(tmp_path / "s.tar", class_tars(content())) if kind == "tar of tars" else
            write_zip(tmp_path / "s.zip", content(), zipfile.ZIP_DEFLATED))
    call_main(monkeypatch, dataset_tools, *converting(path, tmp_path / "dest", "--num-workers=1"))
    found, expected = files(tmp_path / "dest"), files(made / "images")
    assert {**found, "made.json": b""} == {**expected, "made.json": b""}


def assert_same_moments(ours, theirs, names):
    for name in names:
        np.testing.assert_allclose(np.load(ours / name), np.load(theirs / name), rtol=1e-5, atol=1e-5)


def test_batches_equal_single_pictures(made, tmp_path, monkeypatch):
    for size in (1, 7):
        dest, batches = tmp_path / str(size), f"--batch-size={size}"
        call_main(monkeypatch, dataset_tools, *encoding(made / "images", dest, batches, "--num-workers=1"))
        assert_same_moments(dest, made / "vae-sd", map(latent_name, range(48)))


def test_mirrored_pictures_have_latents_of_their_own(made, tmp_path, monkeypatch):
    """encode --hflip: what the VAE makes of the mirror image, under the same names, which train.py --hflip reads."""
    for kind in ("images", "vae-sd"):
        (tmp_path / kind).symlink_to(made / kind)
    call_main(monkeypatch, dataset_tools, *encoding(made / "images", tmp_path / "vae-sd-hflip", "--hflip"))
    assert files(tmp_path / "vae-sd-hflip").keys() == files(made / "vae-sd").keys()
    data, vae = LatentImages(tmp_path, SIDE, CLASSES, hflip=True), VAE(str(VAE_FOLDER))
    for i in (0, 20):
        mirrored = data.image(i).flip(-1)
        expected = vae.encode(mirrored[None])[0]
        sample_id = next(sample_id for sample_id in range(i, 10 ** 4, len(data)) if data.is_mirrored(sample_id))
        torch.testing.assert_close(data[sample_id]["moments"], expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(data[sample_id]["image"], mirrored)
        assert (expected - data.moments(i).flip(-1)).abs().max() > 1e-3  # and not the latent mirrored
    with pytest.raises(UserError, match=r"begun with other settings \(hflip\)"):
        call_main(monkeypatch, dataset_tools, *encoding(made / "images", tmp_path / "vae-sd-hflip"))


def test_processes_change_no_byte(source, made, tmp_path):
    for kind in ("", ".zip"):
        images, latents = f"images{kind}", f"vae-sd{kind}"
        script("preprocessing/dataset_tools.py", *converting(source, tmp_path / images, "--num-workers=3"),
               before="tests.test_dataset_tools.slow_groups")
        assert files(tmp_path / images) == files(made / images)
        done = script("preprocessing/dataset_tools.py", *encoding(made / images, tmp_path / latents), processes=2,
                      before="tests.test_dataset_tools.even_shares")
        assert files(tmp_path / latents) == files(made / latents)
        assert "48 files, 3 classes, 0 pictures skipped" in done.stdout


def test_other_flags(source, tmp_path, monkeypatch):
    def run(name, *more):
        call_main(monkeypatch, dataset_tools, "convert", f"--source={source}", f"--dest={tmp_path / name}",
                  "--num-workers=1", "--max-images=2", *more)
        assert len(json.loads((tmp_path / name / "dataset.json").read_text())["labels"]) == 2
        return np.asarray(Image.open(tmp_path / name / image_name(1)))

    original = Image.open(source / "n01/01.png")
    assert np.array_equal(run("stretched", "--resolution=12x12"), np.asarray(original.resize((12, 12), Image.LANCZOS)))
    assert run("square", "--resolution=12,12", "--transform=center-crop").shape == (12, 12, 3)
    wide = run("wide", "--resolution=12x8", "--transform=center-crop-wide")
    assert wide.shape == (12, 12, 3) and not wide[:2].any() and wide[2:10].any()
    call_main(monkeypatch, dataset_tools, "convert", f"--source={tmp_path / 'square'}", f"--dest={tmp_path / 'again'}")
    assert files(tmp_path / "again")[image_name(1)] == files(tmp_path / "square")[image_name(1)]


# ---- pictures that cannot be used ----

@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_odd_pictures(tmp_path, monkeypatch, capsys, kind):
    """Each is handled or named; the others keep their numbers, and latents pair with them by number."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    expected = odd_pictures()
    pictures = {f"odd/{name}": data for name, (data, _) in expected.items()} | {"plain/a.png": png(picture(0))}
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    path = write(tmp_path / ("s" if kind == "folder" else f"s.{kind}"), pictures)
    call_main(monkeypatch, dataset_tools, *converting(path, tmp_path / "images", "--num-workers=1"))
    told = capsys.readouterr()
    skipped = json.loads((tmp_path / "images/made.json").read_text())["skipped"]
    bad = sorted(name for name, (_, outcome) in expected.items() if isinstance(outcome, str))
    assert [line.partition(" ")[0] for line in skipped] == [f"odd/{name}" for name in bad]
    for line in skipped:
        assert line in told.err and expected[line.partition(" ")[0].removeprefix("odd/")][1] in line
    assert f"{len(expected) + 1 - len(bad)} files, 2 classes, {len(bad)} pictures skipped" in told.out
    numbers = [i for i, name in enumerate(sorted(expected)) if name not in bad] + [len(expected)]
    assert json.loads((tmp_path / "images/dataset.json").read_text())["labels"] == [
        [image_name(i), int(i == len(expected))] for i in numbers]
    call_main(monkeypatch, dataset_tools, *encoding(tmp_path / "images", tmp_path / "vae-sd"))
    assert LatentImages(tmp_path, SIDE, 2).latents.index.names.tolist() == [latent_name(i).encode() for i in numbers]


def test_encoding_what_cannot_be_used(made, tmp_path, monkeypatch):
    images = tmp_path / "images"
    shutil.copytree(made / "images", images)
    Image.new("RGB", (20, 20)).save(images / image_name(5))
    (images / image_name(6)).write_bytes(b"")
    with pytest.raises(UserError, match="img00000005.png is 20x20, the first picture 16x16"):
        call_main(monkeypatch, dataset_tools, *encoding(images, tmp_path / "vae-sd", "--on-error=stop"))
    call_main(monkeypatch, dataset_tools, *encoding(images, tmp_path / "vae-sd"))
    found, whole = files(tmp_path / "vae-sd"), files(made / "vae-sd")
    assert sorted(whole.keys() - found.keys()) == [latent_name(5), latent_name(6)]
    for i in (5, 6):
        shutil.copy(made / "images" / image_name(i), images / image_name(i))
    call_main(monkeypatch, dataset_tools, *encoding(images, tmp_path / "vae-sd"))
    again = files(tmp_path / "vae-sd")
    assert again.keys() == whole.keys() and again["dataset.json"] == whole["dataset.json"]
    assert all(again[name] == found[name] for name in found if name.endswith(".npy"))
    assert_same_moments(tmp_path / "vae-sd", made / "vae-sd", map(latent_name, (5, 6)))


def test_a_repaired_picture(source, made, tmp_path, monkeypatch):
    """convert adds it to a complete folder, encode its latent alone; a zip of latents is not taken for whole."""
    folder, data = tmp_path / "s", tmp_path / "data"
    shutil.copytree(source, folder)
    (folder / "n01/03.png").write_bytes(b"")
    commands = [converting(folder, data / "images", "--num-workers=1"),
                encoding(data / "images", data / "vae-sd", "--batch-size=64"),
                encoding(data / "images", data / "vae-sd.zip")]
    for command in commands:
        call_main(monkeypatch, dataset_tools, *command)
    before = files(data / "vae-sd")
    shutil.copy(source / "n01/03.png", folder / "n01/03.png")
    for command in commands[:2]:
        call_main(monkeypatch, dataset_tools, *command)
    after = files(data / "vae-sd")
    assert after["dataset.json"] == files(made / "vae-sd")["dataset.json"]
    assert after.keys() - before.keys() == {latent_name(3)}
    assert all(after[name] == content for name, content in before.items() if name.endswith(".npy"))
    assert_same_moments(data / "vae-sd", made / "vae-sd", [latent_name(3)])
    with pytest.raises(UserError, match="has 48 pictures, .*vae-sd.zip latents of 47, and nothing is added to a fin"):
        call_main(monkeypatch, dataset_tools, *commands[2])


# ---- stops ----

def slow_groups(size=4, seconds=0.005):
    """Many groups, slowly written, so that there is time to kill at any place."""
    convert.GROUP = size
    fsync, add = os.fsync, destinations.add
    os.fsync = lambda number: time.sleep(seconds) or fsync(number)
    destinations.add = lambda *arguments: time.sleep(seconds / 2) or add(*arguments)


def one_step():
    """Stands still when one more file is made, so that five kills find the work undone on a machine of any speed."""
    slow_groups()
    fsync, dest, most = os.fsync, Path(os.environ["HASTE_TEST_DEST"]), int(os.environ["HASTE_TEST_MOST"])
    command = os.getpid()

    def stand_still(number):
        while progress_of(dest) > most and command in (os.getpid(), os.getppid()):  # a worker alone goes on and sees it
            time.sleep(0.02)
        fsync(number)

    os.fsync = stand_still


def slow_writes():
    slow_groups(16, 0.05)


def even_shares():
    """Fails unless this process is given half of the twelve batches."""
    encode_groups = encode.encode_groups

    def checked(vae, groups, *more):
        assert len(groups) == 6
        return encode_groups(vae, groups, *more)

    encode.encode_groups = checked
    slow_groups()


def progress_of(dest):
    """Files that have their names; for a zip, its parts."""
    work = dest.with_name(dest.name + ".parts") if dest.suffix == ".zip" else dest
    return len([path for path in work.rglob("*.???") if not path.name.startswith(".")])


@pytest.mark.parametrize("kind", ["images", "images.zip", "vae-sd", "vae-sd.zip"])
def test_kill_9_and_the_same_command(source, made, tmp_path, kind):
    """Five kills each at random moments, with and without the workers, one of a zip while it is put together: the bytes
    are those of no kill."""
    dest, moment, seen = tmp_path / kind, random.Random(kind), [0]
    command = making(kind, source, made, dest)
    processes = 2 if kind == "vae-sd.zip" else 1
    while len(seen) < 6:
        putting_together = len(seen) == 5 and dest.suffix == ".zip"
        before = f"tests.test_dataset_tools.{'slow_groups' if putting_together else 'one_step'}"
        started = SERVER.start_all("preprocessing/dataset_tools.py", *command, processes=processes, before=before,
                                   env={"HASTE_TEST_DEST": str(dest), "HASTE_TEST_MOST": str(seen[-1])})
        if putting_together:
            wait_for(lambda: list(tmp_path.glob(f".{kind}.*.tmp")))
        else:
            wait_for(lambda: progress_of(dest) > seen[-1])
        time.sleep(moment.uniform(0, 0.01))
        for process in started:
            (os.killpg if len(seen) % 2 else os.kill)(process.pid, signal.SIGKILL)
        assert started[0].wait() == -signal.SIGKILL, started[0].stderr
        assert all(process.wait() for process in started)
        wait_for(lambda group=started[0].pid: not group_is_alive(group))  # workers end by themselves
        seen.append(progress_of(dest))
        assert not (dest / "dataset.json").exists() and (dest.suffix != ".zip" or not dest.exists())
    assert 0 < seen[1] < seen[2] < seen[3] < seen[4] <= 48, seen
    script("preprocessing/dataset_tools.py", *command, processes=processes)
    if dest.suffix == ".zip":
        assert dest.read_bytes() == (made / kind).read_bytes()
    assert files(dest) == files(made / kind)
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_a_picture_repaired_before_the_zip_is_complete(source, made, tmp_path, monkeypatch):
    """Its part is completed, and keeps what it had."""
    folder, dest = tmp_path / "s", tmp_path / "images.zip"
    shutil.copytree(source, folder)
    (folder / "n01/03.png").write_bytes(b"")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(destinations, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        call_main(patch, dataset_tools, *converting(folder, dest, "--num-workers=1"))
    shutil.copy(source / "n01/03.png", folder / "n01/03.png")
    call_main(monkeypatch, dataset_tools, *converting(folder, dest, "--num-workers=1"))
    found, expected = files(dest), files(made / "images.zip")
    assert list(found) == list(expected) and {**found, "made.json": b""} == {**expected, "made.json": b""}


def test_workers_end_with_their_parent(source, tmp_path):
    """At once: each completes at most the pictures on their way to the disk, not its sixteen."""
    command = converting(source, tmp_path / "images", "--num-workers=2")
    started = SERVER.start("preprocessing/dataset_tools.py", *command, before="tests.test_dataset_tools.slow_writes")
    wait_for(lambda: progress_of(tmp_path / "images") >= 2)
    started.kill()
    there = progress_of(tmp_path / "images")
    wait_for(lambda: not group_is_alive(started.pid), seconds=8)
    assert progress_of(tmp_path / "images") <= there + 2 * (destinations.WRITERS + 1)


def ctrl_c_as_in_a_terminal():
    slow_writes()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the fork server has turned off


def test_ctrl_c(source, tmp_path):
    """It reaches all processes of a terminal: the workers say nothing, and end."""
    command = converting(source, tmp_path / "images", "--num-workers=2")
    started = SERVER.start("preprocessing/dataset_tools.py", *command,
                           before="tests.test_dataset_tools.ctrl_c_as_in_a_terminal")
    wait_for(lambda: progress_of(tmp_path / "images") >= 2)
    os.killpg(started.pid, signal.SIGINT)
    assert started.wait() != 0
    wait_for(lambda: not group_is_alive(started.pid), seconds=8)
    assert started.stderr.count("Traceback") <= 1 and "Worker" not in started.stderr, started.stderr


def group_is_alive(group):
    """Whether a process of the group runs; one that ended and was not waited for does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


def test_a_worker_that_is_killed(source, tmp_path, monkeypatch):
    """As for lack of memory: a sentence, and the same command goes on."""
    picture = convert.convert_picture
    monkeypatch.setattr(convert, "convert_picture", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="A worker process has ended .*the same command goes on, with fewer --num-w"):
        call_main(monkeypatch, dataset_tools, *converting(source, tmp_path / "images", "--num-workers=2"))
    monkeypatch.setattr(convert, "convert_picture", picture)
    call_main(monkeypatch, dataset_tools, *converting(source, tmp_path / "images", "--num-workers=1"))


def test_what_is_there_is_not_made_again(source, made, tmp_path, monkeypatch, capsys):
    """A complete folder is completed where a file is missing, a complete zip is left alone."""
    for kind in ("images", "vae-sd"):
        shutil.copytree(made / kind, tmp_path / kind)
    for kind, name, command in (("images", image_name(9), converting(source, tmp_path / "images", "--num-workers=1")),
                                ("vae-sd", latent_name(9), encoding(made / "images", tmp_path / "vae-sd"))):
        (tmp_path / kind / name).unlink()
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / kind).rglob("*.???")}
        call_main(monkeypatch, dataset_tools, *command)
        assert files(tmp_path / kind) == files(made / kind)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    monkeypatch.setattr(encode, "VAE", None)  # is not needed where nothing is missing
    call_main(monkeypatch, dataset_tools, *encoding(made / "images", tmp_path / "vae-sd"))
    before = (made / "vae-sd.zip").stat().st_mtime_ns
    call_main(monkeypatch, dataset_tools, *encoding(made / "images.zip", made / "vae-sd.zip"))
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    assert (made / "vae-sd.zip").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_other_settings(source, made, tmp_path, monkeypatch, kind):
    """Nothing is mixed: not two crops, not two VAEs, not latents of pictures that were made anew."""
    for name in ("images", "vae-sd"):
        (shutil.copy if kind else shutil.copytree)(made / f"{name}{kind}", tmp_path / f"{name}{kind}")
    images, latents = tmp_path / f"images{kind}", tmp_path / f"vae-sd{kind}"
    for changed, command in (("transform", [*converting(source, images), "--transform=center-crop"]),
                             ("resolution", [*converting(source, images), "--resolution=32x32"]),
                             ("pictures", [*converting(source, images), "--max-images=7"]),
                             ("batch_size", [*encoding(made / f"images{kind}", latents), "--batch-size=5"]),
                             ("vae", [*encoding(made / f"images{kind}", latents), "--model-url=other/vae"])):
        with pytest.raises(UserError, match=rf"was begun with other settings \({changed}\)"):
            call_main(monkeypatch, dataset_tools, *command)
    (images.unlink if kind else lambda: shutil.rmtree(images))()
    call_main(monkeypatch, dataset_tools, *converting(source, images, "--num-workers=1"), "--transform=center-crop")
    with pytest.raises(UserError, match=r"was begun with other settings \(pictures\)"):
        call_main(monkeypatch, dataset_tools, *encoding(images, latents))


def test_what_is_not_ours(source, made, tmp_path, monkeypatch):
    """Nothing that was there is overwritten, and output never becomes input."""
    write_folder(tmp_path / "full", {"00000/img00000000.png": b""})
    write_zip(tmp_path / "full.zip", {"a": b""})
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    for name in ("full", "full.zip", "file", "folder.zip"):
        with pytest.raises(UserError, match=f"{name} is there already and was not made by this tool"):
            call_main(monkeypatch, dataset_tools, *converting(source, tmp_path / name))
    for dest in (source, source / "out", source.parent, source / "n01/x.zip"):
        with pytest.raises(UserError, match="lie in each other"):
            call_main(monkeypatch, dataset_tools, *converting(source, dest))


def test_a_file_that_changed_meanwhile(source, made, tmp_path, monkeypatch):
    """The check at the end reads everything back."""
    for kind in ("images", "vae-sd"):
        shutil.copytree(made / kind, tmp_path / kind)
    images = converting(source, tmp_path / "images", "--num-workers=1")
    latents = encoding(made / "images", tmp_path / "vae-sd")
    path = tmp_path / "images" / image_name(3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="images/00000/img00000003.png is no readable image"):
        call_main(monkeypatch, dataset_tools, *images)
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(UserError, match="img00000003.png is 8x8, expected 16x16"):
        call_main(monkeypatch, dataset_tools, *images)
    path.write_bytes(whole)
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / image_name(99))
    with pytest.raises(UserError, match="img00000099.png does not belong into"):
        call_main(monkeypatch, dataset_tools, *images)
    path, good = tmp_path / "vae-sd" / latent_name(3), np.load(tmp_path / "vae-sd" / latent_name(3))
    for wrong, words in ((np.where(good == good[0, 0, 0], np.nan, good).astype(np.float32), "not finite"),
                         (good.astype(np.float64), "it holds float64"), (good[:, :2], "moments of shapes"),
                         (np.array([{}]), "damaged")):
        np.save(path, wrong, allow_pickle=True)
        with pytest.raises(UserError, match=words):
            call_main(monkeypatch, dataset_tools, *latents)
