"""A run may stop or be killed anywhere: the same command continues it, and only time is lost."""
import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import loss
import train
from models.checkpoint import saved_steps
from runtime.errors import UserError
from runtime.files import atomic_write
from tests.conftest import NO_TEACHER, call_main, checkpoint, metrics, script, train_arguments
from training import start
from training.checkpointing import check_resumed, prune_checkpoints, read_newest, save_checkpoint
from training.metric_log import Metrics

PLAIN = [*NO_TEACHER, "--checkpointing-steps", 2]


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory, tiny_data):
    out = tmp_path_factory.mktemp("six")
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, train, *train_arguments(tiny_data, out, *PLAIN))
    return out


@pytest.fixture
def six(six_steps, tmp_path):
    """A finished run of PLAIN, six steps long, that a test may damage and continue."""
    return shutil.copytree(six_steps, tmp_path / "six")


def steps_saved(out):
    return sorted(saved_steps(out / "run/checkpoints"))


def log(out):
    return (out / "run/log.txt").read_text()


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def assert_same_state(a, b):
    """Plain values and tensors, equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
    if isinstance(a, (dict, list)):
        for x, y in zip(a.values(), b.values(), strict=True) if isinstance(a, dict) else zip(a, b, strict=True):
            assert_same_state(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


def assert_same_run(one, other, step):
    a, b = checkpoint(one, step), checkpoint(other, step)
    for part in ("model", "ema", "opt", "metrics", "steps", "scaler"):
        assert_same_state(a.get(part), b.get(part))
    assert without_time(metrics(one)) == without_time(metrics(other))


# 64 images: batches of 16 end an epoch after 4 and 8 steps, and the stops are after 5 and 9. Metrics are means of 5
# steps.
TRIGGER = ["--early-stop-trigger", "gradient", "--trigger-samples", 8, "--trigger-threshold", 1, "--trigger-start"]
RUNS = {
    "across the early stop": ["--early-stop-point", 6, "--gradient-accumulation-steps", 2, "--num-workers", 2],
    "at the early stop": ["--early-stop-point", 5, "--mixed-precision", "bf16", "--batch-size", 8],
    "before and after the trigger fires": [*TRIGGER, 7],
    "where the trigger fires": [*TRIGGER, 5, "--num-workers", 1],
    "stopped at an epoch's end": ["--early-stop-point", 6, "--batch-size", 8, "--epochs", 2],
}


@pytest.mark.parametrize("name", RUNS)
def test_twelve_steps_are_five_and_four_and_three(run, teacher_file, tmp_path, name):
    more = ["--batch-size", 16, "--enc-weights", teacher_file, "--log-every", 5, *RUNS[name], "--max-train-steps"]
    stops = (8, 16) if "epoch" in name else (5, 9, 12)
    run(tmp_path / "whole", *more, stops[-1])
    for stop in stops:
        run(tmp_path / "parts", *more, stop)
        assert int(metrics(tmp_path / "parts")[-1]["step"]) == stop
    run(tmp_path / "parts", *more, stops[-1])  # done: nothing changes
    assert_same_run(tmp_path / "whole", tmp_path / "parts", stops[-1])
    assert "feature" in metrics(tmp_path / "whole")[0] and metrics(tmp_path / "whole")[-1]["feature"] == ""


def test_two_processes_stop_and_go_on(tiny_data, teacher_file, tmp_path):
    """5 + 4 + 3 bit for bit with two processes; one process from 9 on is allowed, and the log says what changes."""
    more = ["--batch-size", 16, "--enc-weights", teacher_file, "--early-stop-point", 6, "--log-every", 4,
            "--max-train-steps"]
    script("train.py", *train_arguments(tiny_data, tmp_path / "whole", *more, 12), processes=2)
    for stop in (5, 9):
        script("train.py", *train_arguments(tiny_data, tmp_path / "parts", *more, stop), processes=2)
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    script("train.py", *train_arguments(tiny_data, tmp_path / "parts", *more, 12), processes=2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    script("train.py", *train_arguments(tiny_data, tmp_path / "one", *more, 12))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "one"), strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
    assert "processes was 2, is 1" in log(tmp_path / "one")
    said = "data, noise and order stay the same; sums over the batch are rounded in another order"
    assert said in log(tmp_path / "one")
    assert "processes was" not in log(tmp_path / "parts")


def test_a_run_of_the_older_noise_stream_goes_on_and_says_so_once(run, six):
    path, state = six / "run/checkpoints/0000006.pt", checkpoint(six, 6)
    assert state["args"].pop("noise_stream") == 2 and "noise stream" not in log(six)
    torch.save(state, path)
    for step in (7, 8):
        run(six, *PLAIN, "--max-train-steps", step)
    assert checkpoint(six, 8)["args"]["noise_stream"] == 2
    assert [line.split(" ", 2)[2] for line in log(six).splitlines() if "noise stream" in line] == [
        "the noise stream has changed since: timesteps, noise and condition drop are other numbers from here on"]


@pytest.fixture
def scaled(monkeypatch):
    """A loss scaler on the CPU, which fp16 has on a GPU; every second step its scale doubles."""
    make = start.make_accelerator

    def make_accelerator(args):
        accelerator, folder = make(args)
        accelerator.scaler = torch.amp.GradScaler("cpu", growth_interval=2, init_scale=2.0 ** 14)
        accelerator.unscale_gradients = lambda: [accelerator.scaler.unscale_(each.optimizer)
                                                 for each in accelerator._optimizers]
        return accelerator, folder

    monkeypatch.setattr(start, "make_accelerator", make_accelerator)


def test_scaler_goes_on(run, scaled, tmp_path):
    """Its scale and its count of steps since the last change are restored: 5 = 3 + 2."""
    for name, steps in (("whole", 5), ("parts", 3), ("parts", 5)):
        run(tmp_path / name, *NO_TEACHER, "--max-train-steps", steps)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5)
    assert checkpoint(tmp_path / "parts", 3)["scaler"]["_growth_tracker"] == 1
    assert checkpoint(tmp_path / "parts", 5)["scaler"]["scale"] == 2.0 ** 16


# ---- numbers that go wrong ----

def break_loss(monkeypatch, *steps, term="denoise"):
    """The loss of these steps (1-based, of the next run) is not a number."""
    plain, calls = loss.SILoss.__call__, []

    def broken(self, *args):
        calls.append(1)
        losses = plain(self, *args)
        return {**losses, term: losses[term] * float("nan")} if len(calls) in steps else losses

    monkeypatch.setattr(loss.SILoss, "__call__", broken)


def test_a_skipped_step_changes_no_weight(run, monkeypatch, tmp_path):
    """If allowed, it is logged and counted, the weights stay unchanged, and the run continues."""
    break_loss(monkeypatch, 2, 3)
    run(tmp_path, *NO_TEACHER, "--max-skipped-steps", 2, "--log-every", 4, "--checkpointing-steps", 1)
    states = {step: checkpoint(tmp_path, step) for step in range(1, 7)}
    assert_same_state(states[1]["model"], states[3]["model"])
    assert_same_state(states[1]["opt"]["state"], states[3]["opt"]["state"])
    assert not torch.equal(states[3]["model"]["x_embedder.proj.bias"], states[4]["model"]["x_embedder.proj.bias"])
    assert [(row["step"], row["skipped"], float(row["loss"]) > 0) for row in metrics(tmp_path)] == [
        ("4", "2", True), ("6", "0", True)]
    assert "step 2 is skipped: denoise is not finite (loss nan, denoise nan, grad_norm nan)" in log(tmp_path)


def test_the_cause_is_named(run, data, teacher_file, tmp_path):
    """For huge latents and for NaN in the teacher's weights; the learning rate is not blamed."""
    weights = torch.load(teacher_file, weights_only=True)
    torch.save({**weights, "norm.bias": weights["norm.bias"] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="feature is not finite at step 1 .* The teacher's output is not finite: get"):
        run(tmp_path / "a", "--enc-weights", tmp_path / "nan.pth", data=data)
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, 1e30 * np.load(path))
    with pytest.raises(UserError, match="not finite at step 1 .* The latents of the data reach .*e.30: see that"):
        run(tmp_path / "b", "--enc-weights", teacher_file, data=data)
    with pytest.raises(UserError, match="--adam-epsilon is 0; it must be at least 1e-20"):
        run(tmp_path / "b", "--adam-epsilon", 0, data=data)


