"""A run may stop anywhere, by itself or by force: the same command continues it, and nothing but time is lost."""
import errno
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
from tests.conftest import call_main, checkpoint, metrics, script, train_arguments
from training import start
from training.checkpointing import check_resumed, prune_checkpoints, read_newest, save_checkpoint
from training.metric_log import Metrics


def run(monkeypatch, *arguments):
    call_main(monkeypatch, train, *arguments)


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
RUNS = {
    "across the early stop": ["--early-stop-point", 6],
    "at the early stop": ["--early-stop-point", 5],
    "accumulation": ["--early-stop-point", 6, "--gradient-accumulation-steps", 2],
    "before and after the trigger fires": ["--early-stop-trigger", "gradient", "--trigger-start", 7,
                                           "--trigger-samples", 8,
                                           "--trigger-threshold", 1],
    "where the trigger fires": ["--early-stop-trigger", "gradient", "--trigger-start", 5, "--trigger-samples", 8,
                                "--trigger-threshold", 1, "--num-workers", 1],
    "workers": ["--early-stop-point", 6, "--num-workers", 2],
    "bf16": ["--early-stop-point", 7, "--mixed-precision", "bf16"],
    "stopped at an epoch's end": ["--early-stop-point", 6, "--batch-size", 8, "--epochs", 2],
}


@pytest.mark.parametrize("name", RUNS)
def test_twelve_steps_are_five_and_four_and_three(monkeypatch, tiny_data, teacher_file, tmp_path, name):
    more = ["--batch-size", 16, "--enc-weights", teacher_file, "--log-every", 5, *RUNS[name], "--max-train-steps"]
    stops = (8, 16) if "epoch" in name else (5, 9, 12)
    run(monkeypatch, *train_arguments(tiny_data, tmp_path / "whole", *more, stops[-1]))
    for stop in stops:
        run(monkeypatch, *train_arguments(tiny_data, tmp_path / "parts", *more, stop))
        assert int(metrics(tmp_path / "parts")[-1]["step"]) == stop
    run(monkeypatch, *train_arguments(tiny_data, tmp_path / "parts", *more, stops[-1]))  # is done: nothing changes
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


def test_a_run_of_the_older_noise_stream_goes_on_and_says_so_once(monkeypatch, tiny_data, tmp_path):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps")
    run(monkeypatch, *arguments, 2)
    path, state = tmp_path / "run/checkpoints/0000002.pt", checkpoint(tmp_path, 2)
    assert state["args"].pop("noise_stream") == 2 and "noise stream" not in log(tmp_path)
    torch.save(state, path)
    for step in (3, 4):
        run(monkeypatch, *arguments, step)
    assert checkpoint(tmp_path, 4)["args"]["noise_stream"] == 2
    assert [line.split(" ", 2)[2] for line in log(tmp_path).splitlines() if "noise stream" in line] == [
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


def test_scaler_goes_on(monkeypatch, scaled, tiny_data, tmp_path):
    """Its scale and its count of steps since the last change are restored: 5 = 3 + 2."""
    arguments = train_arguments(tiny_data, tmp_path / "whole", "--enc-type", "none", "--max-train-steps")
    parts = train_arguments(tiny_data, tmp_path / "parts", "--enc-type", "none", "--max-train-steps")
    run(monkeypatch, *arguments, 5)
    run(monkeypatch, *parts, 3)
    run(monkeypatch, *parts, 5)
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


def test_a_skipped_step_changes_no_weight(monkeypatch, tiny_data, tmp_path):
    """Allowed, it is logged and counted, the weights are those of the step before, and the run goes on."""
    break_loss(monkeypatch, 2, 3)
    run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-skipped-steps", 2,
                                      "--log-every", 4,
                                      "--checkpointing-steps", 1))
    states = {step: checkpoint(tmp_path, step) for step in range(1, 7)}
    assert_same_state(states[1]["model"], states[3]["model"])
    assert_same_state(states[1]["opt"]["state"], states[3]["opt"]["state"])
    assert not torch.equal(states[3]["model"]["x_embedder.proj.bias"], states[4]["model"]["x_embedder.proj.bias"])
    assert [(row["step"], row["skipped"], float(row["loss"]) > 0) for row in metrics(tmp_path)] == [
        ("4", "2", True), ("6", "0", True)]
    assert "step 2 is skipped: denoise is not finite (loss nan, denoise nan, grad_norm nan)" in log(tmp_path)


