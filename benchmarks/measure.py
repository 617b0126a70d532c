"""What the benchmarks share: variants timed in turns, peak memory, and the machine in words."""
import datetime
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from speed import give_back_memory


def machine(device="cpu"):
    """The line that says what was run, where and when."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = (f"{found[1] if found else platform.processor()}, {len(os.sched_getaffinity(0))} cores, "
                f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    return f"`python {' '.join(sys.argv)}`, {datetime.date.today()}; {name}; torch {torch.__version__}"


def alternate(variants, rounds, device="cpu"):
    """{name: function} -> {name: seconds of each of `rounds` calls}: one call of each in turn, after one that does not count.

    In turns, so that what else the machine does meets all of them: compare within one run.
    """
    seconds = {name: [] for name in variants}
    for turn in range(rounds + 1):
        for name, work in variants.items():
            synchronize(device)
            begin = time.perf_counter()
            work()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values):
    """'median (lowest to highest)'."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def added_memory(work, device="cpu"):
    """Bytes that `work()` adds at its highest to what is held before it (on a CPU: resident memory, Linux)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    give_back_memory()  # what was freed must not pass for what is used
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name):
    """Bytes, from /proc/self/status."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def table(header, rows):
    """Markdown."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows])
