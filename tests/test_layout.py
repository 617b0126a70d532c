"""Code layout: where files lie, which way imports run, file lengths, what --help imports."""
import ast
import json
import resource
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# A file imports only from its own row or from the rows after it.
FLOORS = [("train", "train_t2i", "generate", "generate_t2i", "export", "pipeline", "benchmarks",
           "docs"), ("examples",), ("training",),
          ("sampling", "evaluations", "preprocessing"), ("encoders",),
          ("loss", "samplers", "dataset", "modify_dinov2"), ("models", "data_io"), ("runtime",)]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(path for path in ROOT.rglob("*.py")
                 if not {".venv", "tests", "exps", "data"} & set(path.relative_to(ROOT).parts))
LONGEST = 350


def imported(path):
    """Packages of this project that a file imports, anywhere in it."""
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
    """The check can fail: it finds a file of runtime/ that imports training."""
    (tmp_path / "x.py").write_text("def f():\n    from training.trainer import Trainer\n")
    assert [FLOOR[name] < FLOOR["runtime"] for name in imported(tmp_path / "x.py")] == [True]


HELP_SECONDS = 1  # importing torch alone takes longer
WHOLE_PAGES = """
import json
from docs import make_flags
parsers = {script.__file__: make_flags.parser_of(script) for script in make_flags.SCRIPTS}
for path, parser in parsers.items():
    parser.prog = path.rpartition("/")[2]
print(json.dumps({path: parser.format_help() for path, parser in parsers.items()}))
"""


@pytest.fixture(scope="module")
def whole_pages():
    """{path of a script: its --help page}, from a process that has imported torch."""
    return json.loads(subprocess.run([sys.executable, "-c", WHOLE_PAGES], cwd=ROOT, capture_output=True, text=True,
                                     check=True).stdout)


SCRIPTS = [str(path.relative_to(ROOT)) for path in SOURCES if "import runtime.quick_help" in path.read_text()
           or (path.parent.name == "evaluations" and "__main__" in path.read_text())]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_whole(name, whole_pages):
    """Measures CPU seconds, so that a busy machine changes nothing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-X", "importtime", ROOT / name, "--help"], capture_output=True, text=True,
                          check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < HELP_SECONDS
    assert "usage" in done.stdout and done.stdout == whole_pages.get(str(ROOT / name), done.stdout)
    if name.startswith("evaluations") and "quick_help" not in (ROOT / name).read_text():
        found = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert not found & {"torch", "timm", "transformers", "scipy", "matplotlib", "numpy", "PIL"}


def test_without_help_nothing_is_left_out():
    done = subprocess.run([sys.executable, "-c", "import runtime.quick_help, torch; print(torch.ones(2).sum().item())"],
                          cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "2.0\n"


def test_a_wrong_flag_beside_help():
    """The stand-ins must not pass for a process group, or for what a decorator returns."""
    done = subprocess.run([sys.executable, "generate.py", "--num-steps", "x", "--help"], cwd=ROOT, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 1 and done.stderr == "error: --num-steps/--steps: 'x' is no whole number.\n"
