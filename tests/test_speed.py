"""What speed.py sets."""
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.soak import held
from speed import fast_bf16, give_back_memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_freed_goes_back_to_the_machine():
    """Pieces small enough to lie in the C library's heap, under one that stays in use: no free() shrinks that heap."""
    give_back_memory()
    before = held("self")
    pieces = [torch.ones(12_000) for _ in range(2_000)]  # 96 MB
    last = torch.ones(12_000)
    del pieces
    kept = held("self") - before
    give_back_memory()
    assert held("self") - before < 20_000 / 1024 < kept  # MiB
    assert last.sum() == 12_000


def test_bf16_is_told_by_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for text, known in (("flags : fpu avx512f avx512_bf16", True), ("flags : fpu avx512f", False)):
        monkeypatch.setattr(Path, "read_text", lambda _, text=text: text)
        monkeypatch.setattr(Path, "is_file", lambda _: True)
        assert fast_bf16() == known
