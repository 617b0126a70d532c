"""generate.py through its command line: image i is a function of (seed, i), restarts, outputs, refusals."""
import argparse
import functools
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch._dynamo.utils import counters

import generate
import sampling.images
from encoders.vae import VAE
from models.checkpoint import load_checkpoint
from models.sit import SiT_models
from runtime.errors import UserError
from samplers import SAMPLERS
from sampling.pipeline import load_pipeline
from tests.conftest import CLASSES, ROOT, call_main, script

NAME = "SiT-T-2-0000005-size-64-vae-vae-emoji-cfg-2.0-seed-0-{mode}-high-0.9"


def save_random(path, network, args, spread=0.05, model=None):
    """Save a random network instead of the zero initialisation; `model`: its trained (not averaged) weights."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    torch.save({"model": model or {}, "ema": network.state_dict(), "opt": {}, "args": args, "steps": 5}, path)
    return path


def make_checkpoint(path, name="SiT-T/2"):
    """A SiT with a Namespace, as the published code saves it."""
    torch.manual_seed(0)
    args = argparse.Namespace(model=name, resolution=64, num_classes=CLASSES, path_type="linear")
    return save_random(path, SiT_models[name](input_size=16, num_classes=CLASSES, z_dims=(384,)), args)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "0000005.pt")


def arguments(ckpt, out, *more):
    return ["--ckpt", ckpt, "--sample-dir", out, "--vae", ROOT / "assets/vae-emoji", "--num-fid-samples", 7,
            "--num-steps", 4, "--cfg-scale", 2.0, "--guidance-high", 0.9, "--per-proc-batch-size", 4, *more]


def pictures(out):
    path, = out.glob("*.npz")
    with np.load(path, allow_pickle=False) as file:
        return file["arr_0"]


@pytest.mark.parametrize("mode", ["ode", "sde"])
def test_same_pictures_for_any_processes_and_batch(ckpt, tmp_path, mode):
    """Equal for 1 and 2 processes; for batch 1 and 4 up to one grey level: float32 sums round differently."""
    script("generate.py", *arguments(ckpt, tmp_path / "a", "--mode", mode))
    script("generate.py", *arguments(ckpt, tmp_path / "b", "--mode", mode), processes=2)
    script("generate.py", *arguments(ckpt, tmp_path / "c", "--mode", mode, "--per-proc-batch-size", 1))
    a, b, c = (pictures(tmp_path / part) for part in "abc")
    assert a.shape == (7, 64, 64, 3) and a.dtype == np.uint8 and a.std() > 5
    assert np.array_equal(a, b) and np.abs(a.astype(int) - c).max() <= 1 and not np.array_equal(a[0], a[1])
    folder = tmp_path / "a" / NAME.format(mode=mode)
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(7)]
    assert all(np.array_equal(np.asarray(Image.open(folder / f"{i:06d}.png")), a[i]) for i in range(7))
    assert (tmp_path / "a" / (folder.name + "-grid.png")).is_file()


def test_restart_makes_only_what_is_missing(monkeypatch, ckpt, tmp_path):
    """Paths are compared after resolving them; flags that change no image may differ."""
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path))
    before, folder = pictures(tmp_path), tmp_path / NAME.format(mode="ode")
    (folder / "000002.png").unlink()
    (folder / "000005.png").write_bytes((folder / "000005.png").read_bytes()[:100])
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    spelled = ckpt.parent / ".." / ckpt.parent.name / ckpt.name
    call_main(monkeypatch, generate, *arguments(spelled, tmp_path, "--vae", f"{ROOT}/assets/../assets/vae-emoji/",
                                                "--encoder-depth", 2))
    assert np.array_equal(before, pictures(tmp_path))
    changed = [path.name for path in sorted(folder.glob("*.png")) if times.get(path.name) != path.stat().st_mtime_ns]
    assert changed == ["000002.png", "000005.png"]
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--num-fid-samples", 3))
    assert np.array_equal(before[:3], pictures(tmp_path))
    with pytest.raises(UserError, match="num_steps 4 -> 5"):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--num-steps", 5))


def copy_checkpoint(ckpt, path, change):
    """ckpt at `path`, with change(its content) instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = load_checkpoint(ckpt, needed=(), mmap=False)
    change(state)
    torch.save(state, path)
    return path


def test_other_weights_under_the_same_paths_are_other_settings(monkeypatch, ckpt, tmp_path):
    """Retrained networks and VAEs are refused; a moved checkpoint is the same one."""
    own, vae = tmp_path / "0000005.pt", tmp_path / "vae-emoji"
    shutil.copy(ckpt, own)
    shutil.copytree(ROOT / "assets/vae-emoji", vae)
    given = arguments(own, tmp_path, "--vae", vae, "--num-fid-samples", 1)
    call_main(monkeypatch, generate, *given)
    settings = json.loads((tmp_path / NAME.format(mode="ode") / "settings.json").read_text())
    assert settings["steps"] == 5 and settings["ckpt"] == str(own)
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--num-fid-samples", 1))
    weights = safetensors.torch.load_file(vae / "diffusion_pytorch_model.safetensors")
    name, value = next(iter(weights.items()))
    safetensors.torch.save_file(weights | {name: value + 0.01}, vae / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match="other settings .vae_sha256"):
        call_main(monkeypatch, generate, *given)
    copy_checkpoint(ckpt, own, lambda state: next(iter(state["ema"].values())).add_(0.01))
    with pytest.raises(UserError, match="other settings .network_sha256 .*--prefix"):
        call_main(monkeypatch, generate, *given, "--vae", ROOT / "assets/vae-emoji")
    call_main(monkeypatch, generate, *given, "--prefix", "second-")
    assert (tmp_path / f"second-{NAME.format(mode='ode')}/000000.png").is_file()


