"""The teacher: golden numbers, taps against attention written by hand, weights from files, the cache."""
import functools
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from timm.models.vision_transformer import VisionTransformer
from torch._dynamo.backends.debugging import aot_eager

from dataset import LatentImages
from encoders.teacher_cache import CachedTeacher
from encoders.teachers import TEACHERS, Teacher, TeacherRow, load_vit
from modify_dinov2.taps import Tapped
from runtime.errors import UserError
from tests.conftest import CLASSES, script, train_arguments
from tests.golden.fill import fill_value
from tests.test_golden import close, golden


def small_vit(**kwargs):
    torch.manual_seed(0)
    return VisionTransformer(img_size=518, patch_size=14, embed_dim=96, depth=5, num_heads=6, init_values=1.0,
                             num_classes=0, **kwargs).eval()


def test_golden_teacher():
    file, vit = golden("teacher_dinov2"), small_vit()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            parameter.copy_(torch.from_numpy(fill_value(name, tuple(parameter.shape))))
    images = torch.from_numpy(np.random.RandomState(77).randint(0, 256, (2, 3, 256, 256)).astype(np.uint8))
    out = Teacher(vit, 16, (1, 4))(images)
    close(out.features[0][:, :12], file["x_norm_patchtokens"])
    close(out.attention[1].logits()[:, :, :4, :24], file["attn1"])
    close(out.attention[4].logits()[:, :, :4, :24], file["attn4"])
    close(out.attention[4].logits().softmax(-1).amax(-1)[:, :, :16], file["attn4_softmax_rowmax"])


@pytest.mark.parametrize("registers", [0, 4])
def test_taps_are_attention_written_by_hand(registers):
    """q and k of patch tokens alone, from the block's own input; class and register tokens are cut."""
    vit = small_vit(reg_tokens=registers, no_embed_class=registers > 0)
    torch.nn.init.normal_(vit.cls_token)
    teacher = Teacher(vit, 4, (2,))
    seen = {}
    vit.blocks[2].attn.register_forward_hook(lambda module, inputs, _: seen.update(x=inputs[0]))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    out = teacher(images)
    weight, bias = vit.blocks[2].attn.qkv.weight, vit.blocks[2].attn.qkv.bias
    q, k = ((seen["x"][:, 1 + registers:] @ weight[i * 96:(i + 1) * 96].T + bias[i * 96:(i + 1) * 96]) for i in (0, 1))
    for head in range(6):
        part = slice(head * 16, head * 16 + 16)
        logits = q[:, :, part] @ k[:, :, part].transpose(1, 2) / 4
        torch.testing.assert_close(out.attention[2].logits()[:, head], logits)
    assert list(out.attention) == [2] and out.attention[2].q.shape == (2, 6, 16, 16)
    assert out.features[0].shape == (2, 16, 96)


def test_a_teacher_on_a_finer_grid():
    """input_size gives 8 x 8 tokens, resampled to the student's 4 x 4: 2 x 2 means for features, q and k."""
    images, (coarse, fine) = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), (
        Teacher(small_vit(), grid, (2,)) for grid in (4, 8))
    teacher = Teacher(small_vit(), 4, (2,), input_size=112, resample="teacher")
    out, expected = teacher(images), fine(images)

    def pooled(tokens):
        *rest, _, width = tokens.shape
        return tokens.view(*rest, 4, 2, 4, 2, width).mean(dim=(-2, -4)).view(*rest, 16, width)

    torch.testing.assert_close(out.features[0], pooled(expected.features[0]))
    for ours, theirs in ((out.attention[2].q, expected.attention[2].q), (out.attention[2].k, expected.attention[2].k)):
        torch.testing.assert_close(ours, pooled(theirs))
    assert out.attention[2].scale == expected.attention[2].scale
    assert len({teacher.key(), coarse.key(), fine.key()}) == 3
    assert Teacher(small_vit(), 4, (2,), input_size=56).key() == coarse.key()
    with pytest.raises(UserError, match="--enc-size 100 is no multiple of 14"):
        Teacher(small_vit(), 4, (2,), input_size=100)


@pytest.mark.parametrize("around", ["no", "bf16"])
def test_a_compiled_teacher_gives_the_same(monkeypatch, around):
    """Each block, tapped or not, is one graph that runs once a pass; two graphs are made, with and without tap."""
    made, calls = [], []

    def backend(graph, inputs):
        made.append(graph)
        compiled = aot_eager(graph, inputs)

        def call(*arguments):
            calls.append(1)
            return compiled(*arguments)
        return call

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend=backend))
    sizes = {"reg_tokens": 4, "qk_norm": True, "norm_layer": torch.nn.LayerNorm}
    eager, compiled = (Teacher(small_vit(**sizes), 4, (1, 3), precision=around) for _ in range(2))
    names = list(compiled.vit.state_dict())
    compiled.compile()
    assert list(compiled.vit.state_dict()) == names == list(small_vit(**sizes).state_dict())
    for seed in range(2):  # taps come from the newest pass
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        expected, found = eager(images), compiled(images)
        near = {"atol": 1e-5, "rtol": 1e-5} if around == "no" else {"atol": 0.03, "rtol": 0.03}
        torch.testing.assert_close(found.features[0], expected.features[0], **near)
        assert list(found.attention) == [1, 3]
        for block, qk in expected.attention.items():
            torch.testing.assert_close(found.attention[block].q, qk.q, **near)
            torch.testing.assert_close(found.attention[block].k, qk.k, **near)
    assert len(made) == 2 and len(calls) == 2 * 5
    assert all(module.output is None for module in compiled.vit.modules() if isinstance(module, Tapped))


