"""train.py through its command line on 64 tiny images: both phases, resume, processes, refusals."""
import argparse
import json
import shutil
import weakref

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataset
import encoders
import evaluations.during_training
import train
from evaluations import features, scores
from evaluations.during_training import Evaluation
from evaluations.inception import Inception
from evaluations.scores import load_set, score
from models.sit import SiT_models
from runtime.errors import UserError
from sampling.cache import sample_latents
from tests.conftest import (
    CLASSES,
    NO_TEACHER,
    ROOT,
    call_main,
    checkpoint,
    metrics,
    script,
    tiny_run,
    train_arguments,
    without,
)
from training import previews
from training import trainer as training
from training.data_size import find_resolution
from training.step import ema_decay


def count_teacher(monkeypatch):
    calls = []
    call = encoders.Teacher.__call__
    monkeypatch.setattr(encoders.Teacher, "__call__", lambda self,
                        images: calls.append(len(images)) or call(self, images))
    return calls


def test_the_teacher_is_cast_once(run, monkeypatch, teacher_file, tmp_path):
    """Its weights are cast to the run's precision or its own, for training steps and the cache alike."""
    seen, call = [], encoders.Teacher.__call__
    monkeypatch.setattr(encoders.Teacher, "__call__", lambda self, images: (
        seen.append(self.vit.blocks[0].mlp.fc1.weight.dtype) or call(self, images)))
    half = ["--mixed-precision", "bf16"]
    for name, more, expected in (("a", half, torch.bfloat16), ("b", ["--enc-precision", "bf16"], torch.bfloat16),
                                 ("c", [], torch.float32),
                                 ("d", [*half, "--teacher-cache", tmp_path / "cache"], torch.bfloat16)):
        seen.clear()
        run(tmp_path / name, "--enc-weights", teacher_file, "--max-train-steps", 1, *more)
        assert set(seen) == {expected}


def test_both_phases(run, monkeypatch, teacher_file, tmp_path):
    """The teacher is called exactly early-stop-point times; loss terms and images are used before, not after."""
    calls, teachers, freed = count_teacher(monkeypatch), [], []
    load_vit, update_ema = encoders.teachers.load_vit, training.update_ema

    def load(*args):
        vit = load_vit(*args)
        teachers.append(weakref.ref(vit))
        return vit

    decode_image, images = dataset.decode_image, []
    monkeypatch.setattr(dataset, "decode_image", lambda *args: images.append(1) or decode_image(*args))
    monkeypatch.setattr(encoders.teachers, "load_vit", load)
    monkeypatch.setattr(training, "update_ema", lambda *args: freed.append(teachers[0]() is None) or update_ema(*args))
    run(tmp_path, "--enc-weights", teacher_file, "--early-stop-point", 4, "--checkpointing-steps", 4)
    rows = metrics(tmp_path)
    assert calls == [8] * 4 and freed == [False] * 4 + [True] * 2
    assert len(images) == 1 + 4 * 8  # one as a check; none in Phase II
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows[:4]:
        assert float(row["feature"]) != 0 and float(row["attention"]) > 0
        assert float(row["loss"]) == pytest.approx(
            float(row["denoise"]) + 0.5 * float(row["feature"]) + 0.5 * float(row["attention"]), rel=1e-4)
    assert all(row["feature"] == row["attention"] == "" and row["loss"] == row["denoise"] for row in rows[4:])
    before, after = checkpoint(tmp_path, 4), checkpoint(tmp_path, 6)
    same = [name for name in before["model"] if torch.equal(before["model"][name], after["model"][name])]
    assert same == ["pos_embed", *(name for name in before["model"] if name.startswith("projectors."))]
    assert after["steps"] == 6 and after["args"]["model"] == "SiT-N/2" and set(after) >= {"model", "ema", "opt", "args"}
    settings = json.loads((tmp_path / "run/args.json").read_text())
    assert settings["early_stop_point"] == 4 and settings["environment"]["torch"] == str(torch.__version__)
    assert "environment" not in after["args"]  # a run may continue on any machine
    assert "alignment is switched off" in (tmp_path / "run/log.txt").read_text()


