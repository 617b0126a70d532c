"""The recipes of docs/extending.md, all followed in a copy of the code: what is added works."""
import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.conftest import CLASSES, ROOT, checkpoint, metrics, script, tiny_run

GRAM_LOSS = '''def gram_term(loss_fn, student, teacher):
    """Mean squared difference of the similarities between tokens."""
    def gram(tokens):
        tokens = F.normalize(tokens.float(), dim=-1)
        return tokens @ tokens.mT
    return F.mse_loss(gram(student.features[0]), gram(teacher.features[0]))


class AlignmentLoss('''
RECIPES = {  # file: {text in it: what stands there after the recipe}
    "loss.py": {
        "class AlignmentLoss(": GRAM_LOSS,
        "ALIGNMENT_LOSSES = {\n": "ALIGNMENT_LOSSES = {\n"
            "    'gram': AlignmentLoss('gram_coeff', 0.0, 'features', 'features', gram_term, 'gram loss'),\n"},
    "training/schedule.py": {
        "# --lr-schedule:": "def square(progress):\n    return 1 - progress ** 2\n\n\n# --lr-schedule:",
        "SCHEDULES = {": "SCHEDULES = {\"square\": square, "},
    "encoders/teachers.py": {
        "TEACHERS = {\n": "TEACHERS = {\n    \"vit-t\": TeacherRow(\"vit_tiny_patch16_224\", 192, patch=16, "
                          "mean=(0.5,) * 3, std=(0.5,) * 3, prefix_tokens=1, interpolation=\"bilinear\"),\n"},
    "samplers.py": {
        "SAMPLERS = {": "def one_step(velocity, latents, num_steps=1, **_):\n"
                        "    return latents.double() - velocity(latents, 1.0)\n\n\nSAMPLERS = {\"one\": one_step, "},
    "train.py": {"class_layout(vars(args), accelerator.device)": "__import__('ramps').Ramps"},
}
RAMPS = '''"""A data layout of its own: 32 grey ramps made on the way."""
import numpy as np
import torch

from dataset import LatentDataset


class Ramps(LatentDataset):
    decodes = False

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False):
        self.resolution, self.seed, self.images = resolution, seed, images
        self.indices, self.moments_shape = np.arange(32), (8, resolution // 4, resolution // 4)

    def image(self, i):
        return torch.full((3, self.resolution, self.resolution), 8 * i, dtype=torch.uint8)

    def moments(self, i):
        return torch.tensor([i / 16 - 1] * 4 + [0.0] * 4).view(8, 1, 1).expand(self.moments_shape).clone()

    def condition(self, i):
        return i % 4

    def identity(self):
        return ["ramps", self.resolution]

    def image_stamps(self):  # for --teacher-cache; these images never change
        return []
'''


def build(folder):
    """A copy of the code in which all recipes were followed."""
    copy = folder / "code"
    unused = shutil.ignore_patterns(".*", "exps", "data", "docs", "assets", "samples", "logs")
    shutil.copytree(ROOT, copy, ignore=unused)
    for name, recipe in RECIPES.items():
        text = (copy / name).read_text()
        for old, new in recipe.items():
            assert text.count(old) == 1, f"{name} has no single {old!r}: correct the recipe, and docs/extending.md"
            text = text.replace(old, new)
        (copy / name).write_text(text)
    (copy / "ramps.py").write_text(RAMPS)
    return copy


def in_the_copy():
    """A script's process calls this before it starts: then it imports the project from the copy."""
    ours = [name for name, module in sys.modules.items() if name != "__main__" and ".venv" not in str(module)
            and (getattr(module, "__file__", None) or "").startswith(str(ROOT))]
    for name in ours:
        del sys.modules[name]
    os.chdir(os.environ["HASTE_TEST_COPY"])
    sys.path.insert(0, os.getcwd())
    importlib.import_module("tests.nano")


def in_the_copy_with_its_curves():
    in_the_copy()
    runs, run = importlib.import_module("evaluations.runs"), Path(os.environ["HASTE_TEST_RUN"])
    table = runs.read_table(run)
    print("gram" in runs.TITLES, "gram" in runs.shown(table), runs.alignment_stop(table, runs.read_settings(run)))


def test_all_recipes(tmp_path):
    """The loss has its flag and column and is in the sum; the trigger compares its gradient; curves and report draw it
    and read from the table where alignment ends. The data layout has four methods."""
    env = {"HASTE_TEST_COPY": str(build(tmp_path)), "HASTE_TEST_RUN": str(tmp_path / "run")}
    with torch.random.fork_rng():
        torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "teacher.pt")
    script("train.py", *tiny_run(
        "SiT-N/2", tmp_path, tmp_path, "--num-classes", CLASSES, "--max-train-steps", 4, "--enc-type", "vit-t",
        "--enc-weights", tmp_path / "teacher.pt", "--gram-coeff", 0.3, "--attn-coeff", 0, "--lr-schedule", "square",
        "--early-stop-trigger", "gradient", "--trigger-start", 2, "--trigger-every", 9, "--trigger-samples", 4,
        "--trigger-timesteps", 0.5, "--trigger-threshold", -1, "--early-stop-point", 3,
        "--teacher-cache", tmp_path / "cache"), env=env, before="tests.test_extending.in_the_copy")
    rows = metrics(tmp_path)
    for row in rows[:3]:
        assert float(row["gram"]) > 0 and row["attention"] == ""
        parts = float(row["denoise"]) + 0.3 * float(row["gram"]) + 0.5 * float(row["feature"])
        assert float(row["loss"]) == pytest.approx(parts, rel=1e-4)
    assert rows[3]["gram"] == "" and rows[1]["cosine"] and not rows[0]["cosine"]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-3 * (1 - (k / 4) ** 2) for k in range(4)])
    assert checkpoint(tmp_path, 4)["args"]["gram_coeff"] == 0.3
    done = script("generate.py", "--ckpt", tmp_path / "run/checkpoints/0000004.pt", "--mode", "one",
                  "--num-fid-samples", 2, "--num-steps", 1, "--vae", ROOT / "assets/vae-emoji", "--sample-dir",
                  tmp_path / "samples", env=env, before="tests.test_extending.in_the_copy_with_its_curves")
    assert done.stdout.startswith("True True 3\n")
    assert len(list(tmp_path.glob("samples/*one*/*.png"))) == 2
