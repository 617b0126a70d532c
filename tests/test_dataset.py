"""The ImageNet layout: what is read, in which order, and one sentence with the file's name for each damage."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import LatentImages
from encoders import VAE
from loader import StepBatches, process_places, step_draws
from tests.conftest import CLASSES


def test_reads_what_was_written(tiny_data):
    dataset = LatentImages(tiny_data, 64, CLASSES)
    item = dataset[5]
    assert len(dataset) == 64 and item["y"] == 1 and item["position"] == 5
    with Image.open(tiny_data / "images/00000/img00000005.png") as picture:
        assert np.array_equal(item["image"].permute(1, 2, 0), np.asarray(picture))
    moments = np.load(tiny_data / "vae-sd/00000/img-mean-std-00000005.npy")
    assert np.array_equal(item["moments"], moments)
    z = VAE.latents(item["moments"][None], torch.full((1, 4, 16, 16), 2.0))
    torch.testing.assert_close(z[0], torch.from_numpy(moments[:4] + 2 * moments[4:]) * 0.18215)


def test_no_image_is_opened_in_phase_two(tiny_data, monkeypatch):
    dataset = LatentImages(tiny_data, 64, CLASSES)
    dataset.images = False
    monkeypatch.setattr("dataset.decode_image", lambda *_: pytest.fail("an image was decoded"))
    assert "image" not in dataset[0]


def test_latents_alone_are_enough_without_a_teacher(data):
    shutil.rmtree(data / "images")
    dataset = LatentImages(data, 64, CLASSES, images=False)
    assert dataset[3]["y"] == 3 and "image" not in dataset[3]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_null_labels_in_one_folder(data):
    edit_json(data / "vae-sd/dataset.json", lambda c: c.update(labels=None))
    assert LatentImages(data, 64, CLASSES)[3]["y"] == 3


def test_order_is_a_function_of_seed_and_step():
    """Each epoch shows every entry once, and any start, process count and accumulation see the same global batches."""
    whole = [batch for batch in StepBatches(10, 4, 0, 0, 10)]
    flat = [visit for batch in whole for visit in batch]
    for epoch in range(4):
        assert sorted(flat[10 * epoch:10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))
    assert flat[:10] != [visit - 10 for visit in flat[10:20]]
    assert list(StepBatches(10, 4, 0, 6, 10)) == whole[6:]
    assert list(StepBatches(10, 4, 1, 0, 10)) != whole
    parts = [list(StepBatches(10, 4, 0, 0, 10, process=p, processes=2, accumulation=2)) for p in range(2)]
    for step, batch in enumerate(whole):
        assert [i for a in range(2) for p in range(2) for i in parts[p][2 * step + a]] == batch


def test_draws_are_a_function_of_seed_and_step():
    a, b = step_draws(0, 7, 8, (4, 2, 2)), step_draws(0, 7, 8, (4, 2, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["noise"], step_draws(0, 8, 8, (4, 2, 2))["noise"])
    assert not torch.equal(a["noise"], step_draws(1, 7, 8, (4, 2, 2))["noise"])
    places = [process_places(8, p, 2, 2, micro) for micro in range(2) for p in range(2)]
    assert [i for s in places for i in range(s.start, s.stop)] == list(range(8))