def test_the_cause_is_named(monkeypatch, data, teacher_file, tmp_path):
    """Huge latents and a teacher with NaN in its weights, not the learning rate."""
    arguments = train_arguments(data, tmp_path / "a", "--enc-weights")
    weights = torch.load(teacher_file, weights_only=True)
    torch.save({**weights, "norm.bias": weights["norm.bias"] * float("nan")}, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="feature is not finite at step 1 .* The teacher's output is not finite: get"):
        run(monkeypatch, *arguments, tmp_path / "nan.pth")
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, 1e30 * np.load(path))
    with pytest.raises(UserError, match="not finite at step 1 .* The latents of the data reach .*e.30: see that"):
        run(monkeypatch, *train_arguments(data, tmp_path / "b", "--enc-weights", teacher_file))
    with pytest.raises(UserError, match="--adam-epsilon is 0; it must be at least 1e-20"):
        run(monkeypatch, *train_arguments(data, tmp_path / "b", "--adam-epsilon", 0))


@pytest.mark.parametrize("limit, stop", [(0, 2), (1, 3)])
def test_too_many_skipped_steps_stop_the_run(monkeypatch, tiny_data, teacher_file, tmp_path, limit, stop):
    """Step and term are named; the weights at the stop are still whole, and the last checkpoint is the one before."""
    break_loss(monkeypatch, 2, 3, term="attention")
    with pytest.raises(UserError, match=f"^attention is not finite at step {stop} .*attention nan.*last checkpoint is"):
        run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--max-skipped-steps", limit, "--checkpointing-steps", 1,
                                          "--enc-weights", teacher_file))
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == list(range(1, stop))


def test_scaler_skips_are_counted(monkeypatch, scaled, tiny_data, tmp_path):
    """Gradients that overflow are normal with fp16's scaler, by default; the scale is halved by each."""
    mean_flat, calls = loss.mean_flat, []

    def overflow(x):
        calls.append(1)
        if len(calls) <= 2:
            x.register_hook(lambda gradient: gradient * float("inf"))
        return mean_flat(x)

    monkeypatch.setattr(loss, "mean_flat", overflow)
    run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps", 3))
    assert [row["skipped"] for row in metrics(tmp_path)] == ["1", "1", "0"]
    assert checkpoint(tmp_path, 3)["scaler"]["scale"] == 2.0 ** 12
    assert list(checkpoint(tmp_path, 3)["opt"]["state"]) and checkpoint(tmp_path, 3)["opt"]["state"][1]["step"] == 1


def test_a_scaler_lets_no_loss_pass_that_is_not_finite(monkeypatch, scaled, tiny_data, tmp_path):
    """No scale mends that."""
    break_loss(monkeypatch, 1)
    with pytest.raises(UserError, match="denoise is not finite at step 1"):
        run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps", 3))


def test_weights_that_are_not_finite_are_never_saved(monkeypatch, tiny_data, tmp_path):
    """Finite gradients times an absurd learning rate."""
    with pytest.raises(UserError, match="of model is not finite at step 1, which is not saved"):
        run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--learning-rate", "1e39",
                                          "--checkpointing-steps", 1))
    assert not saved_steps(tmp_path / "run/checkpoints")


# ---- checkpoints ----

def test_newest_and_milestones_are_kept(monkeypatch, tiny_data, tmp_path):
    run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 1,
                                      "--max-train-steps", 8, "--keep-checkpoints", 2, "--keep-every", 3))
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == [3, 6, 7, 8]


def test_what_goes_back_is_not_deleted(tmp_path):
    """After --resume-step the checkpoints ahead, of the branch that was left, are neither counted nor deleted."""
    for step in (1, 2, 3, 7, 8):
        (tmp_path / f"{step:07d}.pt").touch()
    prune_checkpoints(tmp_path, 3, keep=1)
    assert sorted(saved_steps(tmp_path)) == [3, 7, 8]
    prune_checkpoints(tmp_path, 8, keep=0)
    assert sorted(saved_steps(tmp_path)) == [3, 7, 8]


