"""compare.py: names of runs, samples and scores made once, tables and figures over seeds and sweeps."""
import itertools
import json
import os

import numpy as np
import pytest
from PIL import Image

import generate
import train
from evaluations import compare
from evaluations.tables import groups, labels, latex, mean_and_spread, phrase, sampling_words
from runtime.errors import UserError
from tests.conftest import call_main, train_arguments
from tests.test_evaluations_metrics import save_efficientnet

HASTE = {"enc_type": "dinov2-vit-b", "proj_coeff": 0.5, "attn_coeff": 0.5, "early_stop_point": 100_000, "seed": 0}
PLAIN = {"enc_type": "none", "proj_coeff": 0.0, "attn_coeff": 0.0, "early_stop_point": 100_000, "seed": 0}


@pytest.mark.parametrize("settings, words", [
    ([HASTE, PLAIN], ["aligned with dinov2-vit-b", "no alignment"]),
    ([HASTE, {**HASTE, "early_stop_point": 50_000, "seed": 1, "exp_name": "b"}],
     ["alignment until step 100,000, seed 0", "alignment until step 50,000, seed 1"]),
    ([PLAIN, {**PLAIN, "early_stop_point": 7, "hflip": True}], ["hflip null", "hflip"]),
    ([HASTE, {**PLAIN, "latent_coeff": 0.5, "enc_size": 112}],  # aligned without a teacher
     ["aligned with dinov2-vit-b, 0.5 x feature loss, latent coeff null",
      "no teacher, no feature loss, latent coeff 0.5"]),
    ([HASTE, HASTE], ["", ""])])
def test_what_tells_runs_apart_in_words(settings, words):
    assert labels(settings) == words


def test_runs_of_several_seeds_are_one():
    settings = [HASTE, {**HASTE, "seed": 1}, PLAIN]
    assert groups(settings, "abc") == {"aligned with dinov2-vit-b": [0, 1], "no alignment": [2]}
    assert groups(settings[:2], "ab") == {"a and b": [0, 1]}
    assert phrase("seed", "x") == "seed x" and phrase("early_stop_point", None) == "early stop point null"
    assert phrase("qk_norm", False) == "no qk norm" and phrase("cfg_prob", 0.1) == "cfg prob 0.1"


@pytest.mark.parametrize("made, words", [
    ({"run": "a", "step": 4000, "mode": "sde", "num_steps": 250, "cfg_scale": 1.0, "global_seed": 0},
     "a, step 4,000, 250 Euler-Maruyama steps, no guidance, seed 0"),
    ({"mode": "ode", "heun": True, "num_steps": 50, "cfg_scale": 1.65, "guidance_low": 0.0, "guidance_high": 0.72,
      "cache": "taylor", "weights": "model", "labels": "balanced"},
     ("50 Heun steps, guidance 1.65 for t from 0.0 to 0.72, cache taylor, weights without averaging, as many of each "
      "class")),
    ({"cfg_scale": None, "step": "x", "mode": "ode", "num_steps": 2}, "2 Euler steps"), ({}, "")])
def test_samples_in_words(made, words):
    assert sampling_words(made) == words


def test_a_table_for_latex():
    lines = latex(["run", "FID \u2193"], [["a_b & 50 %", "1.5"]], 1).splitlines()
    assert lines == [r"\begin{tabular}{lr}", r"\toprule", r"run & FID $\downarrow$ \\", r"\midrule",
                     r"a\_b \& 50 \% & 1.5 \\", r"\bottomrule", r"\end{tabular}"]


def test_text_has_at_most_an_image_for_each_of_val(tiny_captions):
    text = {"data_dir": tiny_captions}
    assert compare.number_of_samples(None, [{"num_classes": 4}]) == 50_000
    assert compare.number_of_samples(None, [text, {"num_classes": 4}]) == len([*(tiny_captions / "val").glob("*.png")])
    assert compare.number_of_samples(2, [text]) == 2
    assert compare.number_of_samples(7, [{"data_dir": "/elsewhere"}]) == 7  # with samples from another machine


def test_scores_that_statistics_do_not_have(called, monkeypatch, runs, tmp_path):
    """Before hours of sampling, not after them."""
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    with pytest.raises(UserError, match="statistics.npz holds statistics only, and --metrics kid needs images"):
        called(["a0"], "--steps", 2, "--ref", tmp_path / "statistics.npz")
    assert not called.made


