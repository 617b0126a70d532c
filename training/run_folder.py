"""The folder of a run: its name, its lock, and log.txt, which a refused start does not touch."""
import contextlib
import errno
import fcntl
import logging
import os
import platform
import time
from logging.handlers import MemoryHandler

from runtime.errors import UserError, first_line
from runtime.files import check_writable, writing

LOCK = ".lock"
DONE = "done: "  # begins the last line of a finished run's log

logger = logging.getLogger("haste")


def lock_run(run):
    """Make the folder `run` and lock it -> the open file that holds the lock. Raises UserError if another process does.

    fcntl's locks end with their process, are not inherited by loader processes, and reach other machines over NFS.
    """
    with writing(run / LOCK):
        run.mkdir(parents=True, exist_ok=True)
        file = open(run / LOCK, "a+")  # noqa: SIM115 - open as long as the run
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            raise UserError(f"{run} is in use by {file.read() or 'another process'}; wait until that ends, or end it "
                            "and give the command again, or give another --exp-name.") from error
        logger.warning(f"{run} cannot be locked ({first_line(error)}): see that no other process trains there.")
    with writing(run / LOCK):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
    return file


def collect_log(run):
    """Keep what is logged in memory, for log.txt in `run`, until open_log."""
    target = logging.FileHandler(run / "log.txt", delay=True, encoding="utf-8")
    target.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.handlers = [MemoryHandler(10_000, logging.CRITICAL + 1, target)]


def open_log(run, folders=()):
    """Start to write log.txt. Called once the folder is known to be this run's. Checks that `folders` are writable.

    Raises UserError if they are not. Does nothing if collect_log was not called: on the other processes.
    """
    for handler in logger.handlers:
        if isinstance(handler, MemoryHandler):
            for folder in (run, *(run / name for name in folders)):  # rather than after the first steps
                check_writable(folder)
            logger.handlers = [handler.target]
            with writing(run / "log.txt"):
                handler.flush()


def note_end(run, error):
    """Write into log.txt why the run ends. A refused start leaves no new folder, and a finished run's log as it was.

    It does write into an unfinished run's log, whose last line tells a cluster job whether to start the run again.
    """
    why = first_line(str(error).rsplit("UserError: ", 1)[-1]) if isinstance(error, UserError) else repr(error)
    if any(isinstance(handler, MemoryHandler) for handler in logger.handlers):
        if {path.name for path in run.iterdir()} <= {LOCK}:
            (run / LOCK).unlink()
            return run.rmdir()
        log = run / "log.txt"
        if not log.is_file() or f" {DONE}" in log.read_text(errors="replace").strip().rpartition("\n")[2]:
            return None
        logger.handlers = [handler.target for handler in logger.handlers]
        why = f"refused: {why}"
    logger.propagate = False  # stderr shows it anyway
    logger.error(f"ended: {why}")
    logger.propagate = True
    return None


@contextlib.contextmanager
def opened(run, is_main):
    """The folder `run`, locked by the main process; its log says why a run ends."""
    missing = [folder for folder in run.parents if not os.path.exists(folder)]  # pathlib's may raise OSError
    with contextlib.ExitStack() as stack:
        if is_main:
            lock = stack.enter_context(lock_run(run))
            stack.callback(lock.truncate, 0)
        try:
            yield
        except Exception as error:
            if is_main:
                with contextlib.suppress(OSError):
                    note_end(run, error)
                    for folder in missing:  # the innermost first; those in use stay
                        folder.rmdir()
            raise
