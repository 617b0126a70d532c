"""Settings that make the same numbers come sooner, or in less memory: kernels, threads, the compiler, the allocator."""
import ctypes
import os
import sys
from pathlib import Path

import torch

from files import BadInput, first_line


def tune(processes, tf32):
    """For this process, one of `processes`: TF32 products on GPUs if asked for, no denormals, its share of the cores.

    With OMP_NUM_THREADS the number of threads is the user's (torchrun sets it to 1 when it is not set).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.set_flush_denormal(True)  # some CPUs are slow with denormals; benchmarks/README.md has one that is not
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, torch.get_num_threads() // here))


def fast_bf16():
    """Whether products in bfloat16 are faster here than in float32: by the GPU, or by instructions of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and any(name in cpu.read_text() for name in ("avx512_bf16", "amx_bf16"))


def check_compiler(device):
    """Raise BadInput where torch.compile cannot work: it needs a C++ compiler and, on a GPU, Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        raise BadInput(f"--compile does not work here ({first_line(error)}); install a C++ compiler such as g++, or leave "
                       "the flag out.") from error


def give_back_memory():
    """Hand what has been freed back to the machine: glibc keeps it, and a run would seem to grow with each preview and score."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim:
            trim(0)
