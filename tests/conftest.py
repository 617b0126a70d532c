"""Tiny data sets in both layouts, a small random teacher file, and running the scripts by their command lines."""
import csv
import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

import train
from models.checkpoint import load_checkpoint
from runtime.errors import UserError, run_script
from tests import nano
from training.preemption import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"
CLASSES = 4
NO_TEACHER = ["--enc-type", "none"]


def write_tiny_data(folder, count=64, resolution=64, factor=4):
    """`count` images, each of one colour per class with some noise, and latents that follow the class too."""
    rng = np.random.default_rng(0)
    labels = {"images": [], "vae-sd": []}
    for i in range(count):
        label, idx8 = i % CLASSES, f"{i:08d}"
        pixels = np.clip(60 * label + 30 + rng.normal(0, 10, (resolution, resolution, 3)), 0, 255).astype(np.uint8)
        side = resolution // factor
        mean = 5.5 * (label - 1.5) + rng.normal(0, 1, (4, side, side))
        moments = np.concatenate([mean, np.full((4, side, side), 0.1)]).astype(np.float32)
        names = {"images": f"{idx8[:5]}/img{idx8}.png", "vae-sd": f"{idx8[:5]}/img-mean-std-{idx8}.npy"}
        for kind, name in names.items():
            (folder / kind / idx8[:5]).mkdir(parents=True, exist_ok=True)
            labels[kind].append([name, label])
        Image.fromarray(pixels).save(folder / "images" / names["images"])
        np.save(folder / "vae-sd" / names["vae-sd"], moments)
    for kind, entries in labels.items():
        (folder / kind / "dataset.json").write_text(json.dumps({"labels": entries}))
    return folder


