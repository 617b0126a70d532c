"""Settings that make the same numbers come sooner, or in less memory: kernels, threads, the compiler, the allocator."""
import ctypes
import datetime
import os
import sys
from pathlib import Path

import torch

from runtime.errors import UserError, first_line

PROCESS_GROUP_TIMEOUT = datetime.timedelta(hours=2)  # others wait for previews and the teacher cache, not only for gradients
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}  # --mixed-precision -> dtype; "no" has none


def tune(processes, tf32):
    """For this process, one of `processes`: TF32 products on GPUs if asked for, no denormals, its share of the cores and,
    without a GPU, freed memory kept for the next step.

    With OMP_NUM_THREADS the number of threads is the user's (torchrun sets it to 1 when it is not set).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.set_flush_denormal(True)  # some CPUs are slow with denormals; benchmarks/README.md has one that is not
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    if not torch.cuda.is_available():
        keep_freed_memory()


def fast_bf16():
    """Whether products in bfloat16 are faster here than in float32: by the GPU, or by instructions of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and any(name in cpu.read_text() for name in ("avx512_bf16", "amx_bf16"))


def cast_weights(network, precision):
    """Give the linear layers and convolutions of a `network` that is not trained the dtype in which autocast uses them.

    Autocast would cast them anew in each call: what it keeps lives no longer than its context, and is of weights that
    require gradients. The numbers are the same.
    """
    if precision in AUTOCAST:
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(AUTOCAST[precision])


def check_compiler(device):
    """Raise UserError where torch.compile cannot work: it needs a C++ compiler and, on a GPU, Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        raise UserError(f"--compile does not work here ({first_line(error)}); install a C++ compiler such as g++, or leave "
                       "the flag out.") from error


def from_c_library(name):
    """glibc's function `name`; elsewhere one that does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: None)


GLIBC_KEEPS = 64 << 20  # bytes of freed memory, by itself, once pieces of 32 MiB have been freed


def keep_freed_memory(most=-1):
    """Let glibc keep up to `most` bytes that have been freed, or all (-1), until give_back_memory.

    A step frees what the next one needs again, and each page that comes back is filled with zeros first.
    """
    mallopt = from_c_library("mallopt")
    mallopt(-1, most)  # M_TRIM_THRESHOLD
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, its highest: larger pieces that do not fit what is kept are mapped, and go back


def give_back_memory():
    """Hand what has been freed back to the machine: glibc keeps it, and a run would seem to grow with each preview and score."""
    from_c_library("malloc_trim")(0)


def to_device(tensor, device):
    """CPU tensor -> `device` without waiting for it: only from pinned memory does a copy to a GPU not block."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
