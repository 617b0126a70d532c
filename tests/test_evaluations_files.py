"""Files in, scores out: streams, the two scripts, several processes, and every bad input the scripts should explain."""
import contextlib
import io
import json
import os
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from evaluations import evaluator, scores, stats
from evaluations.features import load_extractor
from evaluations.images import NpzImages, open_images
from evaluations.inception import Inception
from evaluations.scores import load_set, score
from files import BadInput
from tests.conftest import ROOT, call_main
from tests.golden.fill import inception_state


def random_images(n, seed, side=24):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def read_all(images, batch_size=3, start=0, stop=None):
    return np.concatenate(list(images.batches(start, stop or images.n, batch_size)))


def save_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:06d}.png")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder with reference and sample files and synthetic Inception weights, which all tests share."""
    folder = tmp_path_factory.mktemp("made")
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Inception().state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in inception_state(shapes).items()}
    torch.save(state, folder / "inception.pth")
    np.savez(folder / "reference.npz", arr_0=random_images(9, 0))
    np.savez_compressed(folder / "sample.npz", arr_0=random_images(7, 1) // 2)
    save_folder(folder / "sample", random_images(7, 1) // 2)
    return folder


@pytest.fixture(scope="module")
def bad(made):
    """The same folder with files that the scripts must refuse."""
    mu, sigma = np.zeros(2048), np.eye(2048)
    np.savez(made / "one.npz", arr_0=random_images(1, 7))
    np.savez(made / "larger.npz", arr_0=random_images(5, 7, side=32))
    np.savez(made / "keys.npz", images=random_images(5, 7))
    np.savez(made / "half.npz", mu=mu)
    np.savez(made / "shape.npz", mu=mu[1:], sigma=sigma[1:, 1:])
    np.savez(made / "nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez(made / "pickled.npz", mu=np.array([None]), sigma=sigma)
    np.savez(made / "objects.npz", arr_0=np.array([None]))
    np.savez(made / "statistics.npz", mu=mu, sigma=sigma, features="inception", preset="adm")
    return made


@pytest.fixture(scope="module")
def adm(made):
    """JSON and, under 'stdout', the text of one run of the evaluator, for the tests that compare with it."""
    with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.MonkeyPatch.context() as patch:
        call_main(patch, evaluator, *paths(made, "reference.npz", "sample"), "--json", made / "adm.json")
    return json.loads((made / "adm.json").read_text()) | {"stdout": stdout.getvalue()}


def paths(made, *names):
    return [*(str(made / name) for name in names), "--inception-weights", str(made / "inception.pth"),
            "--any-weights", "--device", "cpu", "--batch-size", "4"]


def sentence(monkeypatch, script, arguments, capsys):
    """The message that a script ends with on bad input: one sentence, and nothing on stdout."""
    with pytest.raises(BadInput) as stop:
        call_main(monkeypatch, script, *arguments)
    text = str(stop.value)
    assert text.endswith(".") and "\n" not in text
    assert capsys.readouterr().out == ""
    return text


# ---- images ----

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read_in_order_from_any_start(tmp_path, save):
    images = random_images(11, 2)
    save(tmp_path / "a.npz", labels=np.arange(11), arr_0=images)
    opened = open_images(tmp_path / "a.npz")
    assert (opened.n, opened.size) == (11, (24, 24))
    assert np.array_equal(read_all(opened), images)
    assert np.array_equal(read_all(opened, start=5, stop=9), images[5:9])


def test_npz_is_streamed(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((4000, 64, 64, 3), np.uint8))     # 49 MB
    tracemalloc.start()
    count = sum(len(batch) for batch in open_images(tmp_path / "a.npz").batches(0, 4000, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 4e6


def test_folder_array_and_npz_are_the_same_images(tmp_path):
    images = random_images(5, 3)
    np.savez(tmp_path / "a.npz", images)
    folder = save_folder(tmp_path / "folder", images)
    for source in (tmp_path / "a.npz", folder, images, torch.from_numpy(images)):
        assert np.array_equal(read_all(open_images(source)), images)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("damage", ["cut", "short member", "flipped bytes", "broken stream", "no header",
                                    "not a zip"])
def test_damaged_npz(tmp_path, damage, compression):
    member = io.BytesIO()
    np.save(member, random_images(6, 4))
    content = member.getvalue()
    content = {"short member": content[:-100], "no header": b"x" * 500}.get(damage, content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    if damage == "cut":
        data = data[:len(data) // 2]
    if damage == "flipped bytes":
        data[len(data) // 2:len(data) // 2 + 8] = b"\xff" * 8
    if damage == "broken stream":
        data[39] = 0xff                                            # the first byte after the member's name
    if damage == "not a zip":
        data = b"hello"
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(BadInput, match=r"a\.npz"):
        read_all(open_images(tmp_path / "a.npz"))


@pytest.mark.parametrize(("array", "words"), [
    (np.array([None, "x"], dtype=object), "dtype object"),
    (np.zeros((2, 8, 8, 3), np.float32), "dtype float32"),
    (np.zeros((2, 3, 8, 8), np.uint8), "shape"),
    (np.zeros((0, 8, 8, 3), np.uint8), "shape"),
    (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
])
def test_npz_with_something_else_in_it(tmp_path, array, words):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(BadInput, match=words):
        open_images(tmp_path / "a.npz")


def test_bad_folders(tmp_path):
    with pytest.raises(BadInput, match="holds no"):
        open_images(tmp_path)
    folder = save_folder(tmp_path / "sizes", random_images(2, 5))
    Image.fromarray(random_images(1, 6, side=16)[0]).save(folder / "9.png")
    with pytest.raises(BadInput, match=r"9\.png is 16x16"):
        read_all(open_images(folder))
    Image.new("RGBA", (24, 24)).save(folder / "9.png")
    with pytest.raises(BadInput, match="RGBA"):
        read_all(open_images(folder))
    (folder / "9.png").write_bytes((folder / "000000.png").read_bytes()[:200])
    with pytest.raises(BadInput, match=r"9\.png cannot be decoded"):
        read_all(open_images(folder))


# ---- the scripts ----

def test_five_lines_in_adm_wording(adm):
    names, values = zip(*(line.split(": ") for line in adm["stdout"].splitlines()), strict=True)
    assert names == ("Inception Score", "FID", "sFID", "Precision", "Recall")
    assert tuple(adm["scores"]) == names and (adm["n"], adm["reference_n"]) == (7, 9)
    assert [float(value) for value in values] == list(adm["scores"].values())


def test_coco_protocol(made, monkeypatch, capsys, caplog):
    """A statistics file as U-ViT's for COCO, mu and sigma alone, which does not say its preset: FID, and nothing else."""
    np.savez(made / "coco.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    call_main(monkeypatch, evaluator, *paths(made, "coco.npz", "sample"), "--preset", "pytorch-fid")
    name, value = capsys.readouterr().out.strip().split(": ")
    assert name == "FID" and float(value) > 0
    assert "coco.npz does not say how Inception was fed; it is taken to be preset pytorch-fid" in caplog.text


def test_two_processes_give_the_scores_of_one(made, adm):
    """Started as torchrun does; 7 and 9 images do not divide by two."""
    code = [sys.executable, "evaluations/evaluator.py", *paths(made, "reference.npz", "sample.npz"),
            "--json", str(made / "two.json"), "--metrics", "is,fid,pr"]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [subprocess.Popen(code, cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(outputs[0].splitlines()) == 4 and outputs[1] == ""           # said once
    two = json.loads((made / "two.json").read_text())
    assert (two["n"], two["reference_n"]) == (7, 9)
    for name, value in two["scores"].items():
        assert value == pytest.approx(adm["scores"][name], rel=1e-5)


def test_fid_and_sfid_are_of_the_pool_and_of_the_spatial_features(made, adm):
    """By NumPy's means and the formula for centred data A, B: tr (S1 S2)^(1/2) = sum of singular values of A B^T."""
    extractor = load_extractor("inception", made / "inception.pth", verify=False)
    sets = [extractor(images) for images in (random_images(9, 0), random_images(7, 1) // 2)]
    for name, place in (("FID", 0), ("sFID", 1)):
        x, y = (each[place].double().numpy() for each in sets)
        a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
        plain = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * np.linalg.svd(a @ b.T)[1].sum()
        assert adm["scores"][name] == pytest.approx(plain, rel=1e-4)


def test_statistics_file_replaces_the_images(monkeypatch, made, adm, capsys):
    """stats.py's file gives the same FID; with statistics only, precision and recall are n/a."""
    call_main(monkeypatch, stats, *paths(made, "reference.npz", "stats.npz"), "--images", "4")
    with np.load(made / "stats.npz", allow_pickle=False) as file:
        stored = dict(file)
    assert (int(stored["n"]), str(stored["features"]), str(stored["preset"])) == (9, "inception", "adm")
    rows = [any(np.array_equal(image, other) for image in stored["arr_0"]) for other in random_images(9, 0)]
    assert stored["arr_0"].shape == (4, 24, 24, 3) and sum(rows) == 4
    only = {key: stored[key] for key in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(made / "only.npz", **only)
    call_main(monkeypatch, evaluator, *paths(made, "only.npz", "sample.npz"), "--metrics", "is,fid,sfid,pr")
    found = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert found["Precision"] == found["Recall"] == "n/a"
    for name in ("Inception Score", "FID", "sFID"):
        assert float(found[name]) == pytest.approx(adm["scores"][name], rel=1e-6)

    np.savez(made / "other.npz", arr_0=random_images(9, 0), mu=only["mu"] + 1, sigma=only["sigma"])
    extractor = load_extractor("inception", made / "inception.pth", verify=False)
    other = load_set(made / "other.npz", extractor, ("fid", "sfid", "pr"), is_reference=True)
    assert np.array_equal(other.mu.numpy(), only["mu"] + 1)                # stored statistics win over arr_0
    assert len(other.pool) == 9 and score(other, other, ("sfid",)) == {"sFID": None}  # none for sFID


def test_statistics_belong_to_process_0_too(bad, monkeypatch):
    extractor = load_extractor("inception", bad / "inception.pth", verify=False)
    assert load_set(bad / "statistics.npz", extractor, ("fid",)) is not None
    monkeypatch.setattr(scores, "rank", lambda: 1)
    assert load_set(bad / "statistics.npz", extractor, ("fid",)) is None


def test_num_samples_takes_the_first(monkeypatch, made, capsys):
    call_main(monkeypatch, evaluator, *paths(made, "reference.npz", "sample.npz"), "--metrics", "is", "--num-samples", "3")
    first = capsys.readouterr().out
    np.savez(made / "three.npz", arr_0=random_images(7, 1)[:3] // 2)
    call_main(monkeypatch, evaluator, *paths(made, "reference.npz", "three.npz"), "--metrics", "is")
    assert first == capsys.readouterr().out


def test_few_images_against_statistics_alone(monkeypatch, bad, capsys):
    """What needs images of both sets is n/a there, and asks nothing of the images of one. Names may have spaces."""
    monkeypatch.setattr(scores, "frechet_distance", lambda *statistics: 1.5)
    argv = [*paths(bad, "statistics.npz", "sample.npz"), "--num-samples", 3]
    call_main(monkeypatch, evaluator, *argv)
    assert capsys.readouterr().out.splitlines()[1:] == ["FID: 1.5", "sFID: n/a", "Precision: n/a", "Recall: n/a"]
    call_main(monkeypatch, evaluator, *argv, "--metrics", "fid, pr,")
    assert capsys.readouterr().out.splitlines() == ["FID: 1.5", "Precision: n/a", "Recall: n/a"]


def test_identical_sets(made):
    extractor = load_extractor("inception", made / "inception.pth", verify=False)
    each = load_set(made / "sample.npz", extractor, ("fid", "pr"))
    found = score(each, each, ("fid", "pr"))
    assert abs(found["FID"]) < 1e-6
    assert found["Precision"] == found["Recall"] == 1


def test_other_features_keep_their_own_names(monkeypatch, made, capsys, tmp_path):
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save(state, tmp_path / "lite0.pth")
    argv = [str(made / "reference.npz"), str(made / "sample.npz"), "--features", "efficientnet-lite0",
            "--device", "cpu", "--any-weights", "--efficientnet-weights"]
    call_main(monkeypatch, evaluator, *argv, str(tmp_path / "lite0.pth"), "--metrics", "fid,kid")
    text = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in text] == [
        "FD-EffLite0 (n = 7, reference n = 9)", "KID-EffLite0 (n = 7, reference n = 9)"]
    call_main(monkeypatch, evaluator, *argv, str(tmp_path / "lite0.pth"))                   # fid,kid is the default
    assert capsys.readouterr().out.splitlines() == text
    monkeypatch.setattr(scores, "precision_recall", lambda x, y, dtype: (torch.finfo(dtype).bits, 0.5))
    for flag, bits in (([], 16), (["--pr-dtype", "float32"], 32), (["--pr-dtype", "float16"], 16)):
        call_main(monkeypatch, evaluator, *argv, str(tmp_path / "lite0.pth"), "--metrics", "pr", *flag)
        assert capsys.readouterr().out.splitlines() == [f"Precision: {bits}", "Recall: 0.5"]


@pytest.mark.parametrize(("reference", "sample", "extra", "words"), [
    ("nowhere.npz", "sample.npz", [], "does not exist"),
    ("reference.npz", "sample.npz", ["--num-samples", "2"], "metric pr needs at least 4"),
    ("reference.npz", "sample.npz", ["--num-samples", "70", "--metrics", "is"], "not the 70"),
    ("reference.npz", "keys.npz", [], "keys images"),
    ("keys.npz", "sample.npz", [], "keys images"),
    ("half.npz", "sample.npz", [], "only one of mu and sigma"),
    ("shape.npz", "sample.npz", [], r"expected floats of \(2048,\)"),
    ("nan.npz", "sample.npz", [], "nan"),
    ("pickled.npz", "sample.npz", [], "cannot be read"),
    ("reference.npz", "objects.npz", [], "dtype object"),
    ("reference.npz", "sample.npz", ["--metrics", "sfid", "--features", "dinov2-vit-l"], "inception feature"),
    ("statistics.npz", "sample.npz", ["--preset", "pytorch-fid"], "preset adm, not of"),
    ("statistics.npz", "statistics.npz", ["--num-samples", "5"], "statistics only"),
])
def test_bad_input_is_one_sentence(monkeypatch, bad, capsys, reference, sample, extra, words):
    out = bad / "never.json"
    argv = [*paths(bad, reference, sample), "--json", str(out), *extra]
    text = sentence(monkeypatch, evaluator, argv, capsys)
    assert any(part in text for part in (words, words.replace("\\", "")))
    assert not list(bad.glob("*never*"))


def test_wrong_weights_are_one_sentence(monkeypatch, made, capsys, tmp_path):
    files = {
        "text.pth": (b"not weights", "no torch file"),
        "cut.pth": ((made / "inception.pth").read_bytes()[:10_000_000], "damaged"),
    }
    for name, (content, words) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=words):
            load_extractor("inception", tmp_path / name, verify=False)
    state = torch.load(made / "inception.pth", weights_only=True)
    for change, words in (({"fc.weight": torch.zeros(1000, 2048)}, "1 of another shape, the first being fc"),
                          ({"extra": torch.zeros(1)}, "1 unknown")):
        torch.save(state | change, tmp_path / "changed.pth")
        with pytest.raises(BadInput, match=words):
            load_extractor("inception", tmp_path / "changed.pth", verify=False)
    torch.save([1], tmp_path / "list.pth")
    torch.save(Path("/"), tmp_path / "pickle.pth")                 # an object: refused, not run
    for name, words in (("list.pth", "holds a list"), ("pickle.pth", "not run"), ("none.pth", "exist")):
        with pytest.raises(BadInput, match=words):
            load_extractor("inception", tmp_path / name, verify=False)
    with pytest.raises(BadInput, match="EfficientNet-Lite0"):
        load_extractor("efficientnet-lite0", made / "inception.pth", verify=False)
    argv = paths(made, "reference.npz", "sample.npz")
    argv.remove("--any-weights")
    assert "sha256" in sentence(monkeypatch, evaluator, argv, capsys)


def test_stats_writes_nothing_on_bad_input(monkeypatch, bad, capsys):
    for source, extra, words in (("one.npz", [], "has 1 image"), ("keys2.npz", [], "does not exist"),
                                 ("sample.npz", ["--images", "8"], "--images 8")):
        argv = [*paths(bad, source, "unwritten.npz"), *extra]
        assert words in sentence(monkeypatch, stats, argv, capsys)
    assert not list(bad.glob("*unwritten*"))


def test_damage_met_while_writing_leaves_no_file(made, capsys, monkeypatch):
    """The copy of the images fails half way: neither OUT.npz nor a temporary file stays."""
    def copy_fails(self, start, stop, batch_size):
        if batch_size == 64:                                   # the second pass, see statistics_file.BATCH
            raise BadInput("sample.npz is broken.")
        yield from original(self, start, stop, batch_size)

    original = NpzImages.batches
    monkeypatch.setattr(NpzImages, "batches", copy_fails)
    sentence(monkeypatch, stats, [*paths(made, "sample.npz", "unwritten.npz"), "--images", "2"], capsys)
    assert not list(made.glob("*unwritten*"))


def test_script_exits_with_one_line_on_stderr(made):
    command = [sys.executable, "evaluations/evaluator.py", "nowhere.npz", "nowhere.npz"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: nowhere.npz does not exist; give an npz file or a folder of images.\n"
