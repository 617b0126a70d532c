"""benchmarks/study.py: comparisons, the order of runs, and the files that a run leaves."""
import itertools
import json
from argparse import Namespace

import pytest

from benchmarks import study, study_report
from runtime.errors import UserError
from tests.conftest import call_main

FD, _, _, KID, LOSS = study_report.SCORES
SHORT = ("--steps", 32, "--jobs", 1)


def result(points):
    return {"scores": {FD: points}}


def test_differences_are_of_the_same_seed():
    """They pair runs by seed, not by list position; a seed that one of the two lacks is left out."""
    found = {"vanilla": {0: result({"4": 10.0}), 2: result({"4": 30.0})},
             study.NO_STOP: {seed: result({"4": value}) for seed, value in ((0, 9.0), (1, 20.0), (2, 27.0))}}
    assert study_report.difference(found, study.NO_STOP, "vanilla", FD, 4) == [-1.0, -3.0]
    table = study_report.differences(found, [study.NO_STOP], "vanilla", [4])
    assert "| HASTE, no stop | -2.000 (-3.000 to -1.000) | - | - |" in table
    assert study_report.mean_and_spread([1234.56]) == "1235"  # four digits
    assert study_report.mean_and_spread([0.0123, 0.011]) == "0.01165 (0.01100 to 0.01230)"


def test_steps_to_reach_a_score():
    points = {8: 3.0, 2: 10.0, 4: 6.0, 6: 4.0}
    for target, step in ((5.0, 5.0), (4.0, 6.0), (11.0, 2), (2.9, None)):  # 5.0: between 6.0 at 4 and 4.0 at 6
        assert study_report.steps_to_reach(points, target) == step
    found = {"vanilla": {0: result({"4": 8.0, "8": 5.0})}, study.NO_STOP: {0: result(points)}}
    assert study_report.share_of_steps(found, study.NO_STOP, FD, 8) == "0.6250"
    found["vanilla"][0] = result({"8": 1.0})
    assert study_report.share_of_steps(found, study.NO_STOP, FD, 8) == "not reached by 1 of 1"


@pytest.fixture
def begun(monkeypatch):
    """The runs in the order of their start; each leaves a real run's files."""
    runs = []

    def train(args, seed, name):
        runs.append((seed, name))
        folder = args.out / study.name_of(seed, name) / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        for quarter in range(1, 5):
            (folder / f"{quarter * args.steps // 4:07d}.pt").touch()
        study.result_of(args, seed, name).write_text("{}")

    monkeypatch.setattr(study, "report", lambda *args: None)
    monkeypatch.setattr(study, "train", train)
    return runs


def test_runs_of_other_settings_are_refused(monkeypatch, begun, tmp_path):
    with pytest.raises(UserError, match="holds no study; leave --report out"):
        call_main(monkeypatch, study, "--out", tmp_path, "--report")
    call_main(monkeypatch, study, "--out", tmp_path, *SHORT)
    call_main(monkeypatch, study, "--out", tmp_path, "--report")  # takes the settings of the existing runs
    for more, message in (
            (["--samples", 50], "holds runs with --samples 2000, not 50; use another --out"),
            (["--every", 3], "--every 3 does not divide a quarter of --steps 32"),
            (["--steps", 12], "--steps 12 is no multiple of 8"),
            (["--variants", "HASTE", "vanilla"], "--variants 'HASTE' is none of vanilla, REPA")):
        with pytest.raises(UserError, match=message):
            call_main(monkeypatch, study, "--out", tmp_path, *SHORT, *more)


def test_what_has_a_result_is_not_run_again(monkeypatch, begun, tmp_path):
    arguments = ("--out", tmp_path, *SHORT, "--seeds", 0, 1)
    first = [study.NO_STOP, "vanilla", "REPA (features only)", *(f"HASTE, stop at {step}" for step in (8, 16, 24))]
    call_main(monkeypatch, study, *arguments, "--variants", *first)
    assert begun == [(seed, name) for seed in (0, 1) for name in first]
    begun.clear()
    study.result_of(Namespace(results=tmp_path / "results"), 1, "vanilla").unlink()
    call_main(monkeypatch, study, *arguments)
    others = ["attention only", "HASTE, twice the weights, stop at 8", "HASTE, gradient trigger"]
    assert begun == [(1, "vanilla"), *((seed, name) for seed in (0, 1) for name in others)]


