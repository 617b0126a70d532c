"""Signals, kills and runs on several processes, all through the command line."""
import itertools
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import dataset
from models.checkpoint import saved_steps
from models.layers import TimestepEmbedder
from runtime import progress, setup
from runtime.errors import PEER_ENDED
from tests.conftest import (
    CLASSES,
    CPU,
    NO_TEACHER,
    ROOT,
    SERVER,
    checkpoint,
    metrics,
    script,
    tiny_run,
    train_arguments,
)
from tests.test_generate import arguments as generate_arguments
from tests.test_generate import make_checkpoint, pictures
from tests.test_resume import assert_same_run, assert_same_state
from training import checkpointing
from training import trainer as training
from training.preemption import EXIT_CODE, STOPPED_EARLY

KILLS = 32
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


def wait_for_rows(out, count, seconds=60):
    """Wait until metrics.csv has `count` rows."""
    wait_for(lambda: (out / "run/metrics.csv").is_file() and len(metrics(out)) >= count, seconds)


def newest(out):
    return max(saved_steps(out / "run/checkpoints"), default=0)


def is_writing(out):
    return any((out / "run/checkpoints").glob(".*.tmp"))


def slow_disk():
    """Make writes slow enough to be killed half-way."""
    fsync = os.fsync
    os.fsync = lambda number: time.sleep(0.03) or fsync(number)


def slow_steps():
    """Make steps slow enough for a signal to arrive within one."""
    step = training.update_ema
    training.update_ema = lambda *arguments: time.sleep(0.2) or step(*arguments)


def long_run(tiny_data, out, *more):
    return train_arguments(tiny_data, out, *NO_TEACHER, "--max-train-steps", 500, "--checkpointing-steps", 1000, *more)


def test_kill_9_loses_nothing_but_time(tiny_data, teacher_file, tmp_path):
    """More than 30 kills: a third at any moment, a third inside the writing of a checkpoint, a third after one."""
    arguments = train_arguments(tiny_data, tmp_path / "killed", "--enc-weights", teacher_file, "--early-stop-point", 6,
                                "--checkpointing-steps", 1, "--log-every", 3, "--keep-checkpoints", 3,
                                "--max-train-steps")
    moment, kills, inside, out = random.Random(0), 0, 0, tmp_path / "killed"
    while kills < KILLS:
        process = SERVER.start("train.py", *arguments, 10_000,
                               before="tests.test_faults.slow_disk")  # never done by itself
        if kills % 3 == 0:
            time.sleep(moment.uniform(0, 1))
        elif kills % 3 == 1:
            wait_for(lambda: is_writing(out))
            time.sleep(moment.uniform(0, 0.04))
        else:
            before = newest(out)
            wait_for(lambda before=before: newest(out) > before)
            time.sleep(moment.uniform(0, 0.1))
        inside += is_writing(out)
        assert process.kill() == -signal.SIGKILL, process.stderr
        kills += 1
    last = newest(out) + 3
    assert inside >= 5 and last > 10, (inside, last)
    script("train.py", *arguments, last)
    script("train.py", *train_arguments(tiny_data, tmp_path / "whole", *arguments[4:], last))
    assert_same_run(tmp_path / "whole", out, last)
    kept = sorted(path.name for path in (out / "run/checkpoints").iterdir())
    assert kept == [f"{step:07d}.pt" for step in (last - 2, last - 1, last)]


def test_a_signal_saves_and_exits_with_its_code(tiny_data, tmp_path):
    """It saves after the step; the same command continues to the same weights. Loader processes outlive the signal."""
    process = SERVER.start("train.py", *long_run(tiny_data, tmp_path / "a", "--num-workers", 1),
                           before="tests.test_faults.slow_steps")
    wait_for_rows(tmp_path / "a", 3)
    os.killpg(process.pid, signal.SIGTERM)  # as launchers and clusters do: the loader's processes get it too
    assert process.wait(timeout=20) == EXIT_CODE == 75, process.stderr
    stopped = newest(tmp_path / "a")
    assert f"stopped by a signal after step {stopped}; the same command continues" in process.stderr
    assert "Traceback" not in process.stderr
    for out in ("a", "b"):
        script("train.py", *long_run(tiny_data, tmp_path / out, "--max-train-steps", stopped + 2))
    assert_same_run(tmp_path / "a", tmp_path / "b", stopped + 2)


