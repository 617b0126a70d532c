"""The commands that `pip install -e .` installs: haste-train runs `python train.py` from any folder."""
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {"train": "train.py", "train-t2i": "train_t2i.py", "generate": "generate.py",
           "generate-t2i": "generate_t2i.py", "export": "export.py", "data": "preprocessing/dataset_tools.py",
           "coco": "preprocessing/coco.py", "evaluate": "evaluations/evaluator.py",
           "compare": "evaluations/compare.py", "report": "evaluations/report.py"}


def run():
    """Run the script of the command that was called, as the interpreter would."""
    script = ROOT / SCRIPTS[Path(sys.argv[0]).stem.removeprefix("haste-")]
    sys.argv[0] = str(script)
    sys.path.insert(0, str(script.parent))
    if script.parent != ROOT:
        sys.path.insert(0, str(ROOT))
    runpy.run_path(str(script), run_name="__main__")
