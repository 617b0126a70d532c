"""Samplers: from noise (t = 1) to data (t = 0) along velocity(x, t). The state is float64 throughout.

Samplers take any velocity function; `guided` adds conditions and guidance. SAMPLERS is the table behind --mode.
"""
import itertools

import torch

from loss import interpolant


def guided(model, y, y_null, cfg_scale=1.0, guidance_low=0.0, guidance_high=1.0):
    """Classifier-free guidance on an interval of t: v_null + w (v_y - v_null) where low <= t <= high, else v_y.

    model(x, t (N,), y) -> v; y and y_null hold one condition per image. Returns velocity(x (N, ...), t a scalar or
    (N,)) -> float64 like x. The batch is doubled only where guidance acts. Heun's corrector is guided by its own t; the
    published code uses the t of its predictor.
    """
    both = torch.cat([y, y_null])

    def velocity(x, t):
        # Compare in float64, as the samplers count. Keep a scalar t on the CPU to avoid GPU syncs.
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


@torch.no_grad()
def euler_sampler(velocity, latents, num_steps=50, heun=False, **_):
    """Probability-flow ODE by Euler's method on linspace(1, 0, num_steps + 1).

    `heun` makes every step but the last second order.
    """
    dtype, x = latents.dtype, latents.double()
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
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
def euler_maruyama_sampler(velocity, latents, num_steps=250, path_type="linear", noise=torch.randn_like, **_):
    """Reverse SDE with diffusion w(t) = 2 t on linspace(1, 0.04, num_steps), then a last step to 0 without noise."""
    dtype, x = latents.dtype, latents.double()
    times = [*torch.linspace(1, 0.04, num_steps, dtype=torch.float64).tolist(), 0.0]
    for t, t_next in itertools.pairwise(times):
        dt, w = t_next - t, 2 * t
        v = velocity(x.to(dtype), t).double()
        drift = v - w / 2 * score_from_velocity(v, x, t, path_type)
        eps = noise(x) if t_next > 0 else 0  # the last step is drift alone
        x = x + drift * dt + (w * -dt) ** 0.5 * eps
    return x


# --mode -> sampler(velocity, latents (N, ...), num_steps, **options) -> float64 (N, ...). velocity sees x in the dtype
# of `latents`. All samplers are given the same options and ignore those they do not use: heun (second order),
# path_type, and noise(x), a float64 standard normal like x.
SAMPLERS = {"ode": euler_sampler, "sde": euler_maruyama_sampler}
