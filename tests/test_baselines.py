"""evaluations/baselines.py on tiny data and random scorer weights."""
import json

import numpy as np
import pytest
import torch

from evaluations import baselines, features
from evaluations.images import FolderImages, decode
from tests.conftest import ROOT, call_main, write_tiny_data
from tests.test_evaluations_metrics import save_efficientnet


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Command line for samples that are the eight held-out images themselves."""
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    save_efficientnet(tmp_path / "scorer.pth")
    write_tiny_data(tmp_path / "train", 24)
    images = FolderImages(write_tiny_data(tmp_path / "val", 8) / "images").files
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([decode(path) for path in images]))
    return [tmp_path / "samples.npz", "--data", tmp_path, "--vae", ROOT / "assets/vae-emoji", "--efficientnet-weights",
            tmp_path / "scorer.pth"]


def test_rows_are_what_they_are_called(monkeypatch, arguments, tmp_path, capsys):
    call_main(monkeypatch, baselines, *arguments)
    found = json.loads((tmp_path / "samples-scores.json").read_text())
    scores = {name: row["held-out"]["FD-EffLite0"] for name, row in found["scores"].items()}
    assert scores["samples"] == pytest.approx(0, abs=1e-5)
    assert 0 < scores["held-out through the VAE"] < scores["noise"]
    assert set(found["n"].values()) == {8} and len(found["n"]) == 6
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "n = 8 images a set, 8 of each reference"
    assert [line.split("  ")[0] for line in table[2:6]] == list(scores)


def test_training_images_that_are_scored_are_not_the_reference(monkeypatch, arguments):
    """They are two disjoint parts of one permutation. The images of the VAE's row are encoded and decoded."""
    monkeypatch.setattr("sys.argv", ["baselines", *map(str, arguments)])
    references, sets = baselines.image_sets(baselines.parse_args(), 8, torch.device("cpu"))
    training, scored = references["training"].files, sets["training through the VAE"].images.files
    assert len(training) == len(scored) == 8 and len({*training, *scored}) == 16
    through = sets["held-out through the VAE"]
    original, decoded = (next(each.batches(0, 8, 8)) for each in (references["held-out"], through))
    assert original.shape == decoded.shape and 0 < np.abs(original.astype(float) - decoded).mean() < 60
