"""The gradient trigger and the decay of alignment by the command line; cosines against the written-out formula."""
import json
import random
import shutil

import numpy as np
import pytest
import torch

import dataset
import loss
import train_t2i
from data_io.loader import step_noise
from encoders.teachers import Teacher, load_vit
from models.mmdit import MMDiT_models
from models.sit import SiT_models
from tests.conftest import CLASSES, call_main, checkpoint, metrics, script, tiny_run, train_arguments
from tests.test_resume import assert_same_state, log, scaled  # noqa: F401 - a fixture
from training import trainer as training
from training.early_stop import align_decay

TIMES = (0.05, 0.5, 0.9)
TRIGGER = ["--early-stop-trigger", "gradient", "--trigger-start", 3, "--trigger-every", 2, "--trigger-samples", 12,
           "--trigger-timesteps", *TIMES]
NEVER, ALWAYS = ["--trigger-threshold", -1], ["--trigger-threshold", 1]


def cosines(row):
    return [float(row[name]) for name in ("cosine", *(f"cosine_{t:g}" for t in TIMES))]


# ---- the cosines ----

def written_out(model, block, items, y_null, teacher, pairs, coefficients, samples=12, cfg_prob=0.5):
    """Mean and single cosines, all samples in one batch: step 0's images and draws, t fixed, float64 products."""
    places = np.random.default_rng((0, 0, 0)).permutation(len(items))[:samples]
    batch = [items[int(i)] for i in places]
    noise = step_noise(0, 0, range(samples), (4, 16, 16))  # without u, which t replaces
    drop, eps, posterior = noise["drop"] < cfg_prob, noise["noise"], noise["posterior"]
    mean, std = torch.stack([item["moments"] for item in batch]).chunk(2, dim=1)
    x = (mean + std * posterior) * 0.18215
    y = torch.stack([y_null if dropped else torch.as_tensor(item["y"]) for item,
                     dropped in zip(batch, drop, strict=True)])
    assert 0 < drop.sum() < samples
    target = teacher(torch.stack([item["image"] for item in batch]))
    found = []
    for t in TIMES:
        v, student = model((1 - t) * x + t * eps, torch.full((samples,), t), y, return_alignment=True)
        denoise = ((v - (eps - x)) ** 2).mean()
        feature = loss.feature_loss(student.features[0], target.features[0])
        attention = loss.attention_loss([student.attention[s] for s, _ in pairs],
                                        [target.attention[e] for _, e in pairs])
        a, b = (torch.cat([torch.zeros(p.numel()).double() if g is None else g.flatten().double() for p, g in zip(
            block.parameters(), torch.autograd.grad(term, block.parameters(), retain_graph=True,
                                                    allow_unused=True), strict=True)])
            for term in (coefficients[0] * feature + coefficients[1] * attention, denoise))
        found.append(float((a * b).sum() / (a * a).sum().sqrt() / (b * b).sum().sqrt()))
    return [sum(found) / len(found), *found]


@pytest.mark.parametrize("how", ["two processes", "FSDP", "cache", "checkpointing"])
def test_cosines_are_the_written_out_ones(run, tiny_data, teacher_file, tmp_path, how):
    """For the weights at that step, with any number of processes and any micro-batch size."""
    more = ["--enc-weights", teacher_file, *TRIGGER, *NEVER, "--cfg-prob", 0.5, "--attn-coeff", 0.2,
            "--max-train-steps", 3]
    more += {"checkpointing": ["--gradient-accumulation-steps", 2, "--grad-checkpointing"],
             "cache": ["--teacher-cache", tmp_path / "cache"]}.get(how, [])
    if how in ("two processes", "FSDP"):
        script("train.py", *train_arguments(tiny_data, tmp_path, *more), processes=2,
               before="tests.test_faults.fsdp_on_a_cpu" if how == "FSDP" else None)
    else:
        run(tmp_path, *more)
    model = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=(48,))
    model.load_state_dict(checkpoint(tmp_path, 3)["model"])
    expected = written_out(model, model.blocks[1], dataset.LatentImages(tiny_data, 64, CLASSES), torch.tensor(CLASSES),
                           Teacher(load_vit("dinov2-vit-n", teacher_file), 8, [7, 9], 10), ((0, 7), (1, 9)), (0.5, 0.2))
    first, _, last = metrics(tmp_path)
    assert cosines(last) == pytest.approx(expected, abs=1e-2 if how == "cache" else 1e-5)
    assert len({round(value, 3) for value in expected}) == 4 and first["cosine"] == first["cosine_0.5"] == ""
    assert f"step 3: gradients of alignment and denoising by block 2, cosine {expected[0]:.3f}"[:-1] in log(tmp_path)


