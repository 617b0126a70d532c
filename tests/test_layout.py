"""The house: which files lie where, which way imports run, how long files are, what --help waits for."""
import ast
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


@pytest.mark.parametrize("name", ["train.py", "train_t2i.py", "generate.py", "generate_t2i.py", "export.py",
                                  "evaluations/evaluator.py", "evaluations/report.py", "evaluations/compare.py",
                                  "preprocessing/dataset_tools.py", "examples/cifar10/prepare.py",
                                  "benchmarks/study.py"])
def test_help_imports_nothing_heavy(name):
    """In a process of its own: what is imported when --help has been printed."""
    code = ("import runpy, sys\nsys.argv = [sys.argv[1], '--help']\n"
            "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit:\n    pass\n"
            "print(sorted(n for n in sys.modules if '.' not in n), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, ROOT / name], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    loaded = set(ast.literal_eval(done.stderr.strip().splitlines()[-1]))
    assert "usage" in done.stdout and not loaded & set(HEAVY)