def test_a_checkpoint_after_some_minutes(monkeypatch, tiny_data, tmp_path):
    """By the clock alone, at whatever step that is."""
    run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpoint-minutes", 1e-6))
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == [1, 2, 3, 4, 5, 6]


def test_going_back_makes_the_same_run_again(monkeypatch, tiny_data, tmp_path):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2)
    run(monkeypatch, *arguments)
    first, rows = checkpoint(tmp_path, 6), without_time(metrics(tmp_path))
    run(monkeypatch, *arguments, "--resume-step", 2)
    assert "0000002.pt" in log(tmp_path).split("continuing from ")[1]
    assert_same_state(first["model"], checkpoint(tmp_path, 6)["model"])
    assert without_time(metrics(tmp_path)) == rows


def test_rows_are_of_the_steps_that_the_run_has_followed(monkeypatch, tiny_data, tmp_path):
    """Step 6, back to 2 with another rate, stopped before the next checkpoint: it goes on from 6, as its rows do."""
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2)
    run(monkeypatch, *arguments)
    rows = without_time(metrics(tmp_path))
    with monkeypatch.context() as patch, pytest.raises(UserError, match="stop"):
        break_loss(patch, 2)
        patch.setattr("training.metric_log.UserError", lambda _: UserError("stop"))
        run(patch, *arguments, "--resume-step", 2, "--learning-rate", 1e-2)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3"]
    run(monkeypatch, *arguments, "--max-train-steps", 8)
    assert [row["step"] for row in metrics(tmp_path)] == [str(step) for step in range(1, 9)]
    assert without_time(metrics(tmp_path))[:6] == rows


def test_what_a_kill_left_beside_the_checkpoints_to_keep_is_pruned(monkeypatch, tiny_data, tmp_path):
    """By the next start, though it has no step left to make."""
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2)
    run(monkeypatch, *arguments)
    run(monkeypatch, *arguments, "--keep-checkpoints", 1)
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == [6]


@pytest.mark.parametrize("name, value", [
    ("seconds", "long"), ("seconds", float("nan")), ("history", 3), ("trigger_fired", "no"),
    ("metrics", {"names": ["loss"], "rows": [1.0], "in_a_row": 0}),
    ("metrics", {"names": ["loss"], "rows": torch.zeros(3), "in_a_row": 0}),
    ("opt", {"param_groups": [3], "state": {}}), ("opt", {"param_groups": [{"params": [0]}], "state": {0: 1.0}}),
    ("model", {"pos_embed": torch.zeros(1, 64, 32, device="meta")}),
    ("ema", {"pos_embed": torch.zeros(1, 64, 32).to_sparse()})])
def test_entries_of_another_kind(tmp_path, name, value):
    with pytest.raises(UserError, match=f"0000002.pt has a '{name}' that no train.py wrote"):
        check_resumed(tmp_path / "0000002.pt", {"model": {}, name: value})


def test_a_number_that_only_looks_like_one_is_no_step(tmp_path):
    (tmp_path / "\u00b2\u00b2.pt").touch()
    assert saved_steps(tmp_path) == {}


# ---- the log and the folder ----

def test_a_refused_start_leaves_nothing_new_and_a_finished_log_as_it_is(monkeypatch, tiny_data, tmp_path):
    """In an unfinished run's log the last line says it, so that no job starts it again and again."""
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps")
    lost = [tmp_path / "lost" if each == str(tiny_data) else each for each in arguments]
    with pytest.raises(UserError, match="lost/vae-sd"):
        run(monkeypatch, *lost, 1)
    assert not (tmp_path / "run").exists()
    run(monkeypatch, *arguments, 1)
    finished = log(tmp_path)
    for wrong in ([*lost, 2], [*arguments, 2, "--seed", 1, "--model", "SiT-S/8"]):
        with pytest.raises(UserError):
            run(monkeypatch, *wrong)
        assert log(tmp_path) == finished
    with open(tmp_path / "run/log.txt", "a") as file:
        file.write("stopped by a signal after step 1; the same command continues\n")
    with pytest.raises(UserError):
        run(monkeypatch, *lost, 2)
    assert "ended: refused: " in log(tmp_path).splitlines()[-1] and "lost/vae-sd" in log(tmp_path).splitlines()[-1]


