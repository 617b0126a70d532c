"""Latents of any VAE: their scale and shift from its config, the data or a file, through training and sampling."""
import json
import shutil
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

import generate
import train
from data_io.latent_scale import SD_SCALE, LatentScale, from_statistics, read_note, read_statistics, scale_of
from data_io.loader import StepBatches, step_noise
from encoders.vae import VAE, scale_in
from loss import SILoss
from preprocessing import dataset_tools
from runtime.errors import UserError
from sampling.images import choose_vae
from sampling.pipeline import load_pipeline
from tests.conftest import CLASSES, call_main, checkpoint, train_arguments, write_tiny_captions, write_tiny_data
from tests.test_storage import packed_into

# name -> blocks (the factor is 2 ** (blocks - 1)), channels, what its config says, the network
KINDS = {"f8d16": (4, 16, {"scaling_factor": 1.5, "shift_factor": 0.25}, "SiT-N/2"),
         "f16d32": (5, 32, {}, "SiT-N/1")}


def write_vae(folder, blocks, channels, **config):
    """A random AutoencoderKL of 8 channels a block."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,) * blocks, norm_num_groups=4, latent_channels=channels,
                        down_block_types=("DownEncoderBlock2D",) * blocks, layers_per_block=1, **config,
                        up_block_types=("UpDecoderBlock2D",) * blocks, mid_block_add_attention=False)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.mul_(1.5)  # else all images come out alike
    vae.save_pretrained(folder)
    return folder


def mean_and_std(data):
    """float64 (n, C, h, w) twice, of all latents."""
    moments = np.stack([np.load(path) for path in sorted((data / "vae-sd").rglob("*.npy"))]).astype(np.float64)
    return np.split(moments, 2, axis=1)


@pytest.mark.parametrize("name", KINDS)
def test_a_vae_from_pictures_to_samples(refused, monkeypatch, tmp_path, name):
    """encode notes it; training, previews, a restart and sampling need no flag; the typed command gives equal bytes."""
    blocks, channels, config, model = KINDS[name]
    vae, factor = write_vae(tmp_path / name, blocks, channels, **config), 2 ** (blocks - 1)
    data = write_tiny_data(tmp_path / "data", count=8, resolution=32)
    shutil.rmtree(data / "vae-sd")
    monkeypatch.setattr("training.previews.PREVIEW_STEPS", 2)
    call_main(monkeypatch, dataset_tools, "encode", "--source", data / "images", "--dest", data / "vae-sd",
              "--model-url", vae)
    assert {key: value for key, value in read_note(data).items() if key != "vae_key"} == {
        "vae": str(vae), "factor": factor, "channels": channels, "scale": config.get("scaling_factor", 0.18215),
        "shift": config.get("shift_factor", 0.0)}
    mean, std = mean_and_std(data)
    scale, shift = config.get("scaling_factor"), config.get("shift_factor", 0.0)
    if not config:
        call_main(monkeypatch, dataset_tools, "stats", "--data", data)
        shift = mean.mean((0, 2, 3))
        scale = 1 / np.sqrt((mean ** 2 + std ** 2).mean((0, 2, 3)) - shift ** 2)
        np.testing.assert_allclose(read_note(data)["scale"], scale, rtol=1e-6)
        np.testing.assert_allclose(read_note(data)["shift"], shift, rtol=1e-6)
        scale, shift = (x[:, None, None] for x in (scale, shift))
    shutil.rmtree(data / "images")  # the resolution is that of the latents, times the factor

    call, seen = SILoss.__call__, []
    monkeypatch.setattr(SILoss, "__call__", lambda self, net, x, *more: seen.append(x) or call(self, net, x, *more))
    arguments = [*train_arguments(data, tmp_path / "out", "--model", model, "--enc-type", "none", "--sampling-steps", 2,
                                  "--batch-size", 4, "--max-train-steps", 2)]
    del arguments[arguments.index("--resolution"):arguments.index("--resolution") + 2]
    call_main(monkeypatch, train, *arguments)
    for step, (x, ids) in enumerate(zip(seen, StepBatches(8, 4, 0, 0, 2), strict=True)):
        noise = step_noise(0, step, slice(0, 4), x.shape[1:])["posterior"].numpy()
        ids = np.array(ids) % 8
        np.testing.assert_allclose(x, (mean[ids] + std[ids] * noise - shift) * scale, rtol=1e-4, atol=1e-5)
    saved = checkpoint(tmp_path / "out", 2)["args"]
    assert saved["vae"] == str(vae) and saved["resolution"] == 32 and scale_of(saved).plain() == saved["latents"]
    assert (tmp_path / "out/run/previews/0000002.png").is_file()

    ckpt = tmp_path / "out/run/checkpoints/0000002.pt"
    sampled = ["--ckpt", ckpt, "--num-fid-samples", 3, "--num-steps", 2, "--weights", "model", "--labels", "balanced"]
    call_main(monkeypatch, generate, *sampled, "--sample-dir", tmp_path / "free")
    call_main(monkeypatch, generate, *sampled, "--sample-dir", tmp_path / "typed", "--vae", vae, "--resolution", 32,
              "--model", model, "--num-classes", CLASSES, "--latents-stats", data / "latents.json")
    free, typed = ([path.read_bytes() for path in sorted((tmp_path / kind).glob("*/*.png"))]
                   for kind in ("free", "typed"))
    assert len(set(free)) == 3 and free == typed
    call_main(monkeypatch, generate, *sampled, "--sample-dir", tmp_path / "typed")  # same settings: nothing to do
    images = load_pipeline(ckpt, weights="model")([0, 1, 2], num_steps=2)
    assert all(np.array_equal(image, np.load(next((tmp_path / "free").glob("*.npz")))["arr_0"][i])
               for i, image in enumerate(images))

    note = json.loads((data / "latents.json").read_text())
    (data / "latents.json").write_text(json.dumps(note | {"shift": 3.0}))
    refused("belongs to another run: latents was {'shift'.* and is now {'shift': 3.0}", train,
            *arguments, "--max-train-steps", 4)


def test_what_lies_between_vae_and_network():
    """Both directions match the formula, with one number or one per channel, also from diffusers' configs."""
    moments, noise, mean, std = torch.rand(2, 6, 4, 4), torch.randn(2, 3, 4, 4), (0.5, -1.0, 2.0), (1.0, 3.0, 0.5)
    for scale, shift, a, b in ((2.0, 0.3, 2.0, 0.3),
                               (*from_statistics(mean, std), *(torch.tensor(x).view(3, 1, 1) for x in ([
                                   1 / s for s in std], mean)))):
        z = LatentScale(scale, shift).latents(moments, noise)
        torch.testing.assert_close(z, (moments[:, :3] + moments[:, 3:] * noise - b) * a)
        torch.testing.assert_close(LatentScale(scale, shift).undone(z), moments[:, :3] + moments[:, 3:] * noise)
    assert scale_in({"scaling_factor": 0.3611, "shift_factor": 0.1159}) == (0.3611, 0.1159)
    assert scale_in({"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None}) == SD_SCALE
    both = {"latents_mean": [1.0, 2.0], "latents_std": [4.0, 0.5], "scaling_factor": 0.5}
    assert scale_in(both) == ((0.125, 1.0), (1.0, 2.0))
    assert scale_in(both | {"scaling_factor": 0.18215}) == ((0.25, 2.0), (1.0, 2.0))


def test_a_vae_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match="The VAE vae needs another package .*diffusers.*; install it"):
        VAE("vae")


def test_statistics_from_files(monkeypatch, tmp_path):
    """safetensors, npz and LightningDiT's .pt agree; `stats` also takes captioned and packed data."""
    mean, std = np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1), np.full((1, 4, 1, 1), 2, np.float32)
    np.savez(tmp_path / "a.npz", mean=mean, std=std)
    safetensors.numpy.save_file({"mean": mean, "std": std}, tmp_path / "b.safetensors")
    torch.save({"mean": torch.from_numpy(mean), "std": torch.from_numpy(std)}, tmp_path / "latents_stats.pt")
    for name in ("a.npz", "b.safetensors", "latents_stats.pt"):
        assert read_statistics(tmp_path / name, 3.0) == ((1.5,) * 4, (0.0, 1.0, 2.0, 3.0))
    data = write_tiny_data(tmp_path / "data", count=8)
    call_main(monkeypatch, dataset_tools, "stats", "--data", data, "--multiplier", 0.5)
    packed_into(data, tmp_path / "packed")
    assert read_note(tmp_path / "packed") == read_note(data) and len(read_note(data)["scale"]) == 4
    call_main(monkeypatch, dataset_tools, "stats", "--data", tmp_path / "packed", "--multiplier", 0.5)
    assert read_note(tmp_path / "packed") == read_note(data)
    vae = write_vae(tmp_path / "vae", 3, 4, shift_factor=0.5)
    call_main(monkeypatch, dataset_tools, "stats", "--data", data, "--vae", vae)
    assert read_note(data)["vae"] == str(vae) and scale_of({"latents": read_note(data)}) == (0.18215, 0.5)
    (tmp_path / "none/train").mkdir(parents=True)
    with pytest.raises(UserError, match="none holds no latents; give the folder that has vae-sd"):
        call_main(monkeypatch, dataset_tools, "stats", "--data", tmp_path / "none", "--vae", vae)
    texts = write_tiny_captions(tmp_path / "texts", counts=(1, 1))
    call_main(monkeypatch, dataset_tools, "stats", "--data", texts)
    moments = np.stack([np.load(texts / f"train/{i}.npy") for i in range(2)]).astype(np.float64)
    variance = (moments[:, :4] ** 2 + np.exp(moments[:, 4:])).mean((0, 2, 3)) - moments[:, :4].mean((0, 2, 3)) ** 2
    np.testing.assert_allclose(read_note(texts)["scale"], variance ** -0.5)


