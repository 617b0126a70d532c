"""Versions of packages and the machine, recorded with each result."""
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


@functools.cache
def version(package):
    """The installed version, or "not installed": recording it must not end a run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def commit():
    """The git commit of this code, ending in "-dirty" where files differ from it; "unknown" where git cannot say."""
    root = Path(__file__).resolve().parents[1]
    ask = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:  # only the code's own repository, not one around it
        done = subprocess.run(ask, check=False, capture_output=True, text=True, timeout=10,
                              env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)})
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def environment(accelerator):
    """Versions and machine of the newest start, for args.json. They do not identify a run."""
    device, gpu = accelerator.device, accelerator.device.type == "cuda"
    packages = ("accelerate", "timm", "diffusers", "transformers", "numpy")
    return {"device": torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}",
            "commit": commit(), "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "CPU cores": os.cpu_count(), "threads a process": torch.get_num_threads(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            **{name: version(name) for name in packages},
            **({"CUDA": torch.version.cuda} if gpu else {}), "system": platform.platform()}
