"""Any value in a checkpoint, any content of a data file: scripts work or print one sentence. Seeded choice."""
import copy
import json
import random
import re
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

import generate
import train
from dataset import LatentImages
from runtime.errors import UserError
from runtime.files import load_tensors
from tests.conftest import CLASSES, call_main, train_arguments
from tests.damage import CKPT, IMAGE, LABELS, LATENT, LATENT_LABELS, RUN
from tests.worlds import NO_TEACHER, base

DEEP = [[[[[[[[{"a": [None]}]]]]]]]]
VALUES = (None, True, -1, 0, 3, 0.5, float("nan"), float("inf"), 10 ** 30, "", "x", "SiT-N/2", "../x", "caf\udcff",
          [], {}, [1, 2], {"a": 1}, DEEP, b"bytes")
KINDS = ("<f4", ">f4", "<f8", "<f2", "g", "<c8", "u1", "<i8", "?", "U3", "M8[s]")
SHAPES = ((), (0,), (8, 16, 16), (7, 16, 16), (8, 0, 0), (0, 16, 16), (1, 8, 16, 16), (8, 16), (2, 1, 1), (16, 16, 16))


def works_or_is_a_sentence(call, about):
    started = time.monotonic()
    try:
        call()
    except UserError as error:
        assert re.fullmatch(r"(?s).{15,900}\.", str(error)), about
    except SystemExit as end:
        assert end.code in (0, 2), about
    assert time.monotonic() - started < 30, about


def places(value, path=()):
    """Paths to everything in nested dicts and lists; the first three of a list."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3]) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def tensors(rng):
    """A tensor of any kind."""
    shape = rng.choice(((), (7,), (0,), (4, 4), (64, 64), (4, 4, 2, 2)))
    x = torch.full(shape, rng.choice((0.0, 1.0, torch.nan, 1e38)))
    kind = rng.choice(("as it is", "int", "complex", "half", "sparse", "meta", "bool", "double"))
    return {"int": x.nan_to_num().clamp(max=9).long, "complex": lambda: x.to(torch.complex64), "half": x.half,
            "sparse": x.to_sparse, "meta": lambda: x.to("meta"), "bool": x.bool, "double": x.double}.get(
                kind, lambda: x)()


def changed(value, rng):
    """A copy with one place removed, replaced, added to, or of another shape."""
    value = copy.deepcopy(value)
    *way, last = rng.choice([path for path in places(value) if path])
    inner = value
    for key in way:
        inner = inner[key]
    how = rng.choice(("remove", "value", "value", "tensor", "beside"))
    if how == "remove":
        del inner[last]
    else:
        new = tensors(rng) if how == "tensor" else rng.choice(VALUES)
        if how == "beside" and isinstance(inner, dict):
            inner[rng.choice(("x", 7, last if isinstance(last, int) else f"{last}.x"))] = new
        else:
            inner[last] = new
    return value, (how, *way, last)


@pytest.mark.parametrize("name, calls", [(CKPT, 30), (RUN, 20)])
def test_any_value_in_a_checkpoint(monkeypatch, world, tmp_path, name, calls):
    """Sampling from it and continuing from it."""
    w, rng = shutil.copytree(world, tmp_path / "w"), random.Random(name)
    intact = load_tensors(w / name)
    for k in range(calls):
        state, about = changed(intact, rng)
        if name == RUN:
            shutil.rmtree(w / "out")
            shutil.copytree(world / "out", w / "out")
            module, arguments = train, train_arguments(w / "data", w / "out", *NO_TEACHER, "--max-train-steps", 2)
        else:
            module, arguments = generate, [*base(generate, w), "--sample-dir", w / f"made-{k}"]
        torch.save(state, w / name)
        works_or_is_a_sentence(lambda m=module, a=arguments: call_main(monkeypatch, m, *a), about)


def array(path, rng):
    x = np.full(rng.choice(SHAPES), rng.choice((0, 1)))
    with path.open("wb") as file:
        np.save(file, x.astype(rng.choice(KINDS)))


def picture(path, rng):
    size = rng.choice(((64, 64), (1, 1), (64, 32), (16, 16)))
    image = Image.new(rng.choice(("RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "F")), size)
    with path.open("wb") as file:
        image.save(file, "TIFF" if image.mode in ("CMYK", "F") else rng.choice(("PNG", "GIF", "BMP"))
                   if image.mode in ("RGB", "L", "P", "1") else "PNG")


def listing(path, rng):
    labels = [[f"00000/img{'-mean-std-' * (rng.random() < .5)}{i:08d}.png", i % 4] for i in range(8)]
    value, _ = changed({"labels": labels}, rng)
    path.write_text(json.dumps(rng.choice((value, value, DEEP, 3)), default=lambda value: type(value).__name__))


@pytest.mark.parametrize("name", [IMAGE, LATENT, LABELS, LATENT_LABELS, "data/classes.json"])
def test_any_content_of_a_data_file(monkeypatch, world, tmp_path, name):
    """Open and read all data; every fourth time by training with the teacher."""
    w, rng = shutil.copytree(world, tmp_path / "w"), random.Random(name)
    for k in range(12):
        shutil.rmtree(w / "data")
        shutil.copytree(world / "data", w / "data")
        write = rng.choice((array, picture, listing, lambda path, rng: path.write_bytes(rng.randbytes(50))))
        write(w / name, rng)
        arguments = [*train_arguments(w / "data", w / f"out-{k}"), "--enc-weights", w / "teacher.pth",
                     "--max-train-steps", 1, "--num-workers", 0]
        works_or_is_a_sentence((lambda a=arguments: call_main(monkeypatch, train, *a)) if k % 4 == 0 else (
            lambda: LatentImages(w / "data", 64, CLASSES).batch(range(8))), (k, write.__name__))
