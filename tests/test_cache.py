"""Caches between steps: nothing changes at interval 1, polynomials are exact, and no state outlives a batch."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import generate
import sampling.images
from benchmarks import pareto
from models.mmdit import MMDiT_models
from models.sit import SiT_models
from runtime.errors import UserError
from samplers import guided
from sampling.cache import FIRST, flops_of_call, sample_latents, taylor_weights
from tests.conftest import ROOT, call_main, script
from tests.test_generate import NAME, arguments, make_checkpoint, pictures


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "0000005.pt")


@pytest.fixture(scope="module", params=["SiT-T/2", "MMDiT-T"])
def network(request):
    torch.manual_seed(0)
    if request.param == "SiT-T/2":
        network = SiT_models["SiT-T/2"](input_size=8, num_classes=4, z_dims=())
    else:
        network = MMDiT_models["MMDiT-T"](input_size=8, context_dim=16, z_dims=())
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def conditions(network, n):
    if hasattr(network, "context_embedder"):
        return torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(1)), torch.zeros(n, 6, 16)
    return torch.arange(n) % 4, torch.full((n,), 4)


@torch.no_grad()
def sample(network, n=2, mode="ode", steps=12, kind="none", interval=3, order=2, boundary=0.5, low=0.0, high=1.0,
           heun=False):
    """(latents, Cache) from fixed noise."""
    noise = torch.Generator().manual_seed(3)
    options = {"heun": heun, "noise": lambda x: torch.randn(1, *x.shape[1:], generator=noise).double().expand_as(x)}
    z = torch.randn(n, *network.latent_shape, generator=torch.Generator().manual_seed(2))
    velocity = guided(network, *conditions(network, n), 2.0, low, high)
    return sample_latents(network, velocity, z, mode, steps, kind, interval, order, boundary, **options)


@pytest.mark.parametrize("kind", ["taylor", "delta"])
@pytest.mark.parametrize("mode, heun", [("ode", False), ("ode", True), ("sde", False), ("dpm", False)])
def test_interval_1_is_no_cache(network, kind, mode, heun):
    """Equal bit for bit; an interval of 3 gives a different, close result."""
    plain, _ = sample(network, mode=mode, heun=heun, low=0.2, high=0.7)
    assert torch.equal(sample(network, mode=mode, heun=heun, low=0.2, high=0.7, kind=kind, interval=1)[0], plain)
    near, _ = sample(network, mode=mode, heun=heun, low=0.2, high=0.7, kind=kind)
    assert 0 < (near - plain).square().mean().sqrt() < 0.2 * plain.std()


@pytest.mark.parametrize("order", range(5))
def test_a_polynomial_is_predicted_exactly(order):
    """Exact up to degree = order, at any spacing of times; order 0 repeats the newest value."""
    times, t = [0.6, 0.66, 0.75, 0.8, 0.9][:order + 1], 0.57
    weights = taylor_weights(t, times)
    for degree in range(order + 1):
        assert np.dot(weights, np.power(times, degree)) == pytest.approx(t ** degree, abs=1e-10)
    assert order or weights == [1]


def test_a_network_that_moves_in_a_line_is_predicted_exactly(network, monkeypatch):
    """Branches that are linear in t: first order gives what running in full gives."""
    def linear(block, forward):
        def run(*arguments, with_branches=False):
            branches = [(1 + t[0]) * torch.ones_like(arguments[-4]) for _ in range(2)]
            count = 2 if len(arguments) == 4 or not hasattr(block.context_block, "mlp") else 4
            if count == 4:
                branches += [(2 - t[0]) * torch.ones_like(arguments[0]) for _ in range(2)]
            return (*block.assembled(*arguments[:-2], branches), *([branches] if with_branches else []))
        return run

    t = [0.0]
    network.register_forward_pre_hook(lambda module, inputs: t.__setitem__(0, float(inputs[1][0])))
    for block in getattr(network, "blocks", None) or network.joint_blocks:
        monkeypatch.setattr(block, "forward", linear(block, block.forward))
    plain, _ = sample(network)
    torch.testing.assert_close(sample(network, kind="taylor", order=1)[0], plain, rtol=1e-5, atol=1e-6)
    assert (sample(network, kind="taylor", order=0)[0] - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["taylor", "delta"])
def test_batches_do_not_mix(network, kind):
    """An image is the same in batches of 3 and 1, with guidance switching on and off; the state is freed."""
    whole, _ = sample(network, 3, kind=kind, low=0.2, high=0.7)
    alone, _ = sample(network, 1, kind=kind, low=0.2, high=0.7)
    torch.testing.assert_close(whole[:1], alone, rtol=1e-5, atol=1e-5)
    assert network.cache is None
    assert torch.equal(sample(network, 3, kind=kind, low=0.2, high=0.7)[0], whole)


def test_what_is_computed(network):
    """Full calls: the first ones, every third, the last, and where guidance begins. Delta: a quarter more."""
    blocks = len(getattr(network, "blocks", None) or network.joint_blocks)
    full = [*range(FIRST), 5, 8, 11]
    _, state = sample(network, kind="taylor", steps=12, high=0.0)
    assert state.computed == 2 * blocks * len(full) and state.rows == 2 * 12
    _, state = sample(network, kind="delta", steps=12, high=0.0)
    kept = blocks - round(0.75 * blocks)
    assert state.computed == 2 * (blocks * len(full) + kept * (12 - len(full)))
    _, state = sample(network, kind="taylor", steps=12, high=0.5)  # from the seventh call, t = 0.5, on
    assert state.computed == 2 * blocks * (FIRST + 1 + 2 * 3)  # calls 0, 1, 2, 5 and, doubled, 6, 9, 11
    assert state.rows == 2 * (6 + 2 * 6)


def test_by_the_command_line(monkeypatch, ckpt, tmp_path, capsys):
    """settings.json records the cache; a restart keeps it; another cache counts as other settings."""
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / "plain", "--num-steps", 12))
    cost = {}
    for kind in ("taylor", "delta"):
        given = arguments(ckpt, tmp_path / kind, "--num-steps", 12, "--cache", kind)
        call_main(monkeypatch, generate, *given)
        settings = json.loads((tmp_path / kind / NAME.format(mode="ode") / "settings.json").read_text())
        cost[kind] = settings["cost"]
        assert settings["cache"] == kind and not np.array_equal(pictures(tmp_path / kind), pictures(tmp_path / "plain"))
        call_main(monkeypatch, generate, *given)  # makes nothing
        again = json.loads((tmp_path / kind / NAME.format(mode="ode") / "settings.json").read_text())
        assert again == settings
        with pytest.raises(UserError, match="other settings .cache_interval 3 -> 2"):
            call_main(monkeypatch, generate, *given, "--cache-interval", 2)
    assert cost["taylor"]["calls"] == cost["delta"]["calls"] == 22  # of 12, two before guidance begins
    assert cost["taylor"]["computed"] < cost["delta"]["computed"] < 22
    assert f"of which {cost['delta']['computed']:.1f} were computed" in capsys.readouterr().out
    with pytest.raises(UserError, match="--cache taylor needs steps that are known before, which --mode dopri5"):
        call_main(monkeypatch, generate, *arguments(ckpt, tmp_path, "--mode", "dopri5", "--cache", "taylor"))


@pytest.mark.slow
def test_processes_and_compiled_blocks(monkeypatch, ckpt, tmp_path):
    """Two processes, and compiled blocks, make the same pictures as one process, up to rounding."""
    given = ["--num-steps", 6, "--cache", "taylor", "--mode", "sde"]
    script("generate.py", *arguments(ckpt, tmp_path / "two", *given), processes=2)
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / "one", *given))
    assert np.array_equal(pictures(tmp_path / "one"), pictures(tmp_path / "two"))
    eager = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", eager)
    monkeypatch.setattr(sampling.images, "check_compiler", lambda device: None)
    call_main(monkeypatch, generate, *arguments(ckpt, tmp_path / "compiled", *given, "--compile"))
    difference = np.abs(pictures(tmp_path / "one").astype(int) - pictures(tmp_path / "compiled"))
    assert difference.max() <= 1


def test_operations_of_a_call():
    """2 x weights of the linear layers, per token (condition: once), plus attention's products."""
    network = SiT_models["SiT-T/2"](input_size=16, num_classes=4, z_dims=())
    tokens, width, depth = 64, 160, 5
    blocks = depth * (2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width + 2 * 6 * width ** 2)
    ends = 2 * tokens * width * (16 + 16) + 2 * 2 * width ** 2 + 2 * (256 * width + width ** 2)
    assert flops_of_call(network, torch.zeros(1, dtype=torch.long)) == blocks + ends