def test_the_log_says_why_a_run_ends(monkeypatch, tiny_data, tmp_path):
    for wrong, said in ((UserError("Full."), "ended: Full."), (KeyError("bug"), "ended: KeyError('bug')")):
        monkeypatch.setattr("training.trainer.update_ema", lambda *_, wrong=wrong: (_ for _ in ()).throw(wrong))
        with pytest.raises(type(wrong)):
            run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--enc-type", "none"))
        assert log(tmp_path).endswith(f"{said}\n")


def test_a_finished_run_in_phase_one_has_nothing_to_do(monkeypatch, tiny_data, teacher_file, tmp_path):
    """As one of REPA's presets, whose alignment never ends."""
    arguments = train_arguments(tiny_data, tmp_path, "--enc-weights", teacher_file, "--max-train-steps", 1)
    run(monkeypatch, *arguments)
    before = (tmp_path / "run/checkpoints/0000001.pt").read_bytes()
    monkeypatch.setattr("training.start.load_teachers", lambda *_, **__: pytest.fail("a teacher was opened"))
    run(monkeypatch, *arguments)
    assert log(tmp_path).endswith(f"done: 1 steps in {tmp_path / 'run'}\n")
    assert (tmp_path / "run/checkpoints/0000001.pt").read_bytes() == before


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../../x", "/tmp/x", "a\nb"])
def test_a_run_stays_inside_the_output_folder(monkeypatch, tiny_data, tmp_path, name):
    with pytest.raises(UserError, match="--exp-name.* is no name of a folder inside --output-dir"):
        run(monkeypatch, *train_arguments(tiny_data, tmp_path, "--exp-name", name))


@pytest.mark.parametrize("damage", ["cut", "empty", "one bit", "code"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(monkeypatch, tiny_data, tmp_path, damage):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2,
                                "--max-train-steps")
    run(monkeypatch, *arguments, 6)
    path, whole = tmp_path / "run/checkpoints/0000006.pt", checkpoint(tmp_path, 6)
    data = bytearray(path.read_bytes())
    if damage == "one bit":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-1000], "empty": b""}.get(damage, data))
    if damage == "code":
        torch.save({"model": os.getcwd}, path)
    run(monkeypatch, *arguments, 6)
    assert f"{path} is " in log(tmp_path) and "Trying the checkpoint before it." in log(tmp_path)
    assert "0000004.pt" in log(tmp_path).split("continuing from ")[1]
    assert (tmp_path / "run/checkpoints/0000006.pt.damaged").is_file()
    for part in ("model", "ema", "opt"):
        assert_same_state(whole[part], checkpoint(tmp_path, 6)[part])


def test_phase_two_goes_on_without_images(monkeypatch, tiny_data, teacher_file, tmp_path):
    """As long as its checkpoint is there: if Phase I has to be gone back to, images are read."""
    data = shutil.copytree(tiny_data, tmp_path / "data")
    steps = [*train_arguments(data, tmp_path), "--enc-weights", teacher_file, "--early-stop-point", 2,
             "--checkpointing-steps", 1]
    run(monkeypatch, *steps, "--max-train-steps", 3)
    (data / "images").rename(tmp_path / "images")
    run(monkeypatch, *steps, "--max-train-steps", 4)
    assert saved_steps(tmp_path / "run/checkpoints").keys() == {1, 2, 3, 4}
    for step in (2, 3, 4):
        os.truncate(tmp_path / f"run/checkpoints/{step:07d}.pt", 1000)
    (tmp_path / "images").rename(data / "images")
    run(monkeypatch, *steps, "--max-train-steps", 4)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2", "3", "4"] and metrics(tmp_path)[1]["feature"]


