"""Caption retrieval: known answers on constructed sets, chance for shuffles, CLIP score, bad input."""
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluations import caption_retrieval, captioned
from evaluations.captioned import Clip
from evaluations.metrics import nearest, retrieval
from runtime.errors import UserError
from tests.conftest import ROOT, call_main
from tests.test_evaluations_metrics import save_efficientnet

N = 12


def test_nearest_is_cosine_about_the_mean():
    torch.manual_seed(0)
    candidates, samples = torch.rand(40, 8) + 3, torch.rand(30, 8) + 3
    centre = candidates.mean(0)
    cosine = torch.stack([F.cosine_similarity(sample - centre, candidates - centre) for sample in samples])
    assert torch.equal(nearest(samples, candidates, 5), cosine.argsort(dim=1, descending=True)[:, :5])


def test_retrieval_of_known_answers():
    """All right, one in four right, and nothing right; shuffled captions score what chance does."""
    torch.manual_seed(0)
    candidates, truth = torch.randn(200, 64), torch.arange(200)
    right = candidates + 0.1 * torch.randn(200, 64)
    for share in (1, 4):
        samples = torch.where(truth[:, None] % share == 0, right, candidates.roll(1, dims=0))
        for k, (accuracy, chance, by_chance, highest) in retrieval(samples, candidates, truth).items():
            assert abs(accuracy - 1 / share) < 0.03 * (k > 1) + 1e-9
            assert chance == k / 200 and abs(by_chance - chance) < 0.004 and by_chance < highest < 0.2
    noise = retrieval(torch.randn(200, 64), candidates, truth)
    assert noise.keys() == {1, 5} and noise[1][0] < 0.05 and noise[5][0] < 0.1
    assert retrieval(right[:3], candidates[:3], truth[:3]).keys() == {1}  # of 3 candidates the 5 nearest say nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A split of N pictures, the last equal to the first; samples that are right, and samples of the next caption."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    pictures = np.kron(rng.integers(0, 256, (N, 4, 4, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
    pictures[-1] = pictures[0]
    (folder / "val").mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / f"val/{i}.png")
    captions = {str(i): [f"caption {'abcdefghijkl'[i]}", "other"][:1 + (i != 4)] for i in range(N)}
    (folder / "val/captions.json").write_text(json.dumps(captions))
    np.savez(folder / "right.npz", arr_0=pictures)
    np.savez(folder / "wrong.npz", arr_0=np.roll(pictures, -1, axis=0))
    (folder / "some").mkdir()
    for i in (2, 5, 8):
        brighter = np.clip(pictures[i].astype(int) + 9, 0, 255).astype(np.uint8)
        Image.fromarray(brighter).save(folder / f"some/{i:06d}.png")
    save_efficientnet(folder / "scorer.pth")
    return folder


def run(made, monkeypatch, *more):
    out = made / "out.json"
    call_main(monkeypatch, caption_retrieval, *more, "--efficientnet-weights", made / "scorer.pth", "--any-weights",
              "--device", "cpu", "--json", out)
    return json.loads(out.read_text())


def top1(result, name="samples"):
    return result["retrieval"][name]["top-1"]["accuracy"]


def test_right_wrong_and_some(made, monkeypatch, capsys):
    """Pictures 0 and N - 1 are equal: either is right for both captions. File names give the caption numbers."""
    result = run(made, monkeypatch, made / "val", made / "right.npz", "--vae", ROOT / "assets/vae-emoji")
    assert (result["n"], result["candidates"], top1(result)) == (N, N - 1, 1.0)
    assert result["retrieval"]["samples"]["top-5"]["chance"] == 5 / (N - 1)
    assert top1(result, "VAE reconstructions") > 0.2
    assert "Retrieval-EffLite0 top-1 of samples (n = 12): 1.0000, chance 0.0909" in capsys.readouterr().out
    assert top1(run(made, monkeypatch, made / "val", made / "wrong.npz")) == 1 / N  # the last: its next is its equal
    result = run(made, monkeypatch, made / "val", made / "some")
    assert result["n"] == 3 and top1(result) == 1.0


def test_pictures_are_paired_by_their_numbers(made, monkeypatch):
    """A split may have gaps in its numbers; only --clip needs captions in words."""
    folder = made / "gaps"
    folder.mkdir()
    numbers = [i for i in range(1, N) if i % 3]
    for i in numbers:
        (folder / f"{i}.png").write_bytes((made / f"val/{i}.png").read_bytes())
    with np.load(made / "right.npz", allow_pickle=False) as file:
        np.savez(made / "gaps.npz", arr_0=file["arr_0"][numbers[:5]])  # image i is of the i-th caption of the split
    for sample, n in (("some", 3), ("gaps.npz", 5)):
        result = run(made, monkeypatch, folder, made / sample)
        assert (result["n"], result["candidates"], top1(result)) == (n, len(numbers), 1.0)
    with pytest.raises(UserError, match="captions.json does not exist"):
        run(made, monkeypatch, folder, made / "some", "--clip", "/nowhere")


def test_a_clip_without_images(clip_folder, tmp_path):
    """transformers would draw random weights for what is missing."""
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="could not be loaded .it has no visual_projection.weight"):
        Clip(folder, "cpu")
    with pytest.raises(UserError, match="The CLIP /nowhere could not be loaded .*give --clip a folder"):
        Clip("/nowhere", "cpu")


def test_clip_score(made, clip_folder, monkeypatch):
    """100 max(cos, 0) by transformers' own processing of image and text, in two parts as two processes have them."""
    import transformers
    model = transformers.CLIPModel.from_pretrained(clip_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    captions, scores = json.loads((made / "val/captions.json").read_text()), []
    for i in range(N):
        pixels = processor(Image.open(made / f"val/{i}.png"), return_tensors="pt")
        with torch.no_grad():
            tokens = tokenizer(captions[str(i)][0], return_tensors="pt")
            scores.append(model(**pixels, **tokens).logits_per_image.item())
    expected = np.maximum(np.array(scores) * 100 / model.logit_scale.exp().item(), 0)
    result = run(made, monkeypatch, made / "val", made / "right.npz", "--clip", clip_folder, "--batch-size", 5)
    assert result["CLIP score"] == pytest.approx(expected.mean(), rel=1e-4) and expected.mean() > 0
    clip, (images, _) = Clip(clip_folder, torch.device("cpu")), captioned.read_samples(made / "right.npz", made / "val")
    texts = [captions[str(i)][0] for i in range(N)]
    for start, stop in ((0, 5), (5, N)):
        monkeypatch.setattr(captioned, "shard", lambda n, span=(start, stop): span)
        found = captioned.clip_scores(clip, images, texts, 5)
        np.testing.assert_allclose(found[:, 0], expected[start:stop], atol=1e-3)
