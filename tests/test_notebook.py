"""examples/haste.ipynb: its cells run one after another, on tiny data and with a tiny teacher."""
import importlib
import json
import shlex
import sys

import matplotlib
import pytest

from tests.conftest import ROOT, call_main, train_arguments

NOTEBOOK = json.loads((ROOT / "examples/haste.ipynb").read_text())
LEFT_OUT = "examples/emoji/prepare.py"  # it needs packages


def test_cells_run(monkeypatch, tmp_path, tiny_data, teacher_file):
    """As Jupyter runs them: `%run script.py flags` with {variables} filled in, the rest as Python."""
    matplotlib.use("Agg")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "examples")
    training = train_arguments(tiny_data, "{out}", "--enc-weights", teacher_file, "--early-stop-point", 2,
                               "--max-train-steps", 4, "--model", "SiT-N/8", "--vae", "none")
    shown, out = [], tmp_path / "exps"
    space = {"display": shown.append}
    for cell in (cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"):
        code = "".join(cell["source"])
        if cell["id"] == "parameters":
            exec(code, space)  # noqa: S102
            assert {"DATA", "NAME", "STEPS", "STOP", "TRAINING", "VAE"} <= space.keys()
            space |= {"NAME": "run", "STEPS": 4, "STOP": 2,
                      "TRAINING": shlex.join(training).replace("{out}", str(out)), "VAE": "none"}
        elif code.startswith("%run "):
            name, *words = shlex.split(code.removeprefix("%run ").format(**space))
            assert (ROOT / name).is_file() and "\n" not in code
            if name != LEFT_OUT:
                with pytest.MonkeyPatch.context() as patch:
                    call_main(patch, importlib.import_module(name.removesuffix(".py").replace("/", ".")), *words)
        else:
            exec(code, space)  # noqa: S102
            if cell["id"] == "folder":
                assert space["ROOT"] == ROOT
                monkeypatch.chdir(tmp_path)  # where it finds exps/run
    assert space["stop"] == 2 and shown[0].width == 4 * 64 + 3 * 2
    assert {"denoise", "feature", "attention"} <= set(space["drawn"]) and space["pair"]["student"] == 1


def test_it_holds_no_results():
    """Outputs belong to who runs it; links lead to files."""
    for cell in NOTEBOOK["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    assert "docs/own-data.md" in json.dumps(NOTEBOOK)
