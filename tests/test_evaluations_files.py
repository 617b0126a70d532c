"""Files in, scores out: streams, statistics files, evaluator.py and stats.py, several processes, damaged files."""
import contextlib
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from evaluations import evaluator, scores, stats
from evaluations.features import Extractor, load_extractor
from evaluations.images import open_images
from evaluations.scores import load_set, score
from evaluations.statistics_file import write_statistics
from runtime.errors import UserError
from runtime.files import sha256_of
from tests.conftest import call_main, script
from tests.test_evaluations_metrics import save_efficientnet, save_inception


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
    """Folder with reference and sample files and synthetic weights."""
    folder = tmp_path_factory.mktemp("made")
    save_inception(folder / "inception.pth")
    save_efficientnet(folder / "lite0.pth")
    np.savez(folder / "reference.npz", arr_0=random_images(9, 0))
    np.savez_compressed(folder / "sample.npz", arr_0=random_images(7, 1) // 2)
    save_folder(folder / "sample", random_images(7, 1) // 2)
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048), features="inception", preset="adm")
    return folder


@pytest.fixture(scope="module")
def inception(made):
    return load_extractor("inception", made / "inception.pth", verify=False)


@pytest.fixture(scope="module")
def lite0(made):
    return load_extractor("efficientnet-lite0", made / "lite0.pth", verify=False)


@pytest.fixture(scope="module")
def adm(made):
    """One run of the evaluator: its JSON and, beside it, its text and the features that it saw, the reference's first.
    """
    seen, extract = [], Extractor.__call__
    with contextlib.redirect_stdout(io.StringIO()) as stdout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Extractor, "__call__", lambda *given: seen.append(extract(*given)) or seen[-1])
        call_main(patch, evaluator, *paths(made, "reference.npz", "sample"), "--json", made / "adm.json")
    pool, spatial = (torch.cat(parts).double().numpy() for parts in zip(*seen, strict=True))
    return json.loads((made / "adm.json").read_text()) | {"stdout": stdout.getvalue(), "pool": pool, "spatial": spatial}


@pytest.fixture
def quick(monkeypatch):
    """Skip the eigenvalues, which take seconds."""
    monkeypatch.setattr(scores, "frechet_distance", lambda *statistics: 1.5)


LITE0_KEYS = {"features": "efficientnet-lite0", "preset": "adm"}


def paths(made, *names):
    return [*(str(made / name) for name in names), "--inception-weights", str(made / "inception.pth"),
            "--efficientnet-weights", str(made / "lite0.pth"), "--any-weights", "--device", "cpu", "--batch-size", "4"]


# ---- images ----

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_folder_and_array_are_the_same_images(tmp_path, save):
    """Their digests depend on the pixels."""
    images, other, digests = random_images(11, 2), random_images(11, 2), set()
    other[1, 0, 0, 0] ^= 1
    for name, content in (("a", images), ("b", other)):
        save(tmp_path / f"{name}.npz", labels=np.arange(11), arr_0=content)
        for source in (tmp_path / f"{name}.npz", save_folder(tmp_path / name, content), torch.from_numpy(content)):
            opened = open_images(source)
            assert (opened.n, tuple(opened.size)) == (11, (24, 24)) and np.array_equal(read_all(opened), content)
            assert np.array_equal(read_all(opened, start=5, stop=9), content[5:9])
            assert opened.digest() == open_images(source).digest()
            digests.add(opened.digest())
    assert len(digests) == 6