def test_a_disk_that_fails_for_a_while_makes_no_checkpoint_a_damaged_one(monkeypatch, tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {part: {"weight": torch.ones(3)} for part in ("model", "ema")})

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(UserError, match="0000002.pt cannot be read now .*Input/output error.*; fix that and"):
        read_newest(tmp_path, 0, ("model",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000001.pt", "0000002.pt"]


def test_what_metrics_keep_for_the_first_row_after_a_restart(tmp_path):
    """The seconds of the steps that no row has yet, and how many were skipped in a row."""
    broken = {"loss": torch.tensor(float("nan")), "denoise": torch.tensor(float("nan")), "grad_norm": torch.tensor(1.0)}
    first = Metrics(tmp_path / "metrics.csv", Accelerator(cpu=True), 0, max_skipped=2)
    for _ in range(2):
        first.add(broken)
    state = first.state_dict()
    second = Metrics(tmp_path / "metrics.csv", Accelerator(cpu=True), 2, state, max_skipped=2, seconds=1000.0)
    second.begin()
    assert 1000 <= second.seconds() < 1100
    second.add(broken)
    with pytest.raises(UserError, match="in 3 step"):
        second.write()


def test_a_damaged_checkpoint_is_none_of_those_to_keep(monkeypatch, tiny_data, tmp_path):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2,
                                "--keep-checkpoints", 2)
    run(monkeypatch, *arguments, "--max-train-steps", 6)
    (tmp_path / "run/checkpoints/0000006.pt").rename(tmp_path / "run/checkpoints/0000005.pt")
    (tmp_path / "run/checkpoints/0000005.pt").write_bytes(b"torn")
    run(monkeypatch, *arguments, "--max-train-steps", 6)
    assert sorted(saved_steps(tmp_path / "run/checkpoints")) == [4, 6]


def test_no_checkpoint_left(tmp_path):
    for step in (1, 2):
        (tmp_path / f"{step:07d}.pt").write_bytes(b"torn")
    with pytest.raises(UserError, match="has no checkpoint that can be read"):
        read_newest(tmp_path, 0, ("model",))
    with pytest.raises(UserError, match="0000002.pt is damaged"):
        read_newest(tmp_path, 2, ("model",))
    assert read_newest(tmp_path / "none", 0, ("model",)) is None


def test_full_disk_leaves_the_checkpoint_before(monkeypatch, tiny_data, tmp_path):
    """The write fails half way, for real: the limit on file sizes. One sentence; then, with room, the run goes on."""
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--checkpointing-steps", 2,
                                "--max-train-steps")
    run(monkeypatch, *arguments, 2)
    folder = tmp_path / "run/checkpoints"
    before = (folder / "0000002.pt").read_bytes()
    monkeypatch.setenv("HASTE_TEST_LARGEST_FILE", str(len(before) // 2))
    done = script("train.py", *arguments, 4, check=False, before="tests.test_resume.limit_file_size",
                  env={"HASTE_TEST_LARGEST_FILE": str(len(before) // 2)})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (f"error: {folder}/0000004.pt could not be written (File too large), what was there before is as it was; "
            "make room and run the command again.") in done.stderr
    assert [path.name for path in folder.iterdir()] == ["0000002.pt"] and (folder / "0000002.pt").read_bytes() == before
    run(monkeypatch, *arguments, 4)
    assert sorted(saved_steps(folder)) == [2, 4]


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.31, 0.45, 0.5, 0.62, 0.75, 0.83, 0.99])
def test_full_disk_at_any_place(tmp_path, share):
    """torch.save answers a failed write with an error about positions; the sentence is the same."""
    weights = {str(i): torch.full((1 + 1000 * i,), 1.0) for i in range(20)}
    save_checkpoint(tmp_path, 1, {"model": weights, "ema": weights})
    size, limits = (tmp_path / "0000001.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), limits[1]))
    try:
        with pytest.raises(UserError, match="0000002.pt could not be written .File too large., what was there before"):
            save_checkpoint(tmp_path, 2, {"model": weights, "ema": weights})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["0000001.pt"]


def limit_file_size():
    limit = int(os.environ["HASTE_TEST_LARGEST_FILE"])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_stale_temporary_files_are_cleaned(monkeypatch, tiny_data, tmp_path):
    arguments = train_arguments(tiny_data, tmp_path, "--enc-type", "none", "--max-train-steps")
    run(monkeypatch, *arguments, 1)
    stale = [tmp_path / "run" / name for name in (".args.json.77.tmp", "checkpoints/.0000002.pt.77.tmp")]
    for path in stale:
        path.write_bytes(b"half")
    with open(tmp_path / "run/metrics.csv", "a") as file:
        file.write("2,0.1")  # the line that a killed process was writing
    run(monkeypatch, *arguments, 2)
    assert not any(path.exists() for path in stale)
    assert [row["step"] for row in metrics(tmp_path)] == ["1", "2"]


def test_atomic_write_keeps_what_was_there(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_write(tmp_path / "file", "w") as file:
        file.write("new")
        raise ValueError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "old"
