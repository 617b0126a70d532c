"""Shared by the benchmarks: time variants in turns, measure peak memory, describe the machine."""
import datetime
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from evaluations.tables import markdown as table  # noqa: F401 - for the others
from runtime.setup import give_back_memory, keep_freed_memory


def machine(device="cpu"):
    """One line: what was run, where and when."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = (f"{found[1] if found else platform.processor()}, {len(os.sched_getaffinity(0))} cores, "
                f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    return f"`python {' '.join(sys.argv)}`, {datetime.date.today()}; {name}; torch {torch.__version__}"


def alternate(variants, rounds, device="cpu", untuned=()):
    """{name: function} -> {name: seconds of a call in each of `rounds` rounds}, after one that does not count.

    They take turns, so other load on the machine hits all of them: compare within one run. On a GPU a turn is several
    calls with one synchronisation, as in training. On a CPU those in `untuned` keep the C library's handling of freed
    memory, which runtime.setup changes for the others; after each change one more call goes untimed.
    """
    on_gpu = torch.device(device).type == "cuda"
    seconds, calls, is_untuned = {name: [] for name in variants}, 5 if on_gpu else 1, None
    for turn in range(rounds + 1):
        for name, work in variants.items():
            if not on_gpu and untuned and (name in untuned) != is_untuned:
                is_untuned = name in untuned
                keep_freed_memory(not is_untuned)
                work()
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(calls):
                work()
            synchronize(device)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / calls)
    return seconds


def spread(values, digits=3):
    """'median (lowest to highest)'."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def added_memory(work, device="cpu"):
    """Peak bytes that `work()` adds to the memory in use before it (on a CPU: resident memory, Linux)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    give_back_memory()  # freed memory must not count as used
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name):
    """Bytes, from /proc/self/status."""
    return 1024 * int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1])