def test_stops_after_the_last_needed_block():
    teacher = Teacher(small_vit(), 4, (0, 2), features=False)
    assert len(teacher.vit.blocks) == 3
    assert teacher(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).features == []
    assert len(Teacher(small_vit(), 4, (1,), num_blocks=4).vit.blocks) == 4
    with pytest.raises(UserError, match="5 blocks"):
        Teacher(small_vit(), 4, (5,))


def test_precision_of_the_teacher_alone():
    """By default that of the autocast around it; asked for, its own, whatever is around."""
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    plain = Teacher(small_vit(), 4, (2,))(images)
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        teacher = Teacher(small_vit(), 4, (2,), precision=precision)
        for around in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                out = teacher(images)
                ambient = Teacher(small_vit(), 4, (2,))(images)
            assert out.attention[2].q.dtype == dtype
            assert ambient.attention[2].q.dtype == (torch.bfloat16 if around else torch.float32)
            same = torch.equal(out.features[0].float(), plain.features[0])
            assert same == (precision == "no")
            torch.testing.assert_close(out.features[0].float(), plain.features[0], atol=0.1, rtol=0.1)
            teacher.cast("bf16" if around else "no")
            assert teacher.vit.blocks[0].mlp.fc1.weight.dtype == dtype
            assert torch.equal(teacher(images).features[0], out.features[0])


def test_a_teacher_that_is_not_dinov2(monkeypatch, tmp_path):
    """A row with another patch, mean, std and resize is enough; a row that timm contradicts is refused."""
    row = TeacherRow("vit_tiny_patch16_224", 192, 16, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), 1, "bilinear")
    monkeypatch.setitem(TEACHERS, "tiny", row)
    torch.save(timm.create_model(row.timm_name, num_classes=0).state_dict(), tmp_path / "tiny.pth")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    teacher = Teacher(load_vit("tiny", tmp_path / "tiny.pth"), 4, (3,))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (row.mean, row.std))
    x = torch.nn.functional.interpolate((images / 255 - mean) / std, size=64, mode="bilinear")
    out = teacher(images)
    torch.testing.assert_close(out.features[0], teacher.vit.forward_features(x)[:, 1:])
    assert out.features[0].shape == (2, 16, 192) and out.attention[3].q.shape == (2, 3, 16, 64)
    monkeypatch.setitem(TEACHERS, "tiny", row._replace(mean=(0.5, 0.5, 0.5)))  # a cache must notice
    assert Teacher(load_vit("tiny", tmp_path / "tiny.pth"), 4, (3,)).key() != teacher.key()
    monkeypatch.setitem(TEACHERS, "tiny", row._replace(patch=14))
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 has .* not as in"):
        load_vit("tiny", tmp_path / "tiny.pth")


def test_a_cache_that_another_run_is_making_is_waited_for(tiny_data, tmp_path):
    """It is neither deleted while in use nor made twice."""
    dataset, accelerator = LatentImages(tiny_data, 64, CLASSES), Accelerator(cpu=True)
    calls, vits = [], [small_vit(), small_vit()]

    def slowly(*_):
        calls.append(1)
        time.sleep(0.05)

    def make(vit):
        teacher = Teacher(vit, 8, ())
        teacher.vit.norm.register_forward_hook(slowly)
        return CachedTeacher(tmp_path, teacher, dataset, accelerator, batch_size=16)(torch.arange(64)).features[0]

    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(make, vit) for vit in vits]
        assert torch.equal(first.result(), second.result()) and first.result().any(dim=(1, 2)).all()
    assert len(calls) == 1 + 64 // 16


def test_a_replaced_picture_is_seen(data, tmp_path):
    """Of equal size and name: by its time, in a zip by its checksum. Rows are of the files that hold them."""
    accelerator = Accelerator(cpu=True)

    def cache():
        dataset = LatentImages(data, 64, CLASSES)
        return CachedTeacher(tmp_path / "cache", Teacher(small_vit(), 8, ()), dataset, accelerator).folder

    path = data / "images/00000/img00000003.png"
    folders = [cache()]
    for now in (10 ** 18, 2 * 10 ** 18):
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(now, now))
        folders.append(cache())
    shutil.make_archive(data / "images", "zip", data / "images")
    shutil.rmtree(data / "images")
    folders.append(cache())
    assert len(set(folders)) == 4 and cache() == folders[-1]