@pytest.mark.parametrize("limit, stop", [(0, 2), (1, 3)])
def test_too_many_skipped_steps_stop_the_run(run, monkeypatch, teacher_file, tmp_path, limit, stop):
    """Step and term are named; the weights at the stop are still whole, and the last checkpoint is the one before."""
    break_loss(monkeypatch, 2, 3, term="attention")
    with pytest.raises(UserError, match=f"^attention is not finite at step {stop} .*attention nan.*last checkpoint is"):
        run(tmp_path, "--max-skipped-steps", limit, "--checkpointing-steps", 1, "--enc-weights", teacher_file)
    assert steps_saved(tmp_path) == list(range(1, stop))


def test_scaler_skips_are_counted(run, monkeypatch, scaled, tmp_path):
    """By default, overflowing gradients are normal with fp16's scaler; each halves the scale."""
    mean_flat, calls = loss.mean_flat, []

    def overflow(x):
        calls.append(1)
        if len(calls) <= 2:
            x.register_hook(lambda gradient: gradient * float("inf"))
        return mean_flat(x)

    monkeypatch.setattr(loss, "mean_flat", overflow)
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 3)
    assert [row["skipped"] for row in metrics(tmp_path)] == ["1", "1", "0"]
    assert checkpoint(tmp_path, 3)["scaler"]["scale"] == 2.0 ** 12
    assert list(checkpoint(tmp_path, 3)["opt"]["state"]) and checkpoint(tmp_path, 3)["opt"]["state"][1]["step"] == 1


