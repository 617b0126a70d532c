"""evaluations/report.py and curves.py: what they show, what they report missing, and the page in a browser."""
import base64
import html
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from evaluations import curves, report, runs
from evaluations.runs import alignment_stop, read_table
from evaluations.student import colours, look_inside, mean_map
from models.layers import QK
from models.mmdit import MMDiT_models
from tests.conftest import ROOT, call_main, train_arguments
from tests.test_generate_t2i import save_checkpoint

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
STOP = 4


@pytest.fixture(scope="module")
def folders(tiny_data, teacher_file, tmp_path_factory):
    """Two runs of six steps with previews: one whose alignment stops after four, one without a teacher."""
    folder = tmp_path_factory.mktemp("runs")
    more = ["--sampling-steps", 3, "--vae", ROOT / "assets/vae-emoji", "--enc-weights", teacher_file,
            "--early-stop-point", STOP]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.previews.PREVIEW_STEPS", 2)
        call_main(patch, train, *train_arguments(tiny_data, folder, *more, "--exp-name", "haste"))
        call_main(patch, train, *train_arguments(tiny_data, folder, *more, "--exp-name", "plain", "--enc-type", "none",
                                                 "--logging-dir", "</script><b>"))
    return [folder / "haste", folder / "plain"]


@pytest.fixture(scope="module")
def page(folders, tmp_path_factory):
    """The page of both runs with a folder of samples."""
    made = tmp_path_factory.mktemp("samples") / "SiT-N"
    made.mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(made / f"{i:06d}.png")
    (made / "settings.json").write_text(json.dumps({"mode": "ode", "cfg_scale": 3.0, "num_steps": 50, "steps": 400,
                                                    "ckpt": "exps/haste/checkpoints/0000400.pt", "vae": "x"}))
    row = {name: {"FD-EffLite0": 3.25, "KID-EffLite0": 0.5} for name in ("held-out", "training")}  # wider than a phone
    made.with_name("SiT-N-scores.json").write_text(json.dumps({"scores": {"samples": row}}))
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, report, *folders, "--samples", made, "--images", 2, "--out", made.parent / "page.html")
    return made.parent / "page.html"


def data_of(page):
    element = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(element[1])


def test_page_holds_the_runs(folders, page):
    data = data_of(page)
    assert set(data) == {"title", "labels", "losses", "weights", "titles", "runs", "samples"}
    assert data["weights"] == ["proj_coeff", "attn_coeff"]  # only those that a run has
    haste, plain = data["runs"]
    assert (haste["name"], plain["name"]) == ("haste", "plain") and plain["settings"]["logging_dir"] == "</script><b>"
    table = read_table(folders[0])
    assert haste["columns"]["denoise"] == [[step, value] for step, value in zip(*table["denoise"], strict=True)]
    assert [step for step, _ in haste["columns"]["feature"]] == [1, 2, 3, 4] and "feature" not in plain["columns"]
    assert haste["stop"] == STOP and plain["stop"] is None
    assert [name for name, *_ in haste["speed"]] == ["with alignment", "after it stops"]
    assert plain["speed"][0][0] == "all steps"
    assert [title for title, _ in haste["previews"]] == ["the data", "step 3", "step 6"]
    assert haste["environment"]["torch"] == str(torch.__version__) and "environment" not in haste["settings"]
    sample, = data["samples"]
    assert sample["scores"]["samples"]["held-out"]["FD-EffLite0"] == 3.25
    assert sample["caption"] == "haste, step 400, 50 Euler steps, guidance 3"
    assert data["title"] == "haste, plain"
    assert data["labels"] == ["aligned with dinov2-vit-n", "no alignment"]
    for run in data["runs"]:  # the run without a teacher uses the other's
        assert len(run["inside"]["images"]) == 2 and run["inside"]["step"] == 6
        assert [(pair["student"], pair["teacher"]) for pair in run["inside"]["pairs"]] == [(0, 7), (1, 9)]
    assert -1 <= haste["inside"]["cosine"] <= 1 and "cosine" not in plain["inside"]


