"""The learning rate as a function of the step: its formula, and its use in a run that was stopped and continued."""
import math
from types import SimpleNamespace

import pytest

from tests.conftest import NO_TEACHER, checkpoint, metrics
from training.schedule import learning_rate


def rates(schedule, warmup, last=10):
    args = SimpleNamespace(learning_rate=2.0, lr_schedule=schedule, lr_warmup_steps=warmup)
    return [learning_rate(args, step, last) for step in range(last)]


def test_formulas():
    assert rates("constant", 0) == [2.0] * 10
    assert rates("constant", 4) == [0.5, 1.0, 1.5] + [2.0] * 7
    assert rates("linear", 0) == pytest.approx([2 - step / 5 for step in range(10)])
    assert rates("cosine", 2) == pytest.approx([1.0, 2.0] + [1 + math.cos(math.pi * step / 8) for step in range(8)])


def test_a_continued_run_has_the_rates_of_a_whole_one(run, tmp_path):
    """Rates are logged, act on the weights, and are a function of the step: a run from step 2 ends as the whole one."""
    def end_of(name, *more):
        run(tmp_path / name, *NO_TEACHER, "--max-train-steps", 4, "--checkpointing-steps", 2, *more)
        rates = [float(row["learning_rate"]) for row in metrics(tmp_path / name)]
        return checkpoint(tmp_path / name, 4)["model"], rates

    schedule = ("--lr-schedule", "cosine", "--lr-warmup-steps", 2)
    whole, rates = end_of("cosine", *schedule)
    (tmp_path / "cosine/run/checkpoints/0000004.pt").unlink()
    continued, again = end_of("cosine", *schedule)
    rows = [end_of("rows", "--log-every", 3, *schedule)[1] for _ in range(2)]  # the second start has no step to do
    assert rows[0] == rows[1] == pytest.approx([1e-3, 5e-4])
    plain, constant = end_of("plain")
    assert rates == again == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4]) and constant == [1e-3] * 4
    assert all((whole[name] == continued[name]).all() for name in whole)
    assert any((whole[name] != plain[name]).any() for name in whole)
