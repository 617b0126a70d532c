"""Imported by multiprocessing's fork server: a script that it forks starts in milliseconds, not in seconds."""
import contextlib
import gc
import importlib
import pkgutil
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer step would import it

import generate  # noqa: F401
import generate_t2i  # noqa: F401
import train  # noqa: F401
import train_t2i  # noqa: F401
from runtime import versions
from tests import conftest  # noqa: F401

# Scripts import some modules only when they need them. A test may close the folder of the code by then.
for package in ("data_io", "encoders", "models", "runtime", "sampling", "training"):
    for module in pkgutil.iter_modules([str(Path(__file__).resolve().parents[1] / package)]):
        importlib.import_module(f"{package}.{module.name}")

with contextlib.suppress(ImportError):  # most tests run without it
    from diffusers import AutoencoderDC, AutoencoderKL  # noqa: F401

torch.set_num_threads(1)
versions.commit()
gc.freeze()  # forks then do not collect shared objects
