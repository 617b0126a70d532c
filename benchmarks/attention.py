"""The attention loss with its gradients in several forms: time, and memory beyond the inputs.

    python benchmarks/attention.py
    python benchmarks/attention.py --shapes 32 12 256 72 --tiles 20 22 23 24 25

`plain` is autograd through both maps; `identity` is L = logsumexp S - q . (P k) / sqrt(d), its cross term one fused
attention call with the student's keys as values; `tiles of N` is loss.attention_loss with N logits formed at a time,
`compiled` with the tile compiled. Forward and backward: median (lowest to highest). The second command has the shape of
SiT-XL on a GPU, of whose heads the loss takes 12.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import torch

import loss
from benchmarks.measure import added_memory, alternate, machine, spread, table
from models.layers import QK, attend
from runtime.setup import tune

SHAPES = (32, 5, 64, 32, 8, 12, 256, 64, 4, 12, 1024, 64)  # N, H, T, d of the embedded preset, of 256 px, of 512 px
POWERS = (16, 18, 20, 22, 24)  # a tile has 2 ** power logits


def plain(student, teacher):
    return -(teacher.logits().softmax(dim=-1) * student.logits().log_softmax(dim=-1)).sum(dim=-1).mean()


def identity(student, teacher):
    attended = attend(teacher.q, teacher.k, student.k)
    return (student.logits().logsumexp(dim=-1) - student.scale * (student.q * attended).sum(dim=-1)).mean()


def tiled(power, tile=loss.attention_tile):
    def work(student, teacher):
        loss.tile_size = lambda device: 2 ** power
        return loss.attention_loss([student], [teacher], tile=tile)
    return work


def make_forms(powers):
    """{name: function of student and teacher}."""
    forms, compiled = {"plain": plain, "identity": identity}, torch.compile(loss.attention_tile, dynamic=False)
    for power in powers:
        forms |= {f"tiles of 2^{power}": tiled(power), f"compiled tiles of 2^{power}": tiled(power, compiled)}
    return forms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default 11)")
    parser.add_argument("--shapes", type=int, nargs="+", default=SHAPES, help="N H T d of each (default those of the "
                        "embedded preset, of 256 and of 512 px)")
    parser.add_argument("--tiles", type=int, nargs="+", default=POWERS, help="powers of 2 (default 16 18 20 22 24)")
    args = parser.parse_args()
    if len(args.shapes) % 4:
        parser.error("--shapes takes four numbers for each")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tune(1, tf32=True)
    torch._dynamo.config.recompile_limit = 1000  # after 8 shapes of a tile it would go on without compiling
    print(machine(device))
    shapes, forms = list(zip(*[iter(args.shapes)] * 4, strict=True)), make_forms(args.tiles)
    rows = {name: [name] for name in forms}
    for n, h, t, d in shapes:
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
    print(table(["form", *(f"N {n}, H {h}, T {t}, d {d}" for n, h, t, d in shapes)], rows.values()))


if __name__ == "__main__":
    main()
