"""runtime/: settings at the start of a run, messages when memory runs out, and the clipped step."""
import copy
import errno
import importlib.machinery
import importlib.metadata
import json
import logging
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
from accelerate.utils import FullyShardedDataParallelPlugin

import train
from runtime import memory, progress, setup
from runtime.errors import UserError
from runtime.memory import GIB, advice, images_that_fit
from tests.conftest import CPU, NO_TEACHER, ROOT, forget_accelerator, script, tiny_run, train_arguments, without
from tests.test_models import nano_models
from training.config import MAX_WORKERS
from training.fsdp import set_plugin
from training.start import make_accelerator
from training.step import backward_and_step

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
    """In a fresh interpreter where neither they nor their versions can be loaded."""
    arguments = tiny_run("SiT-S/8", tiny_data, tmp_path, *NO_TEACHER, "--max-train-steps", 1)
    done = subprocess.run([sys.executable, "-c", WITHOUT_OPTIONAL, *arguments], check=False, capture_output=True,
                          text=True, cwd=ROOT, timeout=300, env={**os.environ, **CPU})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "run/args.json").read_text())["environment"]
    assert found["diffusers"] == found["transformers"] == "not installed"
    assert found["timm"] == importlib.metadata.version("timm")


def test_a_tracker_that_is_not_installed(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--report-to wandb needs the package wandb; install it, or give"):
        run(tmp_path, *NO_TEACHER, "--report-to", "wandb")


class FakeWandb(types.ModuleType):
    """The part of wandb that a run uses."""
    errors, config = types.SimpleNamespace(Error=KeyError), types.SimpleNamespace(update=lambda *_, **__: None)

    def init(self, **settings):
        STARTS.append(settings)
        return types.SimpleNamespace(log=lambda values, step=None, **_: LOGGED.append((step, values)), finish=int,
                                     define_metric=lambda *metric, **more: LOGGED.append((metric, more)))


STARTS, LOGGED = [], []


def test_wandb_goes_on_with_one_run(run, monkeypatch, tmp_path):
    """Also back to an earlier step; wandb's own step cannot go back, so "step" is logged as a value."""
    fake = FakeWandb("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking.is_wandb_available", lambda: True)
    arguments = [*NO_TEACHER, "--report-to", "wandb", "--checkpointing-steps", 1, "--max-train-steps", 2,
                 "--wandb-project", "P", "--wandb-entity", "E", "--wandb-tags", "a", "b"]
    run(tmp_path, *arguments)
    run(tmp_path, *arguments, "--resume-step", 1)
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


def test_too_many_open_files(tmp_path):
    with pytest.raises(UserError, match="Too many files are open; allow more of them"), \
            memory.explained(Namespace(), None, torch.nn.Linear(1, 1)):
        raise OSError(errno.EMFILE, "Too many open files")


# ---- what the launcher says ----

def launched(monkeypatch, data, out, *flags, **environment):
    """(flags, accelerator, lines of the log) of a run with these flags and variables, up to opening its data."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = without(train_arguments(data, out, *NO_TEACHER), "--mixed-precision", "--num-workers")
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, *map(str, flags)])
    forget_accelerator()
    args = train.parse_args()
    accelerator, _ = make_accelerator(args)
    return args, accelerator, [record.getMessage() for record in logging.getLogger("haste").handlers[0].buffer]


@pytest.mark.parametrize("flags, said, used, sentences", [
    ([], ("", ""), ("no", 1), []),
    ([], ("no", ""), ("no", 1), []),  # a plain `accelerate launch`
    ([], ("bf16", "4"), ("bf16", 4), []),
    (["no", 1], ("bf16", "4"), ("no", 1), ["--mixed-precision no is used; the launcher says bf16",
                                            "--gradient-accumulation-steps 1 is used; the launcher says 4"]),
    (["bf16", 1], ("fp8", "auto"), ("bf16", 1), ["--mixed-precision bf16 is used; the launcher says fp8",
                                                 "--gradient-accumulation-steps 1 is used; the launcher says auto"]),
    (["fp16", 2], ("", "2"), ("no", 2), ["--mixed-precision fp16 needs a GPU: training in float32"]),
])
def test_the_launcher_fills_in_what_no_flag_says(monkeypatch, tiny_data, tmp_path, flags, said, used, sentences):
    typed = [word for pair in zip(("--mixed-precision", "--gradient-accumulation-steps"), flags, strict=False)
             for word in pair]
    _, accelerator, log = launched(monkeypatch, tiny_data, tmp_path, *typed, ACCELERATE_MIXED_PRECISION=said[0],
                                   ACCELERATE_GRADIENT_ACCUMULATION_STEPS=said[1])
    assert (accelerator.mixed_precision, accelerator.gradient_accumulation_steps) == used
    assert log[0] == "started" and len(log) == 1 + len(sentences)
    assert all(line.startswith(sentence) for line, sentence in zip(log[1:], sentences, strict=True))


@pytest.mark.parametrize("variable, value, message", [
    ("ACCELERATE_MIXED_PRECISION", "fp8", "is fp8, .* must be no, fp16, bf16. Change it or give --mixed-precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "0", "is 0, .* a whole number from 1 on"),
    ("ACCELERATE_USE_DEEPSPEED", "true", "is not supported; choose MULTI_GPU or FSDP"),
    ("WORLD_SIZE", "2", "is 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set")])
def test_what_the_launcher_may_not_say(monkeypatch, tiny_data, tmp_path, variable, value, message):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=f"{variable} {message}"):
        launched(monkeypatch, tiny_data, tmp_path, **{variable: value})


def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
    """accelerate takes LOCAL_RANK for the GPU's number, and `srun --gpus-per-task=1` shows each process its own."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    for gpus, expected in ((8, "3"), (0, "3"), (1, "0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert setup.connect(lambda: os.environ["LOCAL_RANK"]) == expected


@pytest.mark.parametrize("cores, processes, typed, used", [
    (3, 1, [], 3), (64, 1, [], MAX_WORKERS), (16, 8, [], 2), (2, 8, [], 1), (64, 1, ["--num-workers", 1], 1)])
def test_workers_follow_the_cores(monkeypatch, tiny_data, tmp_path, cores, processes, typed, used):
    """All processes that a launcher starts on this machine share its cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    args, _, _ = launched(monkeypatch, tiny_data, tmp_path, *typed, LOCAL_WORLD_SIZE=str(processes))
    assert args.num_workers == used


def test_ddp_keeps_gradients_once_and_compiled_blocks_whole(monkeypatch, tiny_data, tmp_path):
    with torch._dynamo.config.patch(optimize_ddp=True):
        _, accelerator, _ = launched(monkeypatch, tiny_data, tmp_path, "--compile")
        assert torch._dynamo.config.optimize_ddp is False
    assert accelerator.ddp_handler.to_kwargs() == {"gradient_as_bucket_view": True, "broadcast_buffers": False}


# ---- FSDP's plugin ----

@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_what_users_set_of_fsdp(kind):
    """Units are blocks unless the user names classes; settings that change numbers or checkpoints are replaced."""
    model = nano_models()[kind][0]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=False, activation_checkpointing=True,
                                            auto_wrap_policy="size_based_wrap", min_num_params=10)
    plugin.set_mixed_precision("bf16")
    set_plugin(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == [("SiTBlock", "JointBlock")[kind]]
    assert plugin.reshard_after_forward is False
    assert model.grad_checkpointing and not plugin.activation_checkpointing
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype is policy.reduce_dtype is policy.output_dtype is None
    assert policy.cast_forward_inputs is False
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
                                            transformer_cls_names_to_wrap=["FinalLayer"])
    set_plugin(plugin, model)
    assert plugin.transformer_cls_names_to_wrap == ["FinalLayer"]
    plugin.transformer_cls_names_to_wrap = ["LlamaDecoderLayer"]
    with pytest.raises(UserError, match="FSDP is to wrap LlamaDecoderLayer, which .* set fsdp_transformer_layer_cls"):
        set_plugin(plugin, model)


# ---- out of memory ----

XL = 4 * 684_000_000  # bytes of the weights of SiT-XL/2 and its projector
XL_IMAGE = 0.38 * GIB  # bytes kept per image between forward and backward pass
H100 = int(79.1 * GIB)


def test_the_published_batch_on_one_gpu():
    """Memory runs out in the first forward pass; the batch size then suggested fits, given an image's real needs."""
    assert 5 * XL + 256 * XL_IMAGE > H100
    found, held, each = images_that_fit(256, XL, peak=H100, capacity=H100)
    assert found == 128 and 5 * XL + found * XL_IMAGE < H100
    assert held == 5 * XL and each == pytest.approx(XL_IMAGE, rel=0.3)
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


def limit_memory():
    """For a script's process: allow 200 MiB more than now, so that a step's activations do not fit."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (200 << 20),) * 2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_that_is_out_of_memory(tiny_data, tmp_path):
    arguments = train_arguments(tiny_data, tmp_path, *NO_TEACHER, "--model", "SiT-T/2", "--batch-size", 64)
    done = script("train.py", *arguments, check=False, before="tests.test_runtime.limit_memory")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: Out of memory with 64 images a process at a time") and "Traceback" not in done.stderr
    for name in ("--gradient-accumulation-steps", "--grad-checkpointing", "--mixed-precision"):
        assert name in last


def test_samples_that_are_out_of_memory():
    with pytest.raises(UserError, match="Out of memory with 64 images at a time; give a smaller"), \
            memory.explained_sampling(64):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="another"), memory.explained_sampling(64):
        raise RuntimeError("another")


# ---- clipping ----

@pytest.mark.parametrize("most", [1e-3, 0.05, 1e9, 0], ids=["strongly", "slightly", "not", "to nothing"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
def test_the_fused_step_clips_as_clip_grad_norm_does(most, scaled):
    """Weights and moments to the last bits of float32; bit for bit where nothing is clipped."""
    forget_accelerator()
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
    loss, args = wrapped(x).square().mean(), Namespace(max_grad_norm=most)
    norm = backward_and_step(args, accelerator, loss, model, ours, wrapped_optimizer)
    plain(x).square().mean().backward()
    expected = torch.nn.utils.clip_grad_norm_(plain.parameters(), most)
    theirs.step()
    assert torch.equal(norm, expected) and (expected > most) == (most < 1e9)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        exactly = {"rtol": 0, "atol": 0} if most in (0, 1e9) else None
        torch.testing.assert_close(a, b, **(exactly or {"rtol": 2.4e-7, "atol": 1e-9}))
        for name, value in theirs.state[b].items():
            torch.testing.assert_close(ours.state[a][name], value, **(exactly or {"rtol": 6e-7, "atol": 0}), msg=name)
