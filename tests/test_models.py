"""Every model of the table: shapes, counts, gradients, v = 0 at the start; taps that change nothing."""
import pytest
import torch

from models.layers import QK
from models.sit import SIT_CONFIGS, SiT, SiT_models


def expected_parameters(c, input_size=32, classes=1000, projector_dim=2048, z_dim=768):
    """The count, written out layer by layer."""
    d, p = c["hidden_size"], c["patch_size"]
    m = c.get("projector_dim", projector_dim)
    block = (d * 3 * d + 3 * d) + (d * d + d) + (d * 4 * d + 4 * d) + (4 * d * d + d) + (d * 6 * d + 6 * d)
    embed = (4 * p * p * d + d) + (256 * d + d) + (d * d + d) + (classes + 1) * d + (input_size // p) ** 2 * d
    final = (d * 2 * d + 2 * d) + (d * p * p * 4 + p * p * 4)
    return c["depth"] * block + embed + final + (d * m + m) + (m * m + m) + (m * z_dim + z_dim)


@pytest.mark.parametrize("name", SIT_CONFIGS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = SiT_models[name]()
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(SIT_CONFIGS[name])


@pytest.mark.parametrize("name", SIT_CONFIGS)
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
