"""Does alignment help, and does stopping it? Vanilla, features only, attention only, HASTE with and without its stop.

    python benchmarks/study.py                  # on a CPU
    python benchmarks/study.py --out exps/study-gpu --model SiT-S/2 --steps 4000 --minutes 25 --jobs 4 \\
        --mixed-precision bf16                  # on a GPU: the largest --steps that fits
    python benchmarks/study.py --report         # the table and picture of what is there, again

Runs train.py on the embedded data, all variants of a seed with the same data, noise and draws in the same order.
Initial weights are those of the seed, but other ones where there is no projector, whose weights are drawn first: vanilla
and attention only. Runs with a stop share their Phase I with the run without one: they go on from its checkpoints, on a
CPU to the same weights bit for bit. The same command goes on with what is missing. A run that would not fit into
--minutes is not started, which is said.

Along each run: FD-EffLite0 and KID of the EMA's samples against held-out images, and the EMA's denoising loss on
held-out images. Written to --out: table.md and curves.png, with the spread over the seeds, and values.json.
"""
import argparse
import concurrent.futures
import csv
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.measure import machine, table
from dataset import LatentImages
from encoders import VAE
from files import BadInput, atomic_write, check_bounds, read_json, run_script
from loss import SILoss
from models.sit import SIT_CONFIGS
from pipeline import load_network
from presets import PRESETS

SCORES = ("FD-EffLite0", "KID-EffLite0", "held-out loss")
OF_ALL_RUNS = ("model", "steps", "every", "samples", "mixed_precision")
TIMES = 8  # per held-out image, one in each eighth of (0, 1)


def whole_path(text):
    return Path(text).resolve()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=whole_path, default=ROOT / "data/emoji", help="made by preprocessing/embedded.py (default data/emoji)")
    add("--out", type=whole_path, default=ROOT / "exps/study", help="runs and results (default exps/study)")
    add("--model", choices=SIT_CONFIGS, default="SiT-T/2", help="default SiT-T/2")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--steps", type=int, default=640, help="of each run, a multiple of 4 (default 640)")
    add("--every", type=int, help="steps between scores (default: a quarter of --steps)")
    add("--samples", type=int, default=178, help="images of a score (default 178, as many as are held out)")
    add("--minutes", type=float, default=90, help="time budget (default 90)")
    add("--jobs", type=int, default=2, help="runs at a time, which share the cores (default 2)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="default no")
    add("--report", action="store_true", help="start no run")
    args = parser.parse_args()
    check_bounds(args, {name: (1, float("inf")) for name in ("steps", "every", "samples", "jobs")})
    if args.steps % 4:
        raise BadInput(f"--steps {args.steps} is no multiple of 4, as the stops at its quarters need; choose another number.")
    args.every = args.every or args.steps // 4
    if args.steps % args.every:
        raise BadInput(f"--every {args.every} does not divide --steps {args.steps}, whose end is scored; change one of them.")
    return args


def settings_of(args):
    """What is the same for all runs in --out, and the line about the machine: written by the first start, kept since."""
    path, mine = args.out / "study.json", {name: getattr(args, name) for name in OF_ALL_RUNS}
    if not path.is_file() and args.report:
        raise BadInput(f"{args.out} holds no study; leave --report out.")
    if not path.is_file():
        args.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "w") as file:
            json.dump(mine | {"machine": machine("cuda" if torch.cuda.is_available() else "cpu")}, file)
    found = read_json(path)
    if args.report:  # what is there, whatever the defaults are
        vars(args).update({name: found[name] for name in OF_ALL_RUNS})
    for name in OF_ALL_RUNS:
        if found[name] != getattr(args, name):
            raise BadInput(f"{args.out} holds runs with --{name.replace('_', '-')} {found[name]}, not {getattr(args, name)}; "
                           "use another --out.")
    return found["machine"]


