"""The house: which files lie where, which way imports run, how long files are, what --help waits for."""
import ast
import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A file imports files of its own floor or of those after it.
FLOORS = [("train", "train_t2i", "generate", "generate_t2i", "export", "pipeline", "commands", "benchmarks",
           "docs"), ("examples",), ("training",),
          ("sampling", "evaluations", "preprocessing"), ("encoders",),
          ("loss", "samplers", "dataset", "modify_dinov2"), ("models", "data_io"), ("runtime",)]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(path for path in ROOT.rglob("*.py")
                 if not {".venv", "tests", "exps", "data"} & set(path.relative_to(ROOT).parts))
LONGEST = 350


def imported(path):
    """Rooms of this project that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else \
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[0] for name in names if name and name.split(".")[0] in FLOOR)


def test_every_file_has_a_floor():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in SOURCES} == set(FLOOR)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward_and_files_are_short(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    upward = {name for name in imported(path) if FLOOR[name] < FLOOR[room]}
    assert not upward, f"{path} imports {upward}, which stand above it"
    assert len(path.read_text().splitlines()) <= LONGEST


def test_the_readers_of_upward_imports_see_one(tmp_path):
    """The check can fail: a file of runtime/ that imports training is seen."""
    (tmp_path / "x.py").write_text("def f():\n    from training.trainer import Trainer\n")
    assert [FLOOR[name] < FLOOR["runtime"] for name in imported(tmp_path / "x.py")] == [True]


HEAVY = ("timm", "diffusers", "transformers", "accelerate", "wandb", "scipy", "torchvision", "matplotlib")


SCRIPTS = ["train.py", "train_t2i.py", "generate.py", "generate_t2i.py", "export.py", "evaluations/evaluator.py",
           "evaluations/report.py", "evaluations/compare.py", "preprocessing/dataset_tools.py",
           "examples/cifar10/prepare.py", "benchmarks/study.py"]


@pytest.fixture(scope="module")
def helps():
    """{script: [what --help prints, modules imported by then]}, in one process: importing torch takes seconds.

    Of several scripts that fail the first is to blame.
    """
    code = """if True:
        import contextlib, io, json, runpy, sys
        found = {}
        for name in sys.argv[1:]:
            sys.argv = [name, "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
                runpy.run_path(name, run_name="__main__")
            found[name] = [out.getvalue(), sorted(n for n in sys.modules if "." not in n)]
        print(json.dumps(found))"""
    done = subprocess.run([sys.executable, "-c", code, *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_imports_nothing_heavy(helps, name):
    text, loaded = helps[name]
    assert "usage" in text and not set(loaded) & set(HEAVY)
