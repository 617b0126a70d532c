"""Every model of the tables: shapes, counts, gradients, v = 0 at first; taps change nothing; MMDiT written out."""
import difflib
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from models.layers import QK, Alignment
from models.mmdit import MMDIT_CONFIGS, MMDiT, MMDiT_models
from models.sit import SIT_CONFIGS, SiT, SiT_models
from tests.conftest import ROOT


@pytest.mark.parametrize("name", ["SiT-T/2", "SiT-XS/2", "SiT-S/2", "SiT-S/4", "SiT-B/2"])
def test_zero_at_init_and_every_parameter_gets_a_gradient(name):
    """At init v = 0 exactly; once the zero-initialised layers are moved, every parameter has a gradient."""
    torch.manual_seed(0)
    patch = SIT_CONFIGS[name]["patch_size"]
    model = SiT_models[name](input_size=2 * patch, num_classes=3, z_dims=(8,), projector_dim=16)
    x, t, y = torch.randn(2, 4, 2 * patch, 2 * patch), torch.rand(2), torch.tensor([0, 3])
    v, alignment = model(x, t, y, return_alignment=True)
    assert v.shape == x.shape and not v.any()
    assert [f.shape for f in alignment.features] == [(2, 4, 8)]
    assert list(alignment.attention) == [student for student, _ in SIT_CONFIGS[name]["attn_pairs"]]
    with torch.no_grad():
        for module in [*model.blocks, model.final_layer]:
            module.adaLN_modulation[1].weight.normal_(std=0.02)
        model.final_layer.linear.weight.normal_(std=0.02)
    v, alignment = model(x, t, y, return_alignment=True)
    (v.square().sum() + alignment.features[0].square().sum()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not missing
    assert not model.pos_embed.requires_grad


@pytest.mark.parametrize("qk_norm", [False, True])
def test_taps_and_plain_attention_leave_v_alone(qk_norm):
    torch.manual_seed(0)
    model = SiT(input_size=8, hidden_size=48, depth=9, num_heads=4, num_classes=3, qk_norm=qk_norm, z_dims=(8,),
                projector_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    plain = model(x, t, y)
    assert torch.equal(plain, model(x, t, y, return_alignment=True)[0])
    model.fused_attn = False
    torch.testing.assert_close(model(x, t, y), plain, rtol=1e-4, atol=1e-5)


def nano_models():
    """(model, y) of both kinds: two blocks, one of them tapped; no weights are zero."""
    torch.manual_seed(0)
    sizes = {"input_size": 8, "depth": 2, "encoder_depth": 1, "attn_layers": (1,), "z_dims": (8,), "projector_dim": 16}
    models = ((SiT(hidden_size=48, num_heads=4, num_classes=3, **sizes), torch.tensor([0, 3])),
              (MMDiT(context_dim=16, **sizes), torch.randn(2, 5, 16)))
    with torch.no_grad():
        for model, _ in models:
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return models


@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_tokens_lie_row_by_row(kind):
    """In every block: elementwise work and norms are slower on transposed tokens."""
    model, y = nano_models()[kind]
    seen = []
    for block in model.blocks if kind == 0 else model.joint_blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[kind].is_contiguous()))
    model(torch.randn(2, 4, 8, 8), torch.rand(2), y)
    assert seen == [True, True]


def outputs_and_gradients(model, y):
    """All outputs and gradients that a training step of either phase uses."""
    x, t = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8), torch.tensor([0.2, 0.7])
    found = []
    for taps in (True, False):
        model.zero_grad()
        v, alignment = model(x, t, y, return_alignment=True) if taps else (model(x, t, y), Alignment([], {}))
        used = [v, *alignment.features, *(tensor for qk in alignment.attention.values() for tensor in (qk.q, qk.k))]
        sum(tensor.square().mean() for tensor in used).backward()
        found += [*used, *(p.grad for p in model.parameters() if p.grad is not None)]
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_gradient_checkpointing_changes_nothing(kind):
    """Except that each block, taps included, runs again in the backward pass."""
    model, y = nano_models()[kind]
    plain = outputs_and_gradients(model, y)
    calls = []
    blocks = model.blocks if kind == 0 else model.joint_blocks
    blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.grad_checkpointing = True
    torch.testing.assert_close(outputs_and_gradients(model, y), plain, rtol=0, atol=0)
    assert len(calls) == 4
    with torch.no_grad():
        model(torch.zeros(2, 4, 8, 8), torch.zeros(2), y)  # nothing to keep: no checkpoint
    assert len(calls) == 5


@pytest.mark.parametrize("kind", [0, 1], ids=["SiT", "MMDiT"])
def test_compiled_blocks_share_graphs_and_give_the_same(kind, monkeypatch):
    """One graph for tapped and one for other blocks (MMDiT's last has one more); Phase II compiles nothing.

    Skips the C++ compilation, which takes a minute: test_loss_curve.py covers it.
    """
    model, y = nano_models()[kind]
    eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    plain = outputs_and_gradients(model, y)
    torch._dynamo.reset()
    counters.clear()
    model.compile()
    torch.testing.assert_close(outputs_and_gradients(model, y), plain, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 + kind and not counters["graph_break"]


def test_no_logits_and_no_projector_in_sampling(monkeypatch):
    """Without return_alignment neither an attention map nor a projection is computed."""
    model = SiT(input_size=8, hidden_size=48, depth=9, num_heads=4, num_classes=3, z_dims=(8,), projector_dim=16)
    monkeypatch.setattr(QK, "logits", lambda self: pytest.fail("logits were computed"))
    model.projectors[0].register_forward_hook(lambda *_: pytest.fail("the projector ran"))
    model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0]))


