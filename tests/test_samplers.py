"""Samplers on data whose velocity is known, and guidance that acts inside its interval only."""
import pytest
import torch

from loss import interpolant
from samplers import euler_maruyama_sampler, euler_sampler, guided, score_from_velocity

MEAN, STD = 1.5, 0.3


def gaussian_velocity(path_type):
    """The exact marginal velocity for data N(MEAN, STD^2): E[d_alpha x + d_sigma eps | x_t]."""
    def velocity(x, t):
        alpha, sigma, d_alpha, d_sigma = interpolant(torch.tensor(float(t), dtype=torch.float64), path_type)
        variance = (alpha * STD) ** 2 + sigma ** 2
        gain = (alpha * d_alpha * STD ** 2 + sigma * d_sigma) / variance
        return d_alpha * MEAN + gain * (x - alpha * MEAN)
    return velocity


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_gaussian_data(sampler, path_type):
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = (z - z.mean()) / z.std()
    torch.manual_seed(1)
    if sampler == "sde":
        x = euler_maruyama_sampler(gaussian_velocity(path_type), z, 400, path_type)
        tolerance = 0.02
    else:
        x = euler_sampler(gaussian_velocity(path_type), z, 400, heun=sampler == "heun")
        tolerance = 1e-4 if sampler == "heun" else 0.01
    assert x.dtype == torch.float64
    assert abs(x.mean() - MEAN) < tolerance and abs(x.std() - STD) < tolerance


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_score(path_type):
    """grad log p_t of the Gaussian marginal, for one t and for a t per row."""
    x, times = torch.randn(5, 1, dtype=torch.float64), torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    velocity, expected = gaussian_velocity(path_type), []
    for row, t in zip(x, times, strict=True):
        alpha, sigma, _, _ = interpolant(t, path_type)
        expected.append(-(row - alpha * MEAN) / ((alpha * STD) ** 2 + sigma ** 2))
        torch.testing.assert_close(score_from_velocity(velocity(row, t), row, float(t), path_type), expected[-1])
    v = torch.stack([velocity(row, t) for row, t in zip(x, times, strict=True)])
    torch.testing.assert_close(score_from_velocity(v, x, times, path_type), torch.stack(expected))


class Recorder:
    """A model that notes (t, batch) and answers its condition."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y):
        self.calls.append((round(float(t[0]), 6), len(x)))
        return y.float()[:, None].expand_as(x)


def test_guidance_only_inside_the_interval():
    model, x = Recorder(), torch.zeros(3, 2)
    velocity = guided(model, torch.tensor([1, 2, 3]), torch.zeros(3), 2.0, 0.2, 0.6)
    inside, outside = torch.tensor([[2.0], [4], [6]]), torch.tensor([[1.0], [2], [3]])
    for t, expected in ((0.1, outside), (0.2, inside), (0.4, inside), (0.6, inside), (0.7, outside)):
        assert torch.equal(velocity(x, t), expected.double().expand(3, 2))
    assert model.calls == [(0.1, 3), (0.2, 6), (0.4, 6), (0.6, 6), (0.7, 3)]
    mixed = velocity(x, torch.tensor([0.1, 0.4, 0.7]))
    assert mixed[:, 0].tolist() == [1, 4, 3]


def test_the_interval_is_decided_in_float64():
    """1 - 22 / 50 is 0.5599999999999999 in the samplers' float64, below 0.56, but not in float32."""
    model = Recorder()
    guided(model, torch.ones(2), torch.zeros(2), 2.0, 0.56, 1.0)(torch.zeros(2, 1), 0.5599999999999999)
    assert model.calls == [(0.56, 2)]


def test_no_doubling_without_guidance():
    model = Recorder()
    euler_sampler(guided(model, torch.ones(2), torch.zeros(2), 1.0), torch.zeros(2, 1), 4)
    assert {batch for _, batch in model.calls} == {2}


def test_heun_corrector_is_guided_by_its_own_time():
    """Of steps 1 -> .5 -> 0 with guidance on [0, .5], the first corrector (t = .5) is guided, its predictor is not."""
    model = Recorder()
    euler_sampler(guided(model, torch.ones(2), torch.zeros(2), 3.0, 0.0, 0.5), torch.zeros(2, 1), 2, heun=True)
    assert model.calls == [(1.0, 2), (0.5, 4), (0.5, 4)]
