"""evaluations/curves.py on a metrics.csv written by hand."""
import json

import pytest
from PIL import Image

from evaluations import curves
from files import BadInput
from tests.conftest import call_main

ROWS = """step,loss,denoise,feature,attention,grad_norm,seconds,FD-EffLite0
10,3,2,-0.5,2.5,1,4,
20,1,1,,,1,4,300
"""


def write_run(folder, rows=ROWS):
    folder.mkdir()
    (folder / "metrics.csv").write_text(rows)
    (folder / "args.json").write_text(json.dumps({"early_stop_point": 10, "max_train_steps": 20}))
    return folder


def test_terms_and_scores_of_a_run(monkeypatch, tmp_path):
    run, plain = write_run(tmp_path / "run"), write_run(tmp_path / "plain", ROWS.replace(",FD-EffLite0", "").replace(
        "4,300", "4").replace("4,\n", "4\n"))
    assert curves.read_metrics(run) == {"denoise": ([10, 20], [2, 1]), "feature": ([10], [-0.5]),
                                        "attention": ([10], [2.5]), "FD-EffLite0": ([20], [300])}
    call_main(monkeypatch, curves, run, plain)
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 4 * picture.height  # four panels in a row


def test_a_trigger_moves_the_stop(monkeypatch, tmp_path):
    """To the step of the first cosine below the threshold; of the cosines only the mean has a panel."""
    rows = """step,loss,denoise,feature,attention,grad_norm,seconds,cosine,cosine_0.1
5,3,2,-0.5,2.5,1,4,0.1,0.3
8,3,2,-0.5,2.5,1,4,-0.2,-0.3
20,1,1,,,1,4,,
"""
    run, settings = write_run(tmp_path / "run", rows), {"early_stop_point": 10, "trigger_threshold": -0.05}
    assert curves.early_stop(settings, curves.read_metrics(run)) == 8
    assert curves.early_stop({**settings, "trigger_threshold": -0.5}, curves.read_metrics(run)) == 10
    (run / "args.json").write_text(json.dumps({**settings, "max_train_steps": 20}))
    call_main(monkeypatch, curves, run)
    with Image.open(run / "curves.png") as picture:
        assert 4 * picture.height < picture.width < 5 * picture.height


def test_no_run_and_no_rows(monkeypatch, tmp_path):
    with pytest.raises(BadInput, match="metrics.csv does not exist; give the folder of a run"):
        call_main(monkeypatch, curves, tmp_path)
    with pytest.raises(BadInput, match="has no rows yet"):
        call_main(monkeypatch, curves, write_run(tmp_path / "run", ROWS.splitlines()[0]))