def test_a_stuck_loader_process_ends_with_the_run(tiny_data, tmp_path):
    """One that hangs while reading ahead and, like all of them, ignores SIGTERM."""
    process = SERVER.start("train.py", *long_run(tiny_data, tmp_path, "--num-workers", 1),
                           before="tests.test_faults.stuck_reader")
    wait_for_rows(tmp_path, 2)
    process.send(signal.SIGTERM)
    assert process.wait(timeout=20) == EXIT_CODE, process.stderr
    with pytest.raises(ProcessLookupError):  # the group includes its loader processes
        os.killpg(process.pid, 0)


def stuck_reader():
    """The loader process hangs in its fifth batch; the first steps do not need it."""
    slow_steps()
    main, calls, moments = os.getpid(), itertools.count(), dataset.LatentImages.moments
    dataset.LatentImages.moments = lambda self, *arguments: time.sleep(
        60 if os.getpid() != main and next(calls) > 4 * 8 else 0) or moments(self, *arguments)


def test_a_second_signal_exits_at_once(tiny_data, tmp_path):
    """Even while the first one's checkpoint is written; a repeat within a second counts as the first."""
    arguments = long_run(tiny_data, tmp_path)
    script("train.py", *arguments, "--max-train-steps", 2)
    before = checkpoint(tmp_path, 2)
    process = SERVER.start("train.py", *arguments, before="tests.test_faults.hanging_disk")
    wait_for(lambda: newest(tmp_path) == 2 and len(metrics(tmp_path)) > 4)
    for pause in (0.1, 1.2):
        process.send(signal.SIGTERM)
        time.sleep(pause)
    assert is_writing(tmp_path)
    process.send(signal.SIGTERM)
    assert process.wait(timeout=2) == 128 + signal.SIGTERM
    assert newest(tmp_path) == 2
    assert_same_state(before, checkpoint(tmp_path, 2))
    script("train.py", *arguments, "--max-train-steps", 3)
    assert not is_writing(tmp_path)


def hanging_disk():
    """From the second checkpoint on, writes hang; small files are written as usual."""
    fsync = os.fsync
    os.fsync = lambda number: time.sleep(60) if os.fstat(number).st_size > 100_000 else fsync(number)


def test_one_signal_stops_two_processes_at_one_step(tiny_data, tmp_path):
    """Only one of them gets the signal. --checkpoint-minutes is agreed on in the same way."""
    processes = SERVER.start_all("train.py", *long_run(tiny_data, tmp_path, "--checkpoint-minutes", 0.3 / 60),
                                 processes=2, before="tests.test_faults.slow_steps")
    wait_for(lambda: newest(tmp_path) > 2)
    processes[1].send(signal.SIGUSR1)
    assert [process.wait(timeout=30) for process in processes] == [EXIT_CODE] * 2, processes[0].stderr
    steps = sorted(saved_steps(tmp_path / "run/checkpoints"))
    assert all(b - a > 1 for a, b in itertools.pairwise(steps[:-1])), steps  # every 2 steps or so, not each


def test_a_signal_that_comes_again_while_the_run_ends(tiny_data, tmp_path):
    """A repeat within a second counts as the first signal: after the last step, too, the exit code stays."""
    process = SERVER.start("train.py", *long_run(tiny_data, tmp_path), before="tests.test_faults.slow_end")
    wait_for_rows(tmp_path, 3)
    process.send(signal.SIGTERM)
    for _ in range(3):
        time.sleep(0.6)
        process.send(signal.SIGTERM)
    assert process.wait(timeout=20) == EXIT_CODE, process.stderr


def slow_end():
    """Make the end slow, as if a tracker had much to send."""
    end_processes = training.end_processes
    training.end_processes = lambda: time.sleep(2) or end_processes()


