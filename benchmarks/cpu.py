"""What training on a CPU gains from its settings: bfloat16, flushed denormals, memory kept, threads shared out.

    python benchmarks/cpu.py        # after examples/emoji/prepare.py; 2 minutes a round

Each setting runs train.py with the preset `embedded` in processes of its own, all settings in turns; the seconds of a step
are those in metrics.csv, without the first rows. Before that, a product of denormal numbers, flushed and not.
"""
import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees benchmarks/ only

from benchmarks.measure import alternate, machine, spread, table
from runtime.errors import UserError, check_bounds, run_script

EVERY = 10  # steps of a row of metrics.csv
WITHOUT = "import torch, speed; {} = lambda *_: None; import train, files; files.run_script(train.main)"
CORES = 1 << (len(os.sched_getaffinity(0)).bit_length() - 1)  # a power of two, which the batch divides by


def settings():
    """{name: (start of the command, flags, OMP_NUM_THREADS or None)}."""
    one, all_cores = [sys.executable, "train.py"], ["torchrun", "--standalone", f"--nproc_per_node={CORES}", "train.py"]

    def without(what):
        return [sys.executable, "-c", WITHOUT.format(what)], [], None

    return {"float32": (one, [], None), "float32, denormals kept": without("torch.set_flush_denormal"),
            "float32, freed memory not kept": without("runtime.setup.keep_freed_memory"),
            "bf16": (one, ["--mixed-precision", "bf16"], None), "float32, one thread": (one, [], 1),
            f"float32, {CORES} processes of one thread": (all_cores, [], 1),
            f"float32, {CORES} processes of {CORES} threads": (all_cores, [], CORES)}


def step_seconds(args, start, flags, threads):
    """Seconds of each of the rows' steps in one run."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment.pop("OMP_NUM_THREADS", None)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        command = [*start, "--preset", "embedded", "--mixed-precision", "no", "--output-dir", folder, "--exp-name", "cpu",
                   "--max-train-steps", args.steps, "--log-every", EVERY, "--sampling-steps", 0, "--early-stop-point", args.steps,
                   "--data-dir", args.data / "train", "--enc-weights", args.data / "teacher.safetensors",
                   "--teacher-cache", args.data / "teacher-cache", *flags]
        done = subprocess.run([*map(str, command)], check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{' '.join(map(str, command))} ended with {done.returncode}: {done.stderr[-500:]}")
        with open(Path(folder) / "cpu/metrics.csv", newline="") as file:
            return [float(row["seconds"]) / EVERY for row in csv.DictReader(file)][1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=lambda path: Path(path).resolve(), default=ROOT / "data/emoji", help="default data/emoji")
    parser.add_argument("--steps", type=int, default=60, help="of a run (default 60)")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each setting (default 2)")
    args = parser.parse_args()
    check_bounds(args, {"steps": (3 * EVERY, float("inf")), "rounds": (1, float("inf"))})
    args.steps -= args.steps % EVERY
    print(machine())

    def product(flush):
        torch.set_flush_denormal(flush)
        return tiny @ tiny
    torch.set_num_threads(1)  # the setting is a thread's own
    tiny = torch.full((512, 512), 1e-39)
    seconds = alternate({flush: lambda flush=flush: product(flush) for flush in (False, True)}, 5)
    print("\nProduct of 512 x 512 denormal numbers: "
          + ", ".join(f"{1e3 * statistics.median(s):.2f} ms {'flushed' if f else 'kept'}" for f, s in seconds.items()) + "\n")

    found = {name: [] for name in settings()}
    for _ in range(args.rounds):
        for name, setting in settings().items():
            found[name] += step_seconds(args, *setting)
    base = statistics.median(found["float32"])
    rows = [[name, spread(values), f"{base / statistics.median(values):.2f}"] for name, values in found.items()]
    print(table(["setting", "seconds a step: median (lowest to highest)", "times as fast as float32"], rows))


if __name__ == "__main__":
    run_script(main)
