"""Samplers: from noise (t = 1) to data (t = 0) along velocity(x, t). The state is float64 throughout.

Samplers take any velocity function; `guided` adds conditions and guidance. SAMPLERS is the table behind --mode.
"""
import itertools
import math

import torch

from loss import interpolant, shift_time


def guided(model, y, y_null, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0):
    """Classifier-free guidance on an interval of t: v_null + w (v_y - v_null) where low <= t <= high, else v_y.

    model(x, t (N,), y) -> v; y and y_null hold one condition per image. Returns velocity(x (N, ...), t a scalar or
    (N,)) -> float64 like x. The batch is doubled only where guidance acts. Heun's corrector decides by its own t; the
    published code uses the predictor's t.
    """
    both = torch.cat([y, y_null])

    def velocity(x, t):
        # Compare in float64, like the samplers' times. Keep a scalar t on the CPU to avoid GPU syncs.
        t = torch.as_tensor(t, dtype=torch.float64)
        inside = (guidance_low <= t) & (t <= guidance_high) & (cfg_scale > 1)
        times = t.to(x.device, x.dtype) if t.dim() else torch.full((len(x),), t.item(), dtype=x.dtype, device=x.device)
        if not inside.any():
            return model(x, times, y).double()
        v, v_null = model(torch.cat([x, x]), torch.cat([times, times]), both).double().chunk(2)
        if inside.dim() == 0:
            return v_null + cfg_scale * (v - v_null)
        inside = inside.to(x.device).reshape(-1, *[1] * (x.dim() - 1))
        return torch.where(inside, v_null + cfg_scale * (v - v_null), v)

    return velocity


# --time-grid -> (u in [0, 1], S of --time-shift) -> t; 0 and 1 stay in place
TIME_GRIDS = {"uniform": lambda u, shift: u, "quadratic": lambda u, shift: u ** 2,
              "shift": shift_time}


def step_times(count, last=0.0, time_grid="uniform", time_shift=3.0):
    """linspace(1, last, count) mapped by a time grid, as floats. `last` is mapped, too: "shift" makes 0.111 of 0.04."""
    even = torch.linspace(1, last, count, dtype=torch.float64).tolist()
    return [min(1.0, TIME_GRIDS[time_grid](u, time_shift)) for u in even]  # the division may round up


@torch.no_grad()
def euler_sampler(velocity, latents, num_steps=50, heun=False, time_grid="uniform", time_shift=3.0, **_):
    """Probability-flow ODE by Euler's method on linspace(1, 0, num_steps + 1), or on another time grid.

    `heun` makes every step but the last second order.
    """
    dtype, x = latents.dtype, latents.double()
    times = step_times(num_steps + 1, 0.0, time_grid, time_shift)
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = velocity(x.to(dtype), t).double()
        x_next = x + (t_next - t) * v
        if heun and i < num_steps - 1:
            v_next = velocity(x_next.to(dtype), t_next).double()
            x_next = x + (t_next - t) * (v + v_next) / 2
        x = x_next
    return x


def score_from_velocity(v, x, t, path_type="linear"):
    """Score of p_t at x (N, ...) for velocity v and t a scalar or (N,).

    s = (r v - x) / var with r = alpha / d_alpha and var = sigma^2 - r d_sigma sigma.
    """
    t = torch.as_tensor(t, dtype=x.dtype)
    t = t.to(x.device).reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t  # a scalar stays on the CPU
    alpha, sigma, d_alpha, d_sigma = interpolant(t, path_type)
    r = alpha / d_alpha
    return (r * v - x) / (sigma ** 2 - r * d_sigma * sigma)


@torch.no_grad()
def euler_maruyama_sampler(velocity, latents, num_steps=250, path_type="linear", noise=torch.randn_like,
                           time_grid="uniform", time_shift=3.0, **_):
    """Reverse SDE with diffusion w(t) = 2 t on linspace(1, 0.04, num_steps), then a last step to 0 without noise."""
    dtype, x = latents.dtype, latents.double()
    times = [*step_times(num_steps, 0.04, time_grid, time_shift), 0.0]
    for t, t_next in itertools.pairwise(times):
        dt, w = t_next - t, 2 * t
        v = velocity(x.to(dtype), t).double()
        drift = v - w / 2 * score_from_velocity(v, x, t, path_type)
        eps = noise(x) if t_next > 0 else 0  # the last step is drift alone
        x = x + drift * dt + (w * -dt) ** 0.5 * eps
    return x