def test_page_needs_nothing_beside_it(page):
    source = page.read_text()
    assert set(re.findall(r"https?://[^\"'\s;]+", source)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in source and not re.search(r"<link|@import|<script[^>]+src", source)
    assert source.count("</script>") == 2  # a setting cannot end the data
    assert '{"rate":"Infinity","score":"NaN"}' in report.page({"rate": float("inf"), "score": float("nan")})


@pytest.mark.parametrize("aligned, plain, settings, stop", [
    ([50, 100], [150], {"early_stop_point": 120}, 120),  # within the row
    ([50, 100], [150], {"early_stop_point": 400}, 100),  # outside it: the rows decide
    ([50, 100], [150], {"early_stop_point": 120, "trigger_threshold": -0.05}, 100),
    ([50, 100], [150], {"early_stop_point": 120, "trigger_threshold": -0.3}, 120),
    ([50, 100], [], {"early_stop_point": 120}, None),
    ([50, 100], [150], {"early_stop_point": None, "trigger_threshold": "x"}, 100),  # another tool's args.json
    ([], [50], {"early_stop_point": 0}, None),
    ([], [50], {"early_stop_point": 20}, 20),  # a row counts as its last step
    ([], [50], {"early_stop_point": 20, "enc_type": "none"}, None)])
def test_stop_is_where_the_losses_of_alignment_end(aligned, plain, settings, stop):
    table = {"feature": (aligned, aligned), "denoise": (aligned + plain,) * 2, "cosine": ([50, 100], [0.1, -0.2])}
    assert alignment_stop(table, settings) == stop


@pytest.mark.parametrize("column, panels, out, begin", [("FD-EffLite0", 4, "a.pdf", b"%PDF"),
                                                        ("cosine_0.1", 3, "a.SVG", b"<?xml")])
def test_curves_of_two_runs(monkeypatch, tmp_path, column, panels, out, begin):
    """Losses and scores have a panel each, the trigger's cosines at single times none."""
    rows = "step,loss,denoise,feature,attention,grad_norm,seconds{}\n10,3,2,-0.5,2.5,1,4{}\n20,1,1,,,1,4{}\n"
    for name, cells in (("run", (f",{column}", ",", ",300")), ("plain", ("", "", ""))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(rows.format(*cells))
        (tmp_path / name / "args.json").write_text(json.dumps({"early_stop_point": 10}))
    for more in ([], ["--out", tmp_path / out]):
        call_main(monkeypatch, curves, tmp_path / "run", tmp_path / "plain", *more)
    assert (tmp_path / out).read_bytes().startswith(begin)
    with Image.open(tmp_path / "run/curves.png") as image:
        assert image.width / image.height == pytest.approx(panels * 4.3 / 3.6, rel=0.01)


def test_speed_and_hours():
    steps = [10, 20, 40, 50]
    found = runs.curves({"denoise": (steps, [3, 2, float("nan"), 1]), "seconds": (steps, [9, 1, 3, 0.5]),
                         "skipped": ([10], [0]), "scores": ([], []), "attention": ([10, 20], [0, 0])})  # 0: off
    assert found["hours"] == pytest.approx([9 / 3600, 10 / 3600, 13 / 3600, 13.5 / 3600], abs=1e-6)
    assert found["columns"] == {"denoise": [[10, 3], [20, 2], [50, 1]],
                                "step_time": [[10, 900], [20, 100], [40, 150], [50, 50]]}
    times = found["columns"]["step_time"]
    assert runs.speed(times, 20, 32) == [["with alignment", 100, 320], ["after it stops", 100, 320]]
    assert runs.speed(times, 30, 32) == [["with alignment", 100, 320], ["after it stops", 50, 640]]  # 150 is of both
    assert runs.speed(times, None, 32) == [["all steps", 100, 320]]
    assert runs.speed(times[:1], 5, 45) == [["all steps", 900, 50]]


def test_few_previews_evenly_and_small_pictures(monkeypatch, tmp_path):
    monkeypatch.setattr(runs, "PREVIEWS", 3)
    for step in (10, 20, 30, 40, 50):
        Image.new("RGB", (1000, 500)).save(tmp_path / f"{step:07d}.png")
    found = runs.previews(tmp_path)
    assert [title for title, _ in found] == ["step 10", "step 30", "step 50"]
    small, large = runs.picture(np.zeros((300, 300, 3), np.uint8)), found[0][1]
    assert small.startswith("data:image/png;") and large.startswith("data:image/jpeg;")
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as picture:
        assert picture.size == (768, 384)


@pytest.mark.parametrize("side", [4, 2])
def test_mean_map_is_the_softmax_written_out(monkeypatch, side):
    """4 x 4 tokens, two of three heads; a large map is averaged over squares of tokens."""
    monkeypatch.setattr("evaluations.student.MAP_SIDE", side)
    qk = QK(*torch.randn(2, 1, 3, 16, 8, generator=torch.Generator().manual_seed(0)))
    full = (qk.q[0, :2] @ qk.k[0, :2].transpose(1, 2) / 8 ** 0.5).exp()
    full = (full / full.sum(-1, keepdim=True)).mean(0)
    if side == 2:  # (row, in it, column, in it) of queries, then of keys
        full = full.reshape(2, 2, 2, 2, 2, 2, 2, 2).mean(dim=(1, 3, 5, 7)).reshape(4, 4)
    expected = 255 * full / full.amax(1, keepdim=True)
    assert (mean_map(qk, 2)[0] - expected).abs().max() <= 0.501


def test_equal_features_have_equal_colours():
    tokens = torch.randn(3, 16, 10, generator=torch.Generator().manual_seed(0))
    teacher, student = colours(tokens, 5 * tokens)
    assert teacher.shape == (3, 4, 4, 3) and np.abs(teacher.astype(int) - student).max() <= 1
    centred = F.normalize(tokens, dim=2).flatten(0, 1)
    centred = centred - centred.mean(0)
    red = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]  # up to its sign
    assert abs(np.corrcoef(red, teacher[..., 0].ravel())[0, 1]) > 0.99
    assert np.abs(teacher.astype(int) - colours(tokens, tokens.flip(1))[1]).max() > 50


def test_inside_of_text_and_of_one_loss(tiny_captions, teacher_file, tmp_path):
    """A run with attention alignment alone has no colours. Its captions are its conditions."""
    args = {"data_dir": str(tiny_captions), "enc_type": "dinov2-vit-n", "enc_weights": str(teacher_file),
            "attn_layers": [[1, 7]], "model": "MMDiT-T", "encoder_depth": 3}
    network = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=(), attn_layers=(1,))
    found = look_inside(save_checkpoint(tmp_path / "1.pt", network, **args), 3, 0.5)
    assert len(found["images"]) == 3 and found["student_colours"] == [] and "cosine" not in found
    pair, = found["pairs"]
    assert found["side"] == 8 and pair["teacher_maps"].shape == (3, 64, 64) and pair["heads"] == 2
    assert pair["loss"] > pair["entropy"] > 0 and (pair["student_maps"].max(axis=2) == 255).all()