def variants(steps):
    """{name: (flags of train.py, step up to which the run is that of 'HASTE, no stop')}."""
    quarter = steps // 4
    stops = {f"HASTE, stop at {i * quarter}": (["--early-stop-point", i * quarter], i * quarter) for i in (1, 2, 3)}
    # The paper's, at its part of the run, but half as often and with a sixteenth of its images: still a quarter of the time.
    trigger = ["--early-stop-point", steps, "--early-stop-trigger", "gradient", "--trigger-start", steps // 8,
               "--trigger-every", max(1, steps // 20), "--trigger-samples", 128]
    return {"vanilla": (["--enc-type", "none"], 0),
            "features only (REPA)": (["--attn-coeff", 0, "--early-stop-point", steps], 0),
            "attention only": (["--proj-coeff", 0, "--early-stop-point", steps], 0),
            "HASTE, no stop": (["--early-stop-point", steps], 0), **stops, "HASTE, gradient trigger": (trigger, 0)}


def folder_of(args, seed, name):
    return args.out / f"seed{seed}-{''.join(c if c.isalnum() else '-' for c in name)}"


def is_done(args, seed, name):
    return (folder_of(args, seed, name) / f"checkpoints/{args.steps:07d}.pt").is_file()


def train(args, seed, name):
    """One run, to its end; returns its seconds."""
    flags, shared = variants(args.steps)[name]
    folder, began = folder_of(args, seed, name), time.time()
    if shared and not any(folder.glob("checkpoints/*.pt")):  # Phase I is there already
        source = folder_of(args, seed, "HASTE, no stop")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in ("metrics.csv", f"checkpoints/{shared:07d}.pt"):  # rows past the checkpoint are cut off by the run
            with open(source / part, "rb") as file, atomic_write(folder / part) as copy:
                shutil.copyfileobj(file, copy)
    command = [sys.executable, "train.py", "--preset", "embedded", "--model", args.model, "--data-dir", args.data / "train",
               "--enc-weights", args.data / "teacher.safetensors", "--teacher-cache", args.data / "teacher-cache",
               "--output-dir", args.out, "--exp-name", folder.name, "--seed", seed, "--max-train-steps", args.steps,
               "--checkpointing-steps", args.steps // 4, "--sampling-steps", 0, "--mixed-precision", args.mixed_precision,
               "--eval-steps", args.every, "--eval-samples", args.samples, "--eval-ref", args.data / "val/images",
               "--eval-features", "efficientnet-lite0", "--eval-weights", args.data / "efficientnet-lite0.pth", *flags]
    command = [*map(str, command)]
    print(f"+ {shlex.join(command[1:])}", flush=True)
    threads = max(1, torch.get_num_threads() // args.jobs)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        said = "".join(done.stderr.strip().splitlines()[-1:])
        raise BadInput(f"{folder} ended with status {done.returncode}: {said}; mend that and give the same command again.")
    print(f"  {folder.name}: {time.time() - began:.0f} s", flush=True)
    return time.time() - began


def run_all(args):
    """Every variant of every seed that fits into the time."""
    end, stop, a_step = time.time() + 60 * args.minutes, threading.Event(), [0.0]  # the slowest run's seconds a step
    shares = {name: shared for name, (_, shared) in variants(args.steps).items()}
    chains = [["HASTE, no stop", *(name for name, shared in shares.items() if shared)], ["HASTE, gradient trigger"],
              ["vanilla"], ["features only (REPA)"], ["attention only"]]  # the longest first, so that all jobs end together

    def work(seed, chain):
        for name in chain:
            if is_done(args, seed, name):
                continue
            steps = args.steps - shares[name]
            has_source = not shares[name] or is_done(args, seed, "HASTE, no stop")
            if stop.is_set() or not has_source or time.time() + a_step[0] * steps > end:
                continue
            took = train(args, seed, name) / steps
            a_step[0] = max(a_step[0], took)

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(work, seed, chain) for seed in args.seeds for chain in chains]
        try:
            for task in concurrent.futures.as_completed(tasks):
                task.result()
        except BaseException:  # Ctrl-C too
            stop.set()
            raise


@torch.no_grad()
def held_out_loss(path, data):
    """L_diff of a checkpoint's EMA over the images of `data`, each at TIMES times; the same draws for every checkpoint."""
    network, _ = load_network(path)
    rng, loss_fn, total = np.random.default_rng(0), SILoss(attn_pairs=()), 0.0
    for i in range(len(data)):
        x = VAE.latents(data.moments(i)[None], torch.zeros(1, *network.latent_shape)).expand(TIMES, -1, -1, -1)
        t = torch.from_numpy((np.arange(TIMES) + rng.random(TIMES)) / TIMES).float()
        noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        total += loss_fn(network, x, torch.full((TIMES,), data.condition(i)), t=t, noise=noise)["denoise"].mean().item()
    return total / len(data)


def collect(args):
    """{variant: {score: {step: {seed: value}}}} of the finished runs, and ['step (seed)'] at which the trigger fired."""
    embedded = PRESETS["embedded"][1]
    data = LatentImages(args.data / "val", embedded["resolution"], embedded["num_classes"], images=False)
    values, fired = {}, []
    for name, (_, shared) in variants(args.steps).items():
        for seed in args.seeds:
            if not is_done(args, seed, name):
                continue
            folder, found = folder_of(args, seed, name), {}
            with open(folder / "metrics.csv", newline="") as file:
                for row in csv.DictReader(file):
                    found |= {(score, int(row["step"])): float(row[score]) for score in SCORES[:2] if row.get(score)}
            cache = folder / "held-out.json"
            known = read_json(cache) if cache.is_file() else {}
            for path in sorted((folder / "checkpoints").glob("*.pt")):
                if path.stem not in known:
                    known[path.stem] = held_out_loss(path, data)
                    with atomic_write(cache, "w") as file:
                        json.dump(known, file)
                found[SCORES[2], int(path.stem)] = known[path.stem]
            phase_one = values.get("HASTE, no stop", {}).get(SCORES[2], {})
            for step, of_seeds in phase_one.items():
                if step < shared and seed in of_seeds:
                    found[SCORES[2], step] = of_seeds[seed]
            for (score, step), value in found.items():
                values.setdefault(name, {}).setdefault(score, {}).setdefault(step, {})[seed] = value
            if "trigger" in name:
                state = torch.load(folder / f"checkpoints/{args.steps:07d}.pt", weights_only=True, mmap=True)
                fired.append(f"{state['trigger_fired'] or 'never'} (seed {seed})")
    return values, fired


def difference(values, name, base, score, step):
    """[value of `name` - value of `base`] at `step`, of each seed that both have."""
    one, other = (values.get(who, {}).get(score, {}).get(step, {}) for who in (name, base))
    return [one[seed] - other[seed] for seed in one if seed in other]


def differences(values, names, base, steps):
    """Table: a row for each of `names`, a column for each score and step."""
    header = ["variant", *(f"{score} at {step}" for score in SCORES for step in steps)]
    return table(header, [[name, *(mean_and_spread(difference(values, name, base, score, step), sign="+")
                                   for score in SCORES for step in steps)] for name in names])


def report(args, where):
    values, fired = collect(args)
    if not values:
        raise BadInput(f"{args.out} holds no finished run; give more --minutes, or leave --report out.")
    left_out = [f"{name} (seed {seed})" for seed in args.seeds for name in variants(args.steps)
                if not is_done(args, seed, name)]
    with atomic_write(args.out / "values.json", "w") as file:
        json.dump(values, file, indent=1)
    last, early = args.steps, args.every
    ends = {name: [list(scores[score].get(last, {}).values()) for score in SCORES] for name, scores in values.items()}
    seeds = sorted({seed for scores in values.values() for seed in scores[SCORES[2]][last]})
    protocol = (f"{args.model}, {args.steps} steps of 32 images, precision {args.mixed_precision}, seeds "
                f"{' '.join(map(str, seeds))}; {args.samples} samples a score, without guidance, against all held-out "
                "images. Mean (lowest to highest) over the seeds; lower is better.")
    text = "\n\n".join([
        where, protocol,
        table(["variant", *(f"{score} at {last}" for score in SCORES), "seeds"],
              [[name, *map(mean_and_spread, columns), len(columns[0])] for name, columns in ends.items()]),
        "Difference to vanilla of the same seed, after the first scored step and at the end; below 0 is better than vanilla:",
        differences(values, [name for name in values if name != "vanilla"], "vanilla", [early, last]),
        "Difference to HASTE without a stop of the same seed, at the end; below 0: stopping is better than not to stop:",
        differences(values, [name for name in values if "stop at" in name or "trigger" in name], "HASTE, no stop", [last]),
        f"The gradient trigger fired after step {', '.join(fired)}." if fired else "",
        f"Left out, for want of time: {', '.join(left_out)}." if left_out else ""]).strip() + "\n"
    with atomic_write(args.out / "table.md", "w") as file:
        file.write(text)
    draw(args.out / "curves.png", values)
    print(text)


def mean_and_spread(values, sign=""):
    """'mean (lowest to highest)' with four digits."""
    if not values:
        return "-"
    digits = max(0, 3 - int(np.floor(np.log10(max(map(abs, values)) or 1))))
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def draw(path, values):
    """Each score along the steps, a line a variant, the seeds' range as a band."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(SCORES), figsize=(15, 5), layout="constrained")
    for i, (name, scores) in enumerate(values.items()):
        style = {"color": plt.get_cmap("tab10")(i), "linestyle": "--" if "stop at" in name or "trigger" in name else "-"}
        for axis, score in zip(axes, SCORES, strict=True):
            steps = sorted(scores[score])
            low, mean, high = ([f(scores[score][step].values()) for step in steps] for f in (min, statistics.mean, max))
            axis.plot(steps, mean, marker="o", markersize=3, label=name, **style)
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.12)
            axis.set(title=score, xlabel="step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main():
    args = parse_args()
    where = settings_of(args)
    if not args.report:
        run_all(args)
    report(args, where)


if __name__ == "__main__":
    run_script(main)