def test_a_signal_before_the_first_step(tiny_data, tmp_path):
    """It exits at once with the same exit code, whatever it was doing; existing files stay unchanged."""
    process = SERVER.start("train.py", *long_run(tiny_data, tmp_path), before="tests.test_faults.slow_start")
    wait_for(lambda: (tmp_path / "run/.lock").is_file())
    time.sleep(0.2)
    process.send(signal.SIGUSR1)
    assert process.wait(timeout=2) == EXIT_CODE, process.stderr
    assert process.stderr.count(STOPPED_EARLY) == 1
    assert (tmp_path / "run/log.txt").read_text().endswith(f"{STOPPED_EARLY}\n")  # a launcher's job looks for this line
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "log.txt"]


def slow_start():
    checkpointing.read_newest = lambda *_: time.sleep(60)


def ctrl_c():
    """Python's handler of SIGINT, which what starts the tests may ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    slow_steps()


def in_background():
    """SIGINT as a shell sets it for background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    slow_steps()


def test_ctrl_c_saves_and_the_second_ends(tiny_data, tmp_path):
    """Like SIGTERM; if a shell ignores SIGINT, as for background jobs, it stays ignored."""
    for before, code in (("ctrl_c", EXIT_CODE), ("in_background", 0)):
        out = tmp_path / before
        process = SERVER.start("train.py", *long_run(tiny_data, out, "--max-train-steps", 8, "--num-workers", 1),
                               before=f"tests.test_faults.{before}")
        wait_for_rows(out, 2)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == code, process.stderr
        assert "Traceback" not in process.stderr
    stopped, last = newest(tmp_path / "ctrl_c"), (tmp_path / "ctrl_c/run/log.txt").read_text().splitlines()[-1]
    assert stopped < 8 and last.endswith(f"after step {stopped}; the same command continues")


def test_two_runs_of_one_name(tiny_data, tmp_path):
    """The second is refused in one sentence and changes nothing; the lock ends with its process, even if killed."""
    arguments = long_run(tiny_data, tmp_path)
    process = SERVER.start("train.py", *arguments, "--num-workers", 1, before="tests.test_faults.slow_steps")
    wait_for_rows(tmp_path, 2)
    second = script("train.py", *arguments, check=False)
    assert second.returncode == 1 and "Traceback" not in second.stderr
    assert f"error: {tmp_path}/run is in use by process {process.pid} on " in second.stderr
    process.kill()
    assert (tmp_path / "run/log.txt").read_text().count("started") == 1
    script("train.py", *arguments, "--max-train-steps", 2)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2"]


def test_output_that_cannot_be_written_ends_no_run(tiny_data, tmp_path):
    """A full disk or closed pipe behind the terminal output and the bar does not end the run."""
    script("train.py", *train_arguments(tiny_data, tmp_path, *NO_TEACHER), before="tests.test_faults.broken_output")
    assert len(metrics(tmp_path)) == 6 and "done: 6 steps" in (tmp_path / "run/log.txt").read_text()


def broken_output():
    """Every second line or bar goes to a full disk, the others into a closed pipe."""
    reader, closed = os.pipe()
    os.close(reader)
    outputs = itertools.cycle([closed, os.open("/dev/full", os.O_WRONLY)])

    def redirect():
        output = next(outputs)
        for number in (1, 2):
            os.dup2(output, number)

    redirect()
    progress.Lines = SimpleNamespace(write=lambda text: redirect() or sys.stderr.write(text),
                                     flush=lambda: sys.stderr.flush())
    progress.LINE_SECONDS = 0


