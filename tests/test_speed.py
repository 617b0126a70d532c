"""Settings of runtime/setup.py that change no result but the time and memory it takes."""
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.measure import status
from runtime.setup import cast_weights, fast_bf16, give_back_memory, tune
from tests.conftest import ROOT
from tests.test_models import nano_models


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_freed_goes_back_to_the_machine():
    """The pieces lie in the C library's heap, below one that stays in use: no free() shrinks that heap."""
    give_back_memory()
    before = status("RssAnon")
    pieces = [torch.ones(12_000) for _ in range(2_000)]  # 96 MB
    last = torch.ones(12_000)
    del pieces
    kept = status("RssAnon") - before
    give_back_memory()
    assert status("RssAnon") - before < 20_000 * 1024 < kept
    assert last.sum() == 12_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_a_step_finds_the_memory_of_the_one_before():
    """In a process of its own, as the setting is for good: page faults of memory asked for again.

    glibc maps the pieces of 50 MB, and puts those of 20 MB on its heap. Calls malloc itself: only memory at the end of
    the heap is given back, and a step's tensors lie there by chance.
    """
    code = """if True:
        import ctypes, resource
        from runtime import setup
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_void_p

        def faults(size):
            for _ in range(3):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                pieces = [ctypes.c_void_p(library.malloc(ctypes.c_size_t(size))) for _ in range(8)]
                for piece in pieces:
                    ctypes.memset(piece, 1, size)
                for piece in reversed(pieces):
                    library.free(piece)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print(faults(20_000_000), faults(50_000_000))
        setup.tune(tf32=False)
        print(faults(20_000_000), faults(50_000_000))"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
                          env={**environment, "CUDA_VISIBLE_DEVICES": ""})
    small, large, small_tuned, large_tuned = map(int, done.stdout.split())
    assert small_tuned < 0.1 * small
    assert large_tuned < 0.1 * large


def test_bf16_is_told_by_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for text, known in (("flags : fpu avx512f avx512_bf16", True), ("flags : fpu avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        monkeypatch.setattr(Path, "is_file", lambda _: True)
        assert fast_bf16() == known


@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_cast_weights_give_what_autocast_gives(kind):
    model, y = nano_models()[kind]
    x, t = torch.randn(2, 4, 8, 8), torch.rand(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x, t, y)
        cast_weights(model, "no")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        cast_weights(model, "bf16")
        products = [module for module in model.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))]
        assert {module.weight.dtype for module in products} == {torch.bfloat16}
        assert torch.equal(model(x, t, y), expected)


def test_processes_share_the_cores(monkeypatch):
    """They divide this machine's cores once, unless the user sets the number of threads. (accelerate may have done it.)
    """
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for environment, before, expected in (({}, 8, 8), ({"LOCAL_WORLD_SIZE": "4"}, 16, 4),
                                          ({"LOCAL_WORLD_SIZE": "4"}, 2, 2), ({"OMP_NUM_THREADS": "3"}, 8, None)):
        monkeypatch.setattr(torch, "get_num_threads", lambda before=before: before)
        for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked.clear()
        tune(tf32=False)
        assert asked == ([] if expected is None else [expected])


def test_denormals_are_flushed():
    if not torch.set_flush_denormal(False):
        pytest.skip("this CPU has no such mode")
    small = torch.full((64,), 2e-38)
    assert (0.1 * small).all()
    tune(tf32=False)
    assert not (0.1 * small).any()
    torch.set_flush_denormal(False)
