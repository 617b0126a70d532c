"""Captioned images to the text-to-image layout: what is written, restarts, processes, bad input; the text encoder."""
import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from data_io.captions import read_texts
from encoders.text import TextEncoder
from encoders.vae import VAE
from evaluations.images import decode
from preprocessing import coco, encode
from runtime.errors import UserError
from tests.conftest import ROOT, SERVER, call_main, contents, script
from tests.test_faults import wait_for

VAE_FOLDER = ROOT / "assets/vae-emoji"
WORDS = ("red", "heart", "of", "the", "sea", "under", "clouds", "and", "stars")
CAPTIONS = {0: 3, 1: 5, 2: 1, 3: 0, 4: 2, 5: 4, 6: 1, 7: 1, 8: 2}  # image -> captions; the id of image i is 100 - i


def pixels_of(i):
    """Image i, landscape or portrait; number 0 is nearly black everywhere."""
    height, width = (50, 71) if i % 2 else (90, 64)
    rng = np.random.default_rng(i)
    waves = np.sin(np.linspace(0, 6, height * width * 3) * rng.uniform(1, 4)).reshape(height, width, 3)
    pixels = 120 + 100 * waves + rng.normal(0, 5, (height, width, 3))
    return np.clip(pixels / 9 if i == 0 else pixels, 0, 255).astype(np.uint8)


def captions_of(i):
    return [" ".join(np.random.default_rng((i, k)).choice(WORDS, 4)) for k in range(CAPTIONS[i])]


def write_source(folder):
    """Nine unordered pictures of several kinds with captions; one has no caption, one caption has no picture."""
    (folder / "photos/more").mkdir(parents=True)
    names = {i: f"{'more/' if i > 4 else ''}picture{i}.png" for i in CAPTIONS}
    kinds = {4: "L", 5: "P", 6: "CMYK", 7: "RGBA"}
    names[6] = "more/picture6.jpg"
    for i, name in names.items():
        Image.fromarray(pixels_of(i)).convert(kinds.get(i, "RGB")).save(folder / "photos" / name)
    images = [{"id": 100 - i, "file_name": names[i]} for i in CAPTIONS]
    annotations = [{"image_id": 100 - i, "id": 10 * i + k, "caption": f" {text}\n"}
                   for i in CAPTIONS for k, text in enumerate(captions_of(i))]
    annotations.append({"image_id": 555, "caption": "of no image"})
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def arguments(source, dest, clip, *more):
    return ["--images", source / "photos", "--captions-json", source / "captions.json", "--split", "train", "--dest",
            dest, "--vae", VAE_FOLDER, "--text-encoder", clip, "--resolution", 32, "--batch-size", 4,
            "--num-workers", 2, *more]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def made(source, clip_folder, tmp_path_factory):
    """The layout from one uninterrupted run of one process; tests must not change it."""
    dest = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        call_main(patch, coco, *arguments(source, dest, clip_folder))
    return dest


def assert_same_layout(ours, theirs):
    """The same files; pictures and lists equal, numbers equal to rounding (another shape of batch is another sum)."""
    ours, theirs = contents(ours), contents(theirs)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith(".npy"):
            a, b = (np.frombuffer(content[name][128:], np.float32) for content in (ours, theirs))
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
        else:
            assert ours[name] == theirs[name], name


KEPT = [i for i in sorted(CAPTIONS, reverse=True) if CAPTIONS[i]]  # by id, the one without caption left out


def test_pictures_come_back_as_they_were_cropped(made):
    """Dark pixels included: the published preparation loses all below mid-grey."""
    darkest = []
    for index, i in enumerate(KEPT):
        original = pixels_of(i)
        side = min(original.shape[:2])
        top, left = ((n - side) // 2 for n in original.shape[:2])
        square = Image.fromarray(original[top:top + side, left:left + side])
        if i == 4:
            square = square.convert("L").convert("RGB")
        if i in (5, 6):  # palette and JPEG lose colours before we see the file
            continue
        expected = np.asarray(square.resize((32, 32), Image.LANCZOS))
        with Image.open(made / f"train/{index}.png") as picture:
            assert picture.mode == "RGB"
            assert np.abs(np.asarray(picture).astype(int) - expected).max() == 0, i
        darkest.append(expected.mean())
    assert min(darkest) < 20
    vae = VAE(str(VAE_FOLDER))
    for index in (0, len(KEPT) - 1):
        pixels = torch.from_numpy(np.asarray(Image.open(made / f"train/{index}.png")).copy()).permute(2, 0, 1)[None]
        posterior = vae.vae.encode(pixels / 127.5 - 1).latent_dist
        moments = np.load(made / f"train/{index}.npy")
        assert moments.dtype == np.float32 and moments.shape == (8, 8, 8)
        expected = torch.cat([posterior.mean, 2 * posterior.std.log()], dim=1)[0]
        np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-3)