def test_pictures_of_unknown_origin_are_not_taken(monkeypatch, ckpt, tmp_path):
    folder = tmp_path / NAME.format(mode="ode")
    folder.mkdir()
    (folder / "000000.png").write_bytes(b"")
    with pytest.raises(UserError, match="holds images, but no settings.json"):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path))


def test_names_that_begin_alike_do_not_share_temporaries(monkeypatch, ckpt, tmp_path):
    foreign = [tmp_path / f".{NAME.format(mode='ode')}{ending}" for ending in ("9.npz.123.tmp", "9-grid.png.123.tmp")]
    for path in foreign:
        path.write_bytes(b"")
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--num-fid-samples", 1))
    assert all(path.exists() for path in foreign)


def test_weights_that_are_no_average(monkeypatch, ckpt, tmp_path):
    other = {name: value + 0.02 for name, value in load_checkpoint(ckpt)["ema"].items()}
    both = copy_checkpoint(ckpt, tmp_path / "both/0000005.pt", lambda state: state.update(model=other))
    swapped = copy_checkpoint(ckpt, tmp_path / "swapped/0000005.pt", lambda state: state.update(ema=other))
    call_main(monkeypatch, generate, *arguments(both, tmp_path / "a", "--weights", "model"))
    call_main(monkeypatch, generate, *arguments(swapped, tmp_path / "b"))
    call_main(monkeypatch, generate, *arguments(both, tmp_path / "c"))
    a, b, c = (pictures(tmp_path / name) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_weights_of_repas_first_release(monkeypatch, ckpt, tmp_path):
    """There the second half of the blocks had its own list. --legacy is accepted, as in REPA."""
    def rename(state):
        for number in (2, 3, 4):
            state["ema"] = {name.replace(f"blocks.{number}.", f"decoder_blocks.{number - 2}."): value
                            for name, value in state["ema"].items()}

    old = copy_checkpoint(ckpt, tmp_path / "0000005.pt", rename)
    assert "decoder_blocks.2.attn.qkv.weight" in load_checkpoint(old)["ema"]
    call_main(monkeypatch, generate, *arguments(old, tmp_path / "old", "--legacy"))
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / "new"))
    assert np.array_equal(pictures(tmp_path / "old"), pictures(tmp_path / "new"))


def test_guidance_by_a_condition_never_trained(monkeypatch, ckpt, tmp_path):
    def no_drop(state):
        state["args"]["cfg_prob"] = 0.0

    path = copy_checkpoint(ckpt, tmp_path / "0000005.pt", no_drop)
    with pytest.raises(UserError, match="was trained with --cfg-prob 0.* give --cfg-scale 1"):
        call_main(monkeypatch, generate, *arguments(path, tmp_path))
    with pytest.raises(UserError, match="give --cfg-scale 1"):
        load_pipeline(path, vae=ROOT / "assets/vae-emoji")([0])
    call_main(monkeypatch, generate, *arguments(path, tmp_path, "--cfg-scale", 1, "--num-fid-samples", 1))


def test_a_run_is_no_checkpoint(monkeypatch, ckpt, tmp_path):
    newest = copy_checkpoint(ckpt, tmp_path / "run/checkpoints/0000012.pt", lambda state: None)
    copy_checkpoint(ckpt, tmp_path / "run/checkpoints/0000005.pt", lambda state: None)
    (tmp_path / "run/checkpoints/\u00b2\u00b2.pt").write_bytes(b"")
    for folder in (tmp_path / "run", tmp_path / "run/checkpoints"):
        with pytest.raises(UserError, match=f"{folder} is the folder of a run; give .* as {newest}"):
            call_main(monkeypatch, generate, *arguments(folder, tmp_path))


def test_every_flag_changes_the_pictures(monkeypatch, ckpt, tmp_path):
    def sample(name, *flags):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / name, "--num-fid-samples", 2, "--guidance-low",
                                                    0.2, *flags))
        return pictures(tmp_path / name)

    plain, by_sde = sample("plain"), sample("sde", "--mode", "sde")
    assert not np.array_equal(plain, by_sde)
    for flag in (("--heun",), ("--num-steps", 5), ("--cfg-scale", 3.0), ("--guidance-low", 0.6),
                 ("--guidance-high", 0.4), ("--global-seed", 1), ("--labels", "balanced")):
        assert not np.array_equal(plain, sample(flag[0], *flag)), flag
    assert not np.array_equal(by_sde, sample("cosine", "--mode", "sde", "--path-type", "cosine"))
    rounded = sample("bf16", "--mixed-precision", "bf16")
    assert not np.array_equal(plain, rounded) and np.abs(plain.astype(int) - rounded).mean() < 3


