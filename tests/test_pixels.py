"""--vae none: pixels as latents, in the data set, training, sampling and the tools that inspect a run."""
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
import train_t2i
from data_io.latent_scale import scale_of
from data_io.loader import StepBatches
from dataset import PixelImages, pixel_moments
from encoders.teachers import Teacher
from encoders.vae import Pixels, open_vae
from evaluations.student import look_inside, noised
from loss import SILoss
from preprocessing import dataset_tools
from runtime.errors import UserError
from sampling.pipeline import load_pipeline
from tests.conftest import CLASSES, call_main, checkpoint, tiny_run, train_arguments, write_tiny_data
from tests.test_generate import make_checkpoint
from tests.test_resume import assert_same_run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """64 entries at 64 px, without latents."""
    data = write_tiny_data(tmp_path_factory.mktemp("pictures"))
    shutil.rmtree(data / "vae-sd")
    return data


def arguments(data, out, *more):
    return train_arguments(data, out, "--model", "SiT-N/8", "--vae", "none", "--early-stop-point", 3, *more)


def test_pixels_come_back_equal():
    """Every byte, at any float dtype that a sampler may use; what lies outside is clipped."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3 * 4).view(1, 3, 32, 32)
    vae = open_vae("none")
    assert isinstance(vae, Pixels) and vae.factor == 1
    moments = vae.encode(images)
    mean, std = moments.chunk(2, dim=1)
    assert mean.dtype == torch.float32 and mean.min() == -1 and mean.max() == 1 and not std.any()
    latents = vae.latent_scale.latents(moments, torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(latents, 2 * (images / 127.5 - 1))
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(vae.decode(latents.to(dtype)), images)
    far = vae.decode(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert far.dtype == torch.uint8 and far[0, 0, 0].tolist() == [0, 255]


def test_the_args_of_a_training_say_the_scale(tiny_data):
    assert scale_of({"vae": "none"}) == Pixels.latent_scale == (2, 0)
    assert scale_of({}) == scale_of({"vae": "mse"}) == (0.18215, 0)
    pixels = PixelImages(tiny_data, 64, CLASSES)
    x = noised(pixels, [3], 0, {"vae": "none"})
    torch.testing.assert_close(x[0], 2 * (pixels.image(3) / 127.5 - 1))


def test_the_picture_is_the_moments(pictures):
    data = PixelImages(pictures, 64, CLASSES, images=False)
    batch = data.batch([5, 9])
    for row, i in enumerate((5, 9)):
        pixels = np.asarray(Image.open(pictures / f"images/00000/img{i:08d}.png")).transpose(2, 0, 1)
        assert torch.equal(data.moments(i), pixel_moments(torch.from_numpy(pixels.copy())[None])[0])
        assert torch.equal(batch["moments"][row], data.moments(i)) and batch["y"][row] == i % CLASSES
    assert "image" not in batch and data.decodes and data.moments_shape == (6, 64, 64)
    data.images = True
    assert torch.equal(data[5]["image"], data.image(5))


def test_packed_images_alone(refused, monkeypatch, pictures, tmp_path):
    """pack --images-only needs no latents and gives the same data set, to its name."""
    call_main(monkeypatch, dataset_tools, "pack", "--source", pictures, "--dest", tmp_path / "packed", "--images-only",
              "--resolution", 64, "--num-workers", 1)
    plain, packed = (PixelImages(folder, 64, CLASSES) for folder in (pictures, tmp_path / "packed"))
    assert plain.fingerprint() == packed.fingerprint() and not packed.decodes
    one, other = plain.batch([3, 60]), packed.batch([3, 60])
    assert all(torch.equal(one[name], other[name]) for name in ("image", "moments", "y"))
    assert not (tmp_path / "packed/vae-sd").exists()
    refused("leave nothing to pack", dataset_tools,
            "pack", "--source", pictures, "--dest", tmp_path / "x", "--images-only", "--latents-only")


def test_mirrored(pictures):
    """Some samples are the mirror image, as moments and as picture alike; no vae-sd-hflip is needed."""
    data, plain = PixelImages(pictures, 64, CLASSES, seed=5, hflip=True), PixelImages(pictures, 64, CLASSES)
    items = [data[sample_id] for sample_id in range(32)]
    mirrored = [torch.equal(item["image"], plain.image(i).flip(-1)) for i, item in enumerate(items)]
    assert 8 < sum(mirrored) < 24
    for i, item in enumerate(items):
        assert torch.equal(item["image"], plain.image(i).flip(-1) if mirrored[i] else plain.image(i))
        assert torch.equal(item["moments"], pixel_moments(item["image"][None])[0])


def test_a_run_on_pixels(monkeypatch, pictures, teacher_file, tmp_path):
    """Six steps are two and two and two, across the early stop, with previews and samples, all without diffusers; the
    network trains on scaled pixels, in the data order."""
    monkeypatch.setitem(sys.modules, "diffusers", None)  # an import raises
    monkeypatch.setattr("training.previews.PREVIEW_STEPS", 2)
    see, seen = Teacher.__call__, set()
    monkeypatch.setattr(Teacher, "__call__",
                        lambda self, images: seen.add((self.input_size, self.grid)) or see(self, images))
    loss, trained_on = SILoss.__call__, []
    monkeypatch.setattr(SILoss, "__call__",
                        lambda self, net, x, *rest: trained_on.append(x) or loss(self, net, x, *rest))
    more = ("--enc-weights", teacher_file, "--enc-size", 56, "--sampling-steps", 6)
    call_main(monkeypatch, train, *arguments(pictures, tmp_path / "whole", *more))
    data = PixelImages(pictures, 64, CLASSES)
    for x, sample_ids in zip(trained_on, StepBatches(64, 8, 0, 0, 6), strict=True):
        torch.testing.assert_close(x, 2 * (torch.stack([data.image(i) for i in sample_ids]) / 127.5 - 1))
    for stop in (2, 4, 6):
        call_main(monkeypatch, train, *arguments(pictures, tmp_path / "parts", *more, "--max-train-steps", stop))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 6)
    saved = checkpoint(tmp_path / "whole", 6)
    assert saved["args"]["vae"] == "none" and saved["ema"]["x_embedder.proj.weight"].shape == (32, 3, 8, 8)
    truth = np.asarray(Image.open(tmp_path / "whole/run/previews/truth.png"))
    first = int(np.random.default_rng(0).permutation(64)[0])
    assert np.array_equal(truth[:64, :64], np.asarray(Image.open(pictures / f"images/00000/img{first:08d}.png")))
    assert (tmp_path / "whole/run/previews/0000006.png").is_file()

    ckpt = tmp_path / "whole/run/checkpoints/0000006.pt"
    call_main(monkeypatch, generate, "--ckpt", ckpt, "--sample-dir", tmp_path / "made", "--num-fid-samples", 4,
              "--num-steps", 3, "--labels", "balanced")
    [folder] = (tmp_path / "made").glob("*-vae-none-*-high-1.0")
    images = load_pipeline(ckpt)([0, 1, 2, 3], num_steps=3)
    for i, image in enumerate(images):
        assert image.size == (64, 64) and np.array_equal(image, np.asarray(Image.open(folder / f"{i:06d}.png")))
    found = look_inside(ckpt, 2, 0.5)
    assert found["side"] == 8 and len(found["images"]) == 2 and seen == {(56, 4), (56, 8)}  # the run, and look_inside


def test_scores_along_a_run(monkeypatch, pictures, tmp_path):
    """The evaluation is given Pixels to decode with."""
    seen = []
    monkeypatch.setattr("training.trainer.Evaluation", lambda _args, _a, _data, vae, *_: seen.append(vae) or (
        lambda _: {}))
    call_main(monkeypatch, train, *arguments(
        pictures, tmp_path, "--enc-type", "none", "--max-train-steps", 1, "--eval-steps", 1, "--eval-ref",
        pictures / "images", "--eval-features", "efficientnet-lite0"))
    assert isinstance(seen[0], Pixels)


def test_what_does_not_go_together(refused, monkeypatch, tiny_data, pictures, tmp_path):
    """One sentence each."""
    none = ("--enc-type", "none", "--max-train-steps", 1)
    call_main(monkeypatch, train, *arguments(tiny_data, tmp_path / "pixels", *none))
    ckpt = tmp_path / "pixels/run/checkpoints/0000001.pt"
    call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path / "latents", *none))
    latents = tmp_path / "latents/run/checkpoints/0000001.pt"
    refused("was trained on pixels .--vae none., which --vae ema cannot decode; leave --vae out", generate, "--ckpt",
            ckpt, "--vae", "ema", "--sample-dir", tmp_path)
    refused("--latents-stats is for a VAE's latents, and .* was trained on pixels", generate, "--ckpt", ckpt,
            "--latents-stats", tmp_path / "any.npz", "--sample-dir", tmp_path)
    refused("was trained on the latents of a VAE .*, which --vae none cannot decode; give a VAE", generate, "--ckpt",
            latents, "--vae", "none", "--sample-dir", tmp_path)
    published = make_checkpoint(tmp_path / "0000005.pt")  # it does not say
    refused("--vae none is for pixels, 3 channels of 64 .*, but the latents have 4 channels", generate, "--ckpt",
            published, "--vae", "none", "--sample-dir", tmp_path)
    with pytest.raises(UserError, match="leave --vae out"):
        load_pipeline(ckpt, vae="mse")
    refused("was trained with --vae none, and --vae is now stabilityai.*do not mix", train,
            *train_arguments(tiny_data, tmp_path / "pixels", *none, "--max-train-steps", 2))
    refused("was trained with --vae stabilityai.*, and --vae is now none.*do not mix", train,
            *train_arguments(tiny_data, tmp_path / "latents", *none, "--vae", "none", "--max-train-steps", 2))
    refused("--resolution is 32, but the images in .* have 64 pixels a side", train,
            *arguments(pictures, tmp_path / "x", *none, "--resolution", 32))
    refused("cuts latents into patches of 8, of which 36, .* is no multiple", train, *arguments(
        write_tiny_data(tmp_path / "odd", 4, 36), tmp_path / "x", *none, "--resolution", 36))
    refused("--vae none, training on pixels, is for train.py", train_t2i,
            *tiny_run("MMDiT-T", tiny_data, tmp_path / "x", "--vae", "none"))
    (pictures_copy := tmp_path / "unlabelled").mkdir()
    shutil.copytree(pictures / "images", pictures_copy / "images")
    (pictures_copy / "images/dataset.json").write_text('{"labels": null}')
    refused("unlabelled has no labels in images/dataset.json", train, *arguments(pictures_copy, tmp_path / "x", *none))
