"""evaluations/baselines.py on tiny data and random scorer weights."""
import json
from argparse import Namespace

import numpy as np
import pytest
import torch

from evaluations import baselines, features, scores
from evaluations.images import FolderImages, decode
from runtime.errors import UserError
from tests.conftest import ROOT, call_main, write_tiny_data
from tests.test_evaluations_metrics import save_efficientnet

VAE = ROOT / "assets/vae-emoji"


def test_rows_are_what_they_are_called(monkeypatch, tmp_path, capsys):
    """The samples are the eight held-out images themselves."""
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    monkeypatch.setattr(scores, "frechet_distance", lambda mu, _, mu2, __: (mu - mu2).square().sum().item())  # sooner
    save_efficientnet(tmp_path / "scorer.pth")
    write_tiny_data(tmp_path / "train", 24)
    images = FolderImages(write_tiny_data(tmp_path / "val", 8) / "images").files
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([decode(path) for path in images]))
    call_main(monkeypatch, baselines, tmp_path / "samples.npz", "--data", tmp_path, "--vae", VAE,
              "--efficientnet-weights", tmp_path / "scorer.pth")
    found = json.loads((tmp_path / "samples-scores.json").read_text())
    of_held_out = {name: row["held-out"]["FD-EffLite0"] for name, row in found["scores"].items()}
    assert of_held_out["samples"] == pytest.approx(0, abs=1e-5)
    assert 0 < of_held_out["held-out through the VAE"] < of_held_out["noise"]
    assert set(found["n"].values()) == {8} and len(found["n"]) == 6
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "n = 8 images a set, 8 of each reference"
    assert [line.split("  ")[0] for line in table[2:6]] == list(of_held_out)

    # Scored training images are not in the reference.
    args = Namespace(samples=None, data=tmp_path, vae=VAE, seed=0, reference_images=None)
    references, sets = baselines.image_sets(args, 8, torch.device("cpu"))
    training, scored = references["training"].files, sets["training through the VAE"].images.files
    assert len(training) == len(scored) == 8 and len({*training, *scored}) == 16
    with pytest.raises(UserError, match="has 17 images, more than the 8 held-out or the 16 other training images"):
        baselines.image_sets(args, 17, torch.device("cpu"))
