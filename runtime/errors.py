"""User-facing errors: one sentence, exit status 1, no traceback."""
import multiprocessing
import signal
import sys
import traceback

LARGEST_SEED, MOST_CLASSES = 2 ** 32 - 1, 10 ** 6  # NumPy's; more classes are a slip of the keyboard


class UserError(Exception):
    """Something the user gave cannot be used. The message is the sentence to show: what, where, what to do."""


class Unreadable(UserError):
    """A file is damaged, or holds code, which is not run."""


def first_line(error):
    """The first line of an exception's message, for use inside a sentence."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def end_workers():
    """End loader processes that are idle or stuck when the script is over; they ignore SIGTERM."""
    for worker in multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader that is still there would raise an error about it
        worker.kill()
        worker.join(1)


def run_script(main):
    """Call `main()`; a UserError ends the process with its sentence on stderr and exit status 1, without a traceback.

    The same goes for what happens to a process of several when another one is gone.
    """
    said = None
    try:
        main()
    except UserError as error:
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()  # a loader's worker wraps it in a traceback's text
        said = f"error: {sentence}"
    except Exception:
        from runtime.processes import ENDED, is_watched, others_ended
        if not is_watched():
            raise
        said = ENDED if others_ended() else traceback.format_exc()
    finally:
        end_workers()
    if said:
        from runtime.processes import end_at_once, is_watched  # not at the top: torch takes seconds, --help needs none
        if is_watched():
            end_at_once(said)
        sys.exit(said)


def check_bounds(args, bounds):
    """Raise UserError for a number in `args` outside its (lowest, highest) or infinite; None, not given, is fine."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name, None)
        if value is not None and not (low <= value <= high and abs(value) < float("inf")):  # nan is outside too
            limits = f"at least {low} and finite" if high == float("inf") else f"from {low} to {high}"
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {limits}.")