def test_cosines_of_an_mmdit(monkeypatch, teacher_file, tiny_captions, tmp_path):
    """For both streams of the joint block, with epoch 0's captions."""
    call_main(monkeypatch, train_t2i, *tiny_run(
        "MMDiT-T", tiny_captions, tmp_path, "--enc-weights", teacher_file, *TRIGGER, *NEVER, "--cfg-prob", 0.5,
        "--max-train-steps", 3, "--batch-size", 4))
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=(48,))
    model.load_state_dict(checkpoint(tmp_path, 3)["model"])
    items = dataset.CaptionedImages(tiny_captions, "train", 64)
    expected = written_out(model, model.joint_blocks[2], items, items.empty_context,
                           Teacher(load_vit("dinov2-vit-n", teacher_file), 8, [7, 9], 10), ((1, 7), (2, 9)), (0.5, 0.5))
    assert cosines(metrics(tmp_path)[-1]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("coefficients, reached", [((0.5, 0), 2), ((0, 0.5), 1)])
def test_one_loss_alone(run, teacher_file, tmp_path, coefficients, reached):
    """The default block is the deepest that has a gradient: the projected one, or the last aligned one."""
    run(tmp_path, "--enc-weights", teacher_file, *TRIGGER, *NEVER, "--attn-layers", "0:7", "--max-train-steps", 3,
        "--proj-coeff", coefficients[0], "--attn-coeff", coefficients[1])
    assert all(0 < abs(value) < 1 for value in cosines(metrics(tmp_path)[-1]))
    assert f"by block {reached}," in log(tmp_path)


# ---- its effect on a run ----

def tie_alignment_to_denoising(monkeypatch, sign):
    """The feature loss becomes `sign` times denoising's, the attention loss nothing: gradients agree or conflict."""
    plain = loss.SILoss.__call__

    def tied(self, *args):
        losses = plain(self, *args)
        return {**losses, "feature": sign * losses["denoise"].mean(), "attention": 0 * losses["attention"]} \
            if "feature" in losses else losses

    monkeypatch.setattr(loss.SILoss, "__call__", tied)


def test_conflict_ends_alignment(run, monkeypatch, teacher_file, tiny_data, tmp_path):
    """At the first comparison; the run then equals, bit for bit, a run with that early-stop point."""
    tie_alignment_to_denoising(monkeypatch, -1)
    more = ["--enc-weights", teacher_file, "--checkpointing-steps", 3]
    run(tmp_path / "gradient", *more, *TRIGGER)
    run(tmp_path / "step", *more, "--early-stop-point", 3)
    rows = metrics(tmp_path / "gradient")
    assert cosines(rows[2]) == pytest.approx([-1] * 4)
    assert [row["cosine"] != "" for row in rows] == [False, False, True, False, False, False]
    assert [row["feature"] != "" for row in rows] == [True] * 3 + [False] * 3
    assert "step 3: alignment is switched off; teacher freed" in log(tmp_path / "gradient")
    a, b = (checkpoint(tmp_path / name, 6) for name in ("gradient", "step"))
    for part in ("model", "ema", "opt"):
        assert_same_state(a[part], b[part])
    assert checkpoint(tmp_path / "gradient", 3)["trigger_fired"] == a["trigger_fired"] == 3
    assert b["trigger_fired"] is None
    # The recorded end applies to the gradient trigger only: a typed step overrides it.
    monkeypatch.setattr("encoders.teachers.load_vit", None)
    without_images = shutil.copytree(tiny_data, tmp_path / "data", ignore=lambda *_: ["images"])
    run(tmp_path / "gradient", *more, *TRIGGER, "--max-train-steps", 7, "--data-dir", without_images, "--resolution",
        64)
    with pytest.raises(TypeError):
        run(tmp_path / "gradient", *more, "--max-train-steps", 8)


def test_agreement_goes_on_to_the_early_stop_point(run, monkeypatch, teacher_file, tmp_path):
    """Compared at 3 and 5; the early-stop point is the latest end."""
    tie_alignment_to_denoising(monkeypatch, 1)
    run(tmp_path, "--enc-weights", teacher_file, *TRIGGER, "--early-stop-point", 7, "--max-train-steps", 10)
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows if row["cosine"]] == [3, 5]
    assert cosines(rows[2]) == cosines(rows[4]) == pytest.approx([1] * 4)
    assert [row["feature"] != "" for row in rows] == [True] * 7 + [False] * 3
    assert checkpoint(tmp_path, 10)["trigger_fired"] is None
    assert "until step 7, or until the gradients point apart (by --early-stop-point)" in log(tmp_path)