def test_loss_falls(run, tmp_path):
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 40, "--log-every", 10)
    losses = [float(row["denoise"]) for row in metrics(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    assert not any(name.startswith("projectors") for name in checkpoint(tmp_path, 40)["model"])


@pytest.mark.parametrize("more, decays", [([], [0.9999] * 2), (["--ema-warmup"], [2 / 11, 3 / 12])])
def test_ema_is_the_written_out_average(run, tmp_path, more, decays):
    run(tmp_path, *NO_TEACHER, "--checkpointing-steps", 1, "--max-train-steps", 3, *more)
    states = [checkpoint(tmp_path, step) for step in (1, 2, 3)]
    for name, value in states[2]["ema"].items():
        expected = states[0]["ema"][name].double()
        for decay, state in zip(decays, states[1:], strict=True):
            expected = decay * expected + (1 - decay) * state["model"][name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)
    assert ema_decay(argparse.Namespace(ema_decay=0.9999, ema_warmup=True), 10 ** 6) == 0.9999


PREVIEWS = [*NO_TEACHER, "--max-train-steps", 2, "--sampling-steps", 1, "--vae", ROOT / "assets/vae-emoji"]


@pytest.mark.parametrize("decay, more, scale", [(1.0, (), 4.0), (0.0, ("--cfg-prob", 0), 1.0)])
def test_previews_are_of_the_ema_with_fixed_noise(run, monkeypatch, tmp_path, decay, more, scale):
    """An EMA that stays at its start (v = 0) gives the same picture twice; an EMA that follows the model does not.

    The log calls the first EMA young. Guidance uses trained conditions only.
    """
    scales, plain = [], previews.guided
    monkeypatch.setattr(previews, "PREVIEW_STEPS", 4)
    monkeypatch.setattr(previews, "guided", lambda *arguments: scales.append(arguments[3]) or plain(*arguments))
    run(tmp_path, *PREVIEWS, "--report-to", "tensorboard", "--ema-decay", decay, *more)
    folder, log = tmp_path / "run/previews", (tmp_path / "run/log.txt").read_text()
    first, second = (np.asarray(Image.open(folder / f"{step:07d}.png")) for step in (1, 2))
    assert first.shape == np.asarray(Image.open(folder / "truth.png")).shape == (262, 262, 3)
    assert np.array_equal(first, second) == (decay == 1)
    events = EventAccumulator(str(next((tmp_path / "logs/run").rglob("events*")).parent)).Reload()
    assert events.Tags()["images"] == ["truth", "samples"] and [e.step for e in events.Images("samples")] == [1, 2]
    assert scales == [scale] * 2 and ("previews are without guidance" in log) == (scale == 1)
    assert log.count("still holds much of the initial weights") == (decay == 1)


def test_a_warm_average_is_not_young(run, monkeypatch, tmp_path):
    monkeypatch.setattr(previews, "PREVIEW_STEPS", 4)
    run(tmp_path, *PREVIEWS, "--ema-warmup", "--sampling-steps", 2)
    assert "still holds much" not in (tmp_path / "run/log.txt").read_text()


def test_classes_and_resolution_are_the_datas(run, monkeypatch, tiny_data, tmp_path):
    """Without flags; more classes than in the data are allowed, another resolution is not."""
    arguments = train_arguments(tiny_data, tmp_path, *NO_TEACHER, "--max-train-steps", 1)
    call_main(monkeypatch, train, *without(arguments, "--num-classes", "--resolution"))
    settings, log = json.loads((tmp_path / "run/args.json").read_text()), (tmp_path / "run/log.txt").read_text()
    assert (settings["num_classes"], settings["resolution"]) == (CLASSES, 64)
    assert f"--num-classes {CLASSES}, by the labels of" in log and "64 images of 64 pixels" in log
    assert "have no image" not in log
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 1, "--num-classes", 1000, "--exp-name", "more")
    assert "996 of the 1000 classes have no image" in (tmp_path / "more/log.txt").read_text()
    with pytest.raises(UserError, match="--resolution is 256, but the images in .* have 64 pixels a side; leave"):
        run(tmp_path, *NO_TEACHER, "--resolution", 256)


def test_the_resolution_without_images(tmp_path, tiny_data, tiny_captions):
    """From the latents, if they are Stable Diffusion's; else 256."""
    assert find_resolution(None, tiny_captions, "train") == find_resolution(None, tiny_data) == 64
    (tmp_path / "vae-sd").mkdir()
    assert find_resolution(None, tmp_path) == 256
    for name in ("img_00000000.npy", "img-mean-std-00000000.npy"):
        np.save(tmp_path / "vae-sd" / name, np.zeros((8, 64, 64), np.float32))
        assert find_resolution(None, tmp_path) == 512 and find_resolution(64, tmp_path) == 64
        (tmp_path / "vae-sd" / name).unlink()
    (tmp_path / "images").mkdir()  # packed rows
    np.save(tmp_path / "images/00000.npy", np.zeros((4, 3, 128, 128), np.uint8))
    assert find_resolution(None, tmp_path) == 128


@pytest.mark.parametrize("more, said", [
    ((), "n: feature x 0.5 (by default), attention x 0.5 (by default), until step 700 (by SiT-N/2's default)"),
    (("--attn-coeff", 0, "--early-stop-point", 3),
     "attention x 0 (by --attn-coeff), until step 3 (by --early-stop-point)"),
    (("--early-stop-fraction", 0.5), "until step 3 (by --early-stop-fraction)"),
    (("--preset", "sit-b-2-repa"), "attention x 0 (by --preset sit-b-2-repa), to the end (by --preset sit-b-2-repa)"),
    (("--proj-coeff", 0, "--attn-coeff", 0), " no alignment"),
    (NO_TEACHER, " no alignment")])
def test_a_run_says_what_it_aligns(run, teacher_file, tmp_path, capsys, more, said):
    """The log states the weights, the end, whose default it is, and whether HASTE never stops."""
    run(tmp_path, "--enc-weights", teacher_file, *more)
    assert ("--enc-type dinov2-vit-n has no effect" in capsys.readouterr().err) == ("--proj-coeff" in more)
    log = (tmp_path / "run/log.txt").read_text()
    assert said in log
    assert ("Alignment never stops in this run: its early-stop point 700 is not before the last step 6; "
            "--early-stop-fraction 0.25 would stop it at step 2." in log) == (more == ())
    run(tmp_path, "--enc-weights", teacher_file, *more, "--max-train-steps", 7)
    again = (tmp_path / "run/log.txt").read_text().removeprefix(log)
    assert ('"preset": "sit-b-2-repa"' in (tmp_path / "run/args.json").read_text()) == ("preset" in said)
    assert "until step 0" not in again and ("alignment has ended at step" in again) == ("until step 3" in said)


def test_one_way_to_say_the_early_stop(run, tmp_path):
    with pytest.raises(UserError, match="--early-stop-fraction: not allowed with argument --early-stop-point"):
        run(tmp_path, "--early-stop-point", 3, "--early-stop-fraction", 0.5)


@pytest.mark.parametrize("flag", ["--trigger-samples", "--batch-size", "--epochs", "--resolution", "--num-workers"])
def test_absurd_numbers_are_refused_at_once(run, tmp_path, flag):
    with pytest.raises(UserError, match=f"^{flag} is 100000000000; it must be from "):
        run(tmp_path, flag, 10 ** 11)


@pytest.mark.parametrize("coefficients", [(0.5, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_losses_without_weight_are_left_out(run, monkeypatch, teacher_file, tmp_path, coefficients):
    """--attn-coeff 0 is REPA; with --proj-coeff 0 there is no projector; without both the teacher is not needed."""
    calls = count_teacher(monkeypatch)
    run(tmp_path, "--max-train-steps", 1, "--proj-coeff", coefficients[0], "--attn-coeff", coefficients[1],
        "--enc-weights", teacher_file if any(coefficients) else "/no/file.pth")
    row, there = metrics(tmp_path)[0], tuple(coefficient > 0 for coefficient in coefficients)
    assert (row["feature"] != "", row["attention"] != "") == there and len(calls) == any(there)
    assert any(name.startswith("projectors") for name in checkpoint(tmp_path, 1)["model"]) == there[0]


def test_condition_drop(run, tmp_path):
    """--cfg-prob 1 trains the null row of the label table alone, 0 never touches it."""
    for probability in (0, 1):
        out = tmp_path / str(probability)
        run(out, *NO_TEACHER, "--cfg-prob", probability, "--max-train-steps", 3)
        opt = checkpoint(out, 3)["opt"]
        names = list(checkpoint(out, 3)["model"])
        moments = opt["state"][names.index("y_embedder.embedding_table.weight")]["exp_avg"]
        touched = moments.abs().sum(dim=1) > 0
        assert touched.tolist() == [not probability] * CLASSES + [bool(probability)]


def test_published_command_line(tiny_data, teacher_file, tmp_path):
    """The release's README command with other paths and sizes: fp16 asked for on a CPU, wandb offline."""
    done = script(
        "train.py", "--report-to=wandb", "--allow-tf32", "--mixed-precision=fp16", "--seed=0", "--path-type=linear",
        "--prediction=v", "--weighting=uniform", "--model=SiT-N/8", "--enc-type=dinov2-vit-n", "--proj-coeff=0.5",
        "--attn-coeff=0.5", "--encoder-depth=3", f"--output-dir={tmp_path}", "--exp-name=run", "--batch-size=4",
        f"--data-dir={tiny_data}", "--early-stop-point=1", "--logging-dir=logs", "--resume-step=0",
        f"--num-classes={CLASSES}", "--fused-attn", "--no-qk-norm", "--resolution=64", "--epochs=1400",
        "--max-train-steps=2", "--checkpointing-steps=50000", "--gradient-accumulation-steps=1", "--learning-rate=1e-4",
        "--adam-beta1=0.9", "--adam-beta2=0.999", "--adam-weight-decay=0.0", "--adam-epsilon=1e-08",
        "--max-grad-norm=1.0", "--num-workers=0", "--cfg-prob=0.1", "--sampling-steps=10000",
        f"--enc-weights={teacher_file}", env={"WANDB_MODE": "offline"})
    assert "needs a GPU: training in float32" in done.stderr
    assert list((tmp_path / "logs/wandb").glob("offline-run-*"))
    assert checkpoint(tmp_path, 2)["steps"] == 2


FLAGS = [("--path-type", "cosine"), ("--weighting", "lognormal"), ("--attn-heads", 1), ("--attn-layers", "0:3,2:5"),
         ("--encoder-depth", 1), ("--enc-blocks", 11), ("--proj-coeff", 0.7), ("--attn-coeff", 0.7),
         ("--adam-beta1", 0.5), ("--adam-beta2", 0.5), ("--adam-epsilon", 1e-3), ("--adam-weight-decay", 0.5),
         ("--learning-rate", 1e-2), ("--max-grad-norm", 0.1), ("--ema-decay", 0.5), ("--seed", 1), ("--cfg-prob", 0.9),
         ("--qk-norm",)]


def test_every_flag_of_the_step_changes_the_weights(run, teacher_file, tmp_path):
    """Only these do: the same command twice gives the same weights."""
    def weights(*flags):
        run(tmp_path, "--enc-weights", teacher_file, "--max-train-steps", 2, *flags)
        state = checkpoint(tmp_path, 2)
        shutil.rmtree(tmp_path / "run")
        return torch.cat([value.flatten() for part in ("model", "ema") for value in state[part].values()])

    plain = weights()
    assert torch.equal(plain, weights("--num-workers", 1))
    assert not [flag for flag in FLAGS if torch.equal(plain, weights(*flag))]


def test_a_published_checkpoint_is_continued(run, teacher_file, tmp_path):
    """Its optimizer was not fused; its args are a Namespace without data settings."""
    more = ["--enc-weights", teacher_file, "--early-stop-point", 3, "--max-train-steps"]
    run(tmp_path, *more, 2)
    state = checkpoint(tmp_path, 2)
    model = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=(48,))
    opt = torch.optim.AdamW(model.parameters(), lr=3.0).state_dict()
    opt["state"] = state["opt"]["state"]
    args = argparse.Namespace(model="SiT-N/2", num_classes=CLASSES, resolution=64, learning_rate=3.0)
    path = tmp_path / "run/checkpoints/0000002.pt"
    torch.save({"model": state["model"], "ema": state["ema"], "opt": opt, "args": args, "steps": 2}, path)
    for out in (tmp_path, tmp_path / "whole"):
        run(out, *more, 5)
    for name, value in checkpoint(tmp_path / "whole", 5)["model"].items():
        assert torch.equal(value, checkpoint(tmp_path, 5)["model"][name]), name


def test_other_latents_under_the_same_names_are_other_data(run, data, tmp_path):
    """As from another VAE."""
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 1, data=data)
    for path in (data / "vae-sd").rglob("*.npy"):
        np.save(path, 3 * np.load(path))
    with pytest.raises(UserError, match="belongs to another run: data was"):
        run(tmp_path, *NO_TEACHER, "--max-train-steps", 2, data=data)


def test_another_run_is_refused_before_its_first_checkpoint(run, tmp_path):
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 1)
    (tmp_path / "run/checkpoints/0000001.pt").unlink()
    before = (tmp_path / "run/metrics.csv").read_bytes()
    with pytest.raises(UserError, match="args.json belongs to another run: model was SiT-N/2"):
        run(tmp_path, *NO_TEACHER, "--model", "SiT-S/8")
    assert (tmp_path / "run/metrics.csv").read_bytes() == before


@pytest.fixture
def scorer(tmp_path, monkeypatch):
    """A file of random EfficientNet-Lite0 weights, whose hash nobody published."""
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    with torch.random.fork_rng():
        torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), tmp_path / "scorer.pth")
    return tmp_path / "scorer.pth"