def test_a_new_sampler_is_a_function_and_a_row(monkeypatch, ckpt, tmp_path):
    """--mode takes it, it is given the options of all samplers, and --heun is refused unless it has it."""
    options = {}
    monkeypatch.setitem(SAMPLERS, "still", lambda velocity, latents, num_steps, **more: options.update(more) or latents)
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--mode", "still", "--num-fid-samples", 2))
    noise = np.random.default_rng((0, 1))
    noise.integers(CLASSES)  # its label
    z = torch.from_numpy(noise.standard_normal((1, 4, 16, 16), dtype=np.float32))
    expected = VAE(ROOT / "assets/vae-emoji").decode(z)[0].permute(1, 2, 0).numpy()
    assert np.abs(pictures(tmp_path)[1].astype(int) - expected).max() <= 1
    assert options.keys() == {"heun", "path_type", "noise", "time_grid", "time_shift", "tolerance"}
    with pytest.raises(UserError, match="--heun is for --mode ode"):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--mode", "still", "--heun"))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_networks_make_the_same_pictures(monkeypatch, ckpt, tmp_path, precision):
    """Equal up to rounding. Graphs run in PyTorch, which saves the minute that C++ compilation takes."""
    eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    monkeypatch.setattr(sampling.images, "check_compiler", lambda device: None)
    torch._dynamo.reset()
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        counters.clear()
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / name, "--mixed-precision", precision, *more))
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    difference = np.abs(pictures(tmp_path / "plain").astype(int) - pictures(tmp_path / "compiled"))
    assert difference.max() <= (1 if precision == "no" else 16)


def test_weights_in_bf16_are_cast_once():
    args = argparse.Namespace(compile=False, fused_attn=True, mixed_precision="bf16")
    model = SiT_models["SiT-T/2"](input_size=16, num_classes=CLASSES, z_dims=(384,))
    model = sampling.images.prepare_model(model, args, torch.device("cpu"))
    assert model.x_embedder.proj.weight.dtype == model.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16


def test_latents_are_decoded_in_chunks():
    vae, sizes = VAE(ROOT / "assets/vae-emoji"), []
    vae.vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    latents = torch.randn(5, 4, 16, 16, dtype=torch.float64)
    whole, parts = vae.decode(latents), vae.decode(latents, chunk=2)
    assert sizes == [5, 2, 2, 1] and whole.shape == (5, 3, 64, 64)
    assert (whole.int() - parts.int()).abs().max() <= 1


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_class_names_stand_in_the_grid(monkeypatch, ckpt, tmp_path, labels):
    """From a file of weights alone. Each image has its class below; a column per class shows whole rows only."""
    torch.save(load_checkpoint(ckpt, mmap=False)["ema"], tmp_path / "bare.pt")
    names, seen, grid = ["ant", "bee", "cow", "dog"], [], sampling.images.image_grid
    (tmp_path / "classes.json").write_text(json.dumps(names))
    monkeypatch.setattr(generate, "GRID_IMAGES", 6)
    monkeypatch.setattr(sampling.images, "GRID_IMAGES", 6)
    monkeypatch.setattr(sampling.images, "image_grid", lambda *given: seen.append(given) or grid(*given))
    more = ("--labels", labels, "--class-names", tmp_path / "classes.json", "--num-fid-samples", 6)
    call_main(monkeypatch, generate, *arguments(tmp_path / "bare.pt", tmp_path, *more))
    [(images, columns, texts)] = seen
    if labels == "balanced":
        assert columns == 4 and texts == names and len(images) == 4
    else:
        drawn = [names[np.random.default_rng((0, i)).integers(4)] for i in range(6)]
        assert columns is None and texts == drawn and len(images) == 6
    named = copy_checkpoint(ckpt, tmp_path / "0000005.pt", lambda state: state["args"].update(class_names=names))
    more = ("--labels", labels, "--num-fid-samples", 6, "--prefix", "by-checkpoint-")
    call_main(monkeypatch, generate, *arguments(named, tmp_path, *more))
    assert seen[1][2] == texts
    pipe = load_pipeline(named, vae=ROOT / "assets/vae-emoji")
    assert np.array_equal(pipe(["cow"], num_steps=2)[0], pipe([2], num_steps=2)[0])
    with pytest.raises(UserError, match="'gnu'.* from 0 to 3 or names out of ant, bee, cow, dog"):
        pipe(["gnu"])
    for bad in ('["ant"]', "[1, 2, 3, 4]", "{}"):
        (tmp_path / "classes.json").write_text(bad)
        with pytest.raises(UserError, match="classes.json (must hold a list of 4 names|holds a dict)"):
            call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, *more, "--class-names",
                                                        tmp_path / "classes.json"))
