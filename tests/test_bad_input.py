"""User mistakes, for all scripts: one sentence, an exit status, and no file changed.

CASES[script] has rows (what is damaged first, arguments, words of the sentence). Damage is a function of the folder, a
list of them, or None. {w} in arguments is the folder: a copy of one with a data set, a finished run of one step, a
checkpoint, samples and references. Each kind of fault has one row per place that reads such input, not per
script. test_hostile_files.py has harmful file contents.
"""
import contextlib
import io
import re
import shutil
import zipfile
from pathlib import Path

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
from preprocessing import coco, convert, dataset_tools, encode, pack
from runtime.errors import run_script
from runtime.files import load_tensors
from tests.conftest import NO_TEACHER, call_main, contents, train_arguments, write_tiny_data
from tests.damage import *  # the words of the table below
from tests.test_sources import bomb
from tests.test_storage import packed_into, write_mirrored
from tests.worlds import base

TRIGGER = ["--early-stop-trigger", "gradient", "--trigger-start", 2]
WITH_TEACHER = ["--enc-weights", "{w}/teacher.pth", "--exp-name", "other"]
TEACHER_CACHE = [*WITH_TEACHER, "--teacher-cache", "{w}/cache"]
GOING_ON = [*NO_TEACHER, "--max-train-steps", 4]
SCORING = [*NO_TEACHER, "--eval-steps", 1, "--eval-samples", 4, "--vae", VAE, "--eval-features", "efficientnet-lite0"]


COMMANDS = (convert, encode, pack)  # of dataset_tools.py
TEXT = (train_t2i, generate_t2i, caption_retrieval, coco)


def cache_without_arrays(w):
    """A teacher cache that is marked complete but has no arrays."""
    more = [argument.replace("{w}", str(w)) for argument in TEACHER_CACHE]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()):
        call_main(patch, train, *train_arguments(w / "data", w / "out", *more, "--max-train-steps", 1))
    next((w / "cache").glob("*/features0.npy")).unlink()


def samples_of(n, side):
    return lambda w: np.savez(w / "samples.npz", arr_0=np.zeros((n, side, side, 3), np.uint8))


def nan_weight(w):
    state = load_tensors(w / CKPT)
    state["ema"]["final_layer.linear.bias"].fill_(torch.nan)
    torch.save(state, w / CKPT)