def test_the_rest_ends_soon_when_the_first_cannot_start(tiny_data, tmp_path):
    """Another program has the port: rank 0 says so at once, rank 1 does not wait for two hours."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        processes = [SERVER.start("train.py", *long_run(tiny_data, tmp_path), rank=rank, processes=2,
                                  port=taken.getsockname()[1], before="tests.test_faults.short_start")
                     for rank in range(2)]
        for process in processes:
            assert process.wait(timeout=30) == 1
            assert re.search("error: The processes of this run could not connect at .*choose another MASTER_PORT",
                             process.stderr), process.stderr
    assert not (tmp_path / "run").exists()


def short_start():
    setup.START_SECONDS = 5


@pytest.mark.parametrize(("flag", "value"), [("--learning-rate", "0.5"), ("--lr-schedule", "cosine")])
def test_processes_with_different_settings(tiny_data, tmp_path, flag, value):
    """As another accelerate configuration on one machine gives: their gradients would be averaged without a word."""
    done = script("train.py", *long_run(tiny_data, tmp_path), processes=2, check=False,
                  before="tests.test_faults.other_flag", env={"HASTE_TEST_FLAG": f"{flag}={value}"})
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    name = flag[2:].replace("-", "_")
    assert f"error: The processes of this run have different settings: {name}; give all" in done.stderr


def other_flag():
    if os.environ["RANK"] == "1":
        sys.argv += [os.environ["HASTE_TEST_FLAG"]]


def test_a_network_interface_that_is_not_there(tiny_data, tmp_path):
    done = script("train.py", *long_run(tiny_data, tmp_path), processes=2, check=False,
                  before="tests.test_faults.wrong_interface")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"error: The processes of this run could not connect at .*eth7.*\)", done.stderr), done.stderr


def wrong_interface():
    os.environ["GLOO_SOCKET_IFNAME"] = "eth7"


def test_a_refused_start_leaves_no_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    done = script("train.py", *train_arguments(tmp_path, tmp_path / "mine/exps", *NO_TEACHER), check=False)
    assert done.returncode == 1 and f"error: {tmp_path}" in done.stderr
    assert [*tmp_path.rglob("*")] == [tmp_path / "mine"]
    done = script("train.py", *train_arguments(tmp_path, tmp_path / ("x" * 300) / "exps", *NO_TEACHER), check=False)
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr


def test_a_killed_loader_process(tiny_data, tmp_path):
    done = script("train.py", *train_arguments(tiny_data, tmp_path, "--num-workers", 1, *NO_TEACHER, "--vae",
                                               "none"), check=False, before="tests.test_faults.killed_reader")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: A loader process has ended (DataLoader worker" in done.stderr


def killed_reader():
    main, image = os.getpid(), dataset.PixelImages.image
    dataset.PixelImages.image = lambda self, i: (
        image(self, i) if os.getpid() == main else os.kill(os.getpid(), signal.SIGKILL))


def test_one_of_two_processes_is_killed(tiny_data, tmp_path):
    """The other one ends with a sentence as soon as a collective fails, even without a launcher."""
    processes = SERVER.start_all("train.py", *long_run(tiny_data, tmp_path), processes=2)
    wait_for_rows(tmp_path, 3)
    processes[1].kill()
    assert processes[0].wait(timeout=20) == 1
    assert processes[0].stderr.splitlines()[-1].startswith(PEER_ENDED) and "Traceback" not in processes[0].stderr


def test_one_of_two_processes_has_a_full_disk(tiny_data, tmp_path):
    """It says so in a sentence; the other one says at most that its peer is gone."""
    done = script("train.py", *long_run(tiny_data, tmp_path, "--checkpointing-steps", 2), processes=2, check=False,
                  before="tests.test_faults.full_disk_of_the_first")
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "0000002.pt could not be written (File too large)" in said[0]
    assert all(line.startswith(PEER_ENDED) for line in said[1:]) and "Traceback" not in done.stderr


def full_disk_of_the_first():
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))


def test_one_of_two_processes_has_a_bug(tiny_data, tmp_path):
    """Under the real torchrun. A bug gives its traceback, not a sentence."""
    (tmp_path / "start.py").write_text("import tests.test_faults as t; t.bug_of_the_first(); import train; "
                                       "from runtime.errors import run_script; run_script(train.main)")
    done = subprocess.run([sys.executable, *TORCHRUN, tmp_path / "start.py", *map(str, long_run(tiny_data, tmp_path))],
                          check=False, capture_output=True, text=True, cwd=ROOT, timeout=120,
                          env={**os.environ, **CPU, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and re.search("in bug\n.*\n(.*\n)?ZeroDivisionError: division by zero", done.stderr)
    assert all(line.startswith(PEER_ENDED) for line in done.stderr.splitlines() if line.startswith("error: "))
    assert done.stderr.count("Traceback (most recent call last)") == 2  # one is torchrun's
    assert "2 process(es) on cpu" in (tmp_path / "run/log.txt").read_text()
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2"]


def bug_of_the_first():
    """Rank 0 fails in its third step."""
    update, calls = training.update_ema, itertools.count(1)

    def bug(*arguments):
        if next(calls) == 3:
            return 1 / 0
        return update(*arguments)

    if os.environ["RANK"] == "0":
        training.update_ema = bug


def test_processes_that_see_different_checkpoints(tiny_data, tmp_path):
    """One of two misses the newest, as on a slow file system: both must resume from one step."""
    arguments = ["--checkpointing-steps", 2, "--max-train-steps"]
    script("train.py", *long_run(tiny_data, tmp_path / "0", *arguments, 4), processes=2)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    first, second = (script("train.py", *long_run(tiny_data, tmp_path / behind, *arguments, 6), processes=2,
                            check=False, before="tests.test_faults.late_files", env={"HASTE_TEST_LATE": behind})
                     for behind in ("0", "1"))
    assert "Traceback" not in first.stderr + second.stderr
    assert first.returncode == 0
    assert "0000002.pt" in (tmp_path / "0/run/log.txt").read_text().split("continuing from ")[1]
    assert second.returncode == 1 and "has no checkpoint of step 4 (there: 2); choose another" in second.stderr


def late_files():
    saved = checkpointing.saved_steps
    if os.environ["RANK"] == os.environ["HASTE_TEST_LATE"]:
        checkpointing.saved_steps = lambda folder: {step: path for step, path in saved(folder).items() if step < 4}


@pytest.mark.slow
def test_under_the_launcher(tiny_data, tmp_path):
    """torchrun passes SIGTERM on to both processes, which save and stop; its own exit code is then 1."""
    command = [sys.executable, *TORCHRUN, "train.py", *tiny_run("SiT-T/2", tiny_data, tmp_path, "--num-classes",
                                                                CLASSES, *NO_TEACHER, "--max-train-steps", 10_000,
                                                                "--checkpointing-steps", 10_000, "--num-workers", 1)]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env={**os.environ, **CPU}, stderr=subprocess.PIPE,
                               text=True)
    wait_for_rows(tmp_path, 3, 120)
    process.terminate()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 1, stderr[-3000:]
    assert newest(tmp_path) >= 3
    assert (tmp_path / "run/log.txt").read_text().splitlines()[-1].endswith("the same command continues")


def test_pictures_after_kills_and_for_any_number_of_processes(tmp_path):
    """1 and 3 processes, repeated kills, torn and lost files: the pictures are the same in the end."""
    ckpt = make_checkpoint(tmp_path / "0000005.pt")
    for count in (1, 3):  # two are in test_generate.py
        script("generate.py", *generate_arguments(ckpt, tmp_path / str(count)), processes=count)
    whole = pictures(tmp_path / "1")
    assert np.array_equal(whole, pictures(tmp_path / "3"))
    out, made = tmp_path / "killed", set()
    for life in range(4):
        process = SERVER.start("generate.py", *generate_arguments(ckpt, out, "--per-proc-batch-size", 4),
                               before="tests.test_faults.slow_disk")
        more = min(len(made) + 1, len(whole))  # a fast machine may have made them all
        wait_for(lambda more=more: len(set(out.rglob("*.png"))) >= more, seconds=20)
        process.kill()
        made = set(out.rglob("*.png"))
        if life == 2:
            min(made).write_bytes(min(made).read_bytes()[:300])
            max(made).unlink()
    script("generate.py", *generate_arguments(ckpt, out))
    assert np.array_equal(whole, pictures(out)) and not list(out.rglob(".*.tmp"))


# ---- FSDP ----

def fsdp_on_a_cpu():
    """As `accelerate launch --use_fsdp --fsdp_version 2` sets it. accelerate offers it to GPUs only."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.setdefault("FSDP_VERSION", "2")
    make = PartialState.__init__

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = made


