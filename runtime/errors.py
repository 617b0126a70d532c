"""User-facing errors: one sentence, exit status 1, no traceback. Each --help imports this file: nothing slow here."""
import multiprocessing
import os
import signal
import sys
import traceback

LARGEST_SEED, MOST_CLASSES = 2 ** 32 - 1, 10 ** 6  # NumPy's limit; more classes than this are a typing error
PEER_ENDED = "error: another process of this run has ended; its message says why."


class UserError(Exception):
    """Something the user gave cannot be used. The message is the sentence to show: what, where, what to do."""


class Unreadable(UserError):
    """A file is damaged, or holds code, which is not run."""


def first_line(error):
    """The first line of an exception's message, for use inside a sentence."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_script(main):
    """Call `main()`. A UserError ends the process with its sentence on stderr and exit status 1, without a traceback.

    With several processes the launcher ends the others. One whose connection breaks first says so in one sentence.
    """
    message = None
    try:
        main()
    except UserError as error:
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()  # a loader worker's error arrives as a traceback
        message = f"error: {sentence}"
    except Exception as error:
        if not process_group():
            raise
        message = PEER_ENDED if is_broken_connection(error) else traceback.format_exc()
    finally:
        end_workers()
    if message and process_group():
        print(message, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a normal exit may wait for collectives that never finish
    if message:
        sys.exit(message)


def process_group():
    """torch.distributed if this is one process of several, else None. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def is_broken_connection(error):
    """Whether a collective failed. NCCL and the store raise DistError; gloo a RuntimeError that names its own file."""
    return isinstance(error, process_group().DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def end_workers():
    """End data loader processes that are idle or stuck when the script is over. They ignore SIGTERM."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else a loader still in use raises an error about it
        worker.kill()
        worker.join(1)


def check_bounds(args, bounds):
    """Raise UserError for a number in `args` outside its (lowest, highest) or infinite. None means not given."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name, None)
        if value is not None and not (low <= value <= high and abs(value) < float("inf")):  # nan is outside too
            limits = f"at least {low} and finite" if high == float("inf") else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {limits}.")
