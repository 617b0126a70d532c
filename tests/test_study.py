"""benchmarks/study.py: what is compared with what."""
from argparse import Namespace

import pytest

from benchmarks import study
from files import BadInput
from tests.conftest import call_main


def test_differences_are_of_the_same_seed():
    """Not of the same place in a list: a seed that one of the two lacks takes no part."""
    score = study.SCORES[0]
    values = {"vanilla": {score: {4: {0: 10.0, 2: 30.0}}}, "HASTE, no stop": {score: {4: {0: 9.0, 1: 20.0, 2: 27.0}}}}
    assert study.difference(values, "HASTE, no stop", "vanilla", score, 4) == [-1.0, -3.0]
    assert study.difference(values, "HASTE, no stop", "vanilla", score, 8) == []
    table = study.differences(values, ["HASTE, no stop"], "vanilla", [4])
    assert "| HASTE, no stop | -2.000 (-3.000 to -1.000) | - | - |" in table


def test_spread_has_four_digits():
    assert study.mean_and_spread([1234.56]) == "1235"
    assert study.mean_and_spread([0.0123, 0.011]) == "0.01165 (0.01100 to 0.01230)"
    assert study.mean_and_spread([]) == "-"


def test_runs_of_other_settings_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "run_all", lambda args: None)
    monkeypatch.setattr(study, "report", lambda *args: None)
    with pytest.raises(BadInput, match="holds no study; leave --report out"):
        call_main(monkeypatch, study, "--out", tmp_path, "--report")
    call_main(monkeypatch, study, "--out", tmp_path, "--steps", 8)
    call_main(monkeypatch, study, "--out", tmp_path, "--report")  # takes the settings of what is there
    with pytest.raises(BadInput, match="holds runs with --samples 178, not 50; use another --out"):
        call_main(monkeypatch, study, "--out", tmp_path, "--steps", 8, "--samples", 50)
    with pytest.raises(BadInput, match="--every 3 does not divide --steps 8"):
        call_main(monkeypatch, study, "--out", tmp_path, "--steps", 8, "--every", 3)
    with pytest.raises(BadInput, match="--steps 10 is no multiple of 4"):
        call_main(monkeypatch, study, "--out", tmp_path, "--steps", 10)


@pytest.mark.parametrize("minutes", [0, 60])
def test_no_run_without_time_or_without_its_phase_one(monkeypatch, tmp_path, minutes):
    monkeypatch.setattr(study, "settings_of", lambda args: "")
    monkeypatch.setattr(study, "report", lambda *args: None)
    begun, clock = [], iter(range(0, 10 ** 6, 600))  # ten minutes from one look at the clock to the next

    def train(args, seed, name):
        begun.append(name)
        path = study.folder_of(args, seed, name) / f"checkpoints/{args.steps:07d}.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        return 600
    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study.time, "time", lambda: next(clock))
    call_main(monkeypatch, study, "--out", tmp_path, "--steps", 8, "--jobs", 1, "--seeds", 0, "--minutes", minutes)
    in_an_hour = ["HASTE, no stop", "HASTE, stop at 2", "HASTE, stop at 4", "HASTE, stop at 6"]
    assert begun == (in_an_hour if minutes else [])


def test_variants_share_phase_one_only_with_the_run_without_a_stop():
    shared = {name: steps for name, (_, steps) in study.variants(1200).items() if steps}
    assert shared == {"HASTE, stop at 300": 300, "HASTE, stop at 600": 600, "HASTE, stop at 900": 900}


def test_phase_one_scores_of_a_stop_are_those_of_the_run_without(monkeypatch, tmp_path):
    """The run with a stop at 4 holds no checkpoint of step 2: its held-out loss there is that of the run it went on from."""
    monkeypatch.setattr(study, "LatentImages", lambda *args, **kwargs: None)
    monkeypatch.setattr(study, "held_out_loss", lambda path, data: len(path.parts[-3]) + int(path.stem) / 10)
    args = Namespace(out=tmp_path, data=tmp_path, steps=8, seeds=[0, 1])
    for seed in args.seeds:
        for name, steps in (("HASTE, no stop", (2, 4, 6, 8)), ("HASTE, stop at 4", (4, 6, 8))):
            folder = study.folder_of(args, seed, name)
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "metrics.csv").write_text("step,FD-EffLite0\n2,30\n")
            for step in steps:
                (folder / f"checkpoints/{step:07d}.pt").touch()
    values, _ = study.collect(args)
    alone, stopped = (values[name]["held-out loss"] for name in ("HASTE, no stop", "HASTE, stop at 4"))
    assert sorted(stopped) == [2, 4, 6, 8] and stopped[2] == alone[2] == {0: 20.2, 1: 20.2}
    assert stopped[6] != alone[6]
    assert values["HASTE, stop at 4"]["FD-EffLite0"] == {2: {0: 30.0, 1: 30.0}}


def test_all_that_a_run_reads_is_of_the_folder_that_was_named(monkeypatch, tmp_path):
    commands, ended = [], Namespace(returncode=0)
    monkeypatch.setattr(study.subprocess, "run", lambda command, **kwargs: commands.append(command) or ended)
    args = Namespace(data=tmp_path / "data", out=tmp_path / "out", model="SiT-T/2", steps=8, every=2, samples=4, jobs=1,
                     mixed_precision="no")
    study.train(args, 0, "vanilla")
    given = dict(zip(commands[0], commands[0][1:], strict=False))
    read = ("--data-dir", "--enc-weights", "--teacher-cache", "--eval-ref", "--eval-weights")
    assert [given[flag] for flag in read] == [str(args.data / path) for path in (
        "train", "teacher.safetensors", "teacher-cache", "val/images", "efficientnet-lite0.pth")]