def test_what_is_not_taken_over(source, made, clip_folder, tmp_path, monkeypatch):
    """Files of another tool, another encoder for the other split, a picture that is newer than what was made of it."""
    def refused(words, dest, *more):
        with pytest.raises(UserError, match=words):
            call_main(monkeypatch, coco, *arguments(source, dest, clip_folder, *more))

    (tmp_path / "foreign/train").mkdir(parents=True)
    shutil.copy(made / "train/0.png", tmp_path / "foreign/train/0.png")
    refused("train holds files that were not made by this tool", tmp_path / "foreign")
    dest = shutil.copytree(made, tmp_path / "made")
    refused(r"train was begun with other settings \(length\)", dest, "--split", "val", "--text-length", 20)
    newer = shutil.copytree(source, tmp_path / "source")
    os.utime(newer / "photos/picture0.png", (2e9, 2e9))
    with pytest.raises(UserError, match="1 pictures are newer than the files that were made of them"):
        call_main(monkeypatch, coco, *arguments(newer, dest, clip_folder))
    place, moments = KEPT.index(0), (dest / f"train/{KEPT.index(0)}.npy")
    Image.new("RGB", (50, 50), "red").save(newer / "photos/picture0.png")
    os.utime(newer / "photos/picture0.png", (1, 1))
    before = moments.read_bytes()
    (dest / f"train/{place}.png").unlink()
    call_main(monkeypatch, coco, *arguments(newer, dest, clip_folder))  # the new picture has new moments
    assert moments.read_bytes() != before and (decode(dest / f"train/{place}.png")[..., 0] == 255).all()


def test_every_caption_of_every_image(made, clip_folder):
    encoder = TextEncoder(clip_folder)
    listed = json.loads((made / "train/captions.json").read_text())
    assert listed == {str(index): captions_of(i) for index, i in enumerate(KEPT)}
    assert {len(texts) for texts in listed.values()} >= {1, 3, 5}
    for index, texts in listed.items():
        expected = encoder(texts).numpy()
        for k in range(len(texts)):
            context = np.load(made / f"train/{index}_{k}.npy")
            assert context.dtype == np.float32 and context.shape == (77, 32)
            np.testing.assert_allclose(context, expected[k], rtol=1e-4, atol=1e-5)
        assert not (made / f"train/{index}_{len(texts)}.npy").exists()
    np.testing.assert_allclose(np.load(made / "empty_context.npy"), encoder([""])[0], rtol=1e-4, atol=1e-5)


def test_what_is_left_out_is_named(source, clip_folder, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    (copy / "photos/picture1.png").unlink()
    shutil.copy(copy / "photos/picture2.png", copy / "photos/stranger.png")
    call_main(monkeypatch, coco, *arguments(copy, tmp_path / "dest", clip_folder))
    told = capsys.readouterr().err
    assert "1 captions in" in told and "image id 555" in told
    assert "2 images of" in told and "picture3.png" in told
    assert "1 images with captions are not in" in told and "picture1.png" in told
    assert len(json.loads((tmp_path / "dest/train/captions.json").read_text())) == len(KEPT) - 1


@pytest.mark.parametrize("more, tf32", [((), False), (("--allow-tf32",), True)])
def test_products_are_exact_unless_asked(source, made, clip_folder, tmp_path, monkeypatch, more, tf32):
    seen = []
    monkeypatch.setattr(encode, "tune", lambda *given: seen.append(given))
    shutil.copytree(made, tmp_path / "dest")
    call_main(monkeypatch, coco, *arguments(source, tmp_path / "dest", clip_folder, *more))
    assert seen == [(tf32,)]


def slowly():
    """Called by the script before it starts: it takes long enough to be killed in."""
    save = coco.save_array
    coco.save_array = lambda *args: time.sleep(0.02) or save(*args)


def test_killed_and_started_again(source, made, clip_folder, tmp_path, monkeypatch):
    """After a kill at any time the same command completes; whole files are not made again."""
    process = SERVER.start("preprocessing/coco.py", *arguments(source, tmp_path, clip_folder),
                           before="tests.test_coco.slowly")
    wait_for(lambda: (tmp_path / "train/2_0.npy").exists())
    process.kill()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.[np][pn][yg]")}
    assert before and not (tmp_path / "train/captions.json").exists()
    (tmp_path / "train/.1.png.99.tmp").write_text("left by the killed process")
    call_main(monkeypatch, coco, *arguments(source, tmp_path, clip_folder))
    assert_same_layout(tmp_path, made)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.name != "empty_context.npy")
    (tmp_path / "train/1.npy").unlink()
    stamp = (tmp_path / "train/1.png").stat().st_mtime_ns
    call_main(monkeypatch, coco, *arguments(source, tmp_path, clip_folder))
    assert_same_layout(tmp_path, made)
    assert (tmp_path / "train/1.png").stat().st_mtime_ns == stamp


