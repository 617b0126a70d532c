"""Out of memory, files or processes in one sentence: which flags help, and how many images would fit."""
import contextlib
import errno
import math
import resource
import sys

import torch

from runtime.errors import UserError, first_line

GIB = 2 ** 30
CPU_MESSAGES = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_memory(error):
    """Whether torch could not allocate. On a CPU it is a plain RuntimeError, recognised by its text."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in CPU_MESSAGES)


def images_that_fit(images, weights, peak, capacity):
    """How many images fit a process in one pass, when `images` of them ran out of memory.

    weights, peak, capacity: bytes of the model's weights, of the highest use before the failure, and of what the
    process can have. -> (number that fits, bytes a step holds without images, bytes an image). A step holds weights,
    average, gradients and two moments. The first two existed at the failure; the rest of the peak is counted as the
    images'. That is a guess, so the number is rounded down to images / 2, / 3, / 4 ..., or 0.
    """
    held = 5 * weights
    each = max(peak - 2 * weights, 1) / images
    most = min(math.floor((capacity - held) / each), images - 1)
    return next((n for n in range(most, 0, -1) if images % n == 0), 0), held, each


def device_memory(device):
    """(highest use so far, what this process can have) in bytes. On a CPU both are the process's peak."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak, peak


def advice(images, accumulation, checkpointing, precision, weights, peak, capacity):
    """Error message for `images` per process and pass, given the run's accumulation, checkpointing and precision."""
    fits, held, each = images_that_fit(images, weights, peak, capacity)
    flags = []
    if fits:
        flags.append(f"--gradient-accumulation-steps {accumulation * images // fits}, which gives the same steps")
    if not checkpointing:
        flags.append("--grad-checkpointing")
    if precision == "no":
        flags.append("--mixed-precision bf16")
    flags += ["a smaller --batch-size"] if fits else ["more processes", "a smaller --model"]
    return (f"Out of memory with {images} images a process at a time: of {capacity / GIB:.1f} GiB weights, average, "
            f"gradients and moments take {held / GIB:.1f} and each image about {each / GIB:.2f}; "
            + (f"about {fits} would fit. " if fits else "") + f"Give {', or '.join(flags)}.")


@contextlib.contextmanager
def explained_sampling(images):
    """The same for sampling `images` at a time."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"Out of memory with {images} images at a time; give a smaller "
                        "--per-proc-batch-size.") from error


@contextlib.contextmanager
def explained(args, accelerator, model):
    """Turn an out-of-memory error inside into a UserError that says what to change. `model` is not sharded yet."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise UserError("Too many files are open; allow more of them (ulimit -n 65536), or give a smaller "
                        "--num-workers.") from error
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(f"A loader process has ended ({first_line(error)}), often for want of memory; give a "
                            "smaller --num-workers and run the command again.") from error
        if not is_out_of_memory(error):
            raise
        images = args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)
        weights //= accelerator.num_processes if accelerator.is_fsdp2 else 1
        raise UserError(advice(images, args.gradient_accumulation_steps, args.grad_checkpointing,
                               accelerator.mixed_precision, weights, *device_memory(accelerator.device))) from error