def test_a_scaler_lets_no_loss_pass_that_is_not_finite(run, monkeypatch, scaled, tmp_path):
    """No loss scale can fix that."""
    break_loss(monkeypatch, 1)
    with pytest.raises(UserError, match="denoise is not finite at step 1"):
        run(tmp_path, *NO_TEACHER, "--max-train-steps", 3)


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path):
    """Here from finite gradients times an absurd learning rate."""
    with pytest.raises(UserError, match="of model is not finite at step 1, which is not saved"):
        run(tmp_path, *NO_TEACHER, "--learning-rate", "1e39", "--checkpointing-steps", 1)
    assert not saved_steps(tmp_path / "run/checkpoints")


# ---- checkpoints ----

def test_newest_and_milestones_are_kept(run, tmp_path):
    run(tmp_path, *NO_TEACHER, "--checkpointing-steps", 1, "--max-train-steps", 8, "--keep-checkpoints", 2,
        "--keep-every", 3)
    assert steps_saved(tmp_path) == [3, 6, 7, 8]


def test_what_goes_back_is_not_deleted(tmp_path):
    """After --resume-step, later checkpoints of the abandoned branch are neither counted nor deleted."""
    for step in (1, 2, 3, 7, 8):
        (tmp_path / f"{step:07d}.pt").touch()
    prune_checkpoints(tmp_path, 3, keep=1)
    assert sorted(saved_steps(tmp_path)) == [3, 7, 8]
    prune_checkpoints(tmp_path, 8, keep=0)
    assert sorted(saved_steps(tmp_path)) == [3, 7, 8]


