"""Parity with numbers computed by the published code (tests/golden/): networks, losses, gradients, samplers, keys."""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from loss import SILoss
from models.layers import QK, Alignment
from models.mmdit import MMDIT_CONFIGS, MMDiT, MMDiT_models
from models.sit import SIT_CONFIGS, SiT, SiT_models
from samplers import euler_maruyama_sampler, euler_sampler, guided
from tests.conftest import ROOT
from tests.golden.fill import arr, fill_value

GOLDEN = Path(__file__).parent / "golden"
fill = functools.cache(fill_value)  # seconds for MMDiT


def golden(name):
    return np.load(GOLDEN / f"{name}.npz")


def close(actual, expected, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=tolerance, atol=tolerance)


def filled(model):
    """`model` in eval mode with the golden weights."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.copy_(torch.from_numpy(fill(name, tuple(parameter.shape))))
    return model.eval()


def golden_sit(**kwargs):
    return filled(SiT(input_size=32, patch_size=2, hidden_size=96, depth=9, num_heads=12, num_classes=10,
                      encoder_depth=8, z_dims=(64,), projector_dim=48, **kwargs))


def golden_mmdit(**kwargs):
    return filled(MMDiT(depth=12, encoder_depth=8, z_dims=(64,), projector_dim=48, **kwargs))


def sit_inputs(seed=11, batch=2):
    t = np.random.RandomState(seed + 1).rand(batch).astype(np.float32)
    return (torch.from_numpy(arr(seed, batch, 4, 32, 32)), torch.arange(batch) % 10, torch.from_numpy(t),
            torch.from_numpy(arr(seed + 2, batch, 4, 32, 32)))


def mmdit_inputs():
    x, _, t, noise = sit_inputs(41)
    return x, torch.from_numpy(arr(46, 2, 7, 768)), t, noise


def logits_as_qk(logits):
    """A QK whose logits are exactly the given (N, H, T, T)."""
    return QK(torch.from_numpy(logits), torch.eye(logits.shape[-1]).expand(logits.shape), 1.0)


def golden_teacher(seed=11, batch=2):
    attention = {i: logits_as_qk(arr(seed * 1000 + i, batch, 12, 256, 256)) for i in range(8, 12)}
    return Alignment([torch.from_numpy(arr(seed * 1000 + 999, batch, 256, 64))], attention)


NETWORKS = {"sit_linear": (golden_sit, sit_inputs, 11), "mmdit_linear_d12": (golden_mmdit, mmdit_inputs, 41)}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("fused", [True, False])
def test_forward(name, fused):
    file, (network, inputs, _) = golden(name), NETWORKS[name]
    model, (x, y, t, _) = network(fused_attn=fused), inputs()
    with torch.no_grad():
        v, alignment = model(x, t, y, return_alignment=True)
        close(model(x, t, y), v, 1e-6)
    close(v, file["v"])
    close(alignment.features[0][:, :8], file["proj"])
    for block in (5, 7):
        close(alignment.attention[block].logits()[:, :, :4, :16], file[f"attn{block}"])
    assert sorted(alignment.attention) == [4, 5, 6, 7]


@pytest.mark.parametrize("name", NETWORKS)
def test_losses(name):
    file, (network, inputs, seed) = golden(name), NETWORKS[name]
    x, y, t, noise = inputs()
    with torch.no_grad():
        losses = SILoss()(network(), x, y, golden_teacher(seed), t, noise)
    close(losses["denoise"], file["denoise"])
    close(losses["feature"], file["proj_loss"])
    close(losses["attention"], file["attn_loss"])


def test_gradients():
    """SiT only: the golden file of MMDiT has no gradients."""
    file, model = golden("sit_linear"), golden_sit()
    x, y, t, noise = sit_inputs()
    losses = SILoss()(model, x, y, golden_teacher(), t, noise)
    total = losses["denoise"].mean() + 0.5 * losses["feature"] + 0.5 * losses["attention"]
    close(total.detach(), file["total"])
    total.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}
    expected = dict(zip(file["gnames"].tolist(), file["gnorms"].tolist(), strict=True))
    assert norms.keys() == expected.keys()
    close([norms[name] for name in expected], list(expected.values()))


def toy(x, t, y):
    """v(x, t, c) = tanh(x) (1 - t / 2) + 0.3 sin(c) + 0.1, c = the label or the mean of the text tokens.

    The golden run added the two terms without x first: in float32 the order shows at 1e-8.
    """
    c = y.float() if y.dim() == 1 else y.mean(dim=(1, 2))
    t, c = t[:, None, None, None], c[:, None, None, None].to(x.dtype)
    return torch.tanh(x) * (1 - t / 2) + (0.3 * torch.sin(c) + 0.1)


def sample(seed, sampler, cfg_scale=1.0, low=0.0, high=1.0, text=False, device="cpu", **kwargs):
    z = torch.from_numpy(arr(seed, 3, 4, 8, 8)).to(device)
    y, y_null = torch.tensor([1, 5, 999]), torch.full((3,), 1000)
    if text:
        y, y_null = torch.from_numpy(arr(seed + 1, 3, 5, 16)), torch.from_numpy(arr(seed + 2, 3, 5, 16))
    if sampler is euler_maruyama_sampler:  # the golden noise is the CPU's
        kwargs["noise"] = lambda x: torch.randn(x.shape, dtype=x.dtype).to(x.device)
    torch.manual_seed(seed)
    return sampler(guided(toy, y.to(device), y_null.to(device), cfg_scale, low, high), z, **kwargs)


SAMPLES = {
    "euler_cfg_interval": (4, euler_sampler, {"cfg_scale": 1.65, "low": 0.1, "high": 0.72, "num_steps": 25}),
    "heun_cfg": (5, euler_sampler, {"cfg_scale": 4.0, "num_steps": 12, "heun": True}),
    "sde_plain": (6, euler_maruyama_sampler, {"num_steps": 30}),
    "sde_cfg_interval": (7, euler_maruyama_sampler, {"cfg_scale": 1.65, "high": 0.72, "num_steps": 40}),
    "sde_t2i": (9, euler_maruyama_sampler, {"cfg_scale": 2.25, "text": True, "num_steps": 25}),
}


def save_samples(path):
    np.savez(path, **{name: sample(seed, sampler, **arguments) for name, (seed, sampler, arguments) in SAMPLES.items()})


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """From a process in which MKL runs the same code on every CPU: else float32's tanh differs in its last bit."""
    path = tmp_path_factory.mktemp("golden") / "samples.npz"
    code = f"from tests.test_golden import save_samples; save_samples({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "MKL_CBWR": "COMPATIBLE"})
    return np.load(path, allow_pickle=False)


