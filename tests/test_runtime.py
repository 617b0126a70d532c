"""What runtime/ sets at the start of a run, what it says when memory runs out, and the clipped step."""
import copy
import errno
import importlib.machinery
import importlib.metadata
import json
import os
import re
import resource
import subprocess
import sys
import time
import types
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin

import train
from preprocessing import destinations
from runtime import memory, progress
from runtime.errors import UserError
from runtime.memory import GIB, advice, images_that_fit, is_out_of_memory
from runtime.versions import version
from tests.conftest import CLASSES, CPU, ROOT, call_main, script, tiny_run, train_arguments
from tests.test_models import nano_models
from training import start as setup
from training.fsdp import set_plugin
from training.metric_log import Metrics
from training.start import MOST_WORKERS, take_from_launcher
from training.step import backward_and_step


def settings_of(out):
    return json.loads((out / "run/args.json").read_text())


# ---- packages ----

OPTIONAL = ("diffusers", "transformers", "wandb", "tensorboard", "tensorboardX", "matplotlib", "scipy", "onnx",
            "imagecodecs")
WITHOUT_OPTIONAL = f"""if True:
    import runpy, sys
    from importlib import metadata
    sys.modules.update(dict.fromkeys({OPTIONAL}))  # None: an import raises ImportError
    known = metadata.Distribution.from_name
    def from_name(name):
        if name in {OPTIONAL}:
            raise metadata.PackageNotFoundError(name)
        return known(name)
    metadata.Distribution.from_name = from_name
    runpy.run_path("train.py", run_name="__main__")"""


def test_a_run_needs_no_optional_package(tiny_data, tmp_path):
    """In a fresh interpreter, in which they can neither be imported nor asked for their versions."""
    arguments = tiny_run("SiT-S/8", tiny_data, tmp_path, "--num-classes", CLASSES, "--enc-type", "none",
                         "--max-train-steps", 1)
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL, *arguments], check=False, capture_output=True,
                          text=True,
                          cwd=ROOT, timeout=300, env={**os.environ, **CPU})
    assert done.returncode == 0, done.stderr[-3000:]
    found = settings_of(tmp_path)["environment"]
    assert found["diffusers"] == found["transformers"] == "not installed"
    assert found["timm"] == importlib.metadata.version("timm")


def test_the_note_of_preprocessing_needs_no_optional_package(monkeypatch):
    known = importlib.metadata.Distribution.from_name

    def from_name(name):
        if name == "diffusers":
            raise importlib.metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", from_name)
    assert f"torch {version('torch')}, diffusers not installed" in destinations.versions()


def test_a_tracker_that_is_not_installed(monkeypatch, tiny_data, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--report-to wandb needs the package wandb; install it, or give"):
        call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--report-to",
                                                       "wandb"))


class FakeWandb(types.ModuleType):
    """As much of wandb as a run uses."""
    errors, config = types.SimpleNamespace(Error=KeyError), types.SimpleNamespace(update=lambda *_, **__: None)

    def init(self, **settings):
        STARTS.append(settings)
        return types.SimpleNamespace(log=lambda values, step=None, **_: LOGGED.append((step, values)), finish=int,
                                     define_metric=lambda *metric, **more: LOGGED.append((metric, more)))


STARTS, LOGGED = [], []


def test_wandb_goes_on_with_one_run(monkeypatch, tiny_data, tmp_path):
    """Also to an earlier step, which its own step may not be: "step" is a value like others."""
    fake = FakeWandb("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--report-to", "wandb",
                                "--checkpointing-steps", 1, "--max-train-steps", 2, "--wandb-project", "P",
                                "--wandb-entity", "E", "--wandb-tags", "a", "b")
    call_main(monkeypatch, train, *arguments)
    call_main(monkeypatch, train, *arguments, "--resume-step", 1)
    assert all((start["project"], start["entity"], start["tags"]) == ("P", "E", ["a", "b"]) for start in STARTS)
    ids = {(start["id"], start["resume"]) for start in STARTS}
    assert ids == {((tmp_path / "run/wandb-id.txt").read_text(), "allow")} and len(STARTS) == 2
    assert (("*",), {"step_metric": "step"}) in LOGGED
    rows = [values["step"] for step, values in LOGGED if step is None]
    assert rows == [1, 2, 2]


