"""Versions of packages and the machine, for the notes on how something was made."""
import os
import platform
from importlib import metadata

import torch


def version(package):
    """The installed version, or "not installed": a note must not end a run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def environment(accelerator):
    """Versions and machine, for args.json: the newest start's. No run is told from another by them."""
    device, gpu = accelerator.device, accelerator.device.type == "cuda"
    packages = ("accelerate", "timm", "diffusers", "transformers", "numpy")
    return {"device": torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}",
            "processes": accelerator.num_processes, "precision": accelerator.mixed_precision,
            "CPU cores": os.cpu_count(), "threads a process": torch.get_num_threads(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            **{name: version(name) for name in packages},
            **({"CUDA": torch.version.cuda} if gpu else {}), "system": platform.platform()}
