"""The attention loss with its gradients in several forms: time, and memory beyond the inputs.

    python benchmarks/attention.py

`plain` is autograd through both maps; `identity` is L = logsumexp S - q . (P k) / sqrt(d), its cross term one fused attention
call with the student's keys as values; `tiles of N` is loss.attention_loss with loss.TILE = N logits. Forward and backward:
median (lowest to highest).
"""
import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import loss
from benchmarks.measure import added_memory, alternate, machine, spread, table
from models.layers import QK, attend
from speed import tune

SHAPES = ((32, 5, 64, 32), (8, 12, 256, 64), (4, 12, 1024, 64))  # (N, H, T, d): embedded default, 256 px, 512 px
TILES = [2 ** power for power in (16, 18, 20, 22, 24)]


def plain(student, teacher):
    return -(teacher.logits().softmax(dim=-1) * student.logits().log_softmax(dim=-1)).sum(dim=-1).mean()


def identity(student, teacher):
    attended = attend(teacher.q, teacher.k, student.k)
    return (student.logits().logsumexp(dim=-1) - student.scale * (student.q * attended).sum(dim=-1)).mean()


def tiled(tile):
    def work(student, teacher):
        loss.TILE = tile
        return loss.attention_loss([student], [teacher])
    return work


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default 11)")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tune(1, tf32=True)
    print(machine(device))
    forms = {"plain": plain, "identity": identity, **{f"tiles of 2^{tile.bit_length() - 1}": tiled(tile) for tile in TILES}}
    rows = {name: [name] for name in forms}
    for n, h, t, d in SHAPES:
        torch.manual_seed(0)
        q, k, teacher_q, teacher_k = (torch.randn(n, h, t, d, device=device) for _ in range(4))
        student, teacher = QK(q.requires_grad_(), k.requires_grad_()), QK(teacher_q, teacher_k)

        def step(form, student=student, teacher=teacher):
            student.q.grad = student.k.grad = None
            form(student, teacher).backward()

        works = {name: (lambda form=form, step=step: step(form)) for name, form in forms.items()}
        for name, seconds in alternate(works, args.rounds, device).items():
            memory = added_memory(works[name], device) / 2 ** 20
            rows[name].append(f"{spread([1000 * s for s in seconds], 1)} ms, {memory:.0f} MiB")
    print()
    print(table(["form", *(f"N {n}, H {h}, T {t}, d {d}" for n, h, t, d in SHAPES)], rows.values()))


if __name__ == "__main__":
    main()