def test_a_vae_without_spread(tmp_path):
    """AutoencoderDC: its latents are exact, and its factor follows from the encoder's blocks."""
    from diffusers import AutoencoderDC
    torch.manual_seed(0)
    blocks = {"block_types": "ResBlock", "block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1),
              "qkv_multiscales": ((),) * 3}
    AutoencoderDC(latent_channels=4, attention_head_dim=8, scaling_factor=0.4,
                  **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()}
                  ).save_pretrained(tmp_path)
    vae = VAE(str(tmp_path))
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    moments = vae.encode(images)
    assert vae.factor == 4 and vae.own_scale == (0.4, 0) and moments.shape == (2, 8, 4, 4)
    assert not moments[:, 4:].any()
    assert (vae.encode(images, "logvar")[:, 4:] == -30).all()
    z = vae.latent_scale.latents(moments, torch.randn(2, 4, 4, 4))
    expected = (255 * (vae.vae.decode(z / 0.4).sample + 1) / 2).clamp(0, 255).to(torch.uint8)
    assert torch.equal(vae.decode(z), expected)


def test_which_vae_decodes():
    """ema, as published, for Stable Diffusion's latents and older checkpoints; else the VAE of the training."""
    latents = SD_SCALE.plain()
    for args, expected in (({}, "ema"), ({"vae": "some/folder"}, "ema"), ({"vae": "none"}, "none"),
                           ({"vae": "stabilityai/sd-vae-ft-mse", "latents": latents}, "ema"),
                           ({"vae": "some/folder", "latents": latents}, "some/folder")):
        assert choose_vae(None, args, "x") == expected
    assert choose_vae("mse", {"vae": "some/folder", "latents": latents}, "x") == "mse"