def test_qk_scale_and_logits():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    assert QK(q, k).scale == 0.5
    torch.testing.assert_close(QK(q, k, 2.0).logits(), 2 * torch.einsum("nhid,nhjd->nhij", q, k))


def small_mmdit(**kwargs):
    torch.manual_seed(0)
    return MMDiT(input_size=8, depth=3, context_dim=10, encoder_depth=2, attn_layers=(0, 2), z_dims=(8,),
                 projector_dim=16,
                 **kwargs)


def text_inputs(length=5):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, generator=generator),
            torch.randn(2, length, 10, generator=generator))


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_mmdit_are_differences(fused):
    """For each weight along a random direction, in float64. (test_golden.py has v and the taps.)"""
    model, inputs = small_mmdit(fused_attn=fused).double(), [value.double() for value in text_inputs()]
    cotangent = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (model(*inputs) * cotangent).sum().backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("projectors"):
            step = 1e-5 * torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            with torch.no_grad():
                parameter.add_(step)
                above = model(*inputs)
                parameter.sub_(2 * step)
                below = model(*inputs)
                parameter.add_(step)
            slope = ((above - below) * cotangent).sum() / 2
            torch.testing.assert_close((parameter.grad * step).sum(), slope, rtol=1e-5, atol=1e-9)


def test_text_never_enters_the_aligned_attention():
    """The map is of image tokens only, for any number of text tokens; the text still moves the features."""
    model, taps = small_mmdit(), []
    for length in (1, 5, 9):
        with torch.no_grad():
            v, alignment = model(*text_inputs(length), return_alignment=True)
        assert torch.equal(v, model(*text_inputs(length)))
        assert list(alignment.attention) == [0, 2] and [f.shape for f in alignment.features] == [(2, 16, 8)]
        for qk in alignment.attention.values():
            assert qk.q.shape == qk.k.shape == (2, 3, 16, 32)
            torch.testing.assert_close(qk.logits().softmax(-1).sum(-1), torch.ones(2, 3, 16))
        taps.append(alignment)
    assert torch.equal(taps[0].attention[0].logits(), taps[1].attention[0].logits())  # text has not entered yet
    assert not torch.allclose(taps[0].attention[2].logits(), taps[1].attention[2].logits(), atol=1e-4)


@pytest.mark.parametrize("zero_init, qk_norm", [(False, False), (True, False), (False, True)])
def test_every_parameter_of_mmdit_gets_a_gradient(zero_init, qk_norm):
    """PyTorch's init gives gradients at once; --zero-init gives v = 0 at the start for any input."""
    model = small_mmdit(zero_init=zero_init, qk_norm=qk_norm)
    if zero_init:
        assert not model(*text_inputs()).any()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    v, alignment = model(*text_inputs(), return_alignment=True)
    (v.square().sum() + alignment.features[0].square().sum()).backward()
    assert v.any() and not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_mmdit_starts_as_pytorch_s_layers_do():
    """Weights and biases of linear layers and patches: uniform within 1 / sqrt(inputs), as the published runs."""
    model = small_mmdit()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            bound = module.weight[0].numel() ** -0.5
            assert 0.97 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.1), name
            assert module.bias.any() and module.bias.abs().max() <= bound, name


def equal_lines(paths):
    """The longest run of equal lines, blank ones left out, that two files share."""
    a, b = ([line.strip() for line in (ROOT / path).read_text().splitlines() if line.strip()] for path in paths)
    block = difflib.SequenceMatcher(None, a, b, autojunk=False).find_longest_match()
    return a[block.a:block.a + block.size]


@pytest.mark.parametrize("paths", [("train.py", "train_t2i.py"), ("generate.py", "generate_t2i.py"),
                                   ("models/sit.py", "models/mmdit.py")], ids=lambda paths: paths[1])
def test_classes_and_text_share_code_by_import(paths):
    """Two copies drift: the published script for text lost its attention loss that way."""
    shared = equal_lines(paths)
    assert 0 < len(shared) < 8, shared


def test_small_mmdit_of_the_table():
    config = MMDIT_CONFIGS["MMDiT-T"]
    model = MMDiT_models["MMDiT-T"](input_size=16, context_dim=384, z_dims=(384,))
    v, alignment = model(torch.randn(1, 4, 16, 16), torch.rand(1), torch.randn(1, 18, 384), return_alignment=True)
    assert v.shape == (1, 4, 16, 16) and alignment.features[0].shape == (1, 64, 384)
    assert list(alignment.attention) == [student for student, _ in config["attn_pairs"]]
    assert sum(p.numel() for p in model.parameters()) == 2_493_840
    with pytest.raises(ValueError, match="no multiple"):
        MMDiT(input_size=7)
    with pytest.raises(ValueError, match="outside a depth of 2"):
        MMDiT(depth=2)
