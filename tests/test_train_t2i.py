"""train_t2i.py through its command line on 16 tiny captioned images: both losses, resume, processes, captions."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train
import train_t2i
from data_io.loader import CAPTION
from dataset import CaptionedImages
from models.mmdit import MMDiT_models
from runtime.images import GAP
from tests.conftest import (
    NO_TEACHER,
    ROOT,
    call_main,
    checkpoint,
    metrics,
    tiny_run,
    train_arguments,
    write_tiny_captions,
)
from training import previews
from training.metric_log import COLUMNS


@pytest.fixture
def run(monkeypatch, tiny_captions):
    """run(out, *flags): train_t2i.py inside the test's process."""
    def run(out, *more, data=tiny_captions):
        call_main(monkeypatch, train_t2i, *tiny_run("MMDiT-T", data, out, *more))
    return run


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, tiny_captions, teacher_file):
    """(A run of 6 steps with a checkpoint at 4, its flags): epochs end every 2 steps, alignment ends before the 4th."""
    out = tmp_path_factory.mktemp("aligned")
    flags = ["--enc-weights", teacher_file, "--early-stop-point", 3, "--checkpointing-steps", 4]
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, train_t2i, *tiny_run("MMDiT-T", tiny_captions, out, *flags))
    return out, flags


def test_both_losses_then_one(run, aligned, tmp_path):
    """In Phase I the attention loss moves the attention; after the early-stop point both terms are gone."""
    out, flags = aligned
    rows = metrics(out)
    for row in rows[:3]:
        assert float(row["feature"]) != 0 and float(row["attention"]) > 0
        assert float(row["loss"]) == pytest.approx(
            float(row["denoise"]) + 0.5 * float(row["feature"]) + 0.5 * float(row["attention"]), rel=1e-4)
    assert all(row["feature"] == row["attention"] == "" and row["loss"] == row["denoise"] for row in rows[3:])
    run(tmp_path, *flags, "--attn-coeff", 0, "--max-train-steps", 4)
    with_loss, without = checkpoint(out, 4)["model"], checkpoint(tmp_path, 4)["model"]
    for block in (1, 2):
        name = f"joint_blocks.{block}.x_block.attn.qkv.weight"
        assert not torch.equal(with_loss[name], without[name])
    assert checkpoint(out, 4)["args"]["context_shape"] == [6, 16]
    assert "captions.json" not in (out / "run/log.txt").read_text()


def test_loss_falls_and_text_is_used(run, tiny_captions, tmp_path):
    """From pure noise only the text tells the colour: v = noise - x is high for the darkest, low for the brightest."""
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 30, "--log-every", 10, "--batch-size", 4, "--zero-init",
        "--learning-rate", 3e-3, "--cfg-prob", 0)
    losses = [float(row["denoise"]) for row in metrics(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=())
    model.load_state_dict(checkpoint(tmp_path, 30)["model"])
    dataset = CaptionedImages(tiny_captions, "val", 64)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dark, bright = (model(noise, torch.ones(1), dataset.condition(i)[None]).mean().item() for i in (0, 3))
    assert dark > bright + 1


def test_restart_is_the_same_run(run, aligned, tmp_path):
    """6 steps = 4 + 2 bit for bit."""
    out, flags = aligned
    run(tmp_path, *flags, "--max-train-steps", 4)
    run(tmp_path, *flags, "--num-workers", 1)
    one, two = checkpoint(out, 6), checkpoint(tmp_path, 6)
    for part in ("model", "ema"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


def test_captions_are_dropped_to_the_empty_context(run, monkeypatch, tmp_path):
    """--cfg-prob 1 shows the network nothing but empty_context.npy, 0 nothing but captions."""
    plain, seen = MMDiT_models["MMDiT-T"], []

    def build(**kwargs):
        model = plain(**kwargs)
        model.context_embedder.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().clone()))
        return model

    monkeypatch.setitem(MMDiT_models, "MMDiT-T", build)
    for probability in (0, 1):
        seen.clear()
        run(tmp_path / str(probability), *NO_TEACHER, "--cfg-prob", probability, "--max-train-steps", 2)
        assert len(seen) == 2 and all(y.shape == (8, 6, 16) for y in seen)
        assert all(bool(caption.any()) != bool(probability) for y in seen for caption in y)


def test_zero_init(run, tmp_path):
    """By the command line, before any learning: adaLN-zero with the flag, PyTorch's init without."""
    for flag in ([], ["--zero-init"]):
        out = tmp_path / str(len(flag))
        run(out, *NO_TEACHER, "--max-train-steps", 1, "--learning-rate", 0, *flag)
        model = checkpoint(out, 1)["model"]
        for name in ("joint_blocks.0.context_block.adaLN_modulation.1.weight",
                     "joint_blocks.3.x_block.adaLN_modulation.1.bias",
                     "final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"):
            assert bool(model[name].any()) != bool(flag), name
        assert model["context_embedder.weight"].any()


