"""benchmarks/gpu.sh: all of part A on a CPU; sections that fail or take too long; the summary of its output."""
import json
import os
import shlex
import subprocess
import sys

import pytest

from benchmarks import gpu, sampling, step_time, study
from benchmarks.gpu_summary import sections
from tests.conftest import CPU, ROOT


def gpu_sh(out, *arguments, python=sys.executable, **env):
    """(finished process with stdout and stderr as one text, its summary)."""
    done = subprocess.run(["bash", str(ROOT / "benchmarks/gpu.sh"), *arguments], check=False, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=570, cwd=out,
                          env={**os.environ, **CPU, "PYTHON": str(python), "OUT": str(out), **env})
    return done, next((json.loads(path.read_text()) for path in out.glob("*.json")), None)


@pytest.mark.slow
def test_part_a_on_a_cpu(tmp_path):
    done, found = gpu_sh(tmp_path, "A", "--dry")
    assert done.returncode == 0, done.stdout
    assert found["result"] == "PASS" and found["failed"] == []
    assert [(section["name"], section["status"]) for section in found["sections"]] == [
        (name, "PASS") for name in ("machine", "ceilings", "attention", "tests")]
    machine, ceilings, attention = (section["tables"][0] for section in found["sections"][:3])
    assert "torch" in next(row["value"] for row in machine if row["what"] == "machine")
    assert {row["what"].split()[0] for row in ceilings} == {"copy", "bf16", "fp16", "tf32", "float32"}
    assert any(row["asked for"] == "default" and "attention" in row["taken"] for row in attention)
    assert " passed" in found["sections"][3]["output"] and "failed" not in found["sections"][3]["output"]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def python(tmp_path):
    """A fake Python for gpu.sh: calls that contain BREAK fail or, with SLEEP, take a minute; others do nothing."""
    path = tmp_path / "bin/python"
    path.parent.mkdir()
    path.write_text(f"""#!/usr/bin/env bash
[[ ${{LOG:-}} ]] && printf '%q ' "$@" >> "$LOG" && echo >> "$LOG"
[[ ${{GPU:-}} && $* == *is_available* ]] && exit 0
case "$*" in
    *summary* | -c*) exec {sys.executable} "$@" ;;
    *"$BREAK"*) echo "it is $BREAK that fails"; [[ ${{SLEEP:-}} ]] && exec sleep 60; exit 3 ;;
    *) echo "done" ;;
esac
""")
    path.chmod(0o755)
    return path


def test_a_failed_section_stops_no_other_and_fails_the_part(out, python):
    done, found = gpu_sh(out, "A", "--dry", python=python, BREAK="gpu.py ceilings")
    assert done.returncode == 1
    assert [line.split(" (")[0] for line in done.stdout.splitlines()[:-1]] == [
        "PASS machine", "it is gpu.py ceilings that fails", "FAIL ceilings", "PASS attention", "PASS tests"]
    assert done.stdout.splitlines()[-1].startswith("FAIL part A")
    assert found["result"] == "FAIL" and found["failed"] == ["ceilings"]
    assert found["sections"][1]["said"] == "status 3" and "that fails" in found["sections"][1]["output"]


def test_no_section_takes_more_than_the_time_there_is(out, python):
    done, found = gpu_sh(out, "A", "2", "--dry", python=python, BREAK="gpu.py machine", SLEEP="1")
    assert done.returncode == 1
    assert found["failed"] == ["machine"] and found["sections"][0]["said"] == "status 124, its time was up"
    assert [section["status"] for section in found["sections"]] == ["FAIL", "SKIP", "SKIP", "SKIP"]
    assert "SKIP tests (0 s): too little time is left" in done.stdout


def test_what_is_not_installed_is_said(tmp_path, out, python):
    """A missing package, missing data, no GPU."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['diffusers'] = None")
    done, found = gpu_sh(out, "C", "--dry", python=python, BREAK="nothing", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and [section["status"] for section in found["sections"]] == ["PASS", "SKIP", "SKIP"]
    assert "SKIP encoding (0 s): diffusers is not installed" in done.stdout
    assert "SKIP study (0 s): no data: set DATA" in done.stdout
    done, _ = gpu_sh(out, "A", python=python)
    assert done.returncode == 1 and "has no PyTorch that sees a GPU" in done.stdout
    for arguments in (["D"], ["A", "soon"], []):
        assert gpu_sh(out, *arguments, python=python)[0].returncode == 2


def test_what_a_gpu_is_asked_for_is_what_scripts_take(monkeypatch, tmp_path, out, python):
    """Parse the command lines of all parts without --dry; no run on a CPU tries them."""
    for part in "ABC":
        done, _ = gpu_sh(out, part, python=python, BREAK="nothing", GPU="1", LOG=str(tmp_path / "log"),
                         DATA=str(tmp_path))
        assert done.returncode == 0, done.stdout
    asked = {}
    for line in (tmp_path / "log").read_text().splitlines():
        script, *arguments = shlex.split(line)
        asked.setdefault(script.removeprefix("benchmarks/"), []).append(arguments)
    for script, module in (("step_time.py", step_time), ("sampling.py", sampling), ("study.py", study)):
        for arguments in asked[script]:
            monkeypatch.setattr(sys, "argv", [script, *arguments])
            module.parse_args()
    assert {name for [name] in asked["gpu.py"]} == set(gpu.COMMANDS)
    [arguments] = asked["study.py"]
    assert 6 < float(arguments[arguments.index("--minutes") + 1]) <= 7  # of part C's eight, one is left for the table


def test_a_section_that_was_cut_is_no_success():
    one, two = sections("# gpu.sh A\n\n## one\n\n$ python one.py\n\n| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"
                        "PASS one (3 s)\n\n## two\n\n$ python two.py\n\n| c |\n| --- |\n| 5 |\n")
    assert one["status"] == "PASS" and one["seconds"] == 3 and one["command"] == "python one.py"
    assert one["tables"] == [[{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]]
    assert two["status"] == "CUT" and two["tables"] == [[{"c": "5"}]]
