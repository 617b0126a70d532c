"""The ImageNet layout: files read, their order, and one sentence with the file's name for each kind of damage."""
import itertools
import shutil
import threading
import time

import numpy as np
import pytest
import torch

from data_io.loader import StepBatches, load_noise, microbatch_slice, step_noise, work_ahead
from data_io.moments import check_shape
from dataset import CaptionedImages, LatentImages
from runtime.errors import UserError
from tests.conftest import CLASSES, write_tiny_captions
from tests.test_storage import packed_into


def test_images_are_read_only_where_they_are_needed(data, monkeypatch):
    """Phase II and runs without a teacher need no images; labels may be null in one of the folders."""
    dataset = LatentImages(data, 64, CLASSES)
    dataset.images = False
    monkeypatch.setattr("dataset.decode_image", lambda *_: pytest.fail("an image was decoded"))
    assert "image" not in dataset[0]
    labels = (data / "vae-sd/dataset.json").read_text()
    (data / "vae-sd/dataset.json").write_text('{"labels": null}')
    assert LatentImages(data, 64, CLASSES, images=False)[3]["y"] == 3
    (data / "vae-sd/dataset.json").write_text(labels)
    shutil.rmtree(data / "images")
    dataset = LatentImages(data, 64, CLASSES, images=False)
    assert dataset[3]["y"] == 3 and "image" not in dataset[3]


def test_latents_of_no_shape():
    for shape in ((0, 16, 16), (8, 0, 0), (8, 16, 8), (7, 16, 16), (16,)):
        with pytest.raises(UserError, match="expected .2 x channels, side, side"):
            check_shape(shape, 64, "x.npy")


@pytest.mark.parametrize("packed", [False, True])
def test_moments_of_the_other_layout(data, tmp_path, packed):
    """A negative std must be a log variance; if no log variance is negative, they must be stds."""
    data = packed_into(data, tmp_path / "packed") if packed else data
    last = data / "vae-sd" / ("00000.npy" if packed else "00000/img-mean-std-00000007.npy")
    moments = np.load(last)
    (moments[-1] if packed else moments)[4:] = -4.6
    np.save(last, moments)
    dataset = LatentImages(data, 64, CLASSES, images=False)
    dataset.batch([0, 1])
    with pytest.raises(UserError, match="00000007.* negative std: it looks like mean and log variance"):
        dataset.batch([0, 7])
    texts = write_tiny_captions(tmp_path / "texts", (2, 1))
    for split in ("train", "val"):
        for i in (0, 1):
            moments = np.load(texts / split / f"{i}.npy")
            np.save(texts / split / f"{i}.npy", np.concatenate([moments[:4], 0 * moments[4:] + 0.1]))
    with pytest.raises(UserError, match="they look like mean and std, the ImageNet layout"):
        CaptionedImages(texts, "train", 64)


def test_names_of_classes(data):
    (data / "classes.json").write_text('["ant", "bee", "cow", "dog"]')
    dataset = LatentImages(data, 64, CLASSES)
    assert dataset.class_names[3] == "dog" and dataset.text(6) == "cow" and dataset.texts
    for bad in ('["ant", "bee", "cow"]', "[1, 2, 3, 4]"):
        (data / "classes.json").write_text(bad)
        with pytest.raises(UserError, match="classes.json must hold a list of 4 names, one for each class; make"):
            LatentImages(data, 64, CLASSES)


def test_order_is_a_function_of_seed_and_step():
    """Each epoch shows every entry once, and any start, process count and accumulation see the same global batches."""
    whole = [batch for batch in StepBatches(10, 4, 0, 0, 10)]
    flat = [sample_id for batch in whole for sample_id in batch]
    for epoch in range(4):
        assert sorted(flat[10 * epoch:10 * epoch + 10]) == list(range(10 * epoch, 10 * epoch + 10))
    assert flat[:10] != [sample_id - 10 for sample_id in flat[10:20]]
    assert list(StepBatches(10, 4, 0, 6, 10)) == whole[6:]
    assert list(StepBatches(10, 4, 1, 0, 10)) != whole
    parts = [list(StepBatches(10, 4, 0, 0, 10, process=p, processes=2, accumulation=2)) for p in range(2)]
    for step, batch in enumerate(whole):
        assert [i for a in range(2) for p in range(2) for i in parts[p][2 * step + a]] == batch


def test_noise_is_a_function_of_seed_step_and_place():
    """Any split into processes and micro-batches sees, bit for bit, what a counter of place and step gives."""
    shape, whole = (4, 2, 2), step_noise(3, 7, slice(0, 8), (4, 2, 2))
    key = np.random.SeedSequence((3, 1)).generate_state(2, np.uint64)
    for place in range(8):
        rng = np.random.Generator(np.random.Philox(key=key, counter=(0, 0, place, 7)))
        u, drop = rng.random(2, dtype=np.float32)
        noise, posterior = (torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)) for _ in range(2))
        assert whole["u"][place] == u.item() and whole["drop"][place] == drop.item()
        assert torch.equal(whole["noise"][place], noise) and torch.equal(whole["posterior"][place], posterior)
    slices = [microbatch_slice(8, p, 2, 2, micro) for micro in range(2) for p in range(2)]
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(8))
    parts = [step_noise(3, 7, range(s.start, s.stop), shape) for s in slices]
    for name, values in whole.items():
        assert values.dtype == torch.float32
        assert torch.equal(torch.cat([part[name] for part in parts]), values)
        assert not torch.equal(step_noise(3, 8, slice(0, 8), shape)[name], values)
        assert not torch.equal(step_noise(4, 7, slice(0, 8), shape)[name], values)


def test_each_micro_batch_comes_with_its_noise():
    batches = StepBatches(10, 8, 5, 2, 4, process=1, processes=2, accumulation=2)
    found = list(load_noise(batches, (4, 2, 2), pin=False))
    expected = [step_noise(5, step, slice(start, start + 2), (4, 2, 2)) for step in (2, 3) for start in (2, 6)]
    assert len(found) == len(expected) == len(batches)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected, strict=True) for name in a)


def test_work_ahead_is_done_while_the_caller_is_busy_and_ends_with_it():
    """A few results are ready ahead; however the caller leaves, threads end and no new work starts."""
    begun, threads = [], threading.active_count()

    def work(item):
        begun.append(item)
        return 6 // (6 - item)

    results = work_ahead(work, itertools.count(), 1)
    assert next(results) == 1
    while len(begun) < 3:
        time.sleep(0.001)
    time.sleep(0.02)
    assert begun == [0, 1, 2] and threading.active_count() == threads + 1
    del results
    assert begun == [0, 1, 2] and threading.active_count() == threads
    with pytest.raises(ZeroDivisionError):
        list(work_ahead(work, itertools.count(), 1))
    assert threading.active_count() == threads
