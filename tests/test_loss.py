"""Losses against their formulas written out."""
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.compile_fx import compile_fx
from torch.utils._python_dispatch import TorchDispatchMode

from loss import SILoss, attention_loss, attention_tile, feature_loss, interpolant, resample_qk, sample_t
from models.layers import QK
from samplers import TIME_GRIDS


def qk(seed, n=2, h=3, t=16, d=5, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return QK(size * torch.randn(n, h, t, d, generator=generator), torch.randn(n, h, t, d, generator=generator))


def test_attention_loss_is_the_written_out_formula():
    """Any head width on either side; it uses the heads that both sides have, or num_heads of them."""
    student, teacher = qk(0, h=4), qk(1, h=3, d=7)
    for heads in (1, 2, 3):
        torch.testing.assert_close(attention_loss([student], [teacher], heads),
                                   exact(student, teacher, heads)[0].float())
    torch.testing.assert_close(attention_loss([student], [teacher], 12), attention_loss([student], [teacher], 3))
    other = attention_loss([qk(2)], [qk(3)])
    torch.testing.assert_close(attention_loss([student, qk(2)], [teacher, qk(3)]),
                               (attention_loss([student], [teacher]) + other) / 2)


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that any operation inside makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def exact(student, teacher, heads):
    """-sum_j P_ij log Q_ij and gradients, times 3, by autograd through whole maps in float64."""
    (q, k), (q_teacher, k_teacher) = ([x.detach().double() for x in side[:2]] for side in (student, teacher))
    q, k = q.requires_grad_(), k.requires_grad_()
    logits, target = ((a[:, :heads] @ b[:, :heads].mT / math.sqrt(a.shape[-1]) for a, b in ((q, k),
                                                                                           (q_teacher, k_teacher))))
    loss = -(target.softmax(dim=-1) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
    (3 * loss).backward()
    return loss, q.grad, k.grad


@pytest.mark.parametrize("tile", [1, 40, 3 * 36 * 36, 2 ** 20])
@pytest.mark.parametrize("shape", [(2, 3, 36, 5), (1, 2, 64, 16), (3, 1, 9, 8)])
def test_tiles_give_autograds_value_and_gradients(monkeypatch, tile, shape):
    """For any tile size, T, H and d; memory holds no more than one tile of the maps."""
    monkeypatch.setattr("loss.tile_size", lambda device: tile)
    n, h, t, d = shape
    teacher, tiled = qk(1, n, h + 1, t, d + 3), qk(0, n, h, t, d)
    for tensor in tiled[:2]:
        tensor.requires_grad_()
    heads = min(h, 2)
    with LargestResult() as seen:
        loss = attention_loss([tiled], [teacher], heads)
        (3 * loss).backward()
    assert seen.elements <= max(tile, t, teacher.q.numel())
    for found, expected in zip((loss, tiled.q.grad, tiled.k.grad), exact(tiled, teacher, heads), strict=True):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_tiles_give_the_same(monkeypatch):
    """Tiles of whole maps (fewer in the last) and of rows of one map; one graph per tile shape."""
    graphs, loss_fn = [], SILoss()

    def backend(graph, inputs):
        graphs.append(graph)
        return compile_fx(graph, inputs)

    torch._dynamo.reset()
    monkeypatch.setattr("loss.torch.compile", functools.partial(torch.compile, backend=backend))
    loss_fn.compile()
    for tile, shapes in ((5 * 16 * 16, 2), (4 * 16, 3)):
        monkeypatch.setattr("loss.tile_size", lambda device, tile=tile: tile)
        for seed in (0, 2):
            teacher, student = qk(seed + 1, d=7), QK(*(x.requires_grad_() for x in qk(seed)[:2]))
            loss = attention_loss([student], [teacher], tile=loss_fn.tile)
            (3 * loss).backward()
            for found, expected in zip((loss, student.q.grad, student.k.grad), exact(student, teacher, 3), strict=True):
                torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        assert len(graphs) == shapes
    assert SILoss().tile is attention_tile


class TF32(TorchDispatchMode):
    """Round the inputs of products to TF32's 10 mantissa bits."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            first = len(arguments) - 2
            arguments = (*arguments[:first], *(self.rounded(x) for x in arguments[first:]))
        return function(*arguments, **(keywords or {}))

    @staticmethod
    def rounded(x):
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2 ** 11).round() / 2 ** 11, exponent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_16_bits_is_exact_in_tf32(dtype):
    student, teacher = (QK(*(x.to(dtype) for x in side[:2])) for side in (qk(0, size=2.0), qk(1, d=7)))
    expected = attention_loss([student], [teacher])
    with TF32():
        assert torch.equal(attention_loss([student], [teacher]), expected)
        wide = attention_loss([qk(0, size=2.0)], [qk(1, d=7)])
    assert not torch.equal(wide, attention_loss([qk(0, size=2.0)], [qk(1, d=7)]))  # rounding has an effect


def test_attention_loss_in_half_precision_and_under_autocast():
    """Softmax and sums in float32: as near the float32 loss as rounded q and k allow; gradients in their dtype."""
    teacher, student = qk(1), QK(*(x.bfloat16().requires_grad_() for x in qk(0)[:2]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_loss([student], [teacher])
    loss.backward()
    torch.testing.assert_close(loss, attention_loss([QK(student.q.float(), student.k.float())], [teacher]))
    assert loss.dtype == torch.float32 and student.q.grad.dtype == torch.bfloat16


def test_attention_loss_of_saturated_rows_is_finite():
    """softmax underflows to 0 here, and log(softmax) would be -inf."""
    student = qk(0, size=1000.0)
    q = student.q.requires_grad_()
    loss = attention_loss([student], [qk(1)])
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(q.grad).all()


def test_resampling_q_and_k_resamples_the_logits():
    """Compare with explicit resampling: logits bilinear over keys (2-D map), then over queries."""
    teacher = qk(5, n=1, h=2, t=36, d=4)
    logits = teacher.logits()  # (1, 2, 36, 36)
    keys = F.interpolate(logits.reshape(-1, 1, 6, 6), size=(4, 4), mode="bilinear").reshape(1, 2, 36, 16)
    both = F.interpolate(keys.transpose(2, 3).reshape(-1, 1, 6, 6), size=(4, 4), mode="bilinear")
    both = both.reshape(1, 2, 16, 16).transpose(2, 3)
    torch.testing.assert_close(resample_qk(teacher, 16).logits(), both)
    coarse, fine = qk(0, n=1, h=2), QK(*(x.requires_grad_() for x in teacher[:2]))
    loss = attention_loss([fine], [coarse])  # the student's maps are resampled to the teacher's grid
    torch.testing.assert_close(loss, -(coarse.logits().softmax(-1) * both.log_softmax(-1)).sum(-1).mean())
    loss.backward()
    assert fine.q.grad.abs().amin() > 0
    with pytest.raises(ValueError, match="square"):
        resample_qk(qk(0, t=15), 16)


def test_feature_loss():
    a, b = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    cosines = [(x @ y) / (x.norm() * y.norm()) for x, y in zip(a.view(-1, 8), b.view(-1, 8), strict=True)]
    torch.testing.assert_close(feature_loss(a, b), -torch.stack(cosines).mean())
    big = torch.full((1, 4, 600), 200.0, dtype=torch.float16)  # its squared norm overflows float16
    torch.testing.assert_close(feature_loss(big, big), torch.tensor(-1.0))
    pooled = a.view(2, 2, 2, 2, 2, 8).mean(dim=(2, 4)).view(2, 4, 8)  # the student's 4 x 4 tokens on a grid of 2 x 2
    torch.testing.assert_close(feature_loss(a, b[:, :4]), feature_loss(pooled, b[:, :4]))


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_interpolant_derivatives(path_type):
    t = torch.rand(20, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = interpolant(t, path_type)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        gradient, = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, gradient)
    ends = interpolant(torch.tensor([0.0, 1.0]), path_type)
    torch.testing.assert_close(torch.stack(ends[:2]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="path_type"):
        interpolant(t, "quadratic")


def test_lognormal_times():
    """logit(t) on the linear path, and log tan(pi t / 2) on the cosine path, are standard normal."""
    u = (torch.arange(20_000) + 0.5) / 20_000
    for path_type, back in (("linear", lambda t: (t / (1 - t)).log()),
                            ("cosine", lambda t: (math.pi / 2 * t).tan().log())):
        normal = back(sample_t(u, "lognormal", path_type).double())
        assert abs(normal.mean()) < 1e-3 and abs(normal.std() - 1) < 1e-2
    assert torch.equal(sample_t(u), u)
    torch.testing.assert_close(sample_t(u, shift=3.0), 3 * u / (1 + 2 * u))
    assert TIME_GRIDS["shift"](0.5, 3.0) == 0.75  # sampling's grid is the same map


def test_without_a_teacher_only_denoise():
    def model(x, t, y, return_alignment=False):
        assert not return_alignment
        return x

    losses = SILoss()(model, torch.randn(3, 4, 8, 8), torch.zeros(3))
    assert list(losses) == ["denoise"] and losses["denoise"].shape == (3,)
