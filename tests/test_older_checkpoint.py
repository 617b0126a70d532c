"""A run begun by the code of commit 61b1645, before the packages: it continues, and its samples are the same."""
import shutil

import numpy as np

import generate
import train
from tests.conftest import ROOT, call_main, checkpoint, metrics, train_arguments, write_tiny_data

CHECKPOINT = ROOT / "tests/assets/run-of-61b1645.pt"  # train_arguments on 16 tiny images, --enc-type none, 2 steps


def test_it_continues(monkeypatch, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    shutil.copy(CHECKPOINT, tmp_path / "run/checkpoints/0000002.pt")
    data = write_tiny_data(tmp_path / "data", count=16)
    call_main(monkeypatch, train, *train_arguments(data, tmp_path, "--enc-type", "none", "--max-train-steps", 3))
    assert [row["step"] for row in metrics(tmp_path)] == ["3"]
    before, after = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    steps = [{int(entry["step"]) for entry in state["opt"]["state"].values()} for state in (before, after)]
    assert steps == [{2}, {3}]
    assert "the noise stream has changed since" in (tmp_path / "run/log.txt").read_text()


def test_its_samples_are_the_same(monkeypatch, tmp_path):
    """Equal byte for byte to its own generate.py's; another CPU may round a value the other way."""
    call_main(monkeypatch, generate, "--ckpt", CHECKPOINT, "--vae", ROOT / "assets/vae-emoji", "--num-fid-samples", 2,
              "--num-steps", 4, "--mode", "sde", "--cfg-scale", 2, "--labels", "balanced", "--sample-dir", tmp_path)
    [path] = tmp_path.glob("*.npz")
    found, expected = (np.load(each, allow_pickle=False)["arr_0"].astype(int)
                       for each in (path, ROOT / "tests/assets/samples-of-61b1645.npz"))
    assert abs(found - expected).max() <= 1 and (found == expected).mean() > 0.99
