"""U-ViT's layout: files read, the caption of each visit, one sentence per kind of damage; captions in grids."""
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data_io.latent_scale import SD_SCALE
from data_io.loader import StepBatches
from dataset import CaptionedImages, LatentDataset
from runtime.errors import UserError
from runtime.images import GAP, MAX_LINES, image_grid, wrap
from tests.conftest import write_tiny_captions

COUNTS = (3, 5, 1, 2)


@pytest.fixture
def captions(tmp_path):
    """Four images per split that a test may damage."""
    return write_tiny_captions(tmp_path / "data", COUNTS)


def test_reads_what_was_written(tiny_captions):
    dataset = CaptionedImages(tiny_captions, "train", 64)
    item, folder = dataset[5], tiny_captions / "train"
    assert len(dataset) == 16 and item["position"] == 5 and dataset.counts[:4] == list(COUNTS)
    with Image.open(folder / "5.png") as picture:
        assert np.array_equal(item["image"].permute(1, 2, 0), np.asarray(picture))
    assert np.array_equal(dataset.condition(5, 4), np.load(folder / "5_4.npy"))
    assert dataset.text(5, 4) == "caption 4 of train image 5" and dataset.text(5) == "caption 0 of train image 5"
    assert dataset.empty_context.shape == (6, 16) and not dataset.empty_context.any()


def test_moments_of_the_file_are_mean_and_log_variance(captions):
    """Clamped to [-30, 20], so that latents are made of mean and std as for ImageNet."""
    moments = np.load(captions / "train/1.npy")
    moments[4, 0, :3] = -100, 0, 100
    np.save(captions / "train/1.npy", moments)
    read = CaptionedImages(captions, "train", 64).moments(1)
    std = np.exp(np.clip(moments[4:].astype(np.float64), -30, 20) / 2)
    np.testing.assert_allclose(read[4, 0, :3], [np.exp(-15), 1, np.exp(10)], rtol=1e-6)
    latents = SD_SCALE.latents(read[None], torch.full((1, 4, 16, 16), 2.0))[0]
    np.testing.assert_allclose(latents, (moments[:4] + 2 * std) * 0.18215, rtol=1e-5)


def test_other_tokens_are_other_data(captions):
    """Of the same counts and shapes, as another text encoder gives: a run is not continued with them."""
    before = CaptionedImages(captions, "train", 64)
    np.save(captions / "empty_context.npy", np.ones((6, 16), np.float32))
    after = CaptionedImages(captions, "train", 64)
    assert before.fingerprint() == after.fingerprint() and before.conditions_key() != after.conditions_key()


def test_a_replaced_picture_changes_the_stamps(captions):
    """Of equal size: the teacher cache then computes it again."""
    dataset, path = CaptionedImages(captions, "train", 64), captions / "train/2.png"
    before = dataset.image_stamps()
    assert dataset.image_stamps() == before and len(before) == len(dataset)
    os.utime(path, ns=(0, 0))
    changed = [i for i, (old, new) in enumerate(zip(before, dataset.image_stamps(), strict=True)) if old != new]
    assert changed == [2]
    with pytest.raises(UserError, match="--teacher-cache needs image_stamps"):  # of a layout that has none
        LatentDataset.image_stamps(dataset)


def shown(dataset, batches, workers=0):
    """(position, number of the caption) of every visit; the first token says which caption it is."""
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers)
    return [(int(i), int(y[0, 0])) for batch in loader
            for i, y in zip(batch["position"], batch["y"], strict=True)]


def test_caption_is_a_function_of_seed_epoch_and_image(tiny_captions):
    """Start, batch size, processes and workers change nothing; all captions of an image are shown."""
    dataset = CaptionedImages(tiny_captions, "train", 64, seed=3, images=False)
    whole = shown(dataset, StepBatches(16, 8, 3, 0, 80))
    by_epoch = [dict(whole[16 * epoch:16 * epoch + 16]) for epoch in range(40)]
    for i, count in enumerate(dataset.counts):
        assert {captions[i] for captions in by_epoch} == set(range(count))
    assert shown(dataset, StepBatches(16, 8, 3, 75, 80), workers=2) == whole[75 * 8:]
    parts = [shown(dataset, StepBatches(16, 8, 3, 0, 4, process=p, processes=2)) for p in range(2)]
    assert [visit for step in range(4) for p in range(2) for visit in parts[p][4 * step:4 * step + 4]] == whole[:32]
    assert shown(dataset, StepBatches(16, 2, 3, 0, 16)) == whole[:32]
    other_seed = CaptionedImages(tiny_captions, "train", 64, seed=4, images=False)
    assert sorted(shown(other_seed, StepBatches(16, 8, 3, 0, 2))) != sorted(whole[:16])