def test_what_does_not_fit(refused, monkeypatch, tmp_path, tiny_data, caplog):
    """One sentence each; older data are of Stable Diffusion's scale, whatever the VAE's config says, which is said."""
    none = ("--enc-type", "none", "--max-train-steps", 1)
    three = tmp_path / "three.npz"
    np.savez(three, mean=np.zeros(3), std=np.ones(3))
    refused("three.npz has mean and std of 3 channels, the latents have 4", train,
            *train_arguments(tiny_data, tmp_path, *none, "--latents-stats", three))
    refused("three.npz has mean and std of 3 channels, the latents have 4", dataset_tools, "stats", "--data", tiny_data,
            "--latents-stats", three)
    np.savez(tmp_path / "zero.npz", mean=np.zeros(4), std=np.zeros(4))
    np.savez(tmp_path / "tiny.npz", mean=np.zeros(4), std=np.full(4, 1e-310))
    torch.save(torch.zeros(4), tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK")
    for name in ("zero.npz", "tiny.npz", "other.pt", "cut.pt", "absent.npz"):
        with pytest.raises(UserError, match=name):
            read_statistics(tmp_path / name)
    refused("--latents-stats is for a VAE's latents", train,
            *train_arguments(tiny_data, tmp_path, *none, "--vae", "none", "--latents-stats", three))
    data = write_tiny_data(tmp_path / "data", count=8)
    for content in ('{"scale": 0, "shift": 0}', f'{{"scale": 1, "shift": {"9" * 400}}}',
                    '{"scale": [1, "a"], "shift": 0}', '{"scale": 1}', "[]",
                    '{"scale": 1, "shift": 0, "factor": 0.5}'):
        (data / "latents.json").write_text(content)
        with pytest.raises(UserError, match="latents.json"):
            read_note(data)
    (data / "latents.json").write_text('{"vae": "other/vae", "vae_key": "other", "scale": 1.0, "shift": 0.0}')
    vae = write_vae(tmp_path / "vae", 3, 4, scaling_factor=0.5)
    refused("says that the latents there are of other/vae, not of", dataset_tools, "encode", "--source",
            data / "images", "--dest", data / "new", "--model-url", vae)
    assert not (data / "new").exists()
    (data / "latents.json").unlink()
    encode = ("encode", "--source", data / "images", "--dest", data / "new", "--model-url")
    call_main(monkeypatch, dataset_tools, *encode, vae)
    for path in (data / "latents.json", data / "new/00000/img-mean-std-00000000.npy"):
        path.unlink()
    refused("begun with other settings", dataset_tools, *encode, write_vae(tmp_path / "other", 3, 5))
    assert not (data / "latents.json").exists()  # the latents are of the first
    call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path / "old", *none, "--vae", vae,
                                                   "--sampling-steps", 1))
    assert checkpoint(tmp_path / "old", 1)["args"]["latents"] == {"scale": 0.18215, "shift": 0.0}
    assert "says scale 0.5, shift 0, the data or the checkpoint say scale 0.18215" in (
        tmp_path / "old/run/log.txt").read_text()