@pytest.mark.parametrize("lacks, words", [
    ("data", "dataset.json does not exist"), ("teacher", "teacher.pth does not exist"),
    ("checkpoint", "holds no checkpoint yet")])
def test_what_is_missing_is_said_on_the_page(monkeypatch, folders, tmp_path, lacks, words):
    run = tmp_path / "run"
    shutil.copytree(folders[0], run)
    [checkpoint] = (run / "checkpoints").glob("*6.pt")
    state = torch.load(checkpoint, weights_only=True)
    state["args"] |= {"data": {"data_dir": "/no/data"}, "teacher": {"enc_weights": "/no/teacher.pth"}}.get(lacks, {})
    torch.save(state, checkpoint)
    if lacks == "checkpoint":
        shutil.rmtree(run / "checkpoints")
    call_main(monkeypatch, report, run)
    found, = data_of(run / "report.html")["runs"]
    assert words in found["inside"]["missing"] and found["inside"]["missing"].endswith(".") and found["previews"]


def test_no_images_and_scores_of_the_evaluator(folders, tmp_path):
    assert runs.inside(folders[0], 0, 0.5, {}) == {"missing": "Left out (--images 0)."}
    (tmp_path / "scores.json").write_text('{"scores": {"FID": 3.5}}')
    assert runs.read_scores(tmp_path / "scores.json") == {"samples": {"": {"FID": 3.5}}}