def scoring(reference, scorer, *more):
    return ["--eval-steps", 2, "--eval-samples", 6, "--eval-ref", reference, "--eval-features", "efficientnet-lite0",
            "--eval-weights", scorer, "--eval-num-steps", 4, "--vae", ROOT / "assets/vae-emoji", *more]


def test_scores_while_training(run, data, scorer, tmp_path):
    """Every --eval-steps steps a row has the scores; the weights equal a run without scores, bit for bit."""
    arguments = [*NO_TEACHER, "--log-every", 3, "--max-train-steps", 5, "--learning-rate", 1e-2]
    run(tmp_path / "plain", *arguments, data=data)
    run(tmp_path / "scored", *arguments, *scoring(data / "images", scorer), data=data)
    plain, scored = (checkpoint(tmp_path / name, 5) for name in ("plain", "scored"))
    for part in ("model", "ema"):
        for name, value in plain[part].items():
            assert torch.equal(value, scored[part][name]), name
    rows = metrics(tmp_path / "scored")
    assert [(row["step"], row["FD-EffLite0"] != "", row["KID-EffLite0"] != "") for row in rows] == [
        ("2", True, True), ("3", False, False), ("4", True, True), ("5", False, False)]
    assert float(rows[0]["FD-EffLite0"]) > 0 and rows[0]["FD-EffLite0"] != rows[2]["FD-EffLite0"]
    assert all(row["loss"] for row in rows) and "FD-EffLite0" not in metrics(tmp_path / "plain")[0]
    # A run that continues without scores keeps its columns; its first row still covers steps 4 to 6.
    run(tmp_path / "scored", *arguments, "--max-train-steps", 6, data=data)
    again = [row["FD-EffLite0"] for row in metrics(tmp_path / "scored")]
    assert again == [*(row["FD-EffLite0"] for row in rows[:3]), ""]


