"""Command-line flags: numbers with a range, flags from a file, and one sentence for a flag that cannot be used."""
import argparse
import difflib
import re
import sys

from runtime.errors import UserError, first_line

# Only files that a run has written have these keys (args.json, settings.json): what else is no flag there is left out.
OF_A_RUN = ("environment", "network_sha256")


class Switch(argparse.BooleanOptionalAction):
    """store_true with a --no-... beside it, which turns off what a file has turned on."""

    def __init__(self, option_strings, dest, default=False, **options):
        super().__init__(option_strings, dest, default=default, **options)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --config, whose errors are UserErrors that name the flag.

    The file of --config holds flags by their names, in YAML or JSON. They are the defaults of what is not typed.
    """

    def __init__(self, config=True, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)
        self.register("action", "store_true", Switch)
        self.takes_file = config
        if config:
            self.add_argument("--config", metavar="FILE", help="flags by name in YAML or JSON, such as the args.json "
                              "of a run; typed ones win")

    def error(self, message):
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)  # number's: --seed is -1; it must ...
        raise UserError(f"{message.rstrip('.')}.")

    def parse_known_args(self, args=None, namespace=None):
        args = [plain_spelling(word) for word in (sys.argv[1:] if args is None else args)]
        self.set_defaults(**self.from_file(args))
        found, rest = super().parse_known_args(args, namespace)
        if self.takes_file:  # what it says is in the other flags
            vars(found).pop("config")
        return found, rest

    def from_file(self, args):
        """{name: value} of the flags in --config among `args`, {} without it. What it gives is not required any more.

        Raises UserError for a file that is not read, a key that is no flag, a value that cannot be used.
        """
        finder = Parser(config=False, add_help=False)
        finder.add_argument("--config")
        path = finder.parse_known_args(args)[0].config if self.takes_file else None
        if path is None:
            return {}
        flags = {name.lstrip("-").replace("-", "_"): action for action in self._actions if action.dest not in
                 ("help", "config") for name in (action.dest, *action.option_strings) if not name.startswith("--no-")}
        typed, given, found = {word.partition("=")[0] for word in args}, read_flags(path), {}
        for key, value in given.items():
            name = str(key).replace("-", "_")
            if name not in flags and any(mark in given for mark in OF_A_RUN):
                continue
            if name not in flags:
                nearest, = difflib.get_close_matches(name, flags, 1, 0)
                raise UserError(f"{path} has the key {key!r}, which is no flag of this script; the nearest is "
                                f"{nearest!r}.")
            if value is not None:
                action = flags[name]
                found[action.dest] = self.value_of(action, value, f"{path}: {key}")
                action.required = False
                if not action.option_strings:
                    action.nargs = {None: "?", "+": "*"}.get(action.nargs, action.nargs)
        rivals = [action for group in self._mutually_exclusive_groups for action in group._group_actions
                  if any(typed & {*other.option_strings} for other in group._group_actions)]
        for action in [*self._actions, *rivals]:
            if action in rivals or typed & {*action.option_strings}:
                found.pop(action.dest, None)
        return found

    def value_of(self, action, value, where):
        """What the flag of `action` would be if `value` of a file were typed."""
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{where} is {value!r}; it must be true or false.")
            return value
        several = action.nargs is not None or isinstance(action, argparse._AppendAction)
        words = [as_word(each) for each in value] if several and isinstance(value, list) else [as_word(value)]
        try:
            if isinstance(action, argparse._AppendAction):
                return [self._get_values(action, [word]) for word in words]
            return self._get_values(action, words)
        except argparse.ArgumentError as error:
            raise UserError(f"{where}: {error.message.rstrip('.')}.".replace(": is ", " is ", 1)) from error


def plain_spelling(word):
    """--num_steps=50, as REPA writes some flags, is --num-steps=50."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if re.fullmatch("--[a-z][a-z0-9_-]*", name) else name) + equals + value


def read_flags(path):
    """The mapping in a file of YAML, which JSON is too. Raises UserError."""
    import yaml  # few starts need it
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = yaml.safe_load(file)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"--config {path} cannot be read ({reason}); give a YAML or JSON file of flags.") from error
    if not isinstance(found, dict):
        raise UserError(f"--config {path} holds a {type(found).__name__}; write a flag a line, such as `seed: 1`.")
    return found


def as_word(value):
    """A value of a file as one types it: [[2, 7], [3, 9]] is 2:7,3:9."""
    if isinstance(value, list):
        return ",".join(":".join(map(str, each)) if isinstance(each, list) else str(each) for each in value)
    return str(value)


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