def write_tiny_captions(folder, counts=(3, 5, 1, 2) * 4, resolution=64, factor=4, shape=(6, 16), texts=True):
    """U-ViT's layout, train/ and val/ alike: image i in colour i % 4, with counts[i] captions that say so.

    All numbers of the first token of caption k are k; in the other tokens every fourth number is raised, starting at
    the colour's index. The moments follow the colour.
    """
    rng = np.random.default_rng(0)
    side = resolution // factor
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for i, count in enumerate(counts):
            colour = i % 4
            pixels = np.clip(60 * colour + 30 + rng.normal(0, 10, (resolution, resolution, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
            mean = 5.5 * (colour - 1.5) + rng.normal(0, 1, (4, side, side))
            np.save(folder / split / f"{i}.npy", np.concatenate([mean, np.full_like(mean, -4.6)]).astype(np.float32))
            for k in range(count):
                tokens = rng.normal(0, 0.1, shape)
                tokens[0] = k
                tokens[1:, colour::4] += 3
                np.save(folder / split / f"{i}_{k}.npy", tokens.astype(np.float32))
        if texts:
            words = {str(i): [f"caption {k} of {split} image {i}" for k in range(n)] for i, n in enumerate(counts)}
            (folder / split / "captions.json").write_text(json.dumps(words))
    np.save(folder / "empty_context.npy", np.zeros(shape, np.float32))
    return folder


def contents(folder):
    """{relative path: bytes} of all files in a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny_captions(tmp_path_factory):
    """16 captioned images per split at 64 px; tests must not change it."""
    return write_tiny_captions(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """64 entries at 64 px; tests must not change it."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path):
    """Eight entries that a test may damage."""
    return write_tiny_data(tmp_path / "data", count=8)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """The nano teacher, randomly initialised, saved as torch.hub saves DINOv2 (with the mask token)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save({**nano.teacher_state(), "mask_token": torch.zeros(1, 48)}, path)
    return path


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP in the files that the published one has: config, safetensors, vocab.json and merges.txt."""
    import transformers
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": tokens[-2], "eos_token": tokens[-1], "unk_token": tokens[-1], "pad_token": tokens[-1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(2)  # gives cosines above 0
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokens), "bos_token_id": len(tokens) - 2,
                     "eos_token_id": len(tokens) - 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 16}, projection_dim=16)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    from tests.worlds import make_world  # it imports this file
    return make_world(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def text_world(tmp_path_factory, clip_folder):
    from tests.worlds import make_text_world
    return make_text_world(tmp_path_factory.getbasetemp(), clip_folder)


CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def become(name, arguments, env, before, folder):
    """Run the script `name` by its command line: a process group of its own, which prints to out and err in `folder`.

    `before` names a function "module.function" to call first.
    """
    multiprocessing.set_start_method(None, force=True)  # the platform's own, for loader processes
    os.setpgid(0, 0)
    for file, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(folder / file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(env)
    sys.argv = [name, *arguments]
    if before:
        module, _, function = before.rpartition(".")
        getattr(importlib.import_module(module), function)()
    run_script(importlib.import_module(name.removesuffix(".py").replace("/", ".")).main)


class Server:
    """Runs scripts by their command lines, each in a fork of a process that has everything imported: preload.py."""

    def __init__(self):
        self.context, self.env = multiprocessing.get_context("forkserver"), {**CPU}
        self.context.set_forkserver_preload(["tests.preload"])
        self.folder, self.started = None, []

    def start(self, name, *arguments, env=None, before=None, rank=0, processes=1, port=None):
        """One process of a script -> Started."""
        folder, env = Path(tempfile.mkdtemp(dir=self.folder)), dict(env or {})
        if port:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = self.context.Process(target=become, args=(name, [*map(str, arguments)], env, before, folder))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            for key, value in self.env.items():
                patch.setenv(key, value)
            process.start()
        self.started.append(Started(process, folder))
        return self.started[-1]

    def start_all(self, name, *arguments, processes, **more):
        """All processes of a script, as a launcher starts them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [self.start(name, *arguments, rank=rank, processes=processes, port=port, **more)
                for rank in range(processes)]


class Started:
    """A running script: `process`, and `folder`, which holds what it prints."""

    def __init__(self, process, folder):
        self.process, self.pid, self.folder = process, process.pid, folder

    def send(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """kill -9 the script; its loader processes notice by themselves."""
        self.process.kill()
        return self.wait()

    def wait(self, timeout=240):
        """The exit status as subprocess has it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.stdout[-2000:] + self.stderr[-4000:])
        return self.process.exitcode

    @property
    def stdout(self):
        return (self.folder / "out").read_text()

    @property
    def stderr(self):
        return (self.folder / "err").read_text()


SERVER = Server()


@pytest.fixture(scope="session", autouse=True)
def server(tmp_path_factory):
    """What its scripts print lies among pytest's own temporary files; no script outlives the tests."""
    SERVER.folder = tmp_path_factory.mktemp("scripts")
    yield
    for started in SERVER.started:
        started.process.kill()


@pytest.fixture(scope="module", autouse=True)
def freeze():
    """Keep imported objects out of garbage collection: a run collects once per phase, else a second each."""
    gc.collect()
    gc.freeze()


def script(name, *arguments, processes=1, check=True, env=None, before=None):
    """Run a script of the project on the CPU, in one or more processes. Returns returncode, stdout, stderr of all."""
    if processes == 1:
        started = [SERVER.start(name, *arguments, env=env, before=before)]
    else:
        started = SERVER.start_all(name, *arguments, processes=processes, env=env, before=before)
    codes = [process.wait() for process in started]
    done = SimpleNamespace(returncode=next((code for code in codes if code), 0),
                           stdout="".join(process.stdout for process in started),
                           stderr="".join(process.stderr for process in started))
    if check:
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def forget_accelerator():
    """Reset accelerate's state from the last call."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def call_main(monkeypatch, module, *arguments, device="cpu"):
    """The script's main() with this command line inside the test's process: imports cost seconds."""
    forget_accelerator()
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    for name in ("stdout", "stderr"):  # main replaces them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with torch.enable_grad():  # generate.py turns gradients off for its whole process
            module.main()
    finally:  # a run ignores them at its end, and processes that the tests start would inherit that
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def refused(monkeypatch):
    """A function: asserts that call_main ends with a UserError that contains these words."""
    def check(words, module, *arguments):
        with pytest.raises(UserError, match=words):
            call_main(monkeypatch, module, *arguments)
    return check


def tiny_run(model, data, out, *more):
    """Arguments of a run of `model` on tiny data: 6 steps, or as `more` says."""
    return ["--exp-name", "run", "--output-dir", str(out), "--data-dir", str(data), "--model", model,
            "--resolution", "64", "--batch-size", "8", "--mixed-precision", "no", "--report-to", "none",
            "--num-workers", "0", "--log-every", "1", "--sampling-steps", "0", "--max-train-steps", "6",
            "--enc-type", "dinov2-vit-n", "--enc-blocks", "10", "--learning-rate", "1e-3", *map(str, more)]


def train_arguments(data, out, *more):
    return tiny_run("SiT-N/2", data, out, "--num-classes", CLASSES, *more)


def without(arguments, *flags):
    """`arguments` without these flags and their values."""
    for flag in flags:
        i = arguments.index(flag)
        arguments = arguments[:i] + arguments[i + 2:]
    return arguments


@pytest.fixture
def run(monkeypatch, tiny_data):
    """run(out, *flags): train.py on tiny data, 6 steps or as the flags say, inside the test's process."""
    def run(out, *more, data=tiny_data):
        call_main(monkeypatch, train, *train_arguments(data, out, *more))
    return run


def metrics(out):
    """The rows of a run's metrics.csv, {column: text}."""
    with open(out / "run/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(out, step):
    return load_checkpoint(out / f"run/checkpoints/{step:07d}.pt", mmap=False)
