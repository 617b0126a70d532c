"""Performance settings that keep results unchanged: kernels, threads, compiler, memory; the end of process groups."""
import ctypes
import datetime
import os
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.errors import UserError, first_line, is_broken_connection

PROCESS_GROUP_TIMEOUT = datetime.timedelta(hours=2)  # ranks also wait for previews, scores and the teacher cache
START_SECONDS = 180  # for the processes of a run to find each other
AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}  # --mixed-precision -> dtype; "no" has none


def connect(make):
    """Call make(), which starts the process group; raises UserError if the launcher's variables do not allow it.

    Ends this process after START_SECONDS: if another program has the port, torch waits for ever, despite any timeout.
    """
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing, several = [name for name in names if not os.environ.get(name)], os.environ.get("WORLD_SIZE", "1") != "1"
    if several and missing:
        raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start by "
                        "torchrun or accelerate launch, set all of them, or unset WORLD_SIZE for one process.")

    if torch.cuda.device_count() == 1 and "LOCAL_RANK" in os.environ:  # of each process, as by srun --gpus-per-task=1
        os.environ["LOCAL_RANK"] = "0"  # accelerate takes it for the number of the GPU

    def sentence(reason):
        return ("The processes of this run could not connect at MASTER_ADDR:MASTER_PORT = "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} ({reason}); see that all are "
                "started, or choose another MASTER_PORT.")

    def give_up():
        os.write(2, f"error: {sentence(f'waited {START_SECONDS} seconds')}\n".encode())
        os._exit(1)

    timer = threading.Timer(START_SECONDS, give_up)
    timer.daemon = True
    if several:
        timer.start()
    try:
        return make()
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        raise UserError(sentence(first_line(error))) from error
    finally:
        timer.cancel()


def share_of_cores():
    """This process's share of the cores it may run on: a launcher lets all processes of a machine use the same ones."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tune(tf32):
    """Tune this process: TF32 on GPUs if asked for, no denormals, no more threads than its share of the cores.

    Without a GPU also keep freed memory. OMP_NUM_THREADS, which torchrun sets to 1, wins over the share.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.set_flush_denormal(True)  # some CPUs are slow with denormals
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share_of_cores()))
    if not torch.cuda.is_available():
        keep_freed_memory()


def fast_bf16():
    """Whether this GPU, or this CPU without one, multiplies bfloat16 faster than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = Path("/proc/cpuinfo")
    return cpu.is_file() and any(name in cpu.read_text() for name in ("avx512_bf16", "amx_bf16"))


def cast_weights(network, precision):
    """Cast linear layers and convolutions of a frozen `network` to the autocast dtype. Results stay the same.

    Autocast would cast the weights again in each call: its cache holds only weights that require gradients.
    """
    if precision in AUTOCAST:
        for module in network.modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                module.to(AUTOCAST[precision])


def check_compiler(device):
    """Raise UserError where torch.compile cannot work. It needs a C++ compiler and, on a GPU, Triton."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except RuntimeError as error:
        raise UserError(f"--compile does not work here ({first_line(error)}); install a C++ compiler such as g++, or "
                        "leave the flag out.") from error


def from_c_library(name):
    """glibc's function `name`; elsewhere a function that does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, name, lambda *_: None)


def keep_freed_memory(keep=True):
    """Let glibc keep all freed memory until give_back_memory; `keep` False: as glibc does once 32 MiB have been freed.

    The next step needs the same memory again, and pages that come back from the system are zeroed first.
    """
    mallopt = from_c_library("mallopt")
    mallopt(-1, -1 if keep else 64 << 20)  # M_TRIM_THRESHOLD: free bytes at the end of the heap
    mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its maximum: larger blocks are mapped, and go back at once, ...
    mallopt(-4, 0 if keep else 65_536)  # M_MMAP_MAX: ... up to so many of them


def give_back_memory():
    """Return freed memory to the system. Without it a run seems to grow with each preview and score."""
    from_c_library("malloc_trim")(0)


def to_device(tensor, device):
    """Copy a tensor to `device` without waiting. A copy from CPU to GPU is asynchronous from pinned memory only."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def end_processes():
    """Wait for the other processes, then leave the group: a launcher may end those that outlive the first to exit."""
    if dist.is_initialized():
        dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()