CASES = {
    train: [
        # the data set
        (None, ["--data-dir", "/no/where"], "/no/where/vae-sd/dataset.json does not exist; --data-dir must hold"),
        (remove(LATENT), [], "vae-sd has no .npy file of index 00000003"),
        (copy(IMAGE, "data/images/00000/copy3.png"), [], "have one index; remove one"),
        (label(LABELS, 0, "00000/img00000004.png"), [], "dataset.json: 00000/img.* and 00000/img.* have one index"),
        (copy(IMAGE, "data/images/cat.png"), [], "cat.png has no index in its name"),
        (cut(IMAGE), WITH_TEACHER, "img00000003.png is no readable image"),
        (put(IMAGE, Image.new("RGBA", (64, 64))), WITH_TEACHER, "RGBA of 64x64"),
        (put(IMAGE, bomb()), WITH_TEACHER, "img00000003.png is no readable image .*decompression bomb"),
        (cut(LATENT), [], "img-mean-std-00000003.npy has 4160 bytes, the first latent 8320"),
        (claims_too_much, WITH_TEACHER, "img-mean-std-00000003.npy is no readable .npy"),
        (put(LATENT, np.array([{"a": 1}] * 500)), WITH_TEACHER, "img-mean-std-00000003.npy (is no|has)"),
        (resize_latents, [], "12 latent pixels a side, of which --resolution 64"),
        (None, ["--enc-precision", "fp16"], "--enc-precision fp16 needs a GPU; use bf16 or no"),
        (None, ["--num-classes", 3], "the label of index 3 is 3; it must be a number from 0 to 2"),
        (label(LABELS, 1, "cat"), [], "the label of index 3 is cat"),
        (no_labels, [], "has no labels in either dataset.json"),
        (put(LABELS, [1, 2]), [], "dataset.json holds a list, expected a dict"),
        (put(LABELS, "[" * 100_000), [], "dataset.json cannot be read as JSON"),
        (label(LABELS, 0, "../../etc/img00000003.png"), [], "lies outside its folder"),
        (None, ["--resolution", 128, *WITH_TEACHER], "--resolution is 128, but the images in .* have 64 pixels a side"),
        (dangling(LATENT), NO_TEACHER, "img-mean-std-00000003.npy cannot be read .No such file"),
        (None, ["--data-dir", "a" * 300], "cannot be read .File name too long"),
        # the same in zips, packed and mirrored
        ([zipped(), cut("data/images.zip")], WITH_TEACHER, "images.zip is no readable zip"),
        (zipped(remove(LABELS)), WITH_TEACHER, "images.zip/dataset.json does not exist"),
        (one_bit_of_a_zip, WITH_TEACHER, r"00000003.npy is damaged \(wrong checksum\)"),
        (zipped(method=zipfile.ZIP_BZIP2), [], "is encrypted or packed in another way than stored or deflated"),
        ([zipped(), zip_field("data/vae-sd.zip", 6, 1)], [], "vae-sd.zip is no readable zip .*encrypted"),
        (packed(remove("data/vae-sd/dataset.json")), [], "vae-sd is not packed to its end"),
        (packed(cut("data/images/00001.npy")), WITH_TEACHER, "00001.npy is damaged .36992 bytes expected"),
        (packed(put("data/vae-sd/00001.npy", np.array([{}] * 3))), [], "00001.npy is damaged .Python objects"),
        (packed(cut("data/vae-sd/index.npy")), [], "vae-sd/index.npy is damaged"),
        (packed(put(LABELS, {"labels": []})), WITH_TEACHER, "names other entries than index.npy"),
        (packed([remove("data/vae-sd"), copy("data/images", "data/vae-sd")]), NO_TEACHER,
         r"shape \(3, 64, 64\); expected \(2 x channels"),
        (mirrored_of_another_size, ["--hflip", *NO_TEACHER],
         r"vae-sd-hflip holds latents of shape \(8, 8, 8\), .*vae-sd of \(8, 16, 16\)"),
        (lambda w: write_mirrored(w / "data"), ["--hflip", "--teacher-cache", "{w}/cache"],
         "--hflip shows images that --teacher-cache"),
        # flags of training
        (None, ["--batch-size", 9, "--gradient-accumulation-steps", 2], "--batch-size 9 is global and"),
        (None, ["--seed", 5_000_000_000], "--seed:? is 5000000000; it must be from 0 to 4294967295"),
        (None, ["--learning-rate", "inf"], "--learning-rate:? is inf; it must be at least 0 and finite"),
        (None, ["--keep-every", 10], "give both, or neither"),
        (None, [*NO_TEACHER, "--eval-steps", 2], "--eval-steps needs something to compare with"),
        (None, ["--attn-layers", "2-7"], 'write student:teacher pairs such as "2:7'),
        (None, ["--attn-layers", "3:7"], "names a student block past 2"),
        (None, [*WITH_TEACHER, "--attn-layers", "0:11"], "choose --enc-blocks and --attn-layers inside"),
        (lambda w: write_tiny_data(w / "odd", 8, 48),
         ["--data-dir", "{w}/odd", "--resolution", 48, "--model", "SiT-S/8", *NO_TEACHER], "patches of 8, of which 12"),
        (None, [*NO_TEACHER, *TRIGGER], "--early-stop-trigger gradient compares the gradient of an"),
        (None, [*TRIGGER, "--trigger-block", 3], "--trigger-block 3 has no gradient of .*1 to 2"),
        (None, ["--preset", "sit-s-2-haste"], "--preset sit-s-2-haste is not known; `--preset list` shows"),
        # what else training reads
        (None, ["--enc-type", "dinov2-vit-s", "--exp-name", "new"], "could not be fetched from the hub"),
        *((None, ["--enc-type", f"timm:{name}"], "is no plain ViT") for name in (
            "beit_base_patch16_224", "vit_small_r26_s32_224", "vitamin_small_224", "vit_base_patch16_rope_mixed_224",
            "vit_dwee_patch16_reg1_gap_256")),
        (None, [*WITH_TEACHER, "--enc-weights", "/no/file.pth"], "/no/file.pth does not exist"),
        (put("teacher.pth", Planted()), WITH_TEACHER, "holds code, which is not run"),
        (cut("teacher.pth"), WITH_TEACHER, "teacher.pth is damaged"),
        (file_for_folder("cache"), TEACHER_CACHE, "cache/.* could not be written .(Not a directory|File exists)"),
        (cache_without_arrays, TEACHER_CACHE, "teacher cache .* is damaged .*delete it"),
        (file_for_folder("out/logs"), [*GOING_ON, "--report-to", "tensorboard"],
         "out/logs could not be written .File exists"),
        (lambda w: write_tiny_data(w / "f8", 8, factor=8),
         [*NO_TEACHER, "--data-dir", "{w}/f8", "--exp-name", "f8", "--sampling-steps", 1, "--vae", VAE],
         "makes 4 channels at 1/4 .*latents have 4 channels of 8"),
        (None, [*SCORING, "--eval-ref", "/no/ref.npz", "--max-train-steps", 2], "/no/ref.npz does not exist"),
        (None, [*SCORING, "--eval-ref", "{w}/larger.npz"], "of 32x32 but --eval-samples of 64x64"),
        (None, [*SCORING, "--eval-ref", "{w}/data/images", "--eval-samples", 1],
         "--eval-samples has 1 image, but metric fid needs at least 2"),
        (None, [*SCORING, "--eval-ref", "{w}/data/images", "--eval-features", "inception", "--eval-weights",
                "{w}/other.pth", "--exp-name", "new"], "the published weights 6726825d0af5f729"),
        # resuming a run
        (cut(RUN), NO_TEACHER, "has no checkpoint that can be read"),
        (put(RUN, {"model": {}, "ema": {}, "args": {}, "steps": 1}), NO_TEACHER, "has no 'opt'"),
        (shape_of_another_model, NO_TEACHER, "checkpoint of another model: x_embedder.proj.bias"),
        (change_state(RUN, "opt", {}), GOING_ON, "has a dict for 'opt', which is not an optimizer's"),
        (change_state(RUN, "opt", {"state": {}, "param_groups": [{"params": [0, 1]}]}), GOING_ON,
         "has the optimizer's state of another model or optimizer"),
        (change_state(RUN, "opt", {"state": {0: 1.0}, "param_groups": [3]}), GOING_ON,
         "has the optimizer's state of another model"),
        (change_state(RUN, "steps", "x"), GOING_ON, "has a str for 'steps', which is not a number of steps"),
        ([remove("out/run/checkpoints"), file_for_folder("out/run/checkpoints")], GOING_ON,
         "checkpoints could not be written .File exists"),
        ([remove("out/run/log.txt"), lambda w: (w / "out/run/log.txt").mkdir()], GOING_ON,
         "log.txt could not be written"),
        (file_for_folder("block"), [*NO_TEACHER, "--output-dir", "{w}/block"], ".lock could not be written"),
    ],
    generate: [
        (None, ["--ckpt", "/no/file.pt"], "/no/file.pt does not exist"),
        (None, ["--ckpt", "{w}/out"], "does not exist; give the path of a weight or"),
        (cut(CKPT), [], "0000005.pt is damaged"),
        (put(CKPT, {"ema": Planted()}), [], "holds code, which is not run"),
        (change_state(CKPT, "args", [1]), [], "has a list for 'args'"),
        (change_state(CKPT, "ema", 5), [], "has a int for 'ema', which is not named tensors"),
        (change_state(CKPT, "args", {"model": ["a"]}), [], "has a list for 'model' in its args"),
        (None, ["--model", "SiT-S/2"], "is a checkpoint of another model: pos_embed"),
        (change_state(CKPT, "args", {"model": "SiT-M/2"}), [], "--model SiT-M/2 is not known"),
        (None, ["--guidance-low", 0.9, "--guidance-high", 0.1], "lies above --guidance-high 0.1"),
        (None, ["--mode", "sde", "--heun"], "--heun:? is for --mode ode"),
        (None, ["--projector-embed-dims", "768"], "has projectors to 384"),
        (None, ["--seed", 2 ** 32], "is 4294967296; it must be from 0 to 4294967295"),
        (nan_weight, ["--sample-dir", "{w}/new"], "The sampler's latents are not finite"),
        (None, ["--vae", "/no/vae"], "The VAE /no/vae could not be loaded"),
        ([copy(VAE, "vae"), cut("vae/diffusion_pytorch_model.safetensors")], ["--vae", "{w}/vae"],
         "vae could not be loaded"),
        (lambda w: next((w / "made").glob("SiT*/settings.json")).write_text("{"), [],
         "settings.json cannot be read as JSON"),
    ],
    evaluator: [
        (None, ["--json", "{w}/samples.npz"], "samples.npz itself, which is read here"),
        (None, ["--json", "{w}/one.npz"], "one.npz is a file of another kind"),
        (None, ["--metrics", "best"], "There is no metric best; choose from"),
        (None, ["--device", "cuda"], "PyTorch sees no GPU; use --device cpu"),
        (None, ["--inception-weights", "/no/w.pth"], "/no/w.pth does not exist"),
        (None, ["--inception-weights", "{w}/other.pth", "--any-weights"], "does not hold the weights of inception"),
        (put("samples.npz", b"hello"), [], "samples.npz is not a whole npz file"),
        (blank("samples.npz", b"}", "arr_0.npy"), [], "arr_0 of .* no readable .npy header"),
        (zip_field("samples.npz", 6, 1), [], "samples.npz is damaged"),
        (copy("larger.npz", "samples.npz"), [], "24x24 but .*32x32; compare sets of one size"),
        (None, ["--num-samples", 2], "metric pr needs at least 4"),
        (None, ["--num-samples", 70], "has 7 images, not the 70 asked for"),
        (copy("statistics.npz", "samples.npz"), ["--num-samples", 5], "samples.npz holds statistics only"),
        (None, ["--metrics", "sfid", "--features", "dinov2-vit-l"], "Metric sfid is for inception features only"),
    ],
    stats: [
        (lambda w: (w / "new.npz").symlink_to("reference.npz"), [], "reference.npz itself, which is read here"),
        (None, ["--images", 10], "--images 10: .* has only 9"),
        ([remove("reference.npz"), lambda w: (w / "reference.npz").mkdir()], [], "holds no .png"),
    ],
    curves: [
        (None, ["--out", "{w}/out/run/metrics.csv"], "pictures are written as .png, .pdf, .svg"),
        (lambda w: (w / "a.png").mkdir(), ["--out", "{w}/a.png"], "a.png is a folder and is not written over"),
        (remove("out/run/metrics.csv"), [], "metrics.csv does not exist; give the folder of a run"),
        (put("out/run/metrics.csv", "step,loss\n"), [], "has no rows yet"),
        (put("out/run/metrics.csv", "step,denoise,feature,attention,seconds\n1,x,,,1\n"), [],
         "is not a metrics.csv of train.py"),
    ],
    report: [
        (None, ["{w}/nope"], "nope does not exist; give the folder of a run"),
        (None, ["{w}/data"], "data holds no args.json; give the folder of a run"),
        (None, ["--out", "{w}/out/run/checkpoints/0000001.pt"], "0000001.pt is a file of another kind"),
        (None, ["--samples", "/no/samples"], "--samples /no/samples does not exist"),
        ([copy("data/images/00000", "s"), put("s-scores.json", {"scores": 3})],
         ["--samples", "{w}/s"], "s-scores.json has no scores"),
        (put("out/run/args.json", {"enc_weights": 3}), [], "has a int for 'enc_weights' in its args"),
        (put("out/run/args.json", {"seed": 3}), [], "args.json has no model; give the folder of a run of train.py"),
    ],
    probe: [
        (None, ["--json", "{w}/" + CKPT], "0000005.pt itself, which is read here"),
        (None, ["--enc-weights", "{w}/data"], "data is a folder; give the path of a weight"),
        (None, ["--blocks", "1,4"], "--blocks names 4, the network has blocks 1 to 3"),
        (None, ["--t", "0.5,2"], "--t is 2; it must be from 0 to 1"),
        (None, ["--k", 8], "There are 8 held-out images, too few for --k 8 neighbours"),
        (None, ["--enc-type", "none"], "The run had no teacher"),
        (resize_latents, [], r"data has moments of shape \(8, 12, 12\)|of which --resolution 64"),
    ],
    baselines: [
        (lambda w: (w / "samples-scores.json").mkdir(), [], "samples-scores.json is a folder"),
    ],
    export: [
        (remove(CKPT), [], "0000005.pt does not exist"),
        (put(CKPT, {"ema": {"a": torch.zeros(1)}}), [], "holds the weights of neither SiT nor MMDiT"),
        (put("exported.safetensors", b"mine"), [], "exported.safetensors is there already"),
    ],
    train_vae: [
        (remove("data/images"), [], "has no dataset.json; build the data first"),
        (file_for_folder("vae"), ["--steps", 2], "vae is there already and is not written over"),
        (None, ["--out", "{w}/data/images"], "data/images lie in each other, so that output would become"),
        (None, ["--steps", 3, "--learning-rate", "1e30"], "The loss is nan at step 2; nothing"),
    ],
    convert: [
        (None, ["--source", "/no/where"], "/no/where is no folder, .zip or .tar"),
        (put("s.zip", b"PK"), ["--source", "{w}/s.zip"], "s.zip cannot be read .File is not a zip file"),
        (lambda w: (w / "empty").mkdir(), ["--source", "{w}/empty"], "empty holds no pictures"),
        (None, ["--resolution", "big"], "--resolution big is not understood; write it as 256x256"),
        (None, ["--resolution", "100000x100000"], "--resolution 100000x100000 is more than"),
        (None, ["--dest", "{w}/data/images/small"], "lie in each other, so that output would become"),
        (None, ["--dest", "{w}/data/vae-sd"], "vae-sd is there already and was not made by this"),
        (label(LABELS, 0, "cat.png"), [], "dataset.json names cat.png, which is not there"),
        (put(IMAGE, Image.new("RGB", (32, 32))), ["--on-error", "stop"],
         "img00000003.png cannot be used: it is 32x32, not 64x64; give a --resolution"),
    ],
    encode: [
        (put("odd/1.png", Image.new("RGB", (30, 30))), ["--source", "{w}/odd"],
         "have 30 pixels a side, no multiple of 4"),
        ([remove(LABELS), put("data/images/made.json", {"command": "convert"})], [],
         "images has a made.json but no dataset.json"),
    ],
    pack: [
        (remove("data"), [], "vae-sd/dataset.json does not exist"),
        (with_nan, [], "img-mean-std-00000003.npy holds"),
        (None, ["--dest", "{w}/data"], "data/.* and .* lie in each other, so that output would become"),
        (put("packed/vae-sd/mine.json", [1]), [], "vae-sd holds something that is not packed"),
        ([lambda w: packed_into(w / "data", w / "packed", "--rows", 3), label(LABELS, 1, 1),
          label(LATENT_LABELS, 1, 1)], [], r"begun with other settings \(data\); delete it or name another"),
    ],
    train_t2i: [
        (remove("data/train"), [], "train does not exist; --data-dir must hold train/, val/"),
        (remove("data/train/2.npy"), [], r"image 2 has no moments \(2.npy\)"),
        (remove("data/train/1_2.npy"), [], r"image 1 has no caption \(1_2.npy\)"),
        (remove("data/train/1_4.npy"), [], "has 5 captions of image 1, beside it are 4"),
        (copy("data/train/1_0.npy", "data/train/9_0.npy"), [], "image 9 has no moments"),
        (put("data/train/captions.json", {"a": 1}), [], "captions.json is not of the form"),
        (remove("data/empty_context.npy"), [], "empty_context.npy is missing"),
        (put("data/train/3_1.npy", np.zeros((6, 8), np.float32)), [], "3_1.npy has .* bytes"),
        (put("data/train/2_0.npy", np.zeros((6, 16), np.int32)), [], "2_0.npy holds int32"),
        (flat_latents, [], r"0.npy has shape \(8, 16, 8\)"),
    ],
    generate_t2i: [
        (remove("data/val"), [], "val does not exist"),
        (None, ["--prompts", "/no/texts"], "--prompts /no/texts cannot be read"),
    ],
    caption_retrieval: [
        (None, ["--json", "{w}/data/val/captions.json"], "captions.json itself, which is read here"),
        (remove("data/val/2.png"), [], "an image of caption 2, .*val no picture 2.png"),
        (samples_of(5, 64), [], "samples.npz has 5 images, .*val only 4"),
        (samples_of(2, 32), [], "has images of 32x32 but .*val of 64x64"),
        ([remove("samples.npz"), lambda w: (w / "samples.npz").mkdir()], [], "samples.npz holds no .png"),
        (None, ["--clip", "{w}/clip", "--caption-index", 1], "--caption-index 1: image 2 of .* has 1 captions"),
    ],
    coco: [
        (None, ["--coco", "c"], "Give --coco alone"),
        (remove("captions.json"), [], "captions.json cannot be read as JSON .No such file"),
        (captions_file(annotations=[{"image_id": 1, "caption": 3}]), [], "annotation 0 .image id 1. is 3, not text"),
        (captions_file([{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], []), [],
         "2 images under 1 different ids"),
        (captions_file([{"id": 1, "file_name": "a.png"}]), [], "No image of the captions file lies in"),
        (change_json("clip/config.json", lambda config: config.update(model_type="x", auto_map={"AutoConfig": "x.X"})),
         [], "could not be loaded"),
    ],
}


def outcome(monkeypatch, module, arguments):
    """(exit status, last line on stderr) of the script."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr, contextlib.redirect_stdout(io.StringIO()), \
            pytest.raises(SystemExit) as end:
        run_script(lambda: call_main(monkeypatch, dataset_tools if module in COMMANDS else module, *arguments))
    return end.value.code, stderr.getvalue().strip().splitlines()[-1]


ROWS = [pytest.param(module, *row, id=f"{module.__name__.rpartition('.')[2]}: {row[2]}")
        for module, rows in CASES.items() for row in rows]


@pytest.mark.parametrize("module, change, more, words", ROWS)
def test_bad_input(monkeypatch, request, tmp_path, module, change, more, words):
    w = tmp_path / "w"
    shutil.copytree(request.getfixturevalue("text_world" if module in TEXT else "world"), w)
    damaged(w, change)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.chdir(tmp_path)
    before = contents(w)
    code, said = outcome(monkeypatch, module, [*base(module, w), *(str(a).replace("{w}", str(w)) for a in more)])
    assert code != 0 and re.search(words, said), said
    assert "\n" not in said and re.match(r"error: .{20,}\.$|\S+: error: argument", said), said
    after = contents(w)
    for path, content in before.items():
        assert after[path].startswith(content) if Path(path).name == "log.txt" else after[path] == content, path
    assert not any(Path(path).suffix in (".tmp", ".npz") for path in after.keys() - before.keys())
    assert not (tmp_path / "planted-by-a-checkpoint").exists()
