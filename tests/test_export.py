"""export.py and pipeline.py: all forms of a checkpoint hold the same bits; Python and scripts sample alike."""
import argparse
import itertools
import json

import numpy as np
import pytest
import safetensors.torch
import torch

import export
import generate
import generate_t2i
from evaluations.images import open_images
from models.checkpoint import KINDS, load_checkpoint, load_network, taps
from models.mmdit import MMDiT_models
from models.sit import SIT_CONFIGS, SiT_models
from runtime.errors import UserError
from runtime.files import load_tensors
from sampling.pipeline import load_pipeline
from tests.conftest import CLASSES, ROOT, call_main
from tests.test_generate import make_checkpoint, save_random
from tests.test_generate_t2i import save_checkpoint

VAE = ROOT / "assets/vae-emoji"
SAMPLING = {"num_steps": 3, "cfg_scale": 2.0, "guidance_high": 0.9}
FLAGS = ["--vae", VAE, "--num-steps", 3, "--cfg-scale", 2.0, "--guidance-high", 0.9]
FORMS = ["e.safetensors", "folder", "back.pt"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A checkpoint with a Namespace, as published, and its exports, each made from the one before."""
    folder = tmp_path_factory.mktemp("export")
    paths = [make_checkpoint(folder / "0000005.pt"), *(folder / name for name in FORMS)]
    with pytest.MonkeyPatch.context() as patch:
        for source, out in itertools.pairwise(paths):
            call_main(patch, export, source, out)
    return paths


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    torch.manual_seed(0)
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=32, z_dims=(384,), qk_norm=True)
    path = tmp_path_factory.mktemp("text") / "0000005.pt"
    return save_checkpoint(path, model, model="MMDiT-T", context_shape=[9, 32], attn_layers=[[0, 3], [2, 4]],
                           encoder_depth=1, qk_norm=True)


def test_every_form_has_the_same_bits(forms):
    original = load_checkpoint(forms[0], mmap=False)
    for path in forms[1:]:
        state = load_checkpoint(path, mmap=False)
        assert state.keys() == {"ema", "args", "steps"} and state["steps"] == 5
        assert state["args"] == original["args"] and state["ema"].keys() == original["ema"].keys()
        assert all(value.dtype == original["ema"][name].dtype and torch.equal(value, original["ema"][name])
                   for name, value in state["ema"].items()), path
    assert json.loads((forms[2] / "config.json").read_text())["args"]["model"] == "SiT-T/2"
    assert isinstance(torch.load(forms[3], weights_only=True)["args"], dict)  # no class is needed to read it


@pytest.mark.parametrize(("folder", "released_name"), [("vae", "vae"), ("sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse")])
def test_a_release(monkeypatch, tmp_path, folder, released_name):
    """Half the size, the same weights in half precision, no projectors, no trace of where it was trained."""
    path = make_checkpoint(tmp_path / "0000005.pt")
    state = load_tensors(path)
    vars(state["args"]).update(data_dir="/mnt/mine", output_dir="exps", vae=f"/mnt/mine/{folder}",
                               enc_weights="w,/mnt/mine/w")
    torch.save(state, path)
    for out, more in (("whole.safetensors", []), ("half.safetensors", ["--release"])):
        call_main(monkeypatch, export, path, tmp_path / out, *more)
    whole, half = (tmp_path / f"{name}.safetensors" for name in ("whole", "half"))
    assert half.stat().st_size < 0.51 * whole.stat().st_size
    assert b"/mnt/mine" in whole.read_bytes() and b"/mnt/mine" not in half.read_bytes()
    (exact, args), (rounded, released) = load_network(whole), load_network(half)
    assert released == {name: value for name, value in args.items() if name not in ("data_dir", "enc_weights")} | {
        "vae": released_name}  # without its name, Stable Diffusion's would be taken
    assert exact.z_dims and rounded.z_dims == ()
    exact.projectors = torch.nn.ModuleList()
    for ours, theirs in zip(exact.parameters(), rounded.parameters(), strict=True):
        assert theirs.dtype == torch.float32 and torch.equal(ours.half().float(), theirs)


@pytest.mark.parametrize("form", range(4))
def test_python_samples_what_the_script_samples(monkeypatch, forms, tmp_path, form):
    call_main(monkeypatch, generate, "--ckpt", forms[form], "--sample-dir", tmp_path, "--num-fid-samples", 3, *FLAGS,
              "--mode", "sde", "--labels", "balanced", "--global-seed", 7)
    made = open_images(next(tmp_path.glob("*.npz"))).batches(0, 3, 3)
    images = load_pipeline(forms[form], vae=VAE)([0, 1, 2], seed=7, mode="sde", batch_size=3, **SAMPLING)
    assert np.array_equal(np.stack(images), next(made)) and np.std(images) > 5


def test_text_from_python(monkeypatch, text, clip_folder, tmp_path):
    with pytest.raises(UserError, match="--class-names is for a network of classes"):
        call_main(monkeypatch, export, text, tmp_path / "text.safetensors", "--class-names", "names.json")
    call_main(monkeypatch, export, text, tmp_path / "text.safetensors")
    prompts = ["a bus", "two long cats"]
    call_main(monkeypatch, generate_t2i, "--ckpt", tmp_path / "text.safetensors", "--sample-dir", tmp_path, *FLAGS,
              "--mode", "ode", "--text-encoder", clip_folder, "--prompt", prompts[0], "--prompt", prompts[1])
    made = next(open_images(next(tmp_path.glob("*.npz"))).batches(0, 2, 2))
    for path in (text, tmp_path / "text.safetensors"):
        pipe = load_pipeline(path, vae=VAE, text_encoder=clip_folder)
        assert np.array_equal(np.stack(pipe(prompts, **SAMPLING)), made)
    assert not np.array_equal(np.stack(pipe(prompts[::-1], **SAMPLING)), made)
    with pytest.raises(UserError, match="takes text of width 16, .* gives 32; give the text encoder"):
        narrow = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=())
        torch.save(narrow.state_dict(), tmp_path / "narrow.pt")
        load_pipeline(tmp_path / "narrow.pt", vae=VAE, text_encoder=clip_folder)


@pytest.mark.parametrize("name, more", [("SiT-T/2", {}), ("SiT-N/2", {"qk_norm": True, "projector_dim": 8})])
def test_bare_weights_tell_their_network(monkeypatch, tmp_path, name, more):
    wider = {f"wider {row}": {**sizes, "hidden_size": 2 * sizes["hidden_size"]} for row, sizes in SIT_CONFIGS.items()}
    monkeypatch.setitem(KINDS, "SiT", ({**wider, **SIT_CONFIGS}, *KINDS["SiT"][1:]))
    model = SiT_models[name](input_size=16, num_classes=7, z_dims=(5, 6), **more)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    network, args = load_network(tmp_path / "bare.pt")
    assert args["encoder_depth"] == model.encoder_depth and args["num_classes"] == network.null_label == 7
    assert args["model"] == name and network.latent_shape == (4, 16, 16)
    assert network.attn_layers == model.attn_layers and not network.training
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), model.parameters(), strict=True))


def test_a_killed_export_is_made_again(monkeypatch, forms, tmp_path):
    """Killed between its two files; the same command removes what was left."""
    with monkeypatch.context() as patch:
        patch.setattr("models.checkpoint.write_json", lambda *_, **__: (_ for _ in ()).throw(SystemExit))
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # a kill leaves everything
        with pytest.raises(SystemExit):
            call_main(patch, export, forms[0], tmp_path / "out")
    left, = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    call_main(monkeypatch, export, forms[0], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and len(list((tmp_path / "out").iterdir())) == 2


def test_taps_are_those_of_the_training(text):
    network, args = load_network(text)
    assert (network.attn_layers, network.encoder_depth) == ((0, 2), 1)
    assert (args["attn_layers"], args["encoder_depth"]) == ([[0, 3], [2, 4]], 1)


@pytest.mark.parametrize("pairs, depth", [(None, None), ("0:7", 0), ([0, 1], 4), ([[3, 7]], "2"), ([[0.5, 7]], 0)])
def test_taps_that_do_not_fit_are_those_of_the_model(pairs, depth):
    assert taps({"attn_layers": pairs, "encoder_depth": depth}, SIT_CONFIGS["SiT-N/2"]) == {
        "encoder_depth": 2, "attn_layers": [[0, 7], [1, 9]]}


def test_a_published_namespace_without_our_options(tmp_path):
    model = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=(768,))
    args = argparse.Namespace(model="SiT-N/2", enc_type="dinov2-vit-b", encoder_depth=3, resolution=256, cfg_prob=0.1)
    network, known = load_network(save_random(tmp_path / "p.pt", model, args))
    assert network.encoder_depth == 3 and known["enc_type"] == "dinov2-vit-b"


@pytest.mark.parametrize("file, words", [
    ("torn.safetensors", "torn.safetensors cannot be read as JSON"), ("list.safetensors", "holds a list, expected"),
    ("four.pt", "has 4 blocks of width 160 and patches of 2, which no model here has")])
def test_what_cannot_be_loaded(forms, tmp_path, file, words):
    weights = load_checkpoint(forms[0], mmap=False)["ema"]
    for name, config in (("torn", "{"), ("list", "[]")):
        (tmp_path / f"{name}.safetensors").write_bytes(safetensors.torch.save(weights, {"config": config}))
    four = {name: value for name, value in weights.items() if not name.startswith("blocks.4.")}
    torch.save(four, tmp_path / "four.pt")
    with pytest.raises(UserError, match=words):
        load_pipeline(tmp_path / file, vae=VAE)


@pytest.mark.parametrize("conditions, more, words", [
    ([0, CLASSES], {}, "give whole numbers from 0 to 3"), (["cat"], {}, "give whole numbers from 0 to 3"),
    ([1], {"seed": -1}, "seed is -1"), ([1], {"batch_size": 0}, "batch_size 0"),
    ([1], {"cfg_scale": float("nan")}, "cfg_scale is nan"), ([1], {"cfg_scale": 0.5}, "cfg_scale is 0.5"),
    ("cat", {}, r"is one condition; give a list, such as \["),
    ([1], {"mode": "SDE"}, "mode 'SDE' is not known; use 'ode' or 'sde'"),
    ([1], {"cache": "tayler"}, "cache 'tayler' is not known; use 'none' or 'taylor'"),
    ([1], {"time_grid": "x"}, "time_grid 'x' is not known; use 'uniform'"),
    ([1], {"cache_order": -1}, "cache_order is -1; give a whole number from 0 on"),
    ([1], {"num_steps": 2.5}, "num_steps is 2.5; give a whole number from 1 on"),
    ([1], {"seed": 2 ** 32}, "seed is 4294967296, batch_size 32; give whole numbers, from 0 to 4294967295")])
def test_what_cannot_be_sampled(forms, conditions, more, words):
    with pytest.raises(UserError, match=words):
        load_pipeline(forms[1], vae=VAE)(conditions, **{**SAMPLING, **more})
