"""generate_t2i.py through its command line: file i is caption i, own texts, restarts, refusals."""
import argparse
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import generate_t2i
from encoders.vae import VAE
from models.checkpoint import load_checkpoint
from models.mmdit import MMDiT_models
from models.sit import SiT_models
from runtime.errors import UserError
from runtime.images import GAP
from samplers import euler_maruyama_sampler, guided
from tests.conftest import ROOT, call_main, script, write_tiny_captions
from tests.test_generate import save_random

NAME = "{}-0000005-size-64-vae-vae-emoji-cfg-3.0-seed-0-sde-high-1.0"
THERE = [0, 1, 3, 4, 5]  # the numbers of the val images


def save_checkpoint(path, network, **args):
    """Random enough that text moves the picture."""
    return save_random(path, network, {"resolution": 64, "path_type": "linear", **args}, spread=0.1)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    torch.manual_seed(0)
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=(384,))
    path = tmp_path_factory.mktemp("ckpt") / "0000005.pt"
    return save_checkpoint(path, model, model="MMDiT-T", context_shape=[6, 16])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Val images 0, 1, 3, 4, 5 with at least 2 captions, and neither pictures nor moments."""
    data = write_tiny_captions(tmp_path_factory.mktemp("data"), (3, 5, 1, 2, 2, 3))
    for path in [*data.glob("val/2_*"), *data.glob("val/?.*")]:
        path.unlink()
    np.save(data / "empty_context.npy", np.full((6, 16), 0.5, np.float32))
    return data


def arguments(ckpt, out, *more):
    return ["--ckpt", ckpt, "--sample-dir", out, "--vae", ROOT / "assets/vae-emoji", "--num-steps", 4, "--cfg-scale",
            3.0, "--per-proc-batch-size", 3, *more]


def pictures(out, name="MMDiT-T"):
    folder = out / NAME.format(name)
    with np.load(out / f"{folder.name}.npz", allow_pickle=False) as file:
        array = file["arr_0"]
    names = sorted(path.name for path in folder.glob("*.png"))
    assert all(np.array_equal(np.asarray(Image.open(folder / n)), array[i]) for i, n in enumerate(names))
    assert len(names) == len(array) and (out / f"{folder.name}-grid.png").is_file()
    return names, array


def expected(ckpt, tokens, empty, i):
    """Image number `i` of seed 0, in a batch of one."""
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=16, z_dims=(384,)).eval()
    model.load_state_dict(load_checkpoint(ckpt)["ema"])
    rng = np.random.default_rng((0, i))
    z = torch.from_numpy(rng.standard_normal((1, 4, 16, 16), dtype=np.float32))
    with torch.no_grad():
        latents = euler_maruyama_sampler(guided(model, tokens[None], empty[None], 3.0), z, 4,
                                         noise=lambda x: torch.from_numpy(rng.standard_normal(x.shape)))
        return VAE(ROOT / "assets/vae-emoji").decode(latents)[0].permute(1, 2, 0).numpy()


def test_file_i_is_caption_i_of_val(monkeypatch, ckpt, data, tmp_path):
    call_main(monkeypatch, generate_t2i, *arguments(ckpt, tmp_path, "--data-dir", data, "--caption-index", 1))
    names, array = pictures(tmp_path)
    assert names == [f"{number:06d}.png" for number in THERE]
    lines = (tmp_path / NAME.format("MMDiT-T") / "captions.txt").read_text().splitlines()
    assert lines == [f"caption 1 of val image {number}" for number in THERE]
    empty = torch.from_numpy(np.load(data / "empty_context.npy"))
    for i in (0, 2, 4):
        right, wrong = (torch.from_numpy(np.load(data / f"val/{n}_1.npy")) for n in (THERE[i], THERE[i - 1]))
        assert np.abs(array[i].astype(int) - expected(ckpt, right, empty, i)).max() <= 1
        assert np.abs(array[i].astype(int) - expected(ckpt, wrong, empty, i)).max() > 10
        assert np.abs(array[i].astype(int) - expected(ckpt, right, 0 * empty, i)).max() > 10


def test_two_processes_and_a_restart(monkeypatch, ckpt, data, tmp_path, capsys):
    """Same pictures; a restart makes only missing ones; the log says if there are fewer than asked for."""
    def again(*more):
        call_main(monkeypatch, generate_t2i, *arguments(ckpt, tmp_path / "a", "--data-dir", data, *more))

    again()
    assert "there are 5 captions: one image of each is made" in capsys.readouterr().out
    script("generate_t2i.py", *arguments(ckpt, tmp_path / "b", "--data-dir", data), processes=2)
    names, one = pictures(tmp_path / "a")
    assert np.array_equal(one, pictures(tmp_path / "b")[1])
    folder = tmp_path / "a" / NAME.format("MMDiT-T")
    (folder / names[2]).unlink()
    (folder / "captions.txt").unlink()
    times = {name: (folder / name).stat().st_mtime_ns for name in names if (folder / name).exists()}
    again()
    assert np.array_equal(one, pictures(tmp_path / "a")[1]) and (folder / "captions.txt").is_file()
    assert [n for n in names if times.get(n) != (folder / n).stat().st_mtime_ns] == [names[2]]
    with pytest.raises(UserError, match="other settings .caption_index 0 -> 1"):
        again("--caption-index", 1)
    again("--num-fid-samples", 2)
    with np.load(tmp_path / "a" / f"{folder.name}.npz", allow_pickle=False) as file:
        assert np.array_equal(file["arr_0"], one[:2])
    assert len((folder / "captions.txt").read_text().splitlines()) == 2


class LengthEncoder:
    """Stands for TextEncoder: all tokens of a text are its length / 10."""

    def __init__(self, source, device="cpu", length=None):
        self.shape, self.length, self.model = (length or 9, 8 if source == "narrow" else 16), length, torch.nn.Module()

    def count_cut(self, texts):
        return sum(len(text) > 10 for text in texts)

    def __call__(self, texts):
        return torch.stack([torch.full(self.shape, len(text) / 10) for text in texts])


def test_own_texts(monkeypatch, ckpt, tmp_path, capsys):
    """Folder names depend on the texts or their file, so sets of texts never mix."""
    monkeypatch.setattr(generate_t2i, "TextEncoder", LengthEncoder)

    def sample(*more):
        call_main(monkeypatch, generate_t2i, *arguments(ckpt, tmp_path, *more))

    (tmp_path / "texts").write_text("two  cats\n\na much longer text\n")
    sample("--prompts", tmp_path / "texts", "--prompt", "bus")
    assert "1 of 3 texts are longer than 6 tokens" in capsys.readouterr().out
    hashed = next(tmp_path.glob("*.npz")).name.split("-0000005")[0]  # texts of the command line have no other name
    assert re.fullmatch("MMDiT-T-prompts-[0-9a-f]{8}", hashed)
    names, array = pictures(tmp_path, hashed)
    texts = ["bus", "two cats", "a much longer text"]
    assert names == ["000000.png", "000001.png", "000002.png"]
    assert (tmp_path / NAME.format(hashed) / "captions.txt").read_text().splitlines() == texts
    for i, text in enumerate(texts):
        tokens = torch.full((6, 16), len(text) / 10)
        assert np.abs(array[i].astype(int) - expected(ckpt, tokens, torch.zeros(6, 16), i)).max() <= 1
    grid = np.asarray(Image.open(tmp_path / f"{NAME.format(hashed)}-grid.png"))
    assert grid.shape[1] == 128 + GAP and grid.shape[0] > 128 + GAP  # the texts stand under the pictures
    for text in ("bus", "bus", "cat"):
        sample("--prompt", text)
    assert len(list(tmp_path.glob("MMDiT-T-prompts-*.npz"))) == 3
    sample("--prompts", tmp_path / "texts")
    assert pictures(tmp_path, "MMDiT-T-texts")[0] == names[:2]
    (tmp_path / "texts").write_text("dog\n")
    with pytest.raises(UserError, match="MMDiT-T-texts.* holds images of other settings"):
        sample("--prompts", tmp_path / "texts")
    with pytest.raises(UserError, match=r"takes text of \[6, 16\], narrow gives .* = \[6, 8\]"):
        sample("--text-encoder", "narrow", "--prompt", "tram")


def test_lines_of_a_prompts_file(tmp_path):
    """As in editors: other Unicode separators do not end lines, and a byte-order mark is not text."""
    (tmp_path / "texts").write_bytes("\ufeffa red\u2028bus\r\n\r\ntwo\x0bcats\n".encode())
    args = argparse.Namespace(prompt=[], prompts=tmp_path / "texts")
    assert generate_t2i.read_prompts(args) == (["a red bus", "two cats"], "texts")
    with pytest.raises(UserError, match="is not text in UTF-8"):
        generate_t2i.read_prompts(argparse.Namespace(prompt=["caf\udcff"], prompts=None))


def test_changed_captions_are_other_settings(monkeypatch, ckpt, data, tmp_path):
    """Changed words or tokens count, even under the same path."""
    for name in ("empty_context.npy", "val/captions.json"):
        copy = tmp_path / name.replace("/", "-")
        shutil.copytree(data, copy / "data")
        given = arguments(ckpt, copy, "--data-dir", copy / "data", "--num-fid-samples", 1)
        call_main(monkeypatch, generate_t2i, *given)
        call_main(monkeypatch, generate_t2i, *given)
        path = copy / "data" / name
        path.write_bytes(path.read_bytes().replace(b"caption 0", b"caption 9").replace(b"\0\0\0\x3f", b"\0\0\x80\x3e"))
        with pytest.raises(UserError, match=f"other settings .{'captions' if 'json' in name else 'tokens'}_sha256"):
            call_main(monkeypatch, generate_t2i, *given)


def test_without_words_there_is_no_captions_txt(monkeypatch, ckpt, tmp_path, capsys):
    data = write_tiny_captions(tmp_path / "data", (2, 1), texts=False)
    call_main(monkeypatch, generate_t2i, *arguments(ckpt, tmp_path, "--data-dir", data))
    assert not (tmp_path / NAME.format("MMDiT-T") / "captions.txt").exists()
    assert "has no captions.json" in capsys.readouterr().out
    grid = np.asarray(Image.open(tmp_path / f"{NAME.format('MMDiT-T')}-grid.png"))
    assert grid.shape == (64, 128 + GAP, 3)


def test_a_checkpoint_of_the_other_kind(monkeypatch, ckpt, data, tmp_path):
    """Each script says which one takes it; weights alone, without sizes or text length, are enough."""
    sit = SiT_models["SiT-T/2"](input_size=16, num_classes=4, z_dims=())
    sit = save_checkpoint(tmp_path / "sit.pt", sit, model="SiT-T/2", num_classes=4)
    with pytest.raises(UserError, match="having no context_embedder.weight; generate.py takes those of train.py"):
        call_main(monkeypatch, generate_t2i, *arguments(sit, tmp_path, "--data-dir", data))
    with pytest.raises(UserError, match="having no y_embedder.embedding_table.weight"):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path))
    torch.save(load_checkpoint(ckpt, mmap=False)["ema"], tmp_path / "bare.pt")
    call_main(monkeypatch, generate_t2i, *arguments(tmp_path / "bare.pt", tmp_path, "--data-dir", data,
                                                    "--num-fid-samples", 2))
    assert len(list(tmp_path.glob("*.npz"))) == 1


def test_published_defaults(monkeypatch):
    monkeypatch.setattr("sys.argv", ["generate_t2i.py", "--ckpt", "x.pt"])
    args = generate_t2i.parse_args()
    assert (args.num_fid_samples, args.mode, args.num_steps, args.cfg_scale, args.caption_index) == (
        40_192, "sde", 250, 2.25, 0)
    assert args.data_dir == "../data/coco256_features" and args.text_encoder == "openai/clip-vit-large-patch14"
