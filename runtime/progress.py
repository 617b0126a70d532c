"""Progress bars, and output that may fail: a full disk or a closed pipe behind stderr ends no work."""
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
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            pass


class Lines(Unfailing):
    """Stands in for a terminal: each state of a bar is a line of the log."""

    def write(self, text):
        if text := text.strip():
            logger.info(text)


def progress(total, what, unit, initial=0, shown=True):
    """A tqdm bar on a terminal; elsewhere a line in the log each LINE_SECONDS. Not at all unless `shown`."""
    where = {"file": sys.stderr}
    if not sys.stderr.isatty():
        where = {"file": Lines(sys.stderr), "mininterval": LINE_SECONDS, "maxinterval": LINE_SECONDS,
                 "delay": LINE_SECONDS, "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} passed, "
                 "{remaining} left{postfix}"}
    return tqdm(total=total, desc=what, unit=unit, initial=initial, disable=not shown, **where)
