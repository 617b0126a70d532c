"""Cost and accuracy of samplers, time grids and caches on one checkpoint; for sampling.py --pareto.

For each setting: network calls per image, the share of them that is computed, seconds, the RMS distance of its latents
to a solution from the same noise (ODE: Heun in 500 steps; SDE: itself without a cache) divided by the solution's RMS,
and the FD and KID of its pictures. Writes OUT.md, OUT.png and, row by row, OUT.json; the same command continues from
OUT.json.
"""
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine, table
from evaluations.extract import extract
from evaluations.features import load_extractor
from evaluations.scores import load_set, score
from runtime.files import atomic_write, is_file, read_json, write_json
from runtime.setup import tune
from sampling.images import open_network, sample

SCORES = ("FD-EffLite0", "KID-EffLite0")
TAYLOR = {f"taylor {n}": {"cache": "taylor", "cache_interval": n} for n in (2, 3, 4, 6)}
DELTA = {f"delta {n}": {"cache": "delta", "cache_interval": n} for n in (2, 3)}
EXACT = {"mode": "ode", "num_steps": 500, "heun": True}


def settings():
    """{name: options of sample}, families in a row."""
    found = {f"ode {n}": {"num_steps": n} for n in (10, 25, 50, 100, 250)}
    found |= {f"heun {n}": {"num_steps": n, "heun": True} for n in (5, 13, 25)}
    found |= {f"dpm {n}": {"mode": "dpm", "num_steps": n} for n in (10, 15, 25, 50)}
    found |= {f"dopri5 {t:g}": {"mode": "dopri5", "tolerance": t} for t in (1e-1, 1e-2, 1e-3)}
    found |= {f"{mode} 25, {grid}": {"mode": mode, "num_steps": 25, "time_grid": grid}
              for mode in ("ode", "dpm") for grid in ("shift", "quadratic")}
    found |= {f"ode 50, {name}": {"num_steps": 50, **more} for name, more in {**TAYLOR, **DELTA}.items()}
    found["ode 250, another seed"] = {"num_steps": 250, "seed": 1}
    found["sde 250"] = sde = {"mode": "sde", "num_steps": 250}
    found |= {f"sde 250, {name}": {**sde, **more} for name, more in {**TAYLOR, **DELTA}.items()}
    return found | {"sde 250, another seed": {**sde, "seed": 1}}


class Latents:
    """Stands in for a VAE: sample() then returns latents."""

    @staticmethod
    def decode(latents):
        return latents


def make(args, network, path_type, seed=0, **options):
    """(latents of all samples, seconds an image, cost an image); classes in turn, noise of (seed, i)."""
    latents, cost, seconds = [], Counter(), 0.0
    for first in range(0, args.samples, args.batch_size):
        numbers = range(first, min(first + args.batch_size, args.samples))
        y = torch.tensor([i % network.num_classes for i in numbers], device=next(network.parameters()).device)
        streams = [np.random.default_rng((seed, i)) for i in numbers]
        begin = time.perf_counter()
        latents.append(sample(network, Latents, streams, y, torch.full_like(y, network.null_label), cost=cost,
                              path_type=path_type, cfg_scale=args.cfg_scale, guidance_high=args.guidance_high,
                              **options))
        seconds += time.perf_counter() - begin
    return (torch.cat(latents), seconds / args.samples,
            {name: round(cost[name] / args.samples, 2) for name in ("calls", "computed")})


def distance(x, exact):
    return float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@torch.no_grad()
def run(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tune(tf32=True)
    network, vae, _, trained = open_network(args.ckpt, args.vae, device)
    network.to(device)
    extractor = load_extractor("efficientnet-lite0", args.weights, device)
    reference = load_set(args.reference, extractor, ["fid", "kid"], is_reference=True)
    about = {"ckpt": str(args.ckpt), "samples": args.samples, "cfg_scale": args.cfg_scale, "machine": machine(device)}
    stored = Path(f"{args.out}.json")
    found = read_json(stored) if is_file(stored) else {"about": about, "rows": {}}
    solutions = {"ode": None, "sde": None}
    for name, options in settings().items():
        if name in found["rows"]:
            continue
        kind = "sde" if options.get("mode") == "sde" else "ode"
        if solutions[kind] is None:
            exact = EXACT if kind == "ode" else {"mode": "sde", "num_steps": 250}
            solutions[kind], *_ = make(args, network, trained["path_type"], **exact)
        latents, seconds, cost = make(args, network, trained["path_type"], **options)
        images = (vae.decode(part).permute(0, 2, 3, 1).cpu() for part in latents.split(args.batch_size))
        scores = score(extract(images, args.samples, extractor, name), reference, ["fid", "kid"], device=device)
        row = {**cost, "seconds": seconds, "distance": distance(latents, solutions[kind]),
               **{each: scores[each] for each in SCORES}}
        found["rows"][name] = row
        write_json(stored, found, indent=1)
        print(name, row, flush=True)
    report(args, found)


def report(args, found):
    rows, about = found["rows"], found["about"]
    lines = [[name, f"{row['calls']:.1f}", f"{row['computed']:.1f}", f"{1000 * row['seconds']:.1f}",
              f"{row['distance']:.4f}", f"{row[SCORES[0]]:.2f}", f"{row[SCORES[1]]:.5f}"] for name, row in rows.items()]
    text = (f"{about['machine']}\n\n{about['ckpt']}, {about['samples']} images, guidance {about['cfg_scale']}\n\n"
            + table(["setting", "calls", "computed", "ms an image", "distance", *SCORES], lines) + "\n")
    with atomic_write(f"{args.out}.md", "w") as file:
        file.write(text)
    print(text)
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    families = {}
    for name, row in rows.items():
        family, _, last = name.rpartition(" ")
        distant = float("nan") if last == "seed" else row["distance"]  # another noise has another solution
        families.setdefault(family if last[0].isdigit() else name, []).append(
            (row["computed"], distant, row[SCORES[0]]))
    for i, (family, points) in enumerate(families.items()):
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot([p[0] for p in points], [p[column] for p in points], marker="osD^v<>"[i % 7], label=family,
                      color=plt.get_cmap("tab20")(i % 20), linewidth=1)
    for axis, label in zip(axes, ("distance to the solution of the same noise", SCORES[0]), strict=True):
        axis.set(xscale="log", xlabel="network calls of an image, as far as computed", ylabel=label)
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator(),
                       major_formatter=ScalarFormatter())
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    with atomic_write(f"{args.out}.png") as file:
        figure.savefig(file, format="png", dpi=110)
