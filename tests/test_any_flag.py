"""Any text for any flag: the script works or prints one sentence. The choice of texts is seeded."""
import os
import random
import re
import shutil
import time

import pytest

import export
from docs.make_flags import parser_of
from evaluations import baselines, curves, evaluator, probe, report, stats
from runtime.errors import UserError
from tests.conftest import call_main
from tests.damage import CKPT
from tests.worlds import base

TEXTS = ("", " ", "-1", "0", "1", "0.5", "1e400", "nan", "inf", "9" * 30, "1_000", "\u0663", "caf\udcff", "a\u2028b",
         "a" * 300, "..", ".", "~", "/dev/null", "/dev/zero", "/dev/full", "{w}/pipe", "{w}", "{w}/data", "{w}/new/x",
         "{w}/reference.npz", "{w}/out/run/metrics.csv", "{w}/other.pth", f"{{w}}/{CKPT}", "a/b", "%s", "{x}", "list",
         "none", "-", "1,2,,3", "1,2,3", "cuda", "[]", "*", "100000000000", "{w}/new.json", "{w}/new.npz")
READ = ("reference.npz", "samples.npz", "other.pth", "out/run/metrics.csv", "out/run/args.json", CKPT)


@pytest.mark.parametrize("module", [baselines, curves, evaluator, export, probe, report, stats])
def test_any_text_for_any_flag(monkeypatch, world, tmp_path, module):
    w, rng = shutil.copytree(world, tmp_path / "w"), random.Random(module.__name__)
    os.mkfifo(w / "pipe")
    before = {name: (w / name).read_bytes() for name in READ}
    monkeypatch.chdir(w)
    actions = [action for action in parser_of(module)._actions if action.nargs != 0]
    given = [*base(module, w)]
    for k in range({evaluator: 40, probe: 15}.get(module, 80)):  # these two take longest
        action, text = actions[k % len(actions)], rng.choice(TEXTS).replace("{w}", str(w))
        arguments = [*given, f"{action.option_strings[0]}={text}"] if action.option_strings else [text, *given[1:]]
        started = time.monotonic()
        try:
            call_main(monkeypatch, module, *arguments)
        except UserError as error:
            assert re.fullmatch(r".{15,900}\.", str(error)), (action.dest, text)
        except SystemExit as end:  # argparse's own
            assert end.code == 2, (action.dest, text)
        assert time.monotonic() - started < 30, (action.dest, text)
        assert {name: (w / name).read_bytes() for name in READ} == before, (action.dest, text)
