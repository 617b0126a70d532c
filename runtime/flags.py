"""Command-line flags: numbers with a range, and one sentence for a flag that cannot be used."""
import argparse

from runtime.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, whose sentence names the flag, where argparse prints its usage too."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)  # number's: --seed is -1; it must ...
        raise UserError(f"{message.rstrip('.')}.")


def number(low, high=float("inf"), kind=float):
    """A `type` for add_argument: a finite number of `kind`, int or float, from `low` to `high`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' if kind is int else ''}number.") from None
        if not (low <= value <= high and abs(value) < float("inf")):  # nan is outside too
            limits = f"at least {low} and finite" if high == float("inf") else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"is {text}; it must be {limits}.")
        return value

    return parse


def whole(low, high=float("inf")):
    """The same for whole numbers."""
    return number(low, high, int)