@torch.no_grad()
def dpm_sampler(velocity, latents, num_steps=20, path_type="linear", time_grid="uniform", time_shift=3.0, **_):
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) for the probability-flow ODE: one call per step, second order.

    The predicted data are (d_sigma x - sigma v) / (alpha d_sigma - d_alpha sigma). The first and the last step
    are of first order, as alpha is 0 at t = 1 and sigma is 0 at t = 0.
    """
    dtype, x = latents.dtype, latents.double()
    times = step_times(num_steps + 1, 0.0, time_grid, time_shift)
    before = None  # (data, log-SNR step) of the step before
    for t, t_next in itertools.pairwise(times):
        alpha, sigma, d_alpha, d_sigma = (float(value) for value in interpolant(torch.tensor(t).double(), path_type))
        data = (d_sigma * x - sigma * velocity(x.to(dtype), t).double()) / (alpha * d_sigma - d_alpha * sigma)
        if t_next == 0:
            return data
        alpha_next, sigma_next, *_ = (float(value) for value in interpolant(torch.tensor(t_next).double(), path_type))
        h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma) if t < 1 else math.inf
        ahead = data if before is None else data + (data - before[0]) * h / (2 * before[1])
        x = sigma_next / sigma * x - alpha_next * math.expm1(-h) * ahead
        before = data, h
    return x


@torch.no_grad()
def dopri5_sampler(velocity, latents, num_steps=50, tolerance=1e-4, **_):
    """Probability-flow ODE by Dormand and Prince's method of order 5 (4), with adaptive steps.

    Each image has its own steps, so it does not depend on its batch. The first step is 1 / num_steps. `tolerance` is
    for the error of a step, both absolute and relative.
    """
    from scipy.integrate import RK45  # its tables; here: --help need not wait for it
    a, b, c, e = (torch.from_numpy(table).to(latents.device) for table in (RK45.A, RK45.B, RK45.C, RK45.E))
    dtype, x = latents.dtype, latents.double()
    wide = [len(x), *[1] * (x.dim() - 1)]
    t = x.new_ones(len(x))
    h = torch.full_like(t, 1 / num_steps)
    slopes = [velocity(x.to(dtype), t).double()]

    def moved(weights):
        return x - h.reshape(wide) * sum(w * slope for w, slope in zip(weights, slopes, strict=False))

    while (t > 0).any():
        h = torch.minimum(h, t)
        for row, share in zip(a[1:], c[1:], strict=True):
            slopes.append(velocity(moved(row).to(dtype), t - share * h).double())
        x_next = moved(b)
        slopes.append(velocity(x_next.to(dtype), t - h).double())
        scale = tolerance * (1 + torch.maximum(x.abs(), x_next.abs()))
        error = ((moved(e) - x) / scale).flatten(1).square().mean(dim=1).sqrt()
        good = ~(error > 1)  # NaN ends the loop, too
        x = torch.where(good.reshape(wide), x_next, x)
        slopes = [torch.where(good.reshape(wide), slopes[-1], slopes[0])]
        t, h = torch.where(good, t - h, t), h * (0.9 * error ** -0.2).clamp(0.2, 10)
    return x


# --mode -> sampler(velocity, latents (N, ...), num_steps, **options) -> float64 (N, ...). velocity sees x in the dtype
# of `latents`. All samplers get the same options and ignore those they do not use: heun (second order),
# path_type, noise(x), a float64 standard normal like x, time_grid and time_shift, and tolerance (of adaptive steps).
SAMPLERS = {"ode": euler_sampler, "sde": euler_maruyama_sampler, "dpm": dpm_sampler, "dopri5": dopri5_sampler}
