"""evaluations/report.py: what the page says about a run and if something is missing, and the page in a browser."""
import base64
import html
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
from evaluations import report, runs
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
    (made / "settings.json").write_text(json.dumps({"mode": "ode", "cfg_scale": 3.0, "ckpt": "somewhere"}))
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
    assert set(data) == {"titles", "runs", "samples"}
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
    assert sample["settings"] == {"mode": "ode", "cfg_scale": 3.0}
    assert sample["scores"]["samples"]["held-out"]["FD-EffLite0"] == 3.25
    for run in data["runs"]:  # the one without a teacher is compared with that of the other
        assert len(run["inside"]["images"]) == 2 and run["inside"]["step"] == 6
        assert [(pair["student"], pair["teacher"]) for pair in run["inside"]["pairs"]] == [(0, 7), (1, 9)]
    assert -1 <= haste["inside"]["cosine"] <= 1 and "cosine" not in plain["inside"]


def test_page_needs_nothing_beside_it(page):
    source = page.read_text()
    assert set(re.findall(r"https?://[^\"'\s;]+", source)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in source and not re.search(r"<link|@import|<script[^>]+src", source)
    assert source.count("</script>") == 2  # a setting cannot end the data
    assert '{"rate":"Infinity","score":"NaN"}' in report.page({"rate": float("inf"), "score": float("nan")})


def table_of(aligned, plain):
    return {"feature": (aligned, aligned), "denoise": (aligned + plain, aligned + plain)}


def test_stop_is_where_the_losses_of_alignment_end():
    """It is the early-stop point if that lies in the row, else, as with a trigger, what the rows say."""
    assert alignment_stop(table_of([50, 100], [150]), {"early_stop_point": 120}) == 120
    assert alignment_stop(table_of([50, 100], [150]), {"early_stop_point": 400}) == 100
    assert alignment_stop(table_of([50, 100], [150]), {}) == 100
    fired = {**table_of([50, 100], [150]), "cosine": ([50, 100], [0.1, -0.2])}
    assert alignment_stop(fired, {"early_stop_point": 120, "trigger_threshold": -0.05}) == 100
    assert alignment_stop(fired, {"early_stop_point": 120, "trigger_threshold": -0.3}) == 120
    assert alignment_stop(table_of([50, 100], []), {"early_stop_point": 120}) is None
    assert alignment_stop(table_of([], [50]), {"early_stop_point": 0}) is None
    assert alignment_stop(table_of([], [50]), {"early_stop_point": 20}) == 20  # a row is as its last step
    assert alignment_stop(table_of([], [50]), {"early_stop_point": 20, "enc_type": "none"}) is None


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
    assert runs.previews(tmp_path / "none") == []
    small, large = runs.picture(np.zeros((300, 300, 3), np.uint8)), found[0][1]
    assert small.startswith("data:image/png;") and large.startswith("data:image/jpeg;")
    with Image.open(io.BytesIO(base64.b64decode(large.partition(",")[2]))) as picture:
        assert picture.size == (768, 384)


def test_mean_map_is_the_softmax_written_out():
    qk = QK(*torch.randn(2, 2, 3, 16, 8, generator=torch.Generator().manual_seed(0)))
    for n, row in ((0, 3), (1, 15)):
        logits = (qk.q[n, :2, row, None] * qk.k[n, :2]).sum(-1) / 8 ** 0.5
        weights = (logits.exp() / logits.exp().sum(-1, keepdim=True)).mean(0)
        assert torch.equal(mean_map(qk, 2)[n, row], (255 * weights / weights.max()).round().to(torch.uint8))


def test_large_maps_are_averaged_over_squares(monkeypatch):
    monkeypatch.setattr("evaluations.student.MAP_SIDE", 2)
    qk = QK(*torch.randn(2, 1, 1, 16, 8, generator=torch.Generator().manual_seed(0)))  # 4 x 4 tokens
    full = (qk.q[0, 0] @ qk.k[0, 0].T / 8 ** 0.5).softmax(-1).reshape(2, 2, 2, 2, 2, 2, 2, 2)
    small = full.mean(dim=(1, 3, 5, 7)).reshape(4, 4)  # (row, in it, column, in it) of queries, then of keys
    assert torch.equal(mean_map(qk, 1)[0], (255 * small / small.amax(1, keepdim=True)).round().to(torch.uint8))


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
  return {width: frame.contentWindow.innerWidth, scroll: page.documentElement.scrollWidth, panels: all(".panel").length,
    denoise: panel("denoise"), feature: panel("feature"), painted: all("canvas").length,
    heads: all("h2").map(head => head.textContent), images: all("img").filter(image => image.naturalWidth).length};
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


@pytest.fixture(scope="module")
def seen(page, tmp_path_factory):
    """{before, after} a zoom: what LOOK sees at both widths, and what the browser's console has."""
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on this machine to open the page in")
    folder = tmp_path_factory.mktemp("browser")
    shutil.copy(page, folder / "page.html")
    (folder / "look.html").write_text(LOOK)
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", "--no-sandbox", "--headless", "--enable-logging=stderr",
             "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000"]
    done = subprocess.run([BROWSER, *quiet, "--dump-dom", f"file://{folder / 'look.html'}"], check=True,
                          capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("<pre>(.+?)</pre>", done.stdout, re.DOTALL)[1]))
    return SimpleNamespace(**found, console=[line for line in done.stderr.splitlines() if "CONSOLE" in line])


@pytest.mark.parametrize("i, width", [(0, 1280), (1, 390)])
def test_page_in_a_browser(seen, i, width):
    found = seen.before[i]
    assert seen.console == []
    assert found["width"] == width and found["scroll"] <= width, "the page is wider than the window"
    assert found["panels"] == 6  # three losses, their sum, the gradient's norm, time
    assert found["denoise"]["curves"] == [6, 6] and found["feature"]["curves"] == [4]
    assert found["denoise"]["stops"] == found["feature"]["stops"] == 1
    assert {"0", "2", "4", "6"} <= set(found["denoise"]["labels"]) and "step" in found["denoise"]["labels"]
    assert found["painted"] == 8 and found["images"] == 1 + 2 * 3 + 2 * 2 + 2 * 2
    assert found["heads"] == ["Curves", "Samples", "Previews over time", "What teacher and student see",
                              "Step time and throughput", "Settings that differ", "Environment"]
    after = seen.after[i]  # a drag across one panel zooms all
    assert "0" not in after["denoise"]["labels"] and after["denoise"]["labels"] != found["denoise"]["labels"]
    assert after["feature"]["labels"] != found["feature"]["labels"] and after["scroll"] <= after["width"]
