"""Settings that make the same numbers come sooner: kernels, threads, the compiler."""
import os

import torch

from files import BadInput, first_line


def tune(processes, tf32):
    """For this process, one of `processes`: TF32 products on GPUs if asked for, no denormals, its share of the cores.

    With OMP_NUM_THREADS the number of threads is the user's (torchrun sets it to 1 when it is not set).
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.set_flush_denormal(True)  # denormals of small gradients cost a CPU most of its speed
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        torch.set_num_threads(max(1, torch.get_num_threads() // here))


def check_compiler(device):
    """Raise BadInput where torch.compile cannot work: it needs a C++ compiler and, on a GPU, Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        raise BadInput(f"--compile does not work here ({first_line(error)}); install a C++ compiler such as g++, or leave "
                       "the flag out.") from error
