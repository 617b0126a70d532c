"""Progress: a tqdm bar on a terminal, one line per minute in a log file."""
import logging
import sys

from tqdm import tqdm

LINE_SECONDS = 60  # between lines where there is no terminal

logger = logging.getLogger("haste")


class Lines:
    """Stands in for a terminal: each state of a bar is a line of the log."""

    @staticmethod
    def write(text):
        if text := text.strip():
            logger.info(text)

    @staticmethod
    def flush():
        pass


def progress(total, what, unit, initial=0, shown=True):
    """A tqdm bar on a terminal; elsewhere a line in the log each LINE_SECONDS. Hidden unless `shown`."""
    log = {} if sys.stderr.isatty() else {
        "file": Lines, **dict.fromkeys(("mininterval", "maxinterval", "delay"), LINE_SECONDS),
        "bar_format": "{desc}: {n_fmt} of {total_fmt} {unit}s, {elapsed} passed, {remaining} left{postfix}"}
    return tqdm(total=total, desc=what, unit=unit, initial=initial, disable=not shown, **log)