def test_an_ablation_has_runs_and_a_folder_of_its_own(monkeypatch, begun, tmp_path):
    arguments = ("--out", tmp_path, "--seeds", 0, "--jobs", 1)
    call_main(monkeypatch, study, *arguments, "--ablation")
    assert begun == [(0, name) for name in (study.NO_STOP, "vanilla", *study.ABLATION)]
    found = json.loads((tmp_path / "results/study.json").read_text())
    assert (found["steps"], found["every"]) == (2000, 1000)
    for more, message in ((["--steps", 2000, "--every", 500], "holds runs with --ablation True, not False"),
                          (["--ablation", "--variants", "HASTE, stop at 500"], "is none of vanilla, HASTE, no stop")):
        with pytest.raises(UserError, match=message):
            call_main(monkeypatch, study, *arguments, *more)


def test_no_run_without_its_phase_one_or_without_time(monkeypatch, begun, tmp_path):
    """A result from another machine gives no checkpoint to continue from."""
    (tmp_path / "results").mkdir()
    study.result_of(Namespace(results=tmp_path / "results"), 0, study.NO_STOP).write_text("{}")
    arguments = ("--out", tmp_path, *SHORT, "--seeds", 0)
    call_main(monkeypatch, study, *arguments, "--minutes", 0)
    assert not begun
    call_main(monkeypatch, study, *arguments, "--variants", "HASTE, stop at 8", "vanilla")
    assert begun == [(0, "vanilla")]
    clock = iter(range(0, 10 ** 6, 600))  # ten minutes from one look at the clock to the next
    monkeypatch.setattr(study.time, "time", lambda: next(clock))
    call_main(monkeypatch, study, "--out", tmp_path / "other", *SHORT, "--seeds", 0, "--minutes", 60)
    assert begun[1:] == [(0, study.NO_STOP), (0, "vanilla")]  # of 10 minutes each, a look before, between and after


def test_a_result_has_the_whole_run(monkeypatch, tmp_path):
    """It includes the steps before the stop, from the run without one; only the last checkpoint stays."""
    args = Namespace(out=tmp_path, results=tmp_path, data_dir=tmp_path, data="emoji", steps=8, every=2,
                     ablation=False)
    monkeypatch.setattr(study, "held_out_losses", lambda args, paths: {
        int(path.stem): [int(path.stem) / 2, 1.0] for path in paths})
    monkeypatch.setattr(study.torch, "load", lambda *args, **kwargs: {"trigger_fired": None})
    for name, steps in ((study.NO_STOP, (2, 4, 5, 6, 8)), ("HASTE, stop at 4", (4, 6, 8))):
        folder = tmp_path / study.name_of(0, name)
        (folder / "checkpoints").mkdir(parents=True)
        rows = [f"{step},1,,,{step / 10},{step * 10}" for step in (2, 4, 6, 8)]
        (folder / "metrics.csv").write_text("\n".join([f"step,denoise,feature,attention,seconds,{FD}", *rows]))
        for step in steps:
            (folder / f"checkpoints/{step:07d}.pt").touch()
        study.write_result(args, 0, name)
        left = {int(path.stem) for path in (folder / "checkpoints").iterdir()}
        assert left == ({2, 4, 6, 8} if name == study.NO_STOP else {8})
    found = json.loads(study.result_of(args, 0, "HASTE, stop at 4").read_text())
    assert study_report.curve(found, FD) == {2: 20, 4: 40, 6: 60, 8: 80} and found["seconds of training"] == 2
    assert study_report.curve(found, LOSS) == {2: 1.0, 4: 1.5, 6: 2.0, 8: 2.5}


def test_all_that_a_run_reads_is_of_the_folder_that_was_named(tmp_path):
    args = Namespace(data="cifar10", data_dir=tmp_path / "data", out=tmp_path / "out", model="SiT-T/2", steps=32,
                     every=4, samples=4, mixed_precision="no", ablation=False)
    given = dict(itertools.pairwise(study.command_of(args, 0, "vanilla")))
    read = ("--data-dir", "--enc-weights", "--teacher-cache", "--eval-ref", "--eval-weights")
    assert [given[flag] for flag in read] == [str(args.data_dir / path) for path in (
        "train", "teacher.safetensors", "teacher-cache", "ref-val.npz", "efficientnet-lite0.pth")]
