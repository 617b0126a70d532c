"""Does alignment help, and does stopping it? Vanilla, REPA, attention only, HASTE with and without its stop.

    python benchmarks/study.py --data cifar10                # photographs: some hours a run on one core, a run a core
    python benchmarks/study.py --data emoji                  # about an hour on two cores
    python benchmarks/study.py --data cifar10 --model SiT-S/4 --steps 40000 --jobs 4 --mixed-precision bf16 \\
        --out exps/study-gpu                                 # on a GPU
    python benchmarks/study.py --data cifar10 --ablation     # short runs with another part of HASTE left out or changed
    python benchmarks/study.py --data cifar10 --report       # table and picture of the existing runs

Runs train.py on the data of examples/. All variants of a seed see the same data, noise and draws in the same order.
The seed sets the initial weights; vanilla and attention only start from others: they have no projector, whose weights
are drawn first. A run with a stop shares Phase I with the run without one: it continues that run's
checkpoint, on a CPU to the same weights bit for bit.

Run the same command again to continue from any step. Runs are in --out. A finished run leaves one small file in
--results; copied to another machine, that file replaces the run there.

Along each run: FD-EffLite0, KID, precision and recall of the EMA's samples, and the EMA's denoising loss on held-out
images. Written to --results: table.md and curves.png, with the spread over the seeds.
"""
import concurrent.futures
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch

from benchmarks.measure import machine
from benchmarks.study_report import FEATURES, LOSS, METRICS, NO_STOP, SCORES, as_text, draw
from data_io.latent_scale import scale_of
from loss import SILoss
from models.checkpoint import load_network
from models.sit import SIT_CONFIGS
from runtime.errors import UserError, run_script
from runtime.files import atomic_write, read_json, write_json
from runtime.flags import Parser, whole
from training.presets import PRESETS

# Per data set: its preset and folder, steps of a run, scores along it, samples a score and what they are compared with.
STUDIES = {
    "emoji": {"preset": "embedded", "folder": "data/emoji", "steps": 640, "scores": 4, "samples": 178,
              "reference": "val/images", "flags": []},
    "cifar10": {"preset": "cifar10", "folder": "data/cifar10", "steps": 8000, "scores": 8, "samples": 2000,
                "reference": "ref-val.npz", "flags": ["--enc-size", 112]},  # the preset is made for speed, not scores
}
SAMPLER_STEPS = 25  # Euler, without guidance
# --ablation: name -> what differs from HASTE without a stop. Blocks are 1-based. Each other --enc-blocks has a teacher
# cache of its own.
ABLATION = {"features only": ["--attn-coeff", 0], "attention only": ["--proj-coeff", 0],
            "half the weights": ["--proj-coeff", 0.25, "--attn-coeff", 0.25],
            "twice the weights": ["--proj-coeff", 1, "--attn-coeff", 1],
            "features of student block 2": ["--encoder-depth", 2],
            "features of student block 4": ["--encoder-depth", 4],
            "features of teacher block 12": ["--enc-blocks", 12],
            "features only, of teacher block 7": ["--attn-coeff", 0, "--enc-blocks", 7]}
