"""The commands of docs/own-data.md and docs/compare.md for a first try, run as they stand, with smaller numbers."""
import glob
import importlib

import numpy as np
import pytest
import safetensors.torch
import timm
from PIL import Image

import generate
from evaluations import compare, features
from tests.conftest import ROOT, call_main
from tests.test_commands import commands
from tests.test_evaluations_metrics import save_efficientnet

SMALLER = {"train": ["--max-train-steps", "4", "--checkpointing-steps", "2", "--sampling-steps", "4", "--batch-size",
                     "4"],
           "generate": ["--num-fid-samples", "8", "--num-steps", "2"],
           "evaluations.stats": ["--images", "16"],
           "evaluations.compare": ["--num-fid-samples", "8", "--steps", "2"]}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A working folder with PHOTOS, and random weights where examples/emoji/prepare.py puts real ones."""
    for label, colour in (("cat", 40), ("dog", 200)):
        (tmp_path / "PHOTOS" / label).mkdir(parents=True)
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, colour, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"PHOTOS/{label}/{i}.png")
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / "data/emoji").mkdir(parents=True)
    teacher = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    safetensors.torch.save_file(teacher.state_dict(), tmp_path / "data/emoji/teacher.safetensors")
    save_efficientnet(tmp_path / "data/emoji/efficientnet-lite0.pth")
    monkeypatch.setattr(features, "EFFICIENTNET_SHA256", "")
    monkeypatch.setattr(compare, "run_generate", lambda command: call_main(monkeypatch, generate, *command[1:]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, script, words):
    name = script.removesuffix(".py").replace("/", ".")
    words = [word.replace("0000200", "0000004") for word in words]
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    call_main(monkeypatch, importlib.import_module(name), *words, *SMALLER.get(name, ()))


@pytest.mark.slow
def test_own_data_and_a_comparison(monkeypatch, folder):
    found = [(script, words) for script, words, _ in commands(ROOT / "docs/own-data.md")]
    first = next(i for i, (script, _) in enumerate(found) if script == "examples/emoji/prepare.py")
    tried = found[first + 1:first + 8]
    assert [script for script, _ in tried] == ["preprocessing/dataset_tools.py"] * 2 + [
        "train.py", "generate.py", "evaluations/stats.py", "evaluations/evaluator.py", "evaluations/report.py"]
    for script, words in tried:
        run(monkeypatch, script, words)
    assert len(list(folder.glob("samples/try-*/*.png"))) == 8
    assert "cat" in (folder / "exps/try/report.html").read_text()
    run(monkeypatch, "train.py", [word.replace("try", "plain") for word in tried[2][1]] + ["--enc-type", "none"])
    words = next(words for script, words, _ in commands(ROOT / "docs/compare.md") if "--names" in words)
    run(monkeypatch, "evaluations/compare.py", [word.replace("exps/a", "exps/plain").replace("exps/b", "exps/try")
                                                for word in words])
    table = (folder / "comparison/table.md").read_text()
    assert "| SiT | 1 | " in table and "| HASTE | 1 | " in table
