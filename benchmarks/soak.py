"""Memory, files and processes of a long run: does anything grow, and does anything stay behind?

    python benchmarks/soak.py [--steps 2000] [--restart-every 500] > benchmarks/results/DATE-soak.md

Trains a nano SiT on 64 made-up images with everything on that takes or keeps something: both alignment losses until half
the steps, loader processes, previews every 50 steps, scores every 100, checkpoints every 50 of which two are kept, a
row of metrics every 10 steps and tensorboard. Every --restart-every steps the run ends and the same command continues it in
a new process. While it runs, this script reads from /proc its memory (anonymous pages: what it holds, without the files it
has mapped), open files and loader processes, prints a row for every 100 steps, and says in the end how far the memory
between previews and scores, the lower quartile, has moved after the warm-up of each process, and what was left behind.
Linux only.
"""
import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees benchmarks/ only
NAMES = ("MiB", "open files", "loader processes", "their MiB")
WARM_UP, ROW = 150, 100  # steps of each process that are not compared; steps of a row of the table
RUN = """import sys
sys.path[:0] = [{root!r}]
from evaluations import features
from files import run_script
from tests import nano
import train
features.EFFICIENTNET_SHA256 = None  # random weights will do
run_script(train.main)"""


def write_data(folder, count=64, side=64):
    """ImageNet's layout, random."""
    rng = np.random.default_rng(0)
    for kind, suffix in (("images", "img{:08d}.png"), ("vae-sd", "img-mean-std-{:08d}.npy")):
        names = [f"00000/{suffix.format(i)}" for i in range(count)]
        (folder / kind / "00000").mkdir(parents=True)
        (folder / kind / "dataset.json").write_text(json.dumps({"labels": [[n, i % 4] for i, n in enumerate(names)]}))
        for name in names:
            if kind == "images":
                Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / kind / name)
            else:
                np.save(folder / kind / name, rng.random((8, side // 4, side // 4), np.float32))


def command(folder, out, steps, end):
    """The run's command line up to step `end` of `steps`."""
    return [sys.executable, "-c", RUN.format(root=str(ROOT)), *map(str, (
        "--exp-name", "soak", "--output-dir", out, "--data-dir", folder / "data", "--model", "SiT-N/2", "--num-classes", 4,
        "--resolution", 64, "--batch-size", 8, "--mixed-precision", "no", "--num-workers", 2, "--log-every", 10,
        "--enc-type", "dinov2-vit-n", "--enc-weights", folder / "teacher.pth", "--enc-blocks", 10,
        "--early-stop-point", steps // 2, "--max-train-steps", end, "--report-to", "tensorboard",
        "--sampling-steps", 50, "--vae", ROOT / "assets/vae-emoji", "--checkpointing-steps", 50, "--keep-checkpoints", 2,
        "--eval-steps", 100, "--eval-samples", 8, "--eval-ref", folder / "data/images",
        "--eval-features", "efficientnet-lite0", "--eval-weights", folder / "efficientnet-lite0.pth"))]


def held(pid):
    """MiB of anonymous memory of a process."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) / 1024


def look(pid):
    """{what: number} of a process, NAMES being what; None when it has ended."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return dict(zip(NAMES, (held(pid), len(os.listdir(f"/proc/{pid}/fd")), len(children), sum(map(held, children))),
                        strict=True))
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None


def last_step(out):
    """The last step in metrics.csv."""
    try:
        with open(out / "soak/metrics.csv", newline="") as file:
            return int([*csv.DictReader(file)][-1]["step"])
    except (FileNotFoundError, IndexError, ValueError):
        return 0


def watch(process, out, start, end):
    """[(step, what look() finds)] twice a second, until the run of steps `start` to `end` is at its end."""
    seen = []
    while process.poll() is None:
        found, step = look(process.pid), last_step(out)
        if found and start < step < end:  # at the end it gives back what it has
            seen.append((step, found))
        time.sleep(0.5)
    return seen


def between(memory):
    """What is held between previews and scores: the lower quartile."""
    return statistics.quantiles(memory, n=4)[0] if len(memory) > 1 else memory[0]


def rows(seen):
    """For every ROW steps of `seen`: (steps, MiB between(), highest MiB, medians of the rest of NAMES)."""
    for end in sorted({-(-step // ROW) * ROW for step, _ in seen}):
        part = [found for step, found in seen if end - ROW < step <= end]
        memory = [found["MiB"] for found in part]
        yield end, between(memory), max(memory), *(statistics.median(found[name] for found in part) for name in NAMES[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="default 2000")
    parser.add_argument("--restart-every", type=int, default=500, help="steps; default 500")
    args = parser.parse_args()
    if args.restart_every <= WARM_UP:
        parser.error(f"--restart-every must be more than {WARM_UP}, the steps of each process that are not compared")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        folder, moved, behind = Path(folder), [], set()
        out, environment["TMPDIR"] = folder / "out", str(folder / "tmp")
        (folder / "tmp").mkdir()
        write_data(folder / "data")
        prepare(folder)
        print(f"| steps | MiB | highest MiB | {' | '.join(NAMES[1:])} |\n|{'---|' * (2 + len(NAMES))}", flush=True)
        for start in range(0, args.steps, args.restart_every):
            end = min(start + args.restart_every, args.steps)
            process = subprocess.Popen(command(folder, out, args.steps, end), env=environment, cwd=ROOT,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
            seen = watch(process, out, start, end)
            if process.wait():
                sys.exit(process.stderr.read())
            for row in rows(seen):
                print("| {} | {:.1f} | {:.1f} | {:.0f} | {:.0f} | {:.1f} |".format(*row), flush=True)
            late = [found["MiB"] for step, found in seen if step > start + WARM_UP]
            moved.append(100 * (between(late[-len(late) // 4:]) / between(late[:len(late) // 4]) - 1))
            behind |= {f"process {pid}" for pid in os.listdir("/proc") if pid.isdigit() and session(pid) == process.pid}
            behind |= {str(path.relative_to(folder)) for path in [*folder.glob("tmp/*"), *out.rglob("*.tmp")]
                       if not path.name.startswith("torchinductor")}  # PyTorch's own cache, made by importing it
        kept = sorted(path.name for path in (out / "soak/checkpoints").iterdir())
        previews = len(list((out / "soak/previews").iterdir()))
    print(f"\nmemory, last against first quarter after {WARM_UP} steps of each process: "
          + ", ".join(f"{value:+.1f} %" for value in moved))
    print(f"left behind: {', '.join(sorted(behind)) or 'nothing'}; checkpoints: {', '.join(kept)}; previews: {previews}")


def session(pid):
    """The session of a process, which is the id of the run that it comes from; None when it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[3])
    except (FileNotFoundError, ProcessLookupError):
        return None


def prepare(folder):
    """A random teacher and random scoring network: what they know does not matter here."""
    import timm

    from tests import nano
    torch.manual_seed(0)
    torch.save(nano.teacher_state(), folder / "teacher.pth")
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), folder / "efficientnet-lite0.pth")


if __name__ == "__main__":
    main()
