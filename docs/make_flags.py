"""Write docs/flags.md, a table of the flags of six scripts: python docs/make_flags.py"""
import argparse
import contextlib
import re
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script sees docs/ only
import generate
import generate_t2i
import train
import train_t2i
from evaluations import compare, evaluator
from runtime.flags import spellings, value_name

SCRIPTS = (train, train_t2i, generate, generate_t2i, evaluator, compare)
HEAD = """# What flags are there?

Made by `python docs/make_flags.py` from the scripts themselves; do not edit. Flags of a script's own come first.
Other scripts: `--help`.
`train.py --preset list` shows the paper's runs. What differs from the releases: [differences](differences.md).
"""


def parser_of(script):
    """The ArgumentParser of `script`, captured at its call of parse_args."""
    patch = mock.patch.object
    with patch(sys, "argv", [script.__name__]), contextlib.suppress(StopIteration), \
            patch(argparse.ArgumentParser, "parse_args", autospec=True, side_effect=StopIteration) as parse_args:
        getattr(script, "parse_args", script.main)()
    return parse_args.call_args.args[0]


def row(action):
    """A line of the table: flag with its value, help, default."""
    flags, default = spellings(action), "" if action.default is None else action.default
    if isinstance(default, (bool, list)):
        default = " ".join(map(str, default)) if isinstance(default, list) else ("off", "on")[default]
    value = "" if action.nargs == 0 else value_name(action)
    if action.choices and not action.metavar:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    text = (action.help or "") % vars(action)
    if action.default is not None:  # it has a column
        text = re.sub(r",? *\(default [^():]*\)", "", text)
    return f"| `{f'{flags} {value}'.strip()}` | {text} | {'required' if action.required else default} |"


def page():
    lines = [HEAD]
    for script in SCRIPTS:
        lines.append(f"## {Path(script.__file__).relative_to(ROOT)}\n")
        for group in parser_of(script)._action_groups:
            actions = [action for action in group._group_actions if action.dest != "help"]
            title = [f"**{group.title}**\n", "| flag | what | default |", "|---|---|---|"]
            lines += [*title, *map(row, actions), ""] if actions else []
    return "\n".join(lines)


if __name__ == "__main__":
    (ROOT / "docs/flags.md").write_text(page())
