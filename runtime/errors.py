"""User-facing errors: one sentence, exit status 1, no traceback. Each --help imports this file: nothing slow here."""
import contextlib
import io
import multiprocessing
import os
import signal
import sys
import traceback

MAX_SEED, MAX_CLASSES = 2 ** 32 - 1, 10 ** 6  # NumPy's limit; more classes than this are a typing error
PEER_ENDED = "error: the connection to another process of this run broke; if that process has ended, it says why"


class UserError(Exception):
    """Something the user gave cannot be used. The message is the sentence to show: what, where, what to do."""


class Unreadable(UserError):
    """A file is damaged, or holds code, which is not run."""


def first_line(error):
    """The first line of an exception's message, for use inside a sentence."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Forgiving(io.FileIO):
    """Standard output or error. What cannot be written is dropped: a lost print must not end hours of work."""

    def write(self, data):
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


def forgive_prints():
    """Make prints and progress bars never fail, even on a full disk, a closed pipe or a character of another locale."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):  # not replaced by a test or a notebook
            stream.flush()
            raw = io.BufferedWriter(Forgiving(number, "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, "backslashreplace", "\n",
                                                stream.line_buffering or stream.write_through, stream.write_through))


def check_arguments():
    """Raise UserError for an argument that is not valid text: neither PyTorch nor JSON takes such names."""
    for argument in sys.argv[1:]:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The argument {argument!r} is no text in this locale; set LC_ALL=C.UTF-8 if it is UTF-8, "
                            "else rename what it names.") from error


def run_script(main, continues=False):
    """Call `main()`. A UserError ends the process with its sentence on stderr and exit status 1, without a traceback.

    Ctrl-C ends it with one line and status 130; `continues`: the same command goes on from there. With several
    processes the launcher ends the others. If its connection breaks before that, a process prints one sentence.
    """
    forgive_prints()
    message, status = None, 1
    try:
        check_arguments()
        main()
    except UserError as error:
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()  # a loader worker's error arrives as a traceback
        message = f"error: {sentence}"
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once
        message, status = f"stopped{'; the same command continues' * continues}", 130
    except Exception as error:
        if not process_group():
            raise
        first, *more = str(error).strip().splitlines() or [type(error).__name__]
        message = (f"{PEER_ENDED} ({'; '.join([first, *more[-1:]])})" if is_broken_connection(error)
                   else traceback.format_exc())
    finally:
        end_workers()
    if message:
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
        if process_group():
            os._exit(status)  # a normal exit may wait for collectives that never finish
        sys.exit(status)


def process_group():
    """torch.distributed if this is one process of several, else None. Does not import torch."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def is_broken_connection(error):
    """Whether a collective failed. NCCL and the store raise DistError; gloo a RuntimeError that names its own file."""
    import torch.distributed as dist  # here: loaded already, while --help must not load it
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def end_workers():
    """End data loader processes that are idle or stuck when the script ends. They ignore SIGTERM."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else a loader still in use raises an error about it
        worker.kill()
        worker.join(1)
