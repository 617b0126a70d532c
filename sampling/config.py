"""The flags of generate.py and generate_t2i.py in groups, each with its range beside it."""
import argparse

from runtime.errors import MAX_SEED
from runtime.flags import number, pixels, whole
from samplers import SAMPLERS, TIME_GRIDS
from sampling.cache import CACHES


def add_sampling_flags(parser):
    """The flags of both sampling scripts."""
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("network").add_argument
    add("--ckpt", required=True, help="checkpoint of train.py or of the published code, or an export of it")
    add("--weights", choices=["ema", "model"], default="ema", help="EMA, or the trained weights, which are "
        "better early in training (default ema)")
    add("--vae", help="ema, mse, a hub name or folder in diffusers' format, or none for a network of pixels (default: "
        "the checkpoint's; ema for Stable Diffusion's)")
    add("--latents-stats", metavar="FILE", help="mean and std of the latents' channels, see train.py (default: the "
        "checkpoint's scale and shift)")
    add("--resolution", type=pixels, help="image side in pixels (default: the checkpoint's)")
    add("--path-type", choices=["linear", "cosine"], help="interpolant (default: the checkpoint's, else linear)")
    add("--qk-norm", action=on_off, default=None, help="LayerNorm on q and k (default: the checkpoint's)")
    add("--encoder-depth", type=whole(1), help="1-based block whose output is projected; sampling does not use it "
        "(default: the checkpoint's)")
    add("--projector-embed-dims", help="teacher widths of the projectors, such as 768 (default: the checkpoint's)")

    add_sampler_flags(parser)

    add = parser.add_argument_group("output").add_argument
    add("--sample-dir", default="samples", help="where the folder of images and the .npz go (default samples)")
    add("--prefix", default="", help="prefix of their names, to keep runs or settings apart (default none)")
    add("--per-proc-batch-size", type=whole(1), default=32, help="images a batch and process (default 32)")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="of the network alone (default no: "
        "float32)")
    add("--tf32", action=on_off, default=True, help="TF32 matrix products on Ampere and newer (default on)")
    add("--fused-attn", action=on_off, default=True, help="fused attention (default on)")
    add("--compile", action="store_true", help="torch.compile the network: a minute more at the start")
    add("--legacy", action=on_off, help="no effect: weights of REPA's first release are recognised by their names")


def add_sampler_flags(parser, **swept):
    """Flags of the sampler, for all scripts that sample. `swept`: add_argument's options for flags with many values."""
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("sampling").add_argument
    add("--mode", choices=SAMPLERS, default="ode", help="sampler; ode: Euler, sde: Euler-Maruyama, dpm: "
        "DPM-Solver++(2M), dopri5: adaptive (default %(default)s)")
    add("--num-steps", "--steps", type=whole(1, 10 ** 5), **{"default": 50, **swept}, help="sampler steps; of dopri5 "
        "the first is 1 / num-steps (default %(default)s)")
    add("--heun", action=on_off, default=False, help="second order, for ode (default off)")
    add("--time-grid", choices=TIME_GRIDS, default="uniform", help="where the steps lie; quadratic: t = u^2, shift: "
        "t = S u / (1 + (S - 1) u), for u evenly spaced (default uniform)")
    add("--time-shift", type=number(0.01, 100), default=3.0, help="S of --time-grid shift; above 1 more "
        "steps are noisy (default 3)")
    add("--tolerance", type=number(1e-12, 1), default=1e-4, help="of a step's error, for dopri5 (default 1e-4)")
    add("--cfg-scale", "--cfg", type=number(1), **{"default": 1.5, **swept}, help="guidance scale, 1 = none (default "
        "%(default)s)")
    add("--guidance-low", type=number(0, 1), default=0.0, help="guide where t is at least this (default 0)")
    add("--guidance-high", type=number(0, 1), default=1.0, help="guide where t is at most this (default 1)")
    add("--seed", "--global-seed", dest="global_seed", type=whole(0, MAX_SEED), default=0,
        help="image i is made from (seed, i) (default 0)")

    add = parser.add_argument_group("cache between steps").add_argument
    add("--cache", choices=CACHES, default="none", help="skip work at most steps; taylor: predict attention and MLP "
        "by a polynomial (TaylorSeer's up to order 1), "
        "delta: add what a run of blocks added before (default none)")
    add("--cache-interval", type=whole(1), default=3, help="every so many calls the network is run in full (default 3)")
    add("--cache-order", type=whole(0, 8), default=2, help="degree of taylor's polynomial (default 2)")
    add("--cache-boundary", type=number(0, 1), default=0.5, help="delta skips rear blocks where t is above this, front "
        "blocks below (default 0.5)")