# ---- bars ----

def test_without_a_terminal_a_bar_is_a_line_now_and_then(monkeypatch, caplog):
    caplog.set_level("INFO", "haste")
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    with progress.progress(20, "teacher", "image") as bar:
        for _ in range(20):
            time.sleep(0.01)
            bar.update()
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 7 and re.match(r"teacher: \d+ of 20 images, ", lines[0])
    with progress.progress(20, "teacher", "image", shown=False) as bar:
        bar.update()


def test_a_clock_that_stands_still(monkeypatch, tmp_path):
    monkeypatch.setattr("training.metric_log.time", types.SimpleNamespace(time=lambda: 1.0))
    metrics = Metrics(tmp_path / "metrics.csv", Accelerator(cpu=True), 0)
    metrics.begin()
    metrics.add({name: torch.tensor(1.0) for name in ("loss", "denoise", "grad_norm")})
    assert metrics.write()["loss"] == 1


def test_too_many_open_files(tmp_path):
    with pytest.raises(UserError, match="Too many files are open; allow more of them"), \
            memory.explained(Namespace(), None, torch.nn.Linear(1, 1)):
        raise OSError(errno.EMFILE, "Too many open files")


# ---- what the launcher says ----

@pytest.mark.parametrize("typed, said", [([], False), (["--mixed-precision", "fp16"], True)])
def test_a_cpu_warns_of_an_fp16_that_was_typed(monkeypatch, tiny_data, tmp_path, typed, said):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps", 1)
    i = arguments.index("--mixed-precision")
    call_main(monkeypatch, train, *arguments[:i], *arguments[i + 2:], *typed)
    assert ("needs a GPU: training in float32" in (tmp_path / "run/log.txt").read_text()) == said


def test_a_launcher_that_says_half(monkeypatch, tiny_data, tmp_path):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"):
        call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path, "--enc-type", "none"))


def flags(precision, accumulation):
    return Namespace(mixed_precision=precision, gradient_accumulation_steps=accumulation)


