"""convert and encode by their command lines: files written, skipped and refused."""
import functools
import json
import os
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentImages, digest
from encoders.vae import VAE
from preprocessing import convert, dataset_tools, destinations, encode
from preprocessing.destinations import image_name, latent_name
from preprocessing.sources import open_source
from runtime.errors import UserError
from runtime.files import read_json
from tests.conftest import ROOT, call_main, contents
from tests.test_sources import adm_crop, odd_pictures, saved, write_folder, write_zip
from tests.test_storage import packed_into

VAE_FOLDER = ROOT / "assets/vae-emoji"
SIDE, CLASSES, EACH = 16, 3, 16


def picture(i):
    rng = np.random.default_rng(i)
    width, height = rng.integers(20, 50, 2)
    pixels = np.kron(rng.integers(0, 256, (height // 5 + 1, width // 5 + 1, 3)), np.ones((5, 5, 1)))[:height, :width]
    return saved(Image.fromarray(pixels.astype(np.uint8)), "PNG")


def content():
    """{name: bytes}: classes whose order of names is not that of their making."""
    return {f"{name}/{i:02d}.png": picture(100 * label + i) for label, name in enumerate(("n02", "n01", "n10"))
            for i in range(EACH)}


@pytest.fixture(scope="session")  # test_dataset_stops.py uses it, too
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("imagenet"), content())


def converting(source, dest, *more):
    return ["convert", f"--source={source}", f"--dest={dest}", f"--resolution={SIDE}x{SIDE}",
            "--transform=center-crop-dhariwal", *more]


def encoding(source, dest, *more):
    return ["encode", f"--source={source}", f"--dest={dest}", f"--model-url={VAE_FOLDER}", "--batch-size=4", *more]


@pytest.fixture
def tool(monkeypatch):
    """Runs dataset_tools.py with these arguments."""
    return functools.partial(call_main, monkeypatch, dataset_tools)


@pytest.fixture(scope="session")
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
    if path.suffix != ".zip":
        return contents(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


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


def test_names_and_order_of_classes(refused, tmp_path, tool, capsys):
    """classes.json lies in DATA, beside images/ and vae-sd/, wherever these are made; --class-order is the order."""
    path = write_folder(tmp_path / "photos", {f"{name}/a.png": picture(0) for name in ("0", "1", "2", "10")})
    (tmp_path / "order").write_bytes("\ufeff0\r\n1\r\n2\n\n10".encode())
    for order, more, names in (("a", [], ["0", "1", "10", "2"]),
                               ("b", [f"--class-order={tmp_path / 'order'}"], ["0", "1", "2", "10"])):
        data, _ = tmp_path / order, capsys.readouterr()
        tool(*converting(path, data / "images", "--num-workers=1", *more))
        assert ("10 has label 2; convert --class-order FILE" in capsys.readouterr().err) == (order == "a")
        tool(*encoding(data / "images", tmp_path / f"{order}-2/vae-sd.zip"))
        (tmp_path / f"{order}-2/images").symlink_to(data / "images")
        packed_into(tmp_path / f"{order}-2", tmp_path / f"{order}-3", "--resolution", SIDE)
        for folder in (data, tmp_path / f"{order}-2", tmp_path / f"{order}-3"):
            assert json.loads((folder / "classes.json").read_text()) == names
        dataset = LatentImages(tmp_path / f"{order}-3", SIDE, 4)
        assert [dataset.text(i) for i in range(4)] == ["0", "1", "10", "2"]  # pictures stay in alphabetical order
        assert dataset.labels.tolist() == [names.index(name) for name in ("0", "1", "10", "2")]
    (tmp_path / "b/classes.json").write_text('["zero", "one", "two", "ten"]')
    tool(*converting(path, tmp_path / "b/images", "--num-workers=1", *more))
    assert "names other classes than the source; it stays" in capsys.readouterr().err
    for lines, words in (("0\n1\n2", "does not name the class folder 10"), ("0\n1\n2\n10\n1", "names 1 twice")):
        (tmp_path / "order").write_text(lines)
        refused(words, dataset_tools, *converting(path, tmp_path / "b/images", *more))


def assert_same_moments(ours, theirs, names):
    for name in names:
        np.testing.assert_allclose(np.load(ours / name), np.load(theirs / name), rtol=1e-5, atol=1e-5)


def test_batches_equal_single_pictures(made, tmp_path, tool):
    for size in (1, 7):
        dest, batches = tmp_path / str(size), f"--batch-size={size}"
        tool(*encoding(made / "images", dest, batches, "--num-workers=1"))
        assert_same_moments(dest, made / "vae-sd", map(latent_name, range(48)))


def test_mirrored_pictures_have_latents_of_their_own(refused, made, tmp_path, tool):
    """encode --hflip: what the VAE makes of the mirror image, under the same names, which train.py --hflip reads."""
    for kind in ("images", "vae-sd"):
        (tmp_path / kind).symlink_to(made / kind)
    tool(*encoding(made / "images", tmp_path / "vae-sd-hflip", "--hflip"))
    assert files(tmp_path / "vae-sd-hflip").keys() == files(made / "vae-sd").keys()
    data, vae = LatentImages(tmp_path, SIDE, CLASSES, hflip=True), VAE(str(VAE_FOLDER))
    for i in (0, 20):
        mirrored = data.image(i).flip(-1)
        expected = vae.encode(mirrored[None])[0]
        sample_id = next(sample_id for sample_id in range(i, 10 ** 4, len(data)) if data.is_mirrored(sample_id))
        torch.testing.assert_close(data[sample_id]["moments"], expected, rtol=1e-5, atol=1e-4)
        assert torch.equal(data[sample_id]["image"], mirrored)
        assert (expected - data.moments(i).flip(-1)).abs().max() > 1e-3  # and not the latent mirrored
    refused(r"begun with other settings \(hflip\)", dataset_tools,
            *encoding(made / "images", tmp_path / "vae-sd-hflip"))
    shutil.rmtree(tmp_path / "vae-sd-hflip")
    (tmp_path / "vae-sd-hflip").symlink_to(made / "vae-sd")  # of the same shape, and not mirrored
    with pytest.raises(UserError, match="vae-sd-hflip was not made with --hflip"):
        LatentImages(tmp_path, SIDE, CLASSES, hflip=True)


def test_other_flags(source, tmp_path, tool):
    def run(name, *more):
        tool("convert", f"--source={source}", f"--dest={tmp_path / name}",
                  "--num-workers=1", "--max-images=2", *more)
        assert len(json.loads((tmp_path / name / "dataset.json").read_text())["labels"]) == 2
        return np.asarray(Image.open(tmp_path / name / image_name(1)))

    original = Image.open(source / "n01/01.png")
    assert np.array_equal(run("stretched", "--resolution=12x12"), np.asarray(original.resize((12, 12), Image.LANCZOS)))
    assert run("square", "--resolution=12,12", "--transform=center-crop").shape == (12, 12, 3)
    wide = run("wide", "--resolution=12x8", "--transform=center-crop-wide")
    assert wide.shape == (12, 12, 3) and not wide[:2].any() and wide[2:10].any()
    tool("convert", f"--source={tmp_path / 'square'}", f"--dest={tmp_path / 'again'}")
    assert files(tmp_path / "again")[image_name(1)] == files(tmp_path / "square")[image_name(1)]


# ---- pictures that cannot be used ----

def test_odd_pictures(tool, tmp_path, monkeypatch, capsys):
    """Each is handled or named; the others keep their numbers, which pair them with their latents."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    expected = odd_pictures()
    pictures = {f"odd/{name}": data for name, (data, _) in expected.items()} | {"plain/a.png": picture(0)}
    source = write_folder(tmp_path / "s", pictures)
    tool(*converting(source, tmp_path / "images", "--num-workers=1"))
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
    for i in numbers[:-1]:
        corner = np.asarray(Image.open(tmp_path / "images" / image_name(i)))[0, 0].astype(int)
        assert np.abs(corner - expected[sorted(expected)[i]][1]).max() <= 4, sorted(expected)[i]
    tool(*encoding(tmp_path / "images", tmp_path / "vae-sd"))
    assert LatentImages(tmp_path, SIDE, 2).latents.index.names.tolist() == [latent_name(i).encode() for i in numbers]


def test_encoding_what_cannot_be_used(refused, made, tmp_path, tool):
    images = tmp_path / "images"
    shutil.copytree(made / "images", images)
    Image.new("RGB", (20, 20)).save(images / image_name(5))
    (images / image_name(6)).write_bytes(b"")
    refused("img00000005.png is 20x20, the first picture 16x16", dataset_tools,
            *encoding(images, tmp_path / "vae-sd", "--on-error=stop"))
    tool(*encoding(images, tmp_path / "vae-sd"))
    assert sorted(files(made / "vae-sd").keys() - files(tmp_path / "vae-sd")) == [latent_name(5), latent_name(6)]


def test_a_repaired_picture(refused, source, made, tmp_path, tool):
    """convert adds it to a complete folder, encode adds only its latent; a zip of latents counts as incomplete."""
    folder, data = tmp_path / "s", tmp_path / "data"
    shutil.copytree(source, folder)
    (folder / "n01/03.png").write_bytes(b"")
    commands = [converting(folder, data / "images", "--num-workers=1"),
                encoding(data / "images", data / "vae-sd", "--batch-size=64"),
                encoding(data / "images", data / "vae-sd.zip")]
    for command in commands:
        tool(*command)
    before = files(data / "vae-sd")
    shutil.copy(source / "n01/03.png", folder / "n01/03.png")
    for command in commands[:2]:
        tool(*command)
    after = files(data / "vae-sd")
    assert after["dataset.json"] == files(made / "vae-sd")["dataset.json"]
    assert after.keys() - before.keys() == {latent_name(3)}
    assert all(after[name] == content for name, content in before.items() if name.endswith(".npy"))
    assert_same_moments(data / "vae-sd", made / "vae-sd", [latent_name(3)])
    refused("has 48 pictures, .*vae-sd.zip latents of 47, and nothing is added to a fin", dataset_tools, *commands[2])


def test_a_replaced_picture(refused, source, tmp_path, tool):
    """Neither command keeps a file made from a picture replaced since; both say which file to delete."""
    folder, data = tmp_path / "s", tmp_path / "data"
    shutil.copytree(source, folder)
    commands = {image_name(3): converting(folder, data / "images", "--num-workers=1"),
                latent_name(3): encoding(data / "images", data / "vae-sd", "--batch-size=64")}
    for command in commands.values():
        tool(*command)
    before = {**files(data / "images"), **files(data / "vae-sd")}
    shutil.copy(source / "n01/04.png", folder / "n01/03.png")
    for (name, command), where in zip(commands.items(), ("images", "vae-sd"), strict=True):
        refused(f"1 pictures are newer than .*03.png and .*{name}; delete", dataset_tools, *command)
        (data / where / name).unlink()
        tool(*command)
    (folder / "n01/03.png").unlink()
    (folder / "n01/03.png").symlink_to(tmp_path / "nowhere.png")
    refused("03.png cannot be read .No such file", dataset_tools, *commands[image_name(3)])
    after = {**files(data / "images"), **files(data / "vae-sd")}
    assert {name for name in before if before[name] != after[name]} == {image_name(3), latent_name(3)}


# ---- what is there ----

def test_a_worker_that_is_killed(tool, refused, source, tmp_path, monkeypatch):
    """As when memory runs out: one sentence; the same command continues."""
    picture = convert.convert_picture
    monkeypatch.setattr(convert, "convert_picture", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused("A worker process has ended .*the same command goes on, with fewer --num-w", dataset_tools,
            *converting(source, tmp_path / "images", "--num-workers=2"))
    monkeypatch.setattr(convert, "convert_picture", picture)
    tool(*converting(source, tmp_path / "images", "--num-workers=1"))


def test_what_is_there_is_not_made_again(tool, source, made, tmp_path, monkeypatch, capsys):
    """A folder gets its missing files; a complete zip is left alone."""
    for kind in ("images", "vae-sd"):
        shutil.copytree(made / kind, tmp_path / kind)
    for kind, name, command in (("images", image_name(9), converting(source, tmp_path / "images", "--num-workers=1")),
                                ("vae-sd", latent_name(9), encoding(made / "images", tmp_path / "vae-sd"))):
        (tmp_path / kind / name).unlink()
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / kind).rglob("*.???")}
        tool(*command)
        assert files(tmp_path / kind) == files(made / kind)
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    monkeypatch.setattr(encode, "VAE", None)  # not needed if no file is missing
    tool(*encoding(made / "images", tmp_path / "vae-sd"))
    note, pictures = read_json(tmp_path / "vae-sd/made.json"), open_source(made / "images")
    note["pictures"] = digest([pictures.names, pictures.labels, destinations.origin(made / "images")])
    (tmp_path / "vae-sd/made.json").write_text(json.dumps(note))  # as older versions wrote it
    tool(*encoding(made / "images", tmp_path / "vae-sd"))
    assert read_json(tmp_path / "vae-sd/made.json") == note
    before = (made / "vae-sd.zip").stat().st_mtime_ns
    tool(*encoding(made / "images.zip", made / "vae-sd.zip"))
    assert "is complete; there is nothing to do" in capsys.readouterr().out
    assert (made / "vae-sd.zip").stat().st_mtime_ns == before


@pytest.mark.parametrize("kind", ["", ".zip"])
def test_other_settings(refused, source, made, tmp_path, tool, kind):
    """Never mix two crops, two VAEs, or latents with pictures made anew."""
    for name in ("images", "vae-sd"):
        (shutil.copy if kind else shutil.copytree)(made / f"{name}{kind}", tmp_path / f"{name}{kind}")
    images, latents = tmp_path / f"images{kind}", tmp_path / f"vae-sd{kind}"
    for changed, command in (("transform", [*converting(source, images), "--transform=center-crop"]),
                             ("resolution", [*converting(source, images), "--resolution=32x32"]),
                             ("pictures", [*converting(source, images), "--max-images=7"]),
                             ("batch_size", [*encoding(made / f"images{kind}", latents), "--batch-size=5"]),
                             ("vae", [*encoding(made / f"images{kind}", latents), "--model-url=other/vae"])):
        refused(rf"was begun with other settings \({changed}\)", dataset_tools, *command)
    (images.unlink if kind else lambda: shutil.rmtree(images))()
    tool(*converting(source, images, "--num-workers=1"), "--transform=center-crop")
    refused(r"was begun with other settings \(pictures\)", dataset_tools, *encoding(images, latents))


def test_what_is_not_ours(refused, source, tmp_path):
    """Existing files are never overwritten; test_bad_input.py covers a folder, and output inside the input."""
    write_zip(tmp_path / "full.zip", {"a": b""})
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    for name in ("full.zip", "file", "folder.zip"):
        refused(f"{name} is there already and was not made by this tool", dataset_tools,
                *converting(source, tmp_path / name))


def test_a_file_that_changed_meanwhile(refused, source, made, tmp_path):
    """The check at the end reads everything back."""
    for kind in ("images", "vae-sd"):
        shutil.copytree(made / kind, tmp_path / kind)
    images = converting(source, tmp_path / "images", "--num-workers=1")
    latents = encoding(made / "images", tmp_path / "vae-sd")
    path = tmp_path / "images" / image_name(3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    refused("images/00000/img00000003.png is no readable image", dataset_tools, *images)
    Image.new("RGB", (8, 8)).save(path)
    refused("img00000003.png is 8x8, expected 16x16", dataset_tools, *images)
    path.write_bytes(whole)
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / image_name(99))
    refused("img00000099.png does not belong into", dataset_tools, *images)
    path, good = tmp_path / "vae-sd" / latent_name(3), np.load(tmp_path / "vae-sd" / latent_name(3))
    for wrong, words in ((np.where(good == good[0, 0, 0], np.nan, good).astype(np.float32), "finite"),
                         (good.astype(np.float64), "00000003.npy holds float64"), (good[:, :2], "moments of shapes"),
                         (np.array([{}]), "no readable .npy")):
        np.save(path, wrong, allow_pickle=True)
        refused(words, dataset_tools, *latents)