@pytest.mark.parametrize("compiled", [[], pytest.param(["--compile"], marks=pytest.mark.slow)],
                         ids=["eager", "compiled"])
def test_fsdp_trains_and_checkpoints_to_the_same_file(tiny_data, teacher_file, tmp_path, compiled):
    """Same losses as one process; 6 = 3 + 3 steps; one process continues from the file of two."""
    more = ["--enc-weights", teacher_file, "--early-stop-point", 4, "--checkpointing-steps", 3, *compiled]
    arguments = train_arguments(tiny_data, tmp_path / "fsdp", *more)
    script("train.py", *train_arguments(tiny_data, tmp_path / "plain", *more))
    for stop in (3, 6):
        script("train.py", *arguments, "--max-train-steps", stop, processes=2, before="tests.test_faults.fsdp_on_a_cpu",
               env={"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})  # accelerate launch's default
    for a, b in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "fsdp"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    plain, split = checkpoint(tmp_path / "plain", 6), checkpoint(tmp_path / "fsdp", 6)
    for part in ("model", "ema"):
        assert plain[part].keys() == split[part].keys()
        for name, value in plain[part].items():
            torch.testing.assert_close(split[part][name], value, rtol=1e-2, atol=2e-4, msg=name)
    for i, entry in plain["opt"]["state"].items():
        for name, value in entry.items():
            assert split["opt"]["state"][i][name].shape == value.shape
    script("train.py", *arguments, "--max-train-steps", 7)
    assert metrics(tmp_path / "fsdp")[-1]["step"] == "7"


def test_fsdp_1_is_refused(tiny_data, tmp_path):
    done = script("train.py", *train_arguments(tiny_data, tmp_path, *NO_TEACHER), check=False, processes=2,
                  before="tests.test_faults.fsdp_on_a_cpu", env={"FSDP_VERSION": "1"})
    assert done.returncode == 1 and "set fsdp_version: 2 in accelerate's configuration" in done.stderr


def fsdp_with_a_look_inside():
    """fsdp_on_a_cpu: t reaches the embedder in float32 under autocast, blocks are units, weights are float32."""
    fsdp_on_a_cpu()
    split, embed = training.shard, TimestepEmbedder.forward

    def shard(accelerator, model, optimizer, ema):
        prepared = split(accelerator, model, optimizer, ema)
        assert all(isinstance(module, FSDPModule) for module in (model, *getattr(model, "blocks", ()),
                                                                 *getattr(model, "joint_blocks", ())))
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return prepared

    def forward(self, t):
        assert t.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        return embed(self, t)

    training.shard, TimestepEmbedder.forward = shard, forward


CHECKPOINTING = {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}


@pytest.mark.parametrize("name, ways", [("train.py", [{}, CHECKPOINTING]), ("train_t2i.py", [{}])],
                         ids=["SiT", "MMDiT"])
def test_steps_under_fsdp_are_those_of_ddp(tiny_data, tiny_captions, teacher_file, tmp_path, name, ways):
    """In bfloat16, clipped: both sum float32 gradients of the same forward passes. From the third step on, all weights
    have gradients.

    SiT's weights are equal. In MMDiT two streams of a block share the condition; FSDP adds its gradients block by
    block, in bfloat16.
    """
    terms, moments = (1e-5, 1e-4) if name == "train.py" else (1e-3, 5e-2)
    arguments = ["--enc-weights", teacher_file, "--max-train-steps", 3, "--max-grad-norm", 0.1, "--mixed-precision",
                 "bf16"]

    def run(out, **how):
        script(name, *(train_arguments(tiny_data, out, *arguments) if name == "train.py" else
                       tiny_run("MMDiT-T", tiny_captions, out, *arguments)), processes=2, **how)

    run(tmp_path / "ddp")
    for i, environment in enumerate(ways):
        out = tmp_path / f"fsdp-{i}"
        run(out, before="tests.test_faults.fsdp_with_a_look_inside", env=environment)
        for plain, split in zip(metrics(tmp_path / "ddp"), metrics(out), strict=True):
            for term in ("loss", "denoise", "feature", "attention", "grad_norm"):
                assert float(split[term]) == pytest.approx(float(plain[term]), rel=terms), term
        plain, split = checkpoint(tmp_path / "ddp", 3), checkpoint(out, 3)
        assert plain["model"].keys() == split["model"].keys()
        for number, entry in plain["opt"]["state"].items():
            for moment in ("exp_avg", "exp_avg_sq"):
                expected = entry[moment]
                difference = split["opt"]["state"][number][moment] - expected
                assert expected.any() and difference.norm() <= moments * expected.norm(), (number, moment)
