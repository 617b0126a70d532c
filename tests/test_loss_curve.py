"""A stored loss curve, 50 steps through the early stop: every way to compute a step gives it to 1e-6 (CPU, float32).

After a change of noise or data order, store it anew: the result of `curve` without `more`, in 9 digits.
"""
import argparse
import copy
import functools
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import train
from benchmarks import published
from data_io.loader import StepBatches, step_noise
from dataset import LatentImages
from encoders.teachers import Teacher, load_vit
from models.sit import SIT_CONFIGS, SiT_models
from tests.conftest import CLASSES, ROOT, call_main, checkpoint, script, train_arguments

GOLDEN = ROOT / "tests/golden/loss_curve.json"
STEPS, STOP = 50, 25


def curve(monkeypatch, data, teacher_file, out, *more, steps=STEPS, processes=1):
    """The loss of each step, before rounding for metrics.csv."""
    arguments = train_arguments(data, out, "--enc-weights", teacher_file, "--early-stop-point", STOP,
                                "--max-train-steps", steps, "--learning-rate", 1e-4, "--log-every", STEPS + 1, *more)
    if processes > 1:
        script("train.py", *arguments, processes=processes)
    else:
        call_main(monkeypatch, train, *arguments)
    return checkpoint(out, steps)["metrics"]["rows"][:, 0]


@pytest.fixture(scope="module")
def golden():
    return torch.tensor(json.loads(GOLDEN.read_text()))


@pytest.mark.parametrize("more", [(), ("--no-fused-attn",), ("--grad-checkpointing",),
                                  ("--gradient-accumulation-steps", 4),
                                  pytest.param(("--compile",), marks=pytest.mark.slow)],
                         ids=lambda more: more[0] if more else "plain")
def test_curve(monkeypatch, tiny_data, teacher_file, tmp_path, golden, more):
    torch.testing.assert_close(curve(monkeypatch, tiny_data, teacher_file, tmp_path, *more), golden, rtol=1e-6, atol=0)


@pytest.mark.parametrize("processes", [2, 4])
def test_curve_of_several_processes(monkeypatch, tiny_data, teacher_file, tmp_path, golden, processes):
    found = curve(monkeypatch, tiny_data, teacher_file, tmp_path, steps=STOP + 5, processes=processes)
    torch.testing.assert_close(found, golden[:STOP + 5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("plain", [False, True])
def test_curve_of_the_published_step(tiny_data, teacher_file, golden, plain):
    """The benchmark's copy of the published step gives the same numbers; its teacher has plain attention on a CPU."""
    config = SIT_CONFIGS["SiT-N/2"]
    data = LatentImages(tiny_data, 64, CLASSES)
    set_seed(0)
    model = SiT_models["SiT-N/2"](input_size=16, num_classes=CLASSES, z_dims=(48,))
    ema, y_null = copy.deepcopy(model), torch.tensor(CLASSES)
    teacher = Teacher(load_vit("dinov2-vit-n", teacher_file), 8, () if plain else range(10), 10)
    for block in teacher.vit.blocks if plain else []:
        block.attn = published.PlainAttention(block.attn)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0)
    args = argparse.Namespace(path_type="linear", cfg_prob=0.1, proj_coeff=0.5, attn_coeff=0.5, max_grad_norm=1.0,
                              ema_decay=0.9999)
    step = functools.partial(published.training_step, args, Accelerator(cpu=True), model, ema, optimizer, teacher,
                             config["attn_pairs"])
    losses = []
    for i, entries in enumerate(StepBatches(len(data), 8, 0, 0, STEPS)):
        batch = torch.utils.data.default_collate([data[entry] for entry in entries])
        denoise, feature, attention, _ = step(batch, step_noise(0, i, slice(0, 8), model.latent_shape), y_null,
                                              i < STOP)
        losses.append(denoise + 0.5 * (feature + attention) * (i < STOP))
    torch.testing.assert_close(torch.tensor(losses), golden, rtol=1e-6, atol=0)