def test_a_stopped_cache_goes_on(monkeypatch, caplog, tiny_data, tmp_path):
    """It ends with the same bytes and computes only missing rows (student's grid); its log counts images.

    A run with fewer outputs that was stopped in between leaves no rows empty.
    """
    dataset, accelerator = LatentImages(tiny_data, 64, CLASSES), Accelerator(cpu=True)
    calls, stop_at = [], []

    def make(folder, blocks=(1,)):
        teacher = Teacher(small_vit(), 4, blocks, input_size=112, resample="teacher")

        def count(*_):
            calls.append(1)
            if len(calls) in stop_at:
                raise KeyboardInterrupt

        teacher.vit.norm.register_forward_hook(count)
        return CachedTeacher(tmp_path / folder, teacher, dataset, accelerator, batch_size=12)

    whole = make("whole")
    assert len(calls) == 1 + 6 and whole.arrays["features0"].shape == (64, 16, 96)
    assert whole.arrays["block1"].shape == (64, 2, 6, 16, 16)
    monkeypatch.setattr("encoders.teacher_cache.FLUSH_SECONDS", -1)  # after each batch
    caplog.set_level("INFO", "haste")
    calls.clear()
    stop_at.append(5)
    with pytest.raises(KeyboardInterrupt):
        make("parts")
    assert "teacher outputs: 36 of 64 images" in caplog.text and not list(tmp_path.glob("parts/*/*.complete"))
    calls.clear()
    stop_at.clear()
    parts = make("parts")
    assert len(calls) == 3 and "teacher outputs: 64 of 64 images" in caplog.text
    assert {path.name for path in parts.folder.iterdir()} == {
        f"{name}.{end}" for name in ("features0", "block1") for end in ("npy", "complete")}
    for blocks, last in (((1,), 5), ((), 3)):
        calls.clear()
        stop_at[:] = [last]
        with pytest.raises(KeyboardInterrupt):
            make("mixed", blocks)
    stop_at.clear()
    mixed = make("mixed")
    for name, array in whole.arrays.items():
        assert np.array_equal(array, parts.arrays[name]) and array.any(axis=tuple(range(1, array.ndim))).all()
        assert np.array_equal(array, mixed.arrays[name])


def test_two_processes_make_the_same_cache(tiny_data, teacher_file, tmp_path):
    """Byte for byte, and no record is left."""
    for processes in (1, 2):
        script("train.py", *train_arguments(tiny_data, tmp_path / f"out{processes}", "--enc-weights", teacher_file,
                                            "--teacher-cache", tmp_path / f"cache{processes}", "--max-train-steps", 1),
               processes=processes)
    one, two = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
                for name in ("cache1", "cache2"))
    assert one == two and {path.name for path in one if path.parent.name} == {
        f"{name}.{end}" for name in ("features0", "block7", "block9") for end in ("npy", "complete")}


def test_cache_gives_what_the_teacher_gives(tiny_data, tmp_path, caplog):
    """Each output is computed once per set of weights; the cache holds only requested outputs; the log names others."""
    caplog.set_level("INFO", "haste")
    dataset, accelerator, calls = LatentImages(tiny_data, 64, CLASSES), Accelerator(cpu=True), []

    def cache(blocks, folder=tmp_path / "one", scale=1):
        teacher = Teacher(small_vit(), 8, blocks)
        with torch.no_grad():
            teacher.vit.norm.weight.mul_(scale)
        teacher.vit.norm.register_forward_hook(lambda *_: calls.append(1))
        return CachedTeacher(folder, teacher, dataset, accelerator)

    cached, positions = cache((1, 3)), torch.tensor([5, 0, 63])
    direct = Teacher(small_vit(), 8, (1, 3))(torch.stack([dataset.image(i) for i in positions]))
    again = cached(positions)
    torch.testing.assert_close(again.features[0].float(), direct.features[0], rtol=2e-3, atol=2e-3)
    for block in (1, 3):
        torch.testing.assert_close(again.attention[block].logits().float(), direct.attention[block].logits(),
                                   rtol=1e-2, atol=1e-2)
    calls.clear()
    cache((1, 3))
    assert torch.equal(cache(())(positions).features[0], again.features[0])
    assert not calls  # a second run reads, one with fewer outputs too
    cache((2,))
    assert {path.name for path in cached.folder.glob("*.complete")} == {
        f"{name}.complete" for name in ("features0", "block1", "block2", "block3")}
    assert torch.equal(cached(positions).features[0], again.features[0])
    assert "also holds" not in caplog.text
    cache((), scale=2)
    assert f"0.0 GB of other teachers, data or code ({cached.folder.name})" in caplog.text
    assert len(list(tmp_path.glob("one/*/features0.complete"))) == 2  # other weights, other key
    alone = cache((), tmp_path / "alone")
    assert [path.name for path in alone.folder.glob("*.npy")] == ["features0.npy"]
    assert (alone.folder / "features0.npy").stat().st_size - 128 == 64 * 64 * 96 * 2  # 2 bytes a number of a token
    assert alone(positions).attention == {}
