"""pip install -e, console commands, the versions that were tested, citation, container, runner."""
import re
import runpy
import sys

import pytest
import yaml

from runtime import commands
from tests.conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 and newer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def required(name):
    """{package: rest of the line} of a file of requirements."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return {re.match(r"[\w-]+", line)[0].lower(): line for line in lines if line}


def test_all_that_is_installed_is_there():
    there = PROJECT["tool"]["setuptools"]
    assert {f"haste-{name}" for name in commands.SCRIPTS} == set(PROJECT["project"]["scripts"])
    assert set(PROJECT["project"]["scripts"].values()) == {"runtime.commands:run"}
    assert set(there["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "examples", "benchmarks"}
    assert set(there["packages"]) == folders
    assert all((ROOT / name).is_file() for name in PROJECT["project"]["license-files"])


@pytest.mark.parametrize("name, script", commands.SCRIPTS.items())
def test_a_command_runs_its_script(monkeypatch, name, script):
    seen = []
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, run_name, sys.argv, sys.path[0])))
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/haste-{name}", "--x"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    commands.run()
    assert seen == [(str(ROOT / script), "__main__", [str(ROOT / script), "--x"], str(ROOT))]
    assert (ROOT / script).is_file()


def test_tested_versions_are_of_what_is_required():
    pinned = required("constraints.txt")
    assert set(required("requirements.txt")) <= set(pinned)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned.values())


def test_the_dockerfile_copies_what_there_is():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {name for name, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "CMD"}
    for name, rest in steps:
        for source in rest.split()[:-1] if name == "COPY" else ():
            assert (ROOT / source).exists(), source


def test_the_runner_calls_the_checks_of_a_merge():
    for job in yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())["jobs"].values():
        assert {"run": ".ci/run"} in job["steps"]
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_citation_is_the_readmes():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    readme = re.sub(r"[{}]|\s+", " ", (ROOT / "README.md").read_text())
    authors = " and ".join(f"{one['family-names']}, {one['given-names']}" for one in cited["authors"])
    assert authors in readme and str(cited["year"]) in readme
    assert cited["title"] in re.sub(r" +", " ", readme.replace(" REPA ", "REPA ")) and cited["url"] in readme