def test_scores_are_those_of_the_samples(monkeypatch, data, scorer):
    """Shares of 4 + 2 images, made by two processes or in one batch, are the same six images."""
    entries, vae = dataset.LatentImages(data, 64, CLASSES), encoders.VAE(ROOT / "assets/vae-emoji")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=()).eval()
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    found, caches = [], set()
    monkeypatch.setattr(evaluations.during_training, "sample_latents",
                        lambda *given: caches.add(given[-2:]) or sample_latents(*given))
    for size, spans in ((8, [(0, 6)]), (4, [(0, 4), (4, 6)])):
        args = argparse.Namespace(seed=0, batch_size=size, gradient_accumulation_steps=1, resolution=64, eval_samples=6,
                                  eval_ref=data / "images", eval_features="efficientnet-lite0", eval_preset="adm",
                                  eval_weights=scorer, eval_metrics=["fid", "kid", "pr"], eval_num_steps=10,
                                  eval_cache="none", eval_cache_interval=3 + size)
        evaluation = Evaluation(args, Accelerator(cpu=True), entries, vae, torch.tensor(CLASSES), (4, 16, 16))
        with torch.no_grad():
            found.append(torch.cat([batch for span in spans for batch in evaluation.images(model, *span)]))
            measured = evaluation(model)
            evaluation.num_steps = 2
            assert not torch.equal(next(evaluation.images(model, 0, 2)), found[-1][:2])
        assert measured == pytest.approx(score(load_set(found[0].numpy(), evaluation.extractor, evaluation.metrics),
                                             evaluation.reference, evaluation.metrics), rel=1e-4)
        assert list(measured) == ["FD-EffLite0", "Precision", "Recall", "KID-EffLite0"]
    assert caches == {("none", 11), ("none", 7)}  # --eval-cache and its interval
    assert found[0].shape == (6, 64, 64, 3) and (found[0].int() - found[1].int()).abs().max() <= 1
    streams = [np.random.default_rng((0, 3, i)) for i in (0, 5)]
    y = torch.tensor([entries.condition(int(rng.integers(8))) for rng in streams])
    x = torch.from_numpy(np.stack([rng.standard_normal((4, 16, 16), dtype=np.float32) for rng in streams])).double()
    with torch.no_grad():
        for step in range(10):  # Euler's method for dx/dt = v from t = 1 to 0
            x -= model(x.float(), torch.full((2,), 1 - step / 10), y).double() / 10
    assert (found[0][[0, 5]].int() - vae.decode(x).permute(0, 2, 3, 1).int()).abs().max() <= 1