def test_a_checkpoint_after_some_minutes(run, tmp_path):
    """The clock alone decides, at any step."""
    run(tmp_path, *NO_TEACHER, "--checkpoint-minutes", 1e-6)
    assert steps_saved(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_going_back_makes_the_same_run_again(run, six):
    first, rows = checkpoint(six, 6), without_time(metrics(six))
    run(six, *PLAIN, "--resume-step", 2)
    assert "0000002.pt" in log(six).split("continuing from ")[1]
    assert "resume_step" not in json.loads((six / "run/args.json").read_text())  # a new run has no such checkpoint
    assert_same_state(first["model"], checkpoint(six, 6)["model"])
    assert without_time(metrics(six)) == rows


def test_rows_are_of_the_steps_that_the_run_has_followed(run, monkeypatch, six):
    """Step 6, back to 2 with another rate, stopped before the next checkpoint: run and rows continue from 6."""
    rows = without_time(metrics(six))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        break_loss(patch, 2)
        patch.setattr("training.metric_log.UserError", lambda _: UserError("stop"))
        run(six, *PLAIN, "--resume-step", 2, "--learning-rate", 1e-2)
    assert [row["step"] for row in metrics(six)] == ["1", "2", "3"]
    run(six, *PLAIN, "--max-train-steps", 8)
    assert [row["step"] for row in metrics(six)] == [str(step) for step in range(1, 9)]
    assert without_time(metrics(six))[:6] == rows


def test_what_a_kill_left_beside_the_checkpoints_to_keep_is_pruned(run, six):
    """The next start prunes it, even with no step left to make."""
    run(six, *PLAIN, "--keep-checkpoints", 1)
    assert steps_saved(six) == [6]


@pytest.mark.parametrize("name, value", [
    ("seconds", float("nan")), ("history", 3), ("metrics", {"names": ["loss"], "rows": torch.zeros(3), "in_a_row": 0}),
    ("ema", {"pos_embed": torch.zeros(1, 64, 32).to_sparse()})])
def test_entries_of_another_kind(tmp_path, name, value):
    with pytest.raises(UserError, match=f"0000002.pt has a '{name}' that no train.py wrote"):
        check_resumed(tmp_path / "0000002.pt", {"model": {}, name: value})


def test_an_optimizer_of_another_shape(run, six):
    state = checkpoint(six, 6)
    state["opt"]["state"][1]["exp_avg"] = torch.zeros(3)
    torch.save(state, six / "run/checkpoints/0000006.pt")
    with pytest.raises(UserError, match="0000006.pt has the optimizer's state of another model or optimizer"):
        run(six, *PLAIN, "--max-train-steps", 7)


def test_a_number_that_only_looks_like_one_is_no_step(tmp_path):
    (tmp_path / "\u00b2\u00b2.pt").touch()
    assert saved_steps(tmp_path) == {}


# ---- the log and the folder ----

def test_a_refused_start_leaves_nothing_new_and_a_finished_log_as_it_is(run, six, tmp_path):
    """The last line of an unfinished run's log reports it, so that no job restarts the run for ever."""
    lost = [*PLAIN, "--max-train-steps", 7, "--data-dir", tmp_path / "lost"]
    with pytest.raises(UserError, match="lost/vae-sd"):
        run(six, *lost, "--exp-name", "new")
    assert not (six / "new").exists()
    finished = log(six)
    for wrong in (lost, [*PLAIN, "--max-train-steps", 7, "--seed", 1, "--model", "SiT-S/8"]):
        with pytest.raises(UserError):
            run(six, *wrong)
        assert log(six) == finished
    with open(six / "run/log.txt", "a") as file:
        file.write("stopped by a signal after step 1; the same command continues\n")
    with pytest.raises(UserError):
        run(six, *lost)
    assert "ended: refused: " in log(six).splitlines()[-1] and "lost/vae-sd" in log(six).splitlines()[-1]


def test_the_log_says_why_a_run_ends(run, monkeypatch, tmp_path):
    for wrong, said in ((UserError("Full."), "ended: Full."), (KeyError("bug"), "ended: KeyError('bug')")):
        monkeypatch.setattr("training.trainer.update_ema", lambda *_, wrong=wrong: (_ for _ in ()).throw(wrong))
        with pytest.raises(type(wrong)):
            run(tmp_path, *NO_TEACHER)
        assert log(tmp_path).endswith(f"{said}\n")


def test_a_finished_run_in_phase_one_has_nothing_to_do(run, monkeypatch, teacher_file, tmp_path):
    """As in REPA's presets, where alignment never ends."""
    arguments = ["--enc-weights", teacher_file, "--max-train-steps", 1]
    run(tmp_path, *arguments)
    before = (tmp_path / "run/checkpoints/0000001.pt").read_bytes()
    monkeypatch.setattr("training.start.load_teachers", lambda *_, **__: pytest.fail("a teacher was opened"))
    run(tmp_path, *arguments)
    assert log(tmp_path).endswith(f"done: 1 steps in {tmp_path / 'run'}\n")
    assert (tmp_path / "run/checkpoints/0000001.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["", "..", "a/../../x", "/tmp/x", "a\nb"])
def test_a_run_stays_inside_the_output_folder(run, tmp_path, name):
    with pytest.raises(UserError, match="--exp-name.* is no name of a folder inside --output-dir"):
        run(tmp_path, "--exp-name", name)


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "code"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(run, six, damage):
    """The damaged one does not count among those to keep."""
    path, whole = six / "run/checkpoints/0000005.pt", checkpoint(six, 6)
    (six / "run/checkpoints/0000006.pt").rename(path)
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-1000], "empty": b""}.get(damage, data))
    if damage == "code":
        torch.save({"model": os.getcwd}, path)
    with pytest.raises(UserError, match="--num-classes"):  # a refused start changes no checkpoint
        run(six, *PLAIN, "--num-classes", 1)
    assert steps_saved(six) == [2, 4, 5]
    run(six, *PLAIN, "--keep-checkpoints", 2)
    assert f"{path} is " in log(six) and "Trying the checkpoint before it." in log(six)
    assert "0000004.pt" in log(six).split("continuing from ")[1]
    assert steps_saved(six) == [4, 6] and path.with_name("0000005.pt.damaged").is_file()
    for part in ("model", "ema", "opt"):
        assert_same_state(whole[part], checkpoint(six, 6)[part])


