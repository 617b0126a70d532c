"""Progress bars, and output that may fail: a full disk or a closed pipe behind stderr ends no work."""
import contextlib
import logging
import sys

from tqdm import tqdm

LINE_SECONDS = 60  # between lines where there is no terminal

logger = logging.getLogger("haste")


class Unfailing:
    """A stream whose writes may fail unnoticed."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


class Lines(Unfailing):
    """Stands in for a terminal: each state of a bar is a line of the log."""

    def write(self, text):
        if text := text.strip():
            logger.info(text)


def progress(total, what, unit, initial=0, shown=True):
    """A tqdm bar on a terminal; elsewhere a line in the log each LINE_SECONDS. Not at all unless `shown`."""
    log = {} if sys.stderr.isatty() else {
        "file": Lines(sys.stderr), **dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS),
        "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} passed, {remaining} left{postfix}"}
    return tqdm(total=total, desc=what, unit=unit, initial=initial, disable=not shown, **log)