@pytest.mark.parametrize("name", SAMPLES)
def test_samplers(samples, name):
    close(samples[name], golden(name)["x"], 1e-8 if name.startswith("sde") else 1e-10)


@pytest.mark.parametrize("name", ["SiT-B/2", "SiT-L/2", "SiT-XL/2", "SiT-XL/4", "MMDiT"])
def test_published_state_dict(name):
    published = json.loads((GOLDEN / "state_dict_keys.json").read_text())[name]
    with torch.device("meta"):
        model = {**SiT_models, **MMDiT_models}[name]()
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert list(ours.items()) == list(published.items())  # in order: a published `opt` relies on it
    count = {"SiT-B/2": 137_845_008, "SiT-L/2": 465_955_600, "SiT-XL/2": 683_242_512, "MMDiT": 512_612_112}
    if name in count:
        assert sum(value.numel() for value in model.state_dict().values()) == count[name]


@pytest.mark.parametrize("size, depth, width, heads, encoder_depth, pairs, early_stop", [
    ("S", 12, 384, 6, 5, ((2, 7), (3, 9), (4, 11)), 100_000),
    ("B", 12, 768, 12, 5, ((2, 7), (3, 9), (4, 11)), 100_000),
    ("L", 24, 1024, 16, 8, ((4, 8), (5, 9), (6, 10), (7, 11)), 250_000),
    ("XL", 28, 1152, 16, 8, ((4, 8), (5, 9), (6, 10), (7, 11)), 250_000),
])
def test_config_table_is_the_papers(size, depth, width, heads, encoder_depth, pairs, early_stop):
    for patch in (1, 2, 4, 8):
        assert SIT_CONFIGS[f"SiT-{size}/{patch}"] == {
            "depth": depth, "hidden_size": width, "num_heads": heads, "patch_size": patch,
            "encoder_depth": encoder_depth, "attn_pairs": pairs, "early_stop_point": early_stop}
    assert MMDIT_CONFIGS["MMDiT"] == {"depth": 24, "patch_size": 2, "encoder_depth": 8, "early_stop_point": 150_000,
                                      "attn_pairs": ((4, 8), (5, 9), (6, 10), (7, 11))}
