"""Input folders for the scripts, and correct arguments for each script."""
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import export
import generate
import generate_t2i
import train
import train_t2i
from evaluations import baselines, caption_retrieval, curves, evaluator, probe, report, stats
from examples import train_vae
from models.mmdit import MMDiT_models
from preprocessing import coco, convert, encode, pack
from tests.conftest import NO_TEACHER, call_main, tiny_run, train_arguments, write_tiny_captions, write_tiny_data
from tests.damage import CKPT, VAE
from tests.nano import teacher_state
from tests.test_generate import make_checkpoint


@functools.cache
def make_world(own):
    """Data of eight images, a finished run of one step, a checkpoint, samples of it, references."""
    folder = own / "world"
    write_tiny_data(folder / "data", count=8)
    torch.save(teacher_state(), folder / "teacher.pth")
    make_checkpoint(folder / CKPT, "SiT-N/2")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pth")
    rng = np.random.default_rng(0)
    for name, n, side in (("reference", 9, 24), ("samples", 7, 24), ("larger", 9, 32), ("one", 1, 24)):
        np.savez(folder / f"{name}.npz", arr_0=rng.integers(0, 256, (n, side, side, 3), np.uint8))
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, train, *train_arguments(folder / "data", folder / "out", *NO_TEACHER, "--max-train-steps", 1))
        call_main(patch, generate, *sampling(folder))
    return folder


@functools.cache
def make_text_world(own, clip_folder):
    """The same for the scripts about text: a split of four images, a checkpoint, a COCO folder and a CLIP."""
    folder = own / "text"
    write_tiny_captions(folder / "data", (3, 5, 1, 2))
    torch.save(teacher_state(), folder / "teacher.pth")
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=())
    args = {"model": "MMDiT-T", "resolution": 64, "context_shape": [6, 16]}
    torch.save({"ema": model.state_dict(), "args": args, "steps": 5}, folder / CKPT)
    shutil.copytree(clip_folder, folder / "clip")
    (folder / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(folder / f"photos/{i}.png")
    (folder / "captions.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": i, "caption": "a square"} for i in range(3)]}))
    np.savez(folder / "samples.npz", arr_0=np.zeros((4, 64, 64, 3), np.uint8))
    return folder


def sampling(w):
    return ["--ckpt", w / CKPT, "--sample-dir", w / "made", "--vae", VAE, "--num-fid-samples", 2, "--num-steps", 2]


def base(module, w):
    """Correct arguments for a script; a row's arguments come later and override them."""
    return {
        train: train_arguments(w / "data", w / "out"),
        generate: sampling(w),
        evaluator: [w / "reference.npz", w / "samples.npz", "--device", "cpu", "--json", w / "scores.json"],
        stats: [w / "reference.npz", w / "new.npz", "--device", "cpu"],
        curves: [w / "out/run"],
        report: ["--images", 0, w / "out/run"],
        probe: [w / CKPT, "--data", w / "data", "--val-data", w / "data", "--k", 3, "--enc-type", "dinov2-vit-n",
                "--enc-weights", w / "teacher.pth", "--device", "cpu", "--json", w / "probe.json"],
        export: [w / CKPT, w / "exported.safetensors"],
        train_vae: ["--data", w / "data/images", "--out", w / "vae"],
        pack: ["pack", "--source", w / "data", "--dest", w / "packed", "--resolution", 64, "--rows", 3],
        train_t2i: tiny_run("MMDiT-T", w / "data", w / "out", "--enc-weights", w / "teacher.pth"),
        generate_t2i: ["--data-dir", w / "data", *sampling(w)],
        baselines: [w / "samples.npz", "--data", w / "data", "--vae", VAE],
        caption_retrieval: [w / "data/val", w / "samples.npz"],
        coco: ["--images", w / "photos", "--captions-json", w / "captions.json", "--split", "train",
               "--dest", w / "dest", "--vae", VAE, "--text-encoder", w / "clip", "--resolution", 32, "--batch-size", 4,
               "--num-workers", 2],
        convert: ["convert", "--source", w / "data/images", "--dest", w / "new/images", "--num-workers", 1],
        encode: ["encode", "--source", w / "data/images", "--dest", w / "new/vae-sd", "--model-url", VAE],
    }[module]
