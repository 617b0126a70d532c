"""Images a second when sampling: the published network call, ours, in bf16, compiled, with a cache.

    python benchmarks/sampling.py --model SiT-B/2 --batch-size 8
    python benchmarks/sampling.py --pareto --ckpt exps/run/checkpoints/0008000.pt --vae assets/vae-cifar10 \\
        --reference data/cifar10/ref-val.npz --weights data/cifar10/efficientnet-lite0.pth --out exps/pareto

All variants run in one process, in turns, each sampling one batch without the VAE. Weights are random. --pareto
compares samplers, time grids and caches on one checkpoint: see pareto.py.
"""
import argparse
import functools
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import torch

from benchmarks import published
from benchmarks.measure import alternate, machine, table
from models.sit import SIT_CONFIGS, SiT_models
from runtime.setup import cast_weights, tune
from samplers import SAMPLERS, guided
from sampling.cache import sample_latents

VARIANTS = ("published", "ours", "bf16", "compiled", "compiled bf16")
CACHES = {"taylor 3": ("taylor", 3), "taylor 4": ("taylor", 4), "delta 2": ("delta", 2)}  # of "ours"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=SIT_CONFIGS, default="SiT-B/2", help="default SiT-B/2")
    add("--batch-size", type=int, default=8, help="images (default 8)")
    add("--resolution", type=int, default=256, help="pixels a side, latents an eighth of it (default 256)")
    add("--modes", nargs="+", choices=["sde", "ode", "heun"], default=["sde"], help="default sde")
    add("--num-steps", type=int, default=10, help="sampler steps (default 10)")
    add("--cfg-scale", type=float, default=1.65, help="default 1.65")
    add("--guidance-high", type=float, default=0.72, help="default 0.72")
    add("--variants", nargs="+", choices=[*VARIANTS, *CACHES], default=VARIANTS,
        help="default all without a cache")
    add("--rounds", type=int, default=5, help="timed batches of each (default 5)")
    add("--pareto", action="store_true", help="compare by pictures of --ckpt; takes the flags below")
    add("--ckpt", help="checkpoint of train.py")
    add("--vae", help="its VAE")
    add("--reference", help="what its samples are compared with: npz or folder")
    add("--weights", help="weights of EfficientNet-Lite0")
    add("--samples", type=int, default=500, help="images of each setting (default 500)")
    add("--out", default="exps/pareto", help="beginning of the files' names (default exps/pareto)")
    return parser.parse_args()


def networks(args, device):
    """{variant: model(x, t, y) -> v}."""
    def make(variant):
        torch.manual_seed(0)
        with torch.device(device):  # a CPU takes 8 seconds to draw the weights of XL
            model = SiT_models[args.model](input_size=args.resolution // 8).to(device).eval()
        for block in model.blocks:
            torch.nn.init.normal_(block.adaLN_modulation[1].weight, std=0.02)
        if "compiled" in variant:
            model.compile()
        if "bf16" in variant:
            cast_weights(model, "bf16")
            model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
        if variant == "published":
            return lambda x, t, y: published.forward(model, x, t, y)[0]
        return model
    found = {variant: make(variant) for variant in args.variants if variant not in CACHES}
    cached = found.get("ours") or make("ours")
    return found | {variant: cached for variant in args.variants if variant in CACHES}


@torch.no_grad()
def main():
    args = parse_args()
    if args.pareto:
        from benchmarks import pareto
        return pareto.run(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tune(tf32=True)
    print(machine(device))
    side = args.resolution // 8
    z = torch.randn(args.batch_size, 4, side, side, device=device, generator=torch.Generator(device).manual_seed(0))
    y = torch.arange(args.batch_size, device=device)
    rows, models = [], networks(args, device)

    def sample(variant, mode):
        velocity = guided(models[variant], y, torch.full_like(y, 1000), args.cfg_scale, 0.0, args.guidance_high)
        name, options = "sde" if mode == "sde" else "ode", {"heun": mode == "heun"}
        if variant not in CACHES:
            return SAMPLERS[name](velocity, z, args.num_steps, **options)
        kind, interval = CACHES[variant]
        return sample_latents(models[variant], velocity, z, name, args.num_steps, kind, interval, **options)

    for mode in args.modes:
        works = {variant: functools.partial(sample, variant, mode) for variant in args.variants}
        timed = alternate(works, args.rounds, device, ["published"])
        seconds = {variant: statistics.median(s) for variant, s in timed.items()}
        for variant, median in seconds.items():
            ratio = f"{seconds['published'] / median:.2f}" if "published" in seconds else "-"
            rows.append([mode, variant, f"{median:.2f}", f"{args.batch_size / median:.3f}", ratio])
    print(f"\n{args.model}, {args.resolution} px, batch {args.batch_size}, {args.num_steps} steps, "
          f"guidance {args.cfg_scale} on [0, {args.guidance_high}]\n")
    print(table(["sampler", "variant", "seconds a batch", "images/s", "times faster than published"], rows))


if __name__ == "__main__":
    main()