def states(accelerator, model):
    return [torch.get_rng_state(), str(np.random.get_state()), random.getstate(), str(accelerator.scaler.state_dict()),
            *(value.clone() for value in model.state_dict().values())]


def test_a_comparison_changes_nothing(run, monkeypatch, scaled, teacher_file, tmp_path):  # noqa: F811
    """It touches no random stream, gradient or loss scale: the run equals one without it, bit for bit."""
    plain, compared = training.gradient_cosine, []

    def watched(trainer):
        before = states(trainer.accelerator, trainer.model)
        measured = plain(trainer)
        assert_same_state(before, states(trainer.accelerator, trainer.model))
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        return compared.append(1) or measured

    more = ["--enc-weights", teacher_file, "--gradient-accumulation-steps", 2, "--mixed-precision", "bf16"]
    run(tmp_path / "without", *more)
    monkeypatch.setattr(training, "gradient_cosine", watched)
    run(tmp_path / "with", *more, *TRIGGER, *NEVER, "--trigger-samples", 4, "--log-every", 4)
    a, b = (checkpoint(tmp_path / name, 6) for name in ("without", "with"))
    for part in ("model", "ema", "opt", "scaler"):
        assert_same_state(a[part], b[part])
    assert len(compared) == 2 and [row["step"] for row in metrics(tmp_path / "with")] == ["3", "4", "5", "6"]


def test_two_processes_decide_as_one(tiny_data, teacher_file, tmp_path):
    """Unfired, DDP's run equals one without it bit for bit; fired, both leave Phase I after the same step."""
    more = ["--enc-weights", teacher_file, "--max-train-steps", 5]
    for name, flags in (("plain", []), ("never", [*TRIGGER, *NEVER]), ("stop", ["--early-stop-point", 3]),
                        ("always", [*TRIGGER, *ALWAYS])):
        script("train.py", *train_arguments(tiny_data, tmp_path / name, *more, *flags), processes=2)
    for one, other in (("plain", "never"), ("stop", "always")):
        a, b = (checkpoint(tmp_path / name, 5) for name in (one, other))
        for part in ("model", "ema", "opt"):
            assert_same_state(a[part], b[part])


def test_with_a_cache_no_image_is_read(run, monkeypatch, teacher_file, tmp_path):
    read, decode = [], dataset.decode_image
    more = ["--enc-weights", teacher_file, "--teacher-cache", tmp_path / "cache", "--max-train-steps", 3]
    run(tmp_path / "a", *more)
    monkeypatch.setattr(dataset, "decode_image", lambda *args: read.append(1) or decode(*args))
    run(tmp_path / "b", *more, *TRIGGER)
    assert read == [1] and metrics(tmp_path / "b")[-1]["cosine"]  # the first, to check the folder


def test_samples_divide_by_the_processes(tiny_data, teacher_file, tmp_path):
    done = script("train.py", *train_arguments(tiny_data, tmp_path, "--enc-weights", teacher_file, *TRIGGER,
                                               "--trigger-samples", 3), processes=2, check=False)
    assert done.returncode == 1 and not tmp_path.joinpath("run").exists()
    assert "error: --trigger-samples 3 must be a multiple of the number of processes = 2; change it." in done.stderr


# ---- decay ----

def test_align_decay():
    assert [align_decay("none", step, 8) for step in (0, 7)] == [1, 1]
    assert [align_decay("linear", step, 8) for step in (0, 2, 4, 7, 8)] == [1, 0.75, 0.5, 0.125, 0]
    assert [align_decay("cosine", step, 8) for step in (0, 2, 4, 6, 8)] == pytest.approx(
        [1, 0.5 + 0.5 ** 1.5, 0.5, 0.5 - 0.5 ** 1.5, 0])


def test_decay_of_both_losses(run, teacher_file, tmp_path):
    run(tmp_path, "--enc-weights", teacher_file, "--align-decay", "cosine", "--early-stop-point", 4,
        "--proj-coeff", 0.7, "--attn-coeff", 0.4)
    rows = metrics(tmp_path)
    for row, factor in zip(rows, (1, 0.853553, 0.5, 0.146447), strict=False):
        assert float(row["loss"]) == pytest.approx(
            float(row["denoise"]) + factor * (0.7 * float(row["feature"]) + 0.4 * float(row["attention"])), rel=1e-5)
    assert rows[4]["feature"] == "" and rows[4]["loss"] == rows[4]["denoise"]
    assert json.loads((tmp_path / "run/args.json").read_text())["align_decay"] == "cosine"