def test_any_subset_any_shape_and_no_texts(tmp_path):
    """Gaps in the numbers, another text encoder, no captions.json; moments and pictures only where they are needed."""
    data = write_tiny_captions(tmp_path, COUNTS, shape=(77, 8), texts=False)
    for path in [data / "train/1.png", *(data / "train").glob("1[._]*npy"), *(data / "val").glob("?.*")]:
        path.unlink()
    dataset = CaptionedImages(data, "train", 64)
    assert dataset.indices == [0, 2, 3] and dataset.texts is None and dataset[1]["y"].shape == (77, 8)
    for path in (data / "train").glob("*.png"):
        path.unlink()
    assert "image" not in CaptionedImages(data, "train", 64, images=False)[2]
    val = CaptionedImages(data, "val", 64, images=False, latents=False)
    assert val.counts == list(COUNTS) and val.condition(3, 1).shape == (77, 8)


def test_fingerprint_follows_the_data(captions):
    one = CaptionedImages(captions, "train", 64).fingerprint()
    shutil.move(captions, captions.with_name("moved"))
    assert one == CaptionedImages(captions.with_name("moved"), "train", 64, seed=1).fingerprint()
    (captions.with_name("moved") / "train/captions.json").unlink()
    (captions.with_name("moved") / "train/1_4.npy").unlink()
    assert CaptionedImages(captions.with_name("moved"), "train", 64).fingerprint() != one


def test_captions_stand_under_the_pictures():
    """Each row of pictures has room for the longest caption. White gaps are between the cells."""
    images = torch.arange(3 * 3 * 64 * 64).reshape(3, 3, 64, 64).to(torch.uint8)
    for texts in (None, ["red heart", "a " * 200, "\u30cf\u30fc\u30c8"]):
        grid = image_grid(images, texts=texts)
        height = (grid.shape[0] - GAP) // 2
        assert grid.shape == (2 * height + GAP, 128 + GAP, 3) and (height > 64 + 4 * 9 if texts else height == 64)
        assert (grid[height:, 64:] == 255).all() and (grid[height:height + GAP] == 255).all()
        for row, column, image in ((0, 0, 0), (0, 1, 1), (1, 0, 2)):
            top, left = row * (height + GAP), column * (64 + GAP)
            cell = grid[top:top + height, left:left + 64]
            assert np.array_equal(cell[:64], images[image].permute(1, 2, 0))
            assert not texts or (cell[64:].min() < 100 and (cell[64:, 0] == 255).all())


def test_small_pictures_are_shown_larger():
    """By whole pixels, so that 32 px become 64 and 24 become 72; words fit under them then."""
    images = torch.arange(2 * 3 * 24 * 24).reshape(2, 3, 24, 24).to(torch.uint8)
    grid = image_grid(images, 2)
    assert grid.shape == (72, 144 + GAP, 3)
    assert np.array_equal(grid[1::3, 1:72:3], images[0].permute(1, 2, 0)) and np.array_equal(grid[::3], grid[2::3])
    assert image_grid(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), texts=["automobile"]).shape[1] == 64


def test_wrapping_keeps_to_width_and_lines():
    """Also quick for a caption as long as a page."""
    for text, width, lines in (("flag: Japan", 20, ["flag: Japan"]), ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 5]),
                               ("one two three four five six seven eight", 8, ["one two", "three", "four", "five..."]),
                               ("", 10, [])):
        assert wrap(text, width, len) == lines and len(lines) <= MAX_LINES
    text = "a word and another one " * 500
    begin = time.perf_counter()
    assert wrap(text, 64, len)[0].startswith("a word")
    assert wrap("x" * 10_000, 64, lambda line: 9 * len(line))[-1].endswith("...")
    assert time.perf_counter() - begin < 2
