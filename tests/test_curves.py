"""evaluations/curves.py on a metrics.csv written by hand."""
import json

from PIL import Image

from evaluations import curves, runs
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
    run = write_run(tmp_path / "run")
    plain = write_run(tmp_path / "plain", "\n".join(line.rpartition(",")[0] for line in ROWS.splitlines()))
    assert runs.read_metrics(run) == {"denoise": ([10, 20], [2, 1]), "feature": ([10], [-0.5]),
                                        "attention": ([10], [2.5]), "FD-EffLite0": ([20], [300])}
    call_main(monkeypatch, curves, run, plain)
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 4 * picture.height  # four panels in a row


def test_a_trigger_moves_the_stop(monkeypatch, tmp_path):
    """The stop is the step of the first mean cosine below the threshold; cosines at single times have no panel."""
    rows = """step,loss,denoise,feature,attention,grad_norm,seconds,cosine,cosine_0.1
5,3,2,-0.5,2.5,1,4,0.1,0.3
8,3,2,-0.5,2.5,1,4,-0.2,-0.3
20,1,1,,,1,4,,
"""
    run, settings = write_run(tmp_path / "run", rows), {"early_stop_point": 10, "trigger_threshold": -0.05}
    assert runs.early_stop(settings, runs.read_metrics(run)) == 8
    assert runs.early_stop({**settings, "trigger_threshold": -0.5}, runs.read_metrics(run)) == 10
    (run / "args.json").write_text(json.dumps({**settings, "max_train_steps": 20}))
    call_main(monkeypatch, curves, run)
    with Image.open(run / "curves.png") as picture:
        assert 4 * picture.height < picture.width < 5 * picture.height