def test_two_processes_make_what_one_makes(source, made, clip_folder, tmp_path):
    """COCO's own folders, with both splits, give the same files, too."""
    root = tmp_path / "coco"
    for split in ("train", "val"):
        shutil.copytree(source / "photos", root / f"{split}2014")
        (root / "annotations").mkdir(exist_ok=True)
        shutil.copy(source / "captions.json", root / f"annotations/captions_{split}2014.json")
    more = arguments(source, tmp_path / "dest", clip_folder)[6:]
    script("preprocessing/coco.py", "--coco", root, *more, processes=2)
    for split in ("train", "val"):
        assert_same_layout(tmp_path / "dest" / split, made / "train")


def test_what_is_transparent_is_white(tmp_path):
    """Not the colour behind it."""
    Image.new("RGBA", (20, 20), (200, 0, 0, 0)).save(tmp_path / "a.png")
    assert (coco.centre_square(tmp_path / "a.png", 16) == 255).all()
    with pytest.raises(UserError, match="missing.png cannot be read .No such file"):
        coco.centre_square(tmp_path / "missing.png", 16)


def test_an_unreadable_picture(refused, source, made, clip_folder, tmp_path, monkeypatch, capsys):
    """Everything else is written first, then the picture is named; with a good one the same command completes."""
    copy = tmp_path / "source"
    shutil.copytree(source, copy)
    whole = (copy / "photos/picture1.png").read_bytes()
    (copy / "photos/picture1.png").write_bytes(whole[:900])
    refused("1 images could not be read, all else is done: .*picture1.png is no readable", coco,
            *arguments(copy, tmp_path / "dest", clip_folder))
    there = contents(tmp_path / "dest/train")
    index = KEPT.index(1)
    assert {f"{i}.{kind}" for i in range(len(KEPT)) for kind in ("png", "npy") if i != index} <= there.keys()
    assert f"{index}.png" not in there and "captions.json" not in there
    (copy / "photos/picture1.png").write_bytes(whole)
    call_main(monkeypatch, coco, *arguments(copy, tmp_path / "dest", clip_folder))
    assert_same_layout(tmp_path / "dest", made)


def test_other_settings_are_refused(refused, source, made, clip_folder, tmp_path):
    shutil.copytree(made, tmp_path / "dest")
    refused(r"begun with other settings \(resolution\).*name another --dest", coco,
            *arguments(source, tmp_path / "dest", clip_folder, "--resolution", 64))
    refused(r"other settings \(length\)", coco, *arguments(source, tmp_path / "dest", clip_folder, "--text-length", 20))


def captions_json(folder, change):
    """The source's captions with one change; the file."""
    path = folder / "captions.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())  # as Windows' editors save it
    return path


@pytest.mark.parametrize("caption, words", [
    (None, "captions.json: the caption of annotation 1 .image id 100. is null, not text"),
    (7, "the caption of annotation 1 .image id 100. is 7, not text"),
    ("\ud83d", r"annotation 1 .image id 100., '.ud83d', holds half a character"),
    ("\ufeffred\u2028sea\x85 ", ["red sea"])])
def test_captions_that_are_no_text(source, tmp_path, caption, words):
    """File and entry are named; what is between words is one space, whatever ends lines elsewhere."""
    shutil.copy(source / "captions.json", tmp_path)
    path = captions_json(tmp_path, lambda content: content["annotations"][1].update(caption=caption))
    if isinstance(words, list):
        assert dict(coco.read_captions(path))["picture0.png"][1:2] == words
    else:
        with pytest.raises(UserError, match=words):
            coco.read_captions(path)
        (tmp_path / "captions.json").write_text(json.dumps({"3": ["red", caption]}))
        with pytest.raises(UserError, match=r"captions.json: caption 1 of image 3(, '.ud83d', ho| is (7|null), n)"):
            read_texts(tmp_path / "captions.json", {})


