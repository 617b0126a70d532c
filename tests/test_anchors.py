"""The quickstart's scores: evaluations/anchors.py on tiny data and random scorer weights."""
import json

import numpy as np
import pytest
import timm
import torch

from evaluations import anchors, features
from evaluations.images import FolderImages, decode
from files import BadInput
from tests.conftest import ROOT, call_main, write_tiny_data


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """Command line for samples that are the eight held-out images themselves."""
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "scorer.pth")
    write_tiny_data(tmp_path / "train", 24)
    images = FolderImages(write_tiny_data(tmp_path / "val", 8) / "images").files
    np.savez(tmp_path / "samples.npz", arr_0=np.stack([decode(path) for path in images]))
    return [tmp_path / "samples.npz", "--data", tmp_path, "--vae", ROOT / "assets/vae-emoji", "--efficientnet-weights",
            tmp_path / "scorer.pth"]


def test_rows_are_what_they_are_called(monkeypatch, arguments, tmp_path, capsys):
    call_main(monkeypatch, anchors, *arguments)
    found = json.loads((tmp_path / "samples-scores.json").read_text())
    scores = {name: row["held-out"]["FD-EffLite0"] for name, row in found["scores"].items()}
    assert scores["samples"] == pytest.approx(0, abs=1e-5)
    assert 0 < scores["held-out through the VAE"] < scores["noise"]
    assert set(found["n"].values()) == {8} and len(found["n"]) == 6
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "n = 8 images a set, 8 of each reference" and [line.split("  ")[0] for line in table[2:6]] == list(scores)


def test_training_images_that_are_scored_are_not_the_reference(monkeypatch, arguments):
    """They are two disjoint choices from one permutation."""
    sets, load_set = [], anchors.load_set
    monkeypatch.setattr(anchors, "load_set", lambda images, *more, **named: sets.append(images) or
                        load_set(images, *more, **named))
    monkeypatch.setattr(anchors, "reconstruct", lambda vae, images: images)
    call_main(monkeypatch, anchors, *arguments)
    _, reference, _, _, scored, _ = sets
    assert reference.shape == scored.shape == (8, 64, 64, 3)
    assert len(np.unique(np.concatenate([reference, scored]).reshape(16, -1), axis=0)) == 16


def test_samples_of_another_size(monkeypatch, arguments, tmp_path):
    np.savez(tmp_path / "samples.npz", arr_0=np.zeros((8, 32, 32, 3), np.uint8))
    with pytest.raises(BadInput, match="has images of 64x64 but .*samples.npz has images of 32x32"):
        call_main(monkeypatch, anchors, *arguments)
