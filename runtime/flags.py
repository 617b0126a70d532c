"""Command-line flags: numbers with a range, flags from a file, and one sentence for a flag that cannot be used."""
import argparse
import copy
import difflib
import os
import re
import sys
import textwrap

from runtime.errors import UserError, first_line

LARGEST = 1 << 20  # bytes of a file of flags
# Keys that only files of a run have (args.json, settings.json). In these files, keys that are no flags are ignored.
OF_A_RUN = ("environment", "network_sha256")
FACTS = ("data", "processes")  # of a run, under names that are flags of other scripts
OF_TRAINING = ("time_shift", "vae", "mixed_precision")  # mean something else to scripts that do not train


class Switch(argparse.BooleanOptionalAction):
    """store_true plus a --no-... flag, which turns off what a file has turned on."""

    def __init__(self, option_strings, dest, default=False, **options):
        super().__init__(option_strings, dest, default=default, **options)


class Page(argparse.RawDescriptionHelpFormatter):
    """--help with short names for values and a line for the spellings of a flag."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)

    def _get_default_metavar_for_optional(self, action):
        return value_name(action)

    def _expand_help(self, action):
        """The help, with a default of several values as one types it."""
        shown = copy.copy(action)
        if isinstance(action.default, list):
            shown.default = " ".join(str(value).removesuffix(".0") for value in action.default)
        return super()._expand_help(shown)

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else self._format_args(action, value_name(action))
        return f"{spellings(action)} {value}".strip()


def spellings(action):
    """'--cfg-scale, --cfg' or, of a switch, '--[no-]heun'."""
    if isinstance(action, argparse.BooleanOptionalAction):
        return ", ".join(f"--[no-]{name[2:]}" for name in action.option_strings if not name.startswith("--no-"))
    return ", ".join(action.option_strings)


def value_name(action):
    """Placeholder for the value of a flag: N for a number, else the last word of its name."""
    return action.metavar or getattr(action.type, "stands_as", action.dest.rpartition("_")[2].upper())


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with --config, whose errors are UserErrors that name the flag.

    The file of --config holds flags by their names, in YAML or JSON. Typed flags override them. The commands in
    `description`, a script's docstring, become the examples at the end of --help.
    """

    def __init__(self, config=True, description="", **options):
        parts = [part.strip("\n") for part in (description or "").split("\n\n")]
        commands = [part for part in parts if all(line.startswith("    ") for line in part.splitlines())]
        text = "\n\n".join(part for part in parts if part not in commands)
        super().__init__(formatter_class=Page, description=re.sub(r":$", ".", text, flags=re.MULTILINE),
                         epilog="\n".join(["examples:", *commands]) if any(commands) else None, **options)
        self.register("action", "store_true", Switch)
        self.takes_file = config
        if config:
            self.add_argument("--config", metavar="FILE", help="flags by name in YAML or JSON, such as the args.json "
                              "of a run; typed ones win")

    def format_help(self):
        if self.usage is None and not self._subparsers:  # instead of all flags
            needed = [action for action in self._actions if action.required and action.option_strings]
            places = [action for action in self._actions if not action.option_strings]
            words = [f"{action.option_strings[0]} {value_name(action)}" for action in needed]
            words += [value_name(action) + "..." * (action.nargs in ("+", "*")) for action in places]
            self.usage = " ".join(["%(prog)s", *words, "[flags]"])
        return super().format_help()

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
        """{name: value} of the flags in the file of --config, {} without one. These flags are no longer required.

        Raises UserError for a file that cannot be read, a key that is no flag, a value that cannot be used.
        """
        finder = Parser(config=False, add_help=False)
        finder.add_argument("--config")
        path = finder.parse_known_args(args)[0].config if self.takes_file else None
        if path is None:
            return {}
        typed, given, found = {word.partition("=")[0] for word in args}, read_flags(path), {}
        of_a_run = any(mark in given for mark in OF_A_RUN)  # it holds facts too, whose names may be aliases here
        flags = {name.lstrip("-").replace("-", "_"): action
                 for action in self._actions if action.dest not in ("help", "config")
                 for name in (action.dest, *(() if of_a_run else action.option_strings))
                 if not name.startswith("--no-")}
        for key, value in given.items():
            name = str(key).replace("-", "_")
            if of_a_run and (name not in flags or name in FACTS):
                continue
            if "environment" in given and "exp_name" not in flags and name in OF_TRAINING:
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
        """Parse `value` from a file as if it had been typed for the flag of `action`."""
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
    """Turn --num_steps=50, REPA's spelling of some flags, into --num-steps=50."""
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if re.fullmatch("--[a-z][a-z0-9_-]*", name) else name) + equals + value


def read_flags(path):
    """Read the mapping in a YAML or JSON file (JSON is YAML). Raises UserError."""
    import yaml  # few starts need it
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.getsize(path) > LARGEST):  # a pipe, a device
        raise UserError(f"--config {path} is no file of flags; give one in YAML or JSON, such as a run's args.json.")
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
    """A value from a file as it would be typed: [[2, 7], [3, 9]] is 2:7,3:9."""
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

    parse.stands_as = "N" if kind is int else "X"
    return parse


def whole(low, high=float("inf")):
    """The same for whole numbers."""
    return number(low, high, int)


pixels = whole(1, 2 ** 14)  # of a side
