"""Write docs/flags.md: the flags of the five scripts that have most of them, as their parsers give them.

    python docs/make_flags.py
"""
import argparse
import importlib
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "train_t2i", "generate", "generate_t2i", "evaluations.evaluator")
HEAD = """# What flags are there?

Made by `python docs/make_flags.py` from the scripts themselves; do not edit. Flags of a script's own come first.
`train.py --preset list` shows the paper's runs. What differs from the releases: [differences](differences.md).
"""


def parser_of(script):
    """The ArgumentParser of `script`, caught when it is about to parse an empty command line."""
    with mock.patch.object(sys, "argv", [script]), \
            mock.patch.object(argparse.ArgumentParser, "parse_args", autospec=True) as parse_args:
        parse_args.side_effect = StopIteration
        try:
            importlib.import_module(script).parse_args()
        except StopIteration:
            return parse_args.call_args.args[0]


def row(action):
    """A line of the table: flag with its value, help, default."""
    flags, default = ", ".join(action.option_strings), "" if action.default is None else str(action.default)
    if isinstance(action.default, bool):
        default = "on" if action.default else "off"
    elif isinstance(action.default, list):
        default = " ".join(map(str, action.default))
    value = "" if action.nargs == 0 else action.metavar or action.dest.upper()
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    text = re.sub(r",? *\(default [^():]*\)", "", (action.help or "") % vars(action))
    return f"| `{f'{flags} {value}'.strip()}` | {text} | {'required' if action.required else default} |"


def page():
    lines = [HEAD]
    for script in SCRIPTS:
        lines.append(f"## {script.replace('.', '/')}.py\n")
        for group in parser_of(script)._action_groups:
            actions = [action for action in group._group_actions if action.dest != "help"]
            if actions:
                lines += [f"**{group.title}**\n", "| flag | what | default |", "|---|---|---|", *map(row, actions), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    (ROOT / "docs/flags.md").write_text(page())