def test_scores_by_coco_s_protocol(run, monkeypatch, data, tmp_path):
    """--eval-preset pytorch-fid takes that preset's statistics and preprocesses samples alike; adm refuses them."""
    torch.save(Inception().state_dict(), tmp_path / "inception.pth")
    monkeypatch.setattr(features, "INCEPTION_SHA256", "")
    monkeypatch.setattr(scores, "frechet_distance", lambda *statistics: 1.5)  # seconds at 2,048 numbers
    np.savez(tmp_path / "coco.npz", mu=np.zeros(2048), sigma=np.eye(2048), n=30, features="inception",
             preset="pytorch-fid")
    arguments = [*NO_TEACHER, "--max-train-steps", 1, "--eval-steps", 1, "--eval-samples", 2, "--eval-num-steps", 4,
                 "--vae", ROOT / "assets/vae-emoji", "--eval-weights", tmp_path / "inception.pth", "--eval-ref"]
    with pytest.raises(UserError, match="with preset pytorch-fid, not of .* --eval-preset"):
        run(tmp_path / "adm", *arguments, tmp_path / "coco.npz", data=data)
    run(tmp_path, *arguments, tmp_path / "coco.npz", "--eval-preset", "pytorch-fid", data=data)
    assert metrics(tmp_path)[0]["FID"] == "1.5" and metrics(tmp_path)[0]["KID"] == ""
    log = (tmp_path / "run/log.txt").read_text()
    assert f"preset pytorch-fid), of n = 2 samples against {tmp_path}/coco.npz, n = 30" in log


def test_two_processes_from_text_are_one_run(tiny_captions, teacher_file, data, scorer, tmp_path):
    """By the command line: losses, and scores of five samples; each process makes and measures its part."""
    more = ["--enc-weights", teacher_file, "--early-stop-point", 2, "--max-train-steps", 3,
            *scoring(data / "images", scorer, "--eval-steps", 3, "--eval-samples", 5)]
    for processes in (1, 2):
        script("train_t2i.py", *tiny_run("MMDiT-T", tiny_captions, tmp_path / str(processes), *more),
               processes=processes, before="tests.nano.take_any_scorer")
    one, two = (metrics(tmp_path / str(processes)) for processes in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-5)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-3)
    for name in ("FD-EffLite0", "KID-EffLite0"):
        assert float(two[2][name]) == pytest.approx(float(one[2][name]), rel=1e-3)
    assert "of n = 5 samples against" in (tmp_path / "2/run/log.txt").read_text()
