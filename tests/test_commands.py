"""Every command in README and docs works: the script's own parser accepts it and its files exist."""
import ast
import importlib
import inspect
import re
import shlex

import pytest

from docs.make_flags import parser_of
from sampling.images import sample
from sampling.pipeline import Pipeline, load_pipeline
from tests.conftest import ROOT
from training.presets import PRESETS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md")),
         *sorted(ROOT.glob("examples/*/README.md"))]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
LAUNCHED = re.compile(r"(?:python3?|torchrun|accelerate)\s(?:[^|;&]*?\s)??((?:[a-z_0-9]+/)*[a-z_0-9]+\.py)\b(.*)")
OURS = ("assets/", "examples/", "benchmarks/", "docs/", "evaluations/", "preprocessing/", "tests/", ".ci/")


def blocks(page, *languages):
    return [found[3] for found in BLOCK.finditer(page.read_text()) if found[2] in languages]


def commands(page):
    """(script, words behind it, whether words may be missing) of a page's blocks, and of its `python ...`."""
    text = "\n".join(blocks(page, "", "bash", "sh", "shell", "console")).replace("\\\n", " ")
    inline = re.findall(r"`((?:python|torchrun|accelerate) [^`]+\.py[^`]*)`", BLOCK.sub("", page.read_text()))
    for line in [*text.splitlines(), *(" ".join(code.split()) for code in inline)]:
        if found := LAUNCHED.search(line.partition(" # ")[0]):
            words = shlex.split(re.split(r"\s[|;&]|[;)']", found[2])[0])
            yield found[1], tuple(word for word in words if word != "..."), line in inline or "..." in words


COMMANDS = list(dict.fromkeys((page.name, *command) for page in PAGES for command in commands(page)))
LISTS = ("list", "--preset", "--enc-type")  # `train.py --preset list`


@pytest.mark.parametrize("page, script, words, is_part", COMMANDS,
                         ids=lambda value: value if isinstance(value, str) else "")
def test_the_script_takes_the_command(tmp_path, page, script, words, is_part):
    assert (ROOT / script).is_file()
    for word in words:
        assert not word.startswith(OURS) or list(ROOT.glob(word)), f"{page} names {word}"
    if "--preset" in words and "train" in script:
        name = words[words.index("--preset") + 1]
        assert name == "list" or PRESETS[name][0] == script
    if "--help" in words or script == "docs/make_flags.py":
        return
    parser = parser_of(importlib.import_module(script.removesuffix(".py").replace("/", ".")))
    is_list = "list" in words
    for action in parser._actions:
        action.required = action.required and not (is_part or is_list)
    run = tmp_path / "args.json"
    run.write_text('{"exp_name": "x"}')
    parser.parse_args([str(run) if word.endswith("args.json") else word for word in words
                       if not (is_list and word in LISTS)])


def test_commands_are_found():
    """A page whose commands are not understood would pass: these are known to be there."""
    assert len(COMMANDS) > 40
    scripts = {script for _, script, *_ in COMMANDS}
    assert {"train.py", "train_t2i.py", "generate.py", "generate_t2i.py", "export.py", "evaluations/compare.py",
            "evaluations/report.py", "preprocessing/dataset_tools.py", "preprocessing/coco.py"} <= scripts


def test_python_of_the_pages():
    """It compiles, its imports exist, and calls of a pipeline name what sampling takes."""
    taken = {*inspect.signature(sample).parameters, *inspect.signature(Pipeline.__call__).parameters}
    found = [ast.parse(code) for page in PAGES for code in blocks(page, "python") if "import" in code]
    calls = [node for tree in found for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for tree in found:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), name.name) for name in node.names)
    named = [(call.func.id, {word.arg for word in call.keywords}) for call in calls if isinstance(call.func, ast.Name)]
    assert {"load_pipeline", "pipe"} <= {name for name, _ in named}
    for name, words in named:
        assert name != "pipe" or words <= taken
        assert name != "load_pipeline" or words <= {*inspect.signature(load_pipeline).parameters}