@pytest.mark.slow
def test_the_comparison_of_samplers(monkeypatch, ckpt, tmp_path, tiny_data):
    """One row per setting, with distance and scores; the same command repeats none."""
    monkeypatch.setattr(pareto, "EXACT", {"num_steps": 6})
    rows = {"ode 6": {"num_steps": 6}, "ode 6, taylor 2": {"num_steps": 6, "cache": "taylor", "cache_interval": 2},
            "sde 3": {"mode": "sde", "num_steps": 3}}
    monkeypatch.setattr(pareto, "settings", lambda: rows)
    monkeypatch.setattr(pareto, "load_extractor", lambda *_: SimpleNamespace())
    monkeypatch.setattr(pareto, "load_set", lambda *_, **more: None)
    monkeypatch.setattr(pareto, "extract", lambda images, *_: [*images])
    monkeypatch.setattr(pareto, "score", lambda *_, **more: {"FD-EffLite0": 1.5, "KID-EffLite0": 0.25})
    args = SimpleNamespace(ckpt=ckpt, vae=ROOT / "assets/vae-emoji", weights=None, reference=None, samples=3,
                           batch_size=2, cfg_scale=1.5, guidance_high=1.0, out=tmp_path / "out")
    pareto.run(args)
    found = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert found["ode 6"]["distance"] == 0 < found["sde 3"]["distance"]
    assert found["ode 6, taylor 2"]["distance"] > 0 and found["ode 6, taylor 2"]["computed"] == 10
    assert found["ode 6"]["calls"] == 12 and (tmp_path / "out.png").is_file()
    assert "| ode 6, taylor 2 | 12.0 | 10.0 |" in (tmp_path / "out.md").read_text()
    monkeypatch.setattr(pareto, "make", lambda *_, **more: pytest.fail("made again"))
    pareto.run(args)