@pytest.fixture(scope="module")
def runs(tiny_data, tmp_path_factory):
    """Two seeds with one learning rate, one run with another; two checkpoints of the last."""
    folder = tmp_path_factory.mktemp("compared")
    save_efficientnet(folder / "scorer.pth")
    np.savez(folder / "reference.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        for name, *more in (("a0",), ("a1", "--seed", 1), ("b", "--learning-rate", 0.01, "--checkpointing-steps", 1)):
            call_main(patch, train, *train_arguments(tiny_data, folder, "--enc-type", "none", "--max-train-steps", 2,
                                                     "--model", "SiT-N/8", "--vae", "none", "--exp-name", name,
                                                     *more))
    return folder


@pytest.fixture
def called(monkeypatch, runs, tmp_path):
    """compare.main with these arguments -> the table's lines; `called.made` counts calls of generate.py."""
    def call(names, *more):
        call_main(monkeypatch, compare, *(runs / name for name in names), "--ref", runs / "reference.npz",
                  "--num-fid-samples", 3, "--out", tmp_path / "out", "--sample-dir", tmp_path / "samples", "--features",
                  "efficientnet-lite0", "--efficientnet-weights", runs / "scorer.pth", "--any-weights",
                  "--metrics", "kid", *more)
        return (tmp_path / "out/table.md").read_text().splitlines()[2:]

    def make(command):
        call.made += 1
        with pytest.MonkeyPatch.context() as patch:
            call_main(patch, generate, *command[1:])

    call.made = 0
    monkeypatch.setattr(compare, "run_generate", make)
    return call


def test_runs_over_seeds(called, runs, tmp_path):
    head, _, first, second = called(["a0", "a1", "b"], "--steps", 2)
    assert head == "| run | seeds | KID-EffLite0 \u2193 |"
    assert first.startswith("| learning rate 0.001 | 2 | ") and second.startswith("| learning rate 0.01 | 1 | ")
    values = [json.loads(path.read_text())["scores"]["KID-EffLite0"]
              for path in sorted((tmp_path / "samples").glob("a*-scores.json"))]
    assert len(values) == 2 and f" {mean_and_spread(values)} " in first and "to" not in second
    assert r"learning rate 0.001 & 2 & " in (tmp_path / "out/table.tex").read_text()
    assert (tmp_path / "out/scores.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(tmp_path / "out/samples.png") as picture:
        assert picture.width == 3 * 64 + 2 * 2 and picture.height > 3 * 64
    assert called.made == 3
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").glob("*-scores.json")}
    called(["a0", "a1", "b"], "--steps", 2)  # nothing is made again
    assert called.made == 3 and before == {path: path.stat().st_mtime_ns for path in before}
    os.utime(runs / "b/checkpoints/0000002.pt")  # a newer checkpoint is looked at again
    called(["a0", "b"], "--steps", 2)
    assert called.made == 4
    os.utime(runs / "reference.npz")  # and so is another reference
    called(["a0", "b"], "--steps", 2)
    assert before[path := next(iter(before))] < path.stat().st_mtime_ns
    _, _, *rows = called(["a0", "b"], "--steps", 2, "--names", "SiT", "HASTE")
    assert [row.split(" | ")[:2] for row in rows] == [["| SiT", "1"], ["| HASTE", "1"]] and called.made == 4
    with pytest.raises(UserError, match="holds images of other settings .time_grid"):
        called(["b"], "--steps", 2, "--time-grid", "quadratic")


def test_sweeps(called, tmp_path, monkeypatch):
    """Sweep guidance and steps: one row each, panels with equal axes, ticks at the values that were run."""
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    head, _, *rows = called(["b"], "--cfg", 1, 1.5, "--steps", 1, 2, "--format", "svg")
    assert head.startswith("| run | guidance | steps | seeds | KID") and called.made == 4
    seen = [tuple(row.split(" | ")[1:3]) for row in rows]
    assert sorted(seen) == list(itertools.product(["1", "1.5"], ["1", "2"]))
    top, bottom = drawn[0].axes
    assert top.get_ylim() == bottom.get_ylim() and list(bottom.get_xticks()) == [1, 1.5]
    assert [axis.get_ylabel() for axis in (top, bottom)] == ["1 steps", "2 steps"]
    assert (top.get_title(), bottom.get_xlabel()) == ("KID-EffLite0 \u2193", "guidance scale")


def test_what_cannot_be_compared(called, tmp_path):
    with pytest.raises(UserError, match="nothing.npz"):  # before hours of sampling
        called(["b"], "--ref", tmp_path / "nothing.npz")
    assert called.made == 0
    with pytest.raises(UserError, match="--names gives 1 names to 2 runs"):
        called(["a0", "b"], "--names", "SiT")
    with pytest.raises(UserError, match="No step 1 is among .* of all runs: .*a0 has 2; .*b has 1, 2; give --step"):
        called(["a0", "b"], "--step", 1)
    with pytest.raises(UserError, match="are not all different; give each once"):
        called(["a0", "a0"])
    with pytest.raises(UserError, match="2 images, but metric pr needs at least 4"):
        called(["b"], "--num-fid-samples", 2, "--steps", 1, "--metrics", "pr")
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="small.npz has images of 32x32 but the samples of .*b of 64x64"):
        called(["b"], "--ref", tmp_path / "small.npz")
    for name in ("", "a|b", "$x$"):
        with pytest.raises(UserError, match="is no name for a row"):
            called(["b"], "--names", name)
    assert called.made == 0
