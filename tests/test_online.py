"""--encode-online: encoding images in the step equals cached latents; images may be mirrored and cropped."""
import shutil

import pytest
import torch

import train
from data_io.loader import StepBatches
from dataset import LatentImages
from encoders.online import EncodedImages
from encoders.vae import VAE
from evaluations.student import look_inside
from preprocessing import dataset_tools
from tests.conftest import CLASSES, call_main, checkpoint, metrics, script, train_arguments, write_tiny_data
from tests.test_latents import write_vae
from tests.test_resume import assert_same_run
from tests.test_storage import packed_into


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "f4", 3, 4, scaling_factor=0.6, shift_factor=0.1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """16 entries at 32 px, without latents."""
    data = write_tiny_data(tmp_path_factory.mktemp("pictures"), count=16, resolution=32)
    shutil.rmtree(data / "vae-sd")
    return data


def arguments(data, out, *more):
    return train_arguments(data, out, "--resolution", 32, "--max-train-steps", 4, "--early-stop-point", 2, *more)


def losses(out):
    return [float(row["loss"]) for row in metrics(out)]


def test_the_run_is_that_of_cached_latents(monkeypatch, vae, pictures, teacher_file, tmp_path):
    """In both phases, with the scale noted in the data; the tools that inspect a run encode images, too."""
    shutil.copytree(pictures / "images", tmp_path / "cached/images")
    call_main(monkeypatch, dataset_tools, "encode", "--source", pictures / "images", "--dest",
              tmp_path / "cached/vae-sd", "--model-url", vae)
    call_main(monkeypatch, dataset_tools, "stats", "--data", tmp_path / "cached")
    scaled = tmp_path / "scaled"  # images and a note of the same VAE
    shutil.copytree(pictures / "images", scaled / "images")
    shutil.copy(tmp_path / "cached/latents.json", scaled)
    teacher = ("--enc-weights", teacher_file)
    call_main(monkeypatch, train, *arguments(tmp_path / "cached", tmp_path / "a", *teacher))
    monkeypatch.setattr("training.previews.PREVIEW_STEPS", 2)
    call_main(monkeypatch, train, *arguments(scaled, tmp_path / "b", *teacher, "--encode-online", "--sampling-steps",
                                             4))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    a, b = (checkpoint(tmp_path / run, 4) for run in "ab")
    ours, theirs = (torch.cat([value.flatten() for value in state["model"].values()]) for state in (a, b))
    assert (ours - theirs).norm() < 1e-4 * ours.norm()  # AdamW moves a weight as far for a rounding-error gradient
    assert a["args"]["latents"] == b["args"]["latents"] and len(b["args"]["latents"]["scale"]) == 4
    assert (tmp_path / "b/run/previews/0000004.png").is_file()
    assert look_inside(tmp_path / "b/run/checkpoints/0000004.pt", 2, 0.5)["cosine"] is not None
    call_main(monkeypatch, train, *arguments(pictures, tmp_path / "c", "--enc-type", "none", "--vae", vae,
                                             "--encode-online", "--max-train-steps", 1))
    assert checkpoint(tmp_path / "c", 1)["args"]["latents"] == {"scale": 0.6, "shift": 0.1}


def test_a_restart_and_two_processes(monkeypatch, vae, pictures, teacher_file, tmp_path):
    """With mirrored and cropped images: 4 steps are 2 + 2 bit for bit; two processes have the same losses."""
    more = ("--enc-weights", teacher_file, "--vae", vae, "--encode-online", "--hflip", "--random-crop", "--resolution",
            24)
    call_main(monkeypatch, train, *arguments(pictures, tmp_path / "whole", *more))
    for stop in (2, 4):
        call_main(monkeypatch, train, *arguments(pictures, tmp_path / "parts", *more, "--max-train-steps", stop))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)
    script("train.py", *arguments(pictures, tmp_path / "two", *more), processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_images_as_an_epoch_sees_them(vae, pictures, tmp_path):
    """(seed, epoch, position) sets mirroring and cropping; folder and packed rows agree."""
    network = VAE(str(vae))
    whole = LatentImages.picture
    data = EncodedImages(pictures, 24, CLASSES, seed=3, hflip=True, vae=network, crop=True)
    packed = EncodedImages(packed_into(pictures, tmp_path / "packed", "--images-only", "--resolution", 32), 24, CLASSES,
                           seed=3, hflip=True, vae=network, crop=True)
    assert data.moments_shape == (8, 6, 6) and len(data) == 16
    places, mirrored = set(), 0
    for sample_id in range(5, 12 * 16, 16):
        image, full = data[sample_id]["image"], whole(data, 5, 32)
        found = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)
                 if torch.equal(full[:, top:top + 24, left:left + 24].flip([-1] * flip), image)]
        assert len(found) == 1 and torch.equal(packed[sample_id]["image"], image)
        assert torch.equal(data[sample_id]["image"], image)
        places.add(found[0][:2])
        mirrored += found[0][2]
    assert len(places) > 6 and 0 < mirrored < 12
    assert torch.equal(data.image(5), whole(data, 5, 32)[:, 4:28, 4:28])
    assert torch.equal(data.encode(data.image(5)[None]), network.encode(data.image(5)[None]))
    batch = data.batch(next(iter(StepBatches(16, 4, 3, 0, 1))))
    assert batch["image"].shape == (4, 3, 24, 24) and "moments" not in batch
    other = EncodedImages(pictures, 24, CLASSES, seed=3, vae=VAE(str(write_vae(tmp_path / "other", 3, 6))), crop=True)
    assert data.fingerprint() == packed.fingerprint() != other.fingerprint()


def test_what_does_not_go_together(refused, vae, pictures, tmp_path):
    cached = arguments(pictures, tmp_path, "--enc-type", "none", "--vae", vae)
    online, cropped = [*cached, "--encode-online"], [*cached, "--encode-online", "--random-crop"]
    refused("--encode-online is for a VAE's latents, and --vae none has pixels", train, *online, "--vae", "none")
    refused("--random-crop cuts images, of which there are no latents", train, *cached, "--random-crop")
    refused("those in .* have 32 pixels a side; give a --resolution below", train, *cropped, "--resolution", 40)
    refused("--random-crop shows images that --teacher-cache has no outputs of", train, *cropped, "--teacher-cache",
            tmp_path)
    refused("--resolution 30 is no multiple of 4, the factor of the VAE", train, *cropped, "--resolution", 30)