@pytest.mark.parametrize("given, said, used, differing", [
    ((None, None), ("", ""), (None, 1), []),
    ((None, None), ("no", ""), (None, 1), []),  # a plain `accelerate launch`
    ((None, None), ("bf16", "4"), ("bf16", 4), []),
    (("no", 2), ("no", "2"), ("no", 2), []),
    (("no", 1), ("bf16", "4"), ("no", 1), ["--mixed-precision no is used; the launcher says bf16",
                                            "--gradient-accumulation-steps 1 is used; the launcher says 4"]),
    (("bf16", 1), ("fp8", "auto"), ("bf16", 1), ["--mixed-precision bf16 is used; the launcher says fp8",
                                                 "--gradient-accumulation-steps 1 is used; the launcher says auto"]),
])
def test_the_launcher_fills_in_what_no_flag_says(given, said, used, differing):
    args = flags(*given)
    environ = dict(zip(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"), said, strict=True))
    sentences = take_from_launcher(args, environ)
    assert (args.mixed_precision, args.gradient_accumulation_steps) == used
    assert len(sentences) == len(differing)
    assert all(sentence.startswith(start) for sentence, start in zip(sentences, differing, strict=True))


@pytest.mark.parametrize("variable, value, message", [
    ("ACCELERATE_MIXED_PRECISION", "fp8", "is fp8, .* must be no, fp16, bf16. Change it or give --mixed-precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto", "is auto, .* a whole number from 1 on"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "is 0, .* a whole number from 1 on")])
def test_what_the_launcher_may_not_say(variable, value, message):
    with pytest.raises(UserError, match=f"{variable} {message}"):
        take_from_launcher(flags(None, None), {variable: value})


def test_a_run_under_the_launchers_variables(monkeypatch, tiny_data, tmp_path):
    """bf16 and 4 micro-batches where no flag is given; with flags those, and a line in the log for each."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    given = train_arguments(tiny_data, tmp_path / "given", "--enc-type", "none", "--max-train-steps", 2,
                            "--gradient-accumulation-steps", 1)
    unsaid = train_arguments(tiny_data, tmp_path / "unsaid", "--enc-type", "none", "--max-train-steps", 2)
    i = unsaid.index("--mixed-precision")
    for arguments in (given, unsaid[:i] + unsaid[i + 2:]):
        call_main(monkeypatch, train, *arguments)
    found = settings_of(tmp_path / "unsaid")
    assert (found["mixed_precision"], found["environment"]["precision"],
            found["gradient_accumulation_steps"]) == ("bf16", "bf16", 4)
    found = settings_of(tmp_path / "given")
    assert (found["mixed_precision"], found["environment"]["precision"],
            found["gradient_accumulation_steps"]) == ("no", "no", 1)
    log = (tmp_path / "given/run/log.txt").read_text()
    assert "--mixed-precision no is used; the launcher says bf16" in log
    assert "--gradient-accumulation-steps 1 is used; the launcher says 4" in log


# ---- cores ----

@pytest.mark.parametrize("cores, processes, typed, used", [
    (3, 1, [], 3), (64, 1, [], MOST_WORKERS), (16, 8, [], 2), (2, 8, [], 1), (64, 1, ["--num-workers", 1], 1)])
def test_workers_follow_the_cores(monkeypatch, tiny_data, tmp_path, cores, processes, typed, used):
    """The same cores are of all processes that a launcher starts on this machine."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps", 1)
    i = arguments.index("--num-workers")
    call_main(monkeypatch, train, *arguments[:i], *arguments[i + 2:], *typed)
    assert settings_of(tmp_path)["num_workers"] == used


# ---- DDP ----

def test_ddp_keeps_gradients_once_and_compiled_blocks_whole(monkeypatch, tiny_data, tmp_path):
    made = []
    monkeypatch.setattr("encoders.online.LatentImages", lambda *_, **__: 1 / 0)  # as far as that
    make = setup.Accelerator
    monkeypatch.setattr(setup, "Accelerator", lambda **settings: made.append(make(**settings)) or made[0])
    with torch._dynamo.config.patch(optimize_ddp=True):
        with pytest.raises(ZeroDivisionError):
            call_main(monkeypatch, train, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--compile"))
        assert torch._dynamo.config.optimize_ddp is False
    assert made[0].ddp_handler.to_kwargs() == {"gradient_as_bucket_view": True, "broadcast_buffers": False}


# ---- FSDP's plugin ----

@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_what_users_set_of_fsdp(kind):
    """Units are blocks unless other classes are named; what would change numbers or checkpoints is replaced."""
    model = nano_models()[kind][0]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=False, activation_checkpointing=True,
                                            auto_wrap_policy="size_based_wrap", min_num_params=10)
    plugin.set_mixed_precision("bf16")
    set_plugin(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == [("SiTBlock",
                                                     "JointBlock")[kind]] and plugin.reshard_after_forward is False
    assert model.grad_checkpointing and not plugin.activation_checkpointing
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype, policy.cast_forward_inputs) == (None, None,
                                                                                                          None, False)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=["FinalLayer"])
    set_plugin(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == ["FinalLayer"]
    plugin.transformer_cls_names_to_wrap = ["LlamaDecoderLayer"]
    with pytest.raises(UserError, match="FSDP is to wrap LlamaDecoderLayer, which .* set fsdp_transformer_layer_cls"):
        set_plugin(plugin, model)


# ---- out of memory ----

XL = 4 * 684_000_000  # bytes of SiT-XL/2's weights and its projector's
XL_IMAGE = 0.38 * GIB  # what an image keeps between forward and backward pass
H100 = int(79.1 * GIB)


@pytest.mark.parametrize("batch, fits", [(256, 128), (192, 96), (250, 125)])
def test_the_published_batch_on_one_gpu(batch, fits):
    """It ends in the first forward pass, full; what is then said to fit does, by what an image really needs."""
    assert 5 * XL + batch * XL_IMAGE > H100
    found, held, each = images_that_fit(batch, XL, peak=H100, capacity=H100)
    assert found == fits and 5 * XL + fits * XL_IMAGE < H100
    assert held == 5 * XL and each == pytest.approx(XL_IMAGE, rel=0.3)


def test_no_image_fits():
    assert images_that_fit(1, XL, peak=14 * GIB, capacity=14 * GIB)[0] == 0
    assert images_that_fit(8, XL, peak=10 * GIB, capacity=10 * GIB)[0] == 0  # not even moments


def test_the_sentence_names_what_is_left_to_do():
    text = advice(256, 1, False, "no", XL, H100, H100)
    assert text == ("Out of memory with 256 images a process at a time: of 79.1 GiB weights, average, gradients and "
                    "moments take 12.7 and each image about 0.29; about 128 would fit. Give "
                    "--gradient-accumulation-steps 2, which gives the same steps, or --grad-checkpointing, or "
                    "--mixed-precision bf16, or a smaller --batch-size.")
    text = advice(128, 2, True, "bf16", XL, H100, H100)
    assert "--gradient-accumulation-steps 4," in text and "--grad-checkpointing" not in text and "--mixed" not in text
    assert advice(1, 1, True, "bf16", XL, H100, H100).endswith("Give more processes, or a smaller --model.")


def test_only_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(pytest.raises(RuntimeError, torch.empty, 1 << 60).value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def limit_memory():
    """For a script's process: 600 MiB more than it has, so that a step's activations do not fit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20),) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_is_out_of_memory(tiny_data, tmp_path):
    arguments = tiny_run("SiT-S/2", tiny_data, tmp_path, "--num-classes", CLASSES, "--enc-type", "none", "--batch-size",
                         64)
    done = script("train.py", *arguments, check=False, before="tests.test_runtime.limit_memory")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Out of memory with 64 images a process at a time") and "Traceback" not in done.stderr
    for name in ("--gradient-accumulation-steps", "--grad-checkpointing", "--mixed-precision"):
        assert name in last


# ---- clipping ----

@pytest.mark.parametrize("most", [1e-3, 0.05, 1e9, 0], ids=["strongly", "slightly", "not", "to nothing"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_the_fused_step_clips_as_clip_grad_norm_does(most, scaled):
    """Weights and moments to the last bits of float32; bit for bit where nothing is clipped."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()
    accelerator = Accelerator(cpu=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.SiLU(), torch.nn.Linear(64, 64))
        x = torch.randn(32, 64)
    plain = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-3, weight_decay=0.1, fused=True) for m in (model, plain))
    if scaled:  # before prepare, as on a GPU
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 10)
        accelerator.unscale_gradients = lambda: accelerator.scaler.unscale_(ours)
    wrapped, wrapped_optimizer = accelerator.prepare(model, ours)
    args = flags(None, None)
    args.max_grad_norm = most
    norm = backward_and_step(args, accelerator, wrapped(x).square().mean(), model, ours, wrapped_optimizer)
    plain(x).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), most)
    theirs.step()
    assert torch.equal(norm, expected) and (expected > most) == (most < 1e9)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        exactly = {"rtol": 0, "atol": 0} if most in (0, 1e9) else None
        torch.testing.assert_close(a, b, **(exactly or {"rtol": 2.4e-7, "atol": 1e-9}))
        for name, value in theirs.state[b].items():
            torch.testing.assert_close(ours.state[a][name], value, **(exactly or {"rtol": 6e-7, "atol": 0}), msg=name)