def test_seed_chooses_the_captions(run, monkeypatch, tmp_path):
    """--seed reaches the data set: the first batch has that seed's captions, not those of seed 0."""
    seen, get = [], CaptionedImages.__getitem__

    def spy(self, visit):
        item = get(self, visit)
        seen.append((visit, int(item["y"][0, 0])))  # the first token says which caption it is
        return item

    monkeypatch.setattr(CaptionedImages, "__getitem__", spy)
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 3, "--seed", 5)
    counts = (3, 5, 1, 2) * 4
    chosen = {seed: [int(np.random.default_rng((seed, CAPTION, visit // 16, visit % 16)).integers(counts[visit % 16]))
                     for visit, _ in seen] for seed in (0, 5)}
    assert len(seen) == 24 and [k for _, k in seen] == chosen[5] != chosen[0]


@pytest.mark.parametrize("module", [train, train_t2i], ids=["train", "train_t2i"])
def test_fused_attention_is_a_matter_of_speed(monkeypatch, tiny_data, tiny_captions, tmp_path, module):
    """The kernel runs in every block by default and in none with --no-fused-attn; losses agree to rounding."""
    fused, calls, losses = F.scaled_dot_product_attention, [], []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *qkv: calls.append(1) or fused(*qkv))
    arguments = (train_arguments(tiny_data, tmp_path, *NO_TEACHER) if module is train else
                 tiny_run("MMDiT-T", tiny_captions, tmp_path, *NO_TEACHER))
    for flag, expected in (([], True), (["--no-fused-attn"], False)):
        calls.clear()
        call_main(monkeypatch, module, *arguments, "--max-train-steps", 2, *flag)
        assert (len(calls) > 0) == expected
        losses.append([float(row["loss"]) for row in metrics(tmp_path)])
        shutil.rmtree(tmp_path / "run")
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("texts", [True, False])
def test_previews_have_captions(run, monkeypatch, tmp_path, texts):
    monkeypatch.setattr(previews, "PREVIEW_STEPS", 4)
    data = write_tiny_captions(tmp_path / "data", (3, 5, 1, 2), texts=texts)
    run(tmp_path, *NO_TEACHER, "--max-train-steps", 1, "--sampling-steps", 1, "--vae", ROOT / "assets/vae-emoji",
        data=data)
    truth, samples = (np.asarray(Image.open(tmp_path / f"run/previews/{name}.png")) for name in ("truth", "0000001"))
    assert truth.shape == samples.shape and truth.shape[1] == 128 + GAP and (truth.shape[0] > 128 + GAP) == texts
    height = (truth.shape[0] - GAP) // 2
    assert np.array_equal(truth[64:height], samples[64:height])  # the strips of text
    assert ("previews are without captions" in (tmp_path / "run/log.txt").read_text()) != texts


def test_published_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_t2i.py", "--exp-name", "x"])
    args = train_t2i.parse_args()
    assert (args.model, args.data_dir) == ("MMDiT", "../data/coco256_features")
    assert (args.sampling_steps, args.early_stop_point, args.encoder_depth, args.cfg_prob) == (10_000, 150_000, 8, 0.1)
    assert args.attn_layers == [[4, 8], [5, 9], [6, 10], [7, 11]] and not args.zero_init


def test_published_command_line(monkeypatch, teacher_file, tmp_path):
    """The README's command with another path and size, and every flag that the published script has."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    data = write_tiny_captions(tmp_path / "data", (3, 5, 1, 2))
    call_main(
        monkeypatch, train_t2i,
        "--report-to=wandb", "--allow-tf32", "--mixed-precision=fp16", "--seed=0", "--path-type=linear",
        "--prediction=v", "--weighting=uniform", "--model=MMDiT-T", "--enc-type=dinov2-vit-n", "--proj-coeff=0.5",
        "--attn-coeff=0.5", "--encoder-depth=3", f"--output-dir={tmp_path}", "--exp-name=run", "--batch-size=4",
        f"--data-dir={data}", "--early-stop-point=1", "--logging-dir=logs", "--resume-step=0", "--fused-attn",
        "--no-qk-norm", "--resolution=64", "--epochs=1400", "--max-train-steps=2", "--checkpointing-steps=50000",
        "--gradient-accumulation-steps=1", "--learning-rate=1e-4", "--adam-beta1=0.9", "--adam-beta2=0.999",
        "--adam-weight-decay=0.0", "--adam-epsilon=1e-08", "--max-grad-norm=1.0", "--num-workers=0", "--cfg-prob=0.1",
        "--sampling-steps=10000", f"--enc-weights={teacher_file}")
    assert checkpoint(tmp_path, 2)["steps"] == 2
    assert json.loads((tmp_path / "run/args.json").read_text())["model"] == "MMDiT-T"
    assert COLUMNS == list(metrics(tmp_path)[0])