def test_phase_two_goes_on_without_images(run, tiny_data, teacher_file, tmp_path):
    """While its checkpoint exists; going back to Phase I needs images."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    arguments = ["--enc-weights", teacher_file, "--early-stop-point", 2, "--checkpointing-steps", 1,
                 "--max-train-steps"]
    run(tmp_path, *arguments, 3, data=data)
    (data / "images").rename(tmp_path / "images")
    run(tmp_path, *arguments, 4, data=data)
    assert saved_steps(tmp_path / "run/checkpoints").keys() == {1, 2, 3, 4}
    for step in (2, 3, 4):
        os.truncate(tmp_path / f"run/checkpoints/{step:07d}.pt", 1000)
    (tmp_path / "images").rename(data / "images")
    run(tmp_path, *arguments, 4, data=data)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3", "4"] and metrics(tmp_path)[1]["feature"]


def test_a_disk_that_fails_for_a_while_makes_no_checkpoint_a_damaged_one(monkeypatch, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {part: {"weight": torch.ones(3)} for part in ("model", "ema")})

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="0000002.pt cannot be read now .*Input/output error.*; fix that and"):
        read_newest(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000001.pt", "0000002.pt"]


def test_what_metrics_keep_for_the_first_row_after_a_restart(tmp_path):
    """Seconds of the steps not yet in a row, and the number of consecutive skipped steps."""
    broken = {"loss": torch.tensor(float("nan")), "denoise": torch.tensor(float("nan")), "grad_norm": torch.tensor(1.0)}
    first = Metrics(tmp_path / "metrics.csv", Accelerator(cpu=True), 0, {}, max_skipped=2)
    for _ in range(2):
        first.add(broken)
    state = {**first.state_dict(), "seconds": 1000.0}
    second = Metrics(tmp_path / "metrics.csv", Accelerator(cpu=True), 2, state, max_skipped=2)
    second.begin()
    assert 1000 <= second.seconds() < 1100
    second.add(broken)
    with pytest.raises(UserError, match="in 3 step"):
        second.write()


def test_no_checkpoint_left(tmp_path):
    for step in (1, 2):
        (tmp_path / f"{step:07d}.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="has no checkpoint that can be read"):
        read_newest(tmp_path, 0)
    with pytest.raises(UserError, match="0000002.pt is damaged"):
        read_newest(tmp_path, 2)
    assert read_newest(tmp_path / "none", 0) == (None, {})


def test_full_disk_at_any_place(tmp_path):
    """torch.save reports a failed write as an error about positions; the user sees the same sentence."""
    weights = {str(i): torch.full((1 + 1000 * i,), 1.0) for i in range(20)}
    save_checkpoint(tmp_path, 1, {"model": weights, "ema": weights})
    size, limits = (tmp_path / "0000001.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for share in (0.01, 0.1, 0.2, 0.31, 0.5, 0.75, 0.83, 0.99):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
        try:
            with pytest.raises(UserError, match="0000002.pt could not be written .File too large., what was there"):
                save_checkpoint(tmp_path, 2, {"model": weights, "ema": weights})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["0000001.pt"], share


def limit_file_size():
    limit = int(os.environ["HASTE_TEST_LARGEST_FILE"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_stale_temporary_files_are_cleaned(run, six):
    stale = [six / "run" / name for name in (".args.json.77.tmp", "checkpoints/.0000007.pt.77.tmp")]
    for path in stale:
        path.write_bytes(b"half")
    with open(six / "run/metrics.csv", "a") as file:
        file.write("7,0.1")  # the line that a killed process was writing
    run(six, *PLAIN, "--max-train-steps", 7)
    assert not any(path.exists() for path in stale)
    assert [row["step"] for row in metrics(six)] == [str(step) for step in range(1, 8)]


def test_atomic_write_keeps_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_write(tmp_path / "file", "w") as file:
        file.write("new")
        raise ValueError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