# Loads the page at two widths, looks at it, drags across a plot, looks again, and writes what it saw into the document.
LOOK = """<!doctype html><body style="margin:0"><pre></pre>
<iframe src="page.html" style="width:1280px;height:900px"></iframe>
<iframe src="page.html" style="width:390px;height:844px"></iframe>
<script>
function look(frame) {
  const page = frame.contentDocument, all = selector => [...page.querySelectorAll(selector)];
  const panel = name => ({
    curves: all(`#panel-${name} path.curve`).map(path => (path.getAttribute("d").match(/[ML]/g) || []).length),
    stops: all(`#panel-${name} line.stop`).length,
    labels: all(`#panel-${name} svg > text`).map(text => text.textContent)});
  return {width: frame.contentWindow.innerWidth, scroll: page.documentElement.scrollWidth,
    panels: all(".panel").length, denoise: panel("denoise"), feature: panel("feature"), painted: all("canvas").length,
    heads: all("h2").length, images: all("img").filter(image => image.naturalWidth).length};
}
function drag(frame) {
  const svg = frame.contentDocument.querySelector("#panel-denoise svg"), box = svg.getBoundingClientRect();
  for (const [kind, place] of [["down", 0.6], ["move", 0.7], ["up", 0.8]])
    svg.dispatchEvent(new frame.contentWindow.PointerEvent(`pointer${kind}`, {clientX: box.left + place * box.width}));
}
addEventListener("load", () => setTimeout(() => {
  const frames = [...document.querySelectorAll("iframe")], before = frames.map(look);
  frames.forEach(drag);
  document.querySelector("pre").textContent = JSON.stringify({before, after: frames.map(look)});
}, 300));
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
def test_page_in_a_browser(page, tmp_path):
    shutil.copy(page, tmp_path / "page.html")
    (tmp_path / "look.html").write_text(LOOK)
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-sandbox", "--headless", "--enable-logging=stderr",
             "--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000"]
    done = subprocess.run([BROWSER, *quiet, "--dump-dom", f"file://{tmp_path / 'look.html'}"], check=True,
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    seen = json.loads(html.unescape(re.search("<pre>(.+?)</pre>", done.stdout, re.DOTALL)[1]))
    for width, found, after in zip((1280, 390), seen["before"], seen["after"], strict=True):
        assert found["width"] == width and found["scroll"] <= width, "the page is wider than the window"
        assert found["panels"] == 6  # three losses, their sum, the gradient's norm, time
        assert found["denoise"]["curves"] == [6, 6] and found["feature"]["curves"] == [4]
        assert found["denoise"]["stops"] == found["feature"]["stops"] == 1
        assert {"0", "2", "4", "6"} <= set(found["denoise"]["labels"]) and "step" in found["denoise"]["labels"]
        assert found["painted"] == 8 and found["images"] == 1 + 2 * 3 + 2 * 2 + 2 * 2 and found["heads"] == 7
        for name in ("denoise", "feature"):  # a drag across one panel zooms all
            assert after[name]["labels"] != found[name]["labels"]
        assert after["scroll"] <= width
