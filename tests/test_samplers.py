"""Samplers on data with known velocity; guidance acts only inside its interval."""
import pytest
import torch

from loss import interpolant
from samplers import (
    SAMPLERS,
    dopri5_sampler,
    dpm_sampler,
    euler_maruyama_sampler,
    euler_sampler,
    guided,
    score_from_velocity,
    step_times,
)

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


def exact(z):
    """The end point of the probability flow from noise z: the same quantile."""
    return MEAN + STD * z


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_dpm_needs_fewer_steps_than_euler(path_type):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for n in (10, 20, 40, 80):
        dpm, euler = ((sampler(gaussian_velocity(path_type), z, n, path_type=path_type) - exact(z)).square().mean()
                      for sampler in (dpm_sampler, euler_sampler))
        assert dpm < euler / 2


def test_dpm_is_diffusers():
    """Equals DPMSolverMultistepScheduler on its times, which begin a little below 1."""
    from diffusers import DPMSolverMultistepScheduler
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, solver_type="midpoint", prediction_type="flow_prediction",
        use_flow_sigmas=True, final_sigmas_type="zero")
    scheduler.set_timesteps(12)
    times = scheduler.sigmas.double().tolist()
    velocity, x = gaussian_velocity("linear"), torch.linspace(-2, 2, 9)[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samplers.step_times", lambda *_: times)
        ours = dpm_sampler(velocity, x.double(), 12)
    for t, step in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(velocity(x.double(), t).float(), step, x).prev_sample
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path_type", ["linear", "cosine"])
def test_dopri5_keeps_its_tolerance(path_type):
    """Each image has its own steps: it is the same alone and in a batch with images that need more steps."""
    z, calls = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []

    def velocity(x, t):
        calls.append(t)
        return torch.cat([gaussian_velocity(path_type)(row, time)[None] for row, time in zip(x, t, strict=True)])

    counts = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        calls.clear()
        x = dopri5_sampler(velocity, z, tolerance=tolerance)
        counts.append(len(calls))
        assert (x - exact(z)).square().mean().sqrt() < 10 * tolerance
    assert counts == sorted(set(counts)) and counts[-1] < 400
    x = dopri5_sampler(velocity, torch.cat([z, 100 * z]), tolerance=1e-3)
    torch.testing.assert_close(x[:1], dopri5_sampler(velocity, z[:1], tolerance=1e-3))
    broken = dopri5_sampler(lambda x, t: x * float("nan"), z)  # ends
    assert broken.isnan().all()


def test_time_grids():
    """The published times exactly; shift as in SD3; quadratic has most steps near the data."""
    assert step_times(51) == torch.linspace(1, 0, 51, dtype=torch.float64).tolist()
    assert step_times(250, 0.04) == torch.linspace(1, 0.04, 250, dtype=torch.float64).tolist()
    assert step_times(5, 0.0, "shift", 3.0) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert all(1 - 1e-15 <= step_times(2, 0.0, "shift", i / 100)[0] <= 1 for i in range(1, 400))  # guidance compares
    assert step_times(5, 0.0, "quadratic") == [1, 0.5625, 0.25, 0.0625, 0]
    for mode in ("ode", "sde", "dpm"):
        seen = []
        SAMPLERS[mode](lambda x, t, seen=seen: seen.append(t) or 0 * x, torch.zeros(1, 1), 4, time_grid="quadratic")
        assert seen[0] == 1 and seen[1] == pytest.approx((0.75 if mode != "sde" else 0.68) ** 2)


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