OF_ALL_RUNS = ("ablation", "data", "model", "steps", "every", "samples", "mixed_precision")
HELD_OUT, TIMES = 2000, 8  # images for the held-out loss; times per image, one in each eighth of (0, 1)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--data", choices=STUDIES, default="cifar10", help="data set, with its preset and steps (default cifar10)")
    add("--data-dir", type=lambda text: Path(text).resolve(), help="where its folder is (default data/NAME)")
    add("--out", type=lambda text: Path(text).resolve(), help="folder of the runs (default exps/study-NAME)")
    add("--results", type=lambda text: Path(text).resolve(), help="folder of what the runs gave (default OUT/results)")
    add("--model", choices=SIT_CONFIGS, help="default: the preset's")
    add("--ablation", action="store_true", help="vanilla, HASTE, and HASTE with one thing changed; a quarter of the "
        "steps, two scores")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    add("--variants", nargs="+", metavar="NAME", help="only these, by their names in the table (default all)")
    add("--steps", type=whole(1), help="of each run, a multiple of 8 (default: emoji 640, cifar10 8000)")
    add("--every", type=whole(1), help="steps between scores (default: emoji a quarter, cifar10 an eighth of --steps)")
    add("--samples", type=whole(1), help="images of a score (default: emoji 178, cifar10 2000)")
    add("--minutes", type=float, default=float("inf"), help="start no run that would end later (default: no limit)")
    add("--jobs", type=whole(1), default=len(os.sched_getaffinity(0)), help="runs at a time, which share the cores "
        "(default: one a core)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="default no")
    add("--report", action="store_true", help="start no run")
    args = parser.parse_args()
    study = STUDIES[args.data]
    if args.ablation:
        study = {**study, "steps": study["steps"] // 4, "scores": 2}
    args.data_dir = args.data_dir or ROOT / study["folder"]
    args.out = args.out or ROOT / f"exps/study-{args.data}{'-ablation' * args.ablation}"
    args.results = args.results or args.out / "results"
    args.model = args.model or preset_of(args)["model"]
    args.steps, args.samples = args.steps or study["steps"], args.samples or study["samples"]
    args.every = args.every or args.steps // study["scores"]
    if args.steps % 8:
        raise UserError(f"--steps {args.steps} is no multiple of 8, as stops and the trigger's start need; change it.")
    parts, of = (1, "") if args.ablation else (4, "a quarter of ")  # where the stops' runs part from the first
    if args.steps // parts % args.every:
        raise UserError(f"--every {args.every} does not divide {of}--steps {args.steps}; change one of them.")
    if unknown := set(args.variants or ()) - set(variants(args)):
        raise UserError(f"--variants {min(unknown)!r} is none of {', '.join(variants(args))}.")
    return args


def preset_of(args):
    return PRESETS[STUDIES[args.data]["preset"]][1]


def check_settings(args):
    """Compare the settings that all runs share with those of the first start, which writes them to --results."""
    path, mine = args.results / "study.json", {name: getattr(args, name) for name in OF_ALL_RUNS}
    if path.is_file():
        found = {"ablation": False, **read_json(path)}  # older ones lack it
        if args.report:  # report existing runs, whatever the defaults are
            vars(args).update({name: found[name] for name in OF_ALL_RUNS})
        for name in OF_ALL_RUNS:
            if found[name] != getattr(args, name):
                raise UserError(f"{args.results} holds runs with --{name.replace('_', '-')} {found[name]}, not "
                                f"{getattr(args, name)}; use another --out and --results.")
    elif args.report:
        raise UserError(f"{args.results} holds no study; leave --report out.")
    else:
        write_json(path, mine, indent=1)


# ---- runs ----

def variants(args):
    """{name: (flags of train.py, steps shared with the run 'HASTE, no stop')}, in the order of the table."""
    steps = args.steps
    vanilla, no_stop = ["--enc-type", "none"], ["--early-stop-point", steps]
    if args.ablation:
        return {"vanilla": (vanilla, 0), NO_STOP: (no_stop, 0),
                **{name: ([*no_stop, *flags], 0) for name, flags in ABLATION.items()}}
    quarter = steps // 4
    stops = {f"HASTE, stop at {i * quarter}": (["--early-stop-point", i * quarter], i * quarter) for i in (1, 2, 3)}
    # As in the paper relative to the run's length, but compared half as often and on a sixteenth of the images.
    trigger = [*no_stop, "--early-stop-trigger", "gradient", "--trigger-start", steps // 8,
               "--trigger-every", max(1, steps // 20), "--trigger-samples", 128]
    return {"vanilla": (vanilla, 0), "REPA (features only)": ([*no_stop, *ABLATION["features only"]], 0),
            "attention only": ([*no_stop, *ABLATION["attention only"]], 0), NO_STOP: (no_stop, 0), **stops,
            f"HASTE, twice the weights, stop at {quarter}": (
                ["--early-stop-point", quarter, *ABLATION["twice the weights"]], 0),
            "HASTE, gradient trigger": (trigger, 0)}


def name_of(seed, variant):
    return f"seed{seed}-{re.sub('[^A-Za-z0-9]+', '-', variant).strip('-')}"


def result_of(args, seed, variant):
    return args.results / f"{name_of(seed, variant)}.json"


def order(args):
    """[(seed, variant)]: HASTE and vanilla first, then REPA, then runs that share HASTE's Phase I, then the rest."""
    names = variants(args)
    first = [NO_STOP, "vanilla", "REPA (features only)", *(name for name, (_, shared) in names.items() if shared)]
    runs = [(seed, name) for group in (first, [name for name in names if name not in first]) for seed in args.seeds
            for name in group]
    return [(seed, name) for seed, name in runs if name in (args.variants or names)]


def command_of(args, seed, variant):
    """train.py's command line."""
    folder, study = name_of(seed, variant), STUDIES[args.data]
    command = [sys.executable, "train.py", "--preset", study["preset"], *study["flags"], "--model", args.model,
               "--data-dir", args.data_dir / "train",
               "--enc-weights", args.data_dir / "teacher.safetensors",
               "--teacher-cache", args.data_dir / "teacher-cache",
               "--output-dir", args.out, "--exp-name", folder, "--seed", seed, "--max-train-steps", args.steps,
               "--checkpointing-steps", args.every, "--checkpoint-minutes", 10, "--sampling-steps", 0,
               "--mixed-precision", args.mixed_precision, "--eval-steps", args.every, "--eval-samples", args.samples,
               "--eval-num-steps", SAMPLER_STEPS, "--eval-metrics", *METRICS,
               "--eval-ref", args.data_dir / study["reference"], "--eval-features", FEATURES,
               "--eval-weights", args.data_dir / "efficientnet-lite0.pth", *variants(args)[variant][0]]
    return [*map(str, command)]


def train(args, seed, variant):
    """Start or continue one run to its end; write its result to --results."""
    folder, (_, shared) = args.out / name_of(seed, variant), variants(args)[variant]
    if shared and not any(folder.glob("checkpoints/*.pt")):  # Phase I is there already
        source = args.out / name_of(seed, NO_STOP)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        for part in ("metrics.csv", f"checkpoints/{shared:07d}.pt"):  # the run drops rows past the checkpoint
            with open(source / part, "rb") as file, atomic_write(folder / part) as copy:
                shutil.copyfileobj(file, copy)
    command = command_of(args, seed, variant)
    print(f"+ {shlex.join(command[1:])}", flush=True)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if done.returncode:
        said = "".join(done.stderr.strip().splitlines()[-1:])
        raise UserError(f"{folder} ended with status {done.returncode}: {said}; fix that and give the same command "
                        "again.")
    write_result(args, seed, variant)


def write_result(args, seed, variant):
    """Write the result of a finished run to --results, and delete the checkpoints that no other run starts from."""
    folder, (_, shared) = args.out / name_of(seed, variant), variants(args)[variant]
    from evaluations.runs import read_table  # here, so that --help does not load timm
    table = read_table(folder)
    curves = {score: dict(zip(*table[score], strict=True)) for score in SCORES if score in table}
    paths = sorted((folder / "checkpoints").glob("*.pt"))
    losses = held_out_losses(args, [path for path in paths if int(path.stem) % args.every == 0])
    if shared:
        phase_one = read_json(result_of(args, seed, NO_STOP))["held-out loss by t"]
        losses |= {int(step): loss for step, loss in phase_one.items() if int(step) < shared}
    state = torch.load(folder / f"checkpoints/{args.steps:07d}.pt", weights_only=True, mmap=True)
    curves[LOSS] = {step: statistics.mean(by_t) for step, by_t in sorted(losses.items())}
    write_json(result_of(args, seed, variant), indent=1, value={
        "machine": machine("cuda" if torch.cuda.is_available() else "cpu"),
        "seconds of training": round(sum(table["seconds"][1])), "trigger fired": state["trigger_fired"],
        "scores": curves, "held-out loss by t": losses})
    for path in paths:
        is_start = variant == NO_STOP and int(path.stem) % (args.steps // 4) == 0
        if not is_start and int(path.stem) != args.steps:
            path.unlink()


def run_all(args):
    """Train each run of `order` that has no result and fits into the time, --jobs of them at once."""
    end, a_step, running = time.time() + 60 * args.minutes, 0.0, {}
    waiting = [(seed, name) for seed, name in order(args) if not result_of(args, seed, name).is_file()]

    def can_start(seed, name):
        """Whether there is time, and Phase I on this machine if the run shares that of the run without a stop."""
        shared = variants(args)[name][1]
        has_begun = any((args.out / name_of(seed, name)).glob("checkpoints/*.pt"))
        phase_one = args.out / name_of(seed, NO_STOP) / f"checkpoints/{shared:07d}.pt"
        if shared and not (has_begun or result_of(args, seed, NO_STOP).is_file() and phase_one.is_file()):
            return False
        return time.time() + a_step * (args.steps - shared) <= end

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        while True:
            while len(running) < args.jobs and (run := next((run for run in waiting if can_start(*run)), None)):
                waiting.remove(run)
                running[pool.submit(train, args, *run)] = run, time.time()
            if not running:
                return
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for task in done:
                (seed, name), began = running.pop(task)
                task.result()  # raises its error; the others end first
                seconds = time.time() - began
                a_step = max(a_step, seconds / (args.steps - variants(args)[name][1]))
                print(f"  {name_of(seed, name)}: {seconds:.0f} s", flush=True)


# ---- results ----

@torch.no_grad()
def held_out_losses(args, paths):
    """{step: [L_diff of the EMA in each eighth of t]} over HELD_OUT images; all checkpoints get the same draws."""
    from evaluations.student import open_dataset
    loss_fn, losses, device = SILoss(attn_pairs=()), {}, "cuda" if torch.cuda.is_available() else "cpu"
    for path in paths:
        network, saved = load_network(path)
        network.to(device)
        data = open_dataset(network, saved, args.data_dir / "val")
        rng, total, count = np.random.default_rng(0), torch.zeros(TIMES, dtype=torch.float64), min(len(data), HELD_OUT)
        for images in torch.arange(count).split(32):
            moments, y = data.batch(images.tolist())["moments"], torch.tensor([data.condition(int(i)) for i in images])
            x = scale_of(saved).latents(moments, torch.zeros(())).repeat_interleave(TIMES, dim=0)
            u = torch.from_numpy(rng.random((len(images), TIMES), dtype=np.float32))
            t = ((torch.arange(TIMES) + u) / TIMES).flatten()
            noise = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
            x, y, t, noise = (values.to(device) for values in (x, y.repeat_interleave(TIMES), t, noise))
            total += loss_fn(network, x, y, t=t, noise=noise)["denoise"].view(-1, TIMES).sum(dim=0).cpu()
        losses[int(path.stem)] = (total / count).tolist()
    return losses


def report(args):
    """Write and print table.md, and draw curves.png."""
    found = {name: {seed: read_json(path) for seed in args.seeds if (path := result_of(args, seed, name)).is_file()}
             for name in variants(args)}
    found = {name: results for name, results in found.items() if results}
    if not found:
        raise UserError(f"{args.results} holds no finished run; give more --minutes, or leave --report out.")
    protocol = (f"{args.model} on {args.data}, {args.steps} steps of {preset_of(args)['batch_size']} images, precision "
                f"{args.mixed_precision}; {args.samples} samples a score, of {SAMPLER_STEPS} Euler steps without "
                "guidance. Mean (lowest to highest) over the seeds.")
    left_out = [f"{name} (seed {seed})" for seed, name in order(args) if seed not in found.get(name, {})]
    text = as_text(found, args.steps, protocol, left_out)
    with atomic_write(args.results / "table.md", "w") as file:
        file.write(text)
    draw(args.results / "curves.png", found)
    print(text)


def main():
    args = parse_args()
    check_settings(args)
    if not args.report:
        run_all(args)
    report(args)


if __name__ == "__main__":
    run_script(main, continues=True)