def test_npz_is_streamed(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", arr_0=np.zeros((4000, 64, 64, 3), np.uint8))     # 49 MB
    tracemalloc.start()
    count = sum(len(batch) for batch in open_images(tmp_path / "a.npz").batches(0, 4000, 16))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 4000 and peak < 4e6


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("damage", ["short member", "flipped bytes", "broken stream"])
def test_damaged_npz(tmp_path, damage, compression):
    member = io.BytesIO()
    np.save(member, random_images(6, 4))
    content = member.getvalue()[:-100] if damage == "short member" else member.getvalue()
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", content)
    data = bytearray((tmp_path / "a.npz").read_bytes())
    if damage == "flipped bytes":
        data[len(data) // 2:len(data) // 2 + 8] = b"\xff" * 8
    if damage == "broken stream":
        data[39] = 0xff                                            # the first byte after the member's name
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.npz"):
        opened = open_images(tmp_path / "a.npz")
        assert damage != "short member"                            # found before hours of work
        read_all(opened)


@pytest.mark.parametrize(("array", "words"), [
    (np.array([None, "x"], dtype=object), "Python objects, which are not read"),
    (np.zeros((2, 8, 8, 3), np.float32), "dtype float32"),
    (np.zeros((2, 3, 8, 8), np.uint8), "shape"),
    (np.zeros((0, 8, 8, 3), np.uint8), "shape"),
    (np.asfortranarray(np.zeros((2, 8, 8, 3), np.uint8)), "Fortran"),
])
def test_npz_with_something_else_in_it(tmp_path, array, words):
    np.savez(tmp_path / "a.npz", arr_0=array)
    with pytest.raises(UserError, match=words):
        open_images(tmp_path / "a.npz")


def test_bad_folders(tmp_path):
    folder = save_folder(tmp_path / "folder", random_images(2, 5))
    for picture, words in ((Image.new("RGB", (16, 16)), r"9\.png is 16x16"), (Image.new("RGBA", (24, 24)), "RGBA")):
        picture.save(folder / "9.png")
        with pytest.raises(UserError, match=words):
            read_all(open_images(folder))
    (folder / "9.png").write_bytes((folder / "000000.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"9\.png cannot be decoded"):
        read_all(open_images(folder))
    (folder / "9.png").unlink()
    os.mkfifo(folder / "8.png")
    (folder / "9.png").symlink_to("/dev/zero")
    assert open_images(folder).n == 2  # regular files only
    for path in (folder / "8.png", "/dev/zero"):
        with pytest.raises(UserError, match="is no regular file; give an npz file or a folder"):
            open_images(path)
    (folder / "7.png").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"7\.png cannot be decoded"):  # named, not left out
        read_all(open_images(folder))


# ---- the scripts ----

def test_five_lines_in_adm_wording(adm):
    names, values = zip(*(line.split(": ") for line in adm["stdout"].splitlines()), strict=True)
    assert names == ("Inception Score", "FID", "sFID", "Precision", "Recall")
    assert tuple(adm["scores"]) == names and (adm["n"], adm["reference_n"]) == (7, 9)
    assert list(values) == [f"{value:.4f}" for value in adm["scores"].values()]  # JSON keeps all digits


def test_coco_protocol(made, quick, monkeypatch, capsys, caplog):
    """A statistics file as U-ViT's for COCO, mu and sigma without a preset, gives FID and nothing else."""
    np.savez(made / "coco.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    call_main(monkeypatch, evaluator, *paths(made, "coco.npz", "sample"), "--preset", "pytorch-fid", "--num-samples", 2)
    assert capsys.readouterr().out == "FID: 1.5000\n"
    assert "coco.npz does not name its preprocessing for Inception; it is taken to be preset pytorch-fid" in caplog.text


def test_two_processes_give_the_scores_of_one(made, adm):
    """7 and 9 images do not divide by two."""
    done = script("evaluations/evaluator.py", *paths(made, "reference.npz", "sample.npz"), "--json", made / "two.json",
                  "--metrics", "is,fid,pr", processes=2)
    assert len(done.stdout.splitlines()) == 4                               # said once
    two = json.loads((made / "two.json").read_text())
    assert (two["n"], two["reference_n"]) == (7, 9)
    for name, value in two["scores"].items():
        assert value == pytest.approx(adm["scores"][name], rel=1e-5)


def test_fid_and_sfid_are_of_the_pool_and_of_the_spatial_features(adm):
    """By NumPy's means and the formula for centred data A, B: tr (S1 S2)^(1/2) = sum of singular values of A B^T."""
    for name, features in (("FID", adm["pool"]), ("sFID", adm["spatial"])):
        x, y = features[:9], features[9:]
        a, b = ((z - z.mean(0)) / np.sqrt(len(z) - 1) for z in (x, y))
        root = np.linalg.svd(a @ b.T)[1].sum()
        plain = ((x.mean(0) - y.mean(0)) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * root
        assert adm["scores"][name] == pytest.approx(plain, rel=1e-4)


def test_statistics_file_replaces_the_images(monkeypatch, made, inception, adm):
    """A file of stats.py holds the statistics of the evaluator's features; they win over images beside them."""
    call_main(monkeypatch, stats, *paths(made, "reference.npz", "stats.npz"), "--images", "4")
    with np.load(made / "stats.npz", allow_pickle=False) as file:
        stored = dict(file)
    assert (int(stored["n"]), str(stored["features"]), str(stored["preset"])) == (9, "inception", "adm")
    assert str(stored["made_of"]) == f"{made}/reference.npz, sha256 {sha256_of(made / 'reference.npz')}"
    rows = [any(np.array_equal(image, other) for image in stored["arr_0"]) for other in random_images(9, 0)]
    assert stored["arr_0"].shape == (4, 24, 24, 3) and sum(rows) == 4
    found = load_set(made / "stats.npz", inception, ("fid", "sfid"), is_reference=True)
    for mu, sigma, features in ((found.mu, found.sigma, adm["pool"]), (found.mu_s, found.sigma_s, adm["spatial"])):
        np.testing.assert_allclose(mu, features[:9].mean(0), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(sigma, np.cov(features[:9].T), rtol=1e-4, atol=1e-7)

    np.savez(made / "other.npz", arr_0=random_images(4, 0), mu=stored["mu"] + 1, sigma=stored["sigma"])
    other = load_set(made / "other.npz", inception, ("fid", "sfid", "pr"), is_reference=True)
    assert np.array_equal(other.mu.numpy(), stored["mu"] + 1) and len(other.pool) == 4
    assert score(other, other, ("sfid",)) == {"sFID": None}


def test_num_samples_takes_the_first(made, lite0):
    few, all_there = (load_set(made / "sample.npz", lite0, ("kid",), limit=limit) for limit in (3, None))
    assert (few.n, all_there.n) == (3, 7)
    torch.testing.assert_close(few.pool, all_there.pool[:3])


def test_few_images_against_statistics_alone(monkeypatch, made, inception, quick, capsys):
    """Scores that need images of both sets are n/a, and may have too few. --metrics may have spaces."""
    call_main(monkeypatch, evaluator, *paths(made, "statistics.npz", "sample.npz"), "--num-samples", 3, "--metrics",
              "is, fid,sfid,pr,")
    assert capsys.readouterr().out.splitlines()[1:] == ["FID: 1.5000", "sFID: n/a", "Precision: n/a", "Recall: n/a"]
    monkeypatch.setattr(scores, "rank", lambda: 1)  # only the first process has the statistics
    assert load_set(made / "statistics.npz", inception, ("fid", "pr")) is None


def test_other_features_keep_their_own_names(monkeypatch, made, lite0, quick, capsys):
    argv = [*paths(made, "reference.npz", "sample.npz"), "--features", "efficientnet-lite0"]
    call_main(monkeypatch, evaluator, *argv)                                                # fid,kid is the default
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "FD-EffLite0 (n = 7, reference n = 9)", "KID-EffLite0 (n = 7, reference n = 9)"]
    write_statistics(made / "some-kept.npz", load_set(made / "reference.npz", lite0, ("fid",)),
                     open_images(made / "reference.npz"), range(5))
    call_main(monkeypatch, evaluator, made / "some-kept.npz", *argv[1:])  # each score counts the images it compares
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "FD-EffLite0 (n = 7, reference n = 9)", "KID-EffLite0 (n = 7, reference n = 5)"]
    monkeypatch.setattr(scores, "precision_recall", lambda x, y, dtype: (torch.finfo(dtype).bits, 0.5))
    for flag, bits in (([], 16), (["--pr-dtype", "float32"], 32)):
        call_main(monkeypatch, evaluator, *argv, "--metrics", "pr", *flag)
        assert capsys.readouterr().out.splitlines() == [f"Precision: {bits}.0000", "Recall: 0.5000"]


@pytest.mark.parametrize(("change", "words"), [
    ({"mu": None}, "only one of mu and sigma"),
    ({"mu": np.zeros(1279), "sigma": np.eye(1279)}, r"expected floats of \(1280,\)"),
    ({"mu": np.full(1280, np.nan)}, "mu holds nan"),
    ({"mu": np.array([None])}, "cannot be read"),
    ({"preset": "pytorch-fid"}, "preset pytorch-fid, not of"),
    ({"features": "inception"}, "of inception with preset adm, not of efficientnet-lite0"),
    ({"mu": None, "sigma": None}, "has the keys features, preset"),
    *(({"n": np.array(n)}, "bad.npz holds no .* .n is .*, expected the number of images") for n in (0, 2.5, "many")),
    ({"sigma": np.diag([1.0] * 1279 + [-0.1])}, "sigma is no covariance: it has negative eigenvalues"),
    ({"sigma": np.eye(1280) + np.eye(1280, k=1) / 4}, "sigma is no covariance: it is not symmetric"),
])
def test_bad_statistics(lite0, tmp_path, change, words):
    arrays = {"mu": np.zeros(1280), "sigma": np.eye(1280), **LITE0_KEYS} | change
    np.savez(tmp_path / "bad.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=words):
        load_set(tmp_path / "bad.npz", lite0, ("fid",))


def test_covariances_of_few_images_in_float32(lite0, tmp_path):
    """Rank 8, rounded to float32: some eigenvalues are negative; it is read all the same."""
    rows = np.random.default_rng(0).normal(3, 5, (9, 1280)).astype(np.float32)
    sigma = np.cov(rows.T).astype(np.float32)
    np.savez(tmp_path / "few.npz", mu=rows.mean(0), sigma=sigma, **LITE0_KEYS)
    assert np.linalg.eigvalsh(sigma).min() < 0 and load_set(tmp_path / "few.npz", lite0, ("fid",)).n is None


def test_wrong_weights(made, tmp_path):
    state = torch.load(made / "inception.pth", weights_only=True)
    for content, words in ((state | {"fc.weight": torch.zeros(1)},
                            "not hold the weights of inception .*size mismatch for fc.weight"),
                           (state | {"fc.weight": 3}, "fc.weight"), ({"a": torch.zeros(1)}, "Unexpected"),
                           ([1], "holds a list")):
        torch.save(content, tmp_path / "changed.pth")
        with pytest.raises(UserError, match=words) as error:
            load_extractor("inception", tmp_path / "changed.pth", verify=False)
        assert len(str(error.value)) < 200 + len(str(tmp_path))    # a sentence, however many keys are wrong
    with pytest.raises(UserError, match="EfficientNet-Lite0"):
        load_extractor("efficientnet-lite0", made / "inception.pth", verify=False)