def test_long_captions_are_counted(source, made, clip_folder, tmp_path, capsys, monkeypatch):
    """And cut: 10,000 words to 77 tokens, quickly."""
    copy = shutil.copytree(source, tmp_path / "source")
    captions_json(copy, lambda content: content["annotations"][1].update(caption="heart " * 10_000))
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest/.empty_context.npy.99.tmp").write_text("left by a killed process")
    start = time.monotonic()
    call_main(monkeypatch, coco, *arguments(copy, tmp_path / "dest", clip_folder))
    assert "1 captions for" in (said := capsys.readouterr().out) and "longer than 77 tokens: their ends" in said
    assert time.monotonic() - start < 60 and not list((tmp_path / "dest").glob(".*.tmp"))
    expected = TextEncoder(clip_folder)(["heart " * 77])[0]
    np.testing.assert_allclose(np.load(tmp_path / f"dest/train/{len(KEPT) - 1}_1.npy"), expected, rtol=1e-4, atol=1e-5)


def test_output_that_would_become_input(refused, source, clip_folder, tmp_path):
    copy = shutil.copytree(source, tmp_path / "dest/train")
    for more in ([], ["--images", source / "photos"], ["--captions-json", source / "captions.json"]):
        refused("dest/train and .* lie in each other", coco, *arguments(copy, tmp_path / "dest", clip_folder, *more))
    assert contents(copy) == contents(source)


# ---- text encoder ----

def test_clip_text_as_published(clip_folder):
    """77 tokens padded by the end token, no mask, the last hidden state; a caption is the same in any batch."""
    import transformers
    encoder = TextEncoder(clip_folder)
    states = encoder(["red heart", "", "a " * 200])
    tokenizer, model = (kind.from_pretrained(clip_folder) for kind in
                        (transformers.AutoTokenizer, transformers.CLIPTextModel))
    ids = tokenizer("red heart").input_ids
    padded = torch.tensor([ids + [tokenizer.eos_token_id] * (77 - len(ids))])
    with torch.no_grad():
        expected = model(input_ids=padded).last_hidden_state
    assert states.shape == (3, 77, 32) and states.dtype == torch.float32
    torch.testing.assert_close(states[:1], expected)
    torch.testing.assert_close(encoder(["red heart"]), expected)
    torch.testing.assert_close(TextEncoder(clip_folder, length=20)(["red heart"]), expected[:, :20])


@pytest.fixture
def bert_folder(tmp_path):
    import transformers
    torch.manual_seed(0)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=40)).save_pretrained(tmp_path)
    return tmp_path


def test_sentence_encoder(bert_folder):
    """Padding is masked and its places are zero, so that words do not depend on the length asked for."""
    encoder = TextEncoder(bert_folder, length=9)
    states = encoder(["red heart", "the sea under clouds"])
    assert states.shape == (2, 9, 32)
    assert (states != 0).any(-1).sum(1).tolist() == [4, 6]  # start and end beside the words
    torch.testing.assert_close(TextEncoder(bert_folder)(["red heart"])[:, :9], states[:1])
    assert TextEncoder(bert_folder).length == 40


def test_an_encoder_of_another_kind(bert_folder):
    import transformers
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=50)
    transformers.AutoModel.from_config(config).save_pretrained(bert_folder)
    with pytest.raises(UserError, match="is a t5, neither CLIP nor like BERT"):
        TextEncoder(bert_folder)


def test_weights_that_do_not_fit(bert_folder, clip_folder):
    whole = (bert_folder / "model.safetensors").read_bytes()
    (bert_folder / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="not those of its config.json .* is missing"):
        TextEncoder(bert_folder)
    (bert_folder / "model.safetensors").write_bytes(whole[:5000])
    with pytest.raises(UserError, match="could not be loaded"):
        TextEncoder(bert_folder)
    (bert_folder / "model.safetensors").unlink()
    torch.save({}, bert_folder / "pytorch_model.bin")  # a pickle, which is never opened
    with pytest.raises(UserError, match="could not be loaded"):
        TextEncoder(bert_folder)
