"""Run train.py across the early stop with every teacher of the table, at its real width, cut to two blocks.

    python benchmarks/teachers.py
    python benchmarks/teachers.py --enc-type dinov3-vit-b16 clip-vit-L,mae-vit-l

Weights and data are random. Each run makes two steps of SiT-T/2 with feature and attention alignment; only the first is
aligned. The table shows the process's memory in these steps and whether the teacher was freed between them. Exits with
status 1 if one was not.
"""
import gc
import sys
import tempfile
import weakref
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
import timm
import torch

import train
from benchmarks import synthetic
from benchmarks.measure import status, table
from encoders import teachers
from encoders.teachers import TEACHERS, split_teachers
from runtime.flags import Parser
from training import trainer

BLOCKS = 2
FLAGS = ["--model", "SiT-T/2", "--num-classes", "1000", "--resolution", "128", "--batch-size", "4", "--mixed-precision",
         "no", "--report-to", "none", "--num-workers", "0", "--sampling-steps", "0", "--attn-layers", "1:0,2:1",
         "--early-stop-point", "1", "--max-train-steps", "2"]


def shallow_weights(name, folder):
    """Cut the teacher's row to BLOCKS blocks; write a file of random weights for it."""
    options = dict(TEACHERS[name].options) | {"depth": BLOCKS}
    row = TEACHERS[name] = TEACHERS[name]._replace(options=tuple(options.items()))
    vit = timm.create_model(row.timm_name.split(".")[0], num_classes=0, **options)
    torch.save(vit.state_dict(), folder / f"{name}.pth")
    return str(folder / f"{name}.pth")


def measure(enc_type, folder):
    """A row of the table; the last entry says whether all teachers were freed."""
    names = [teachers.ALIASES.get(name, name) for name, _ in split_teachers(enc_type)]
    files, made, seen = ",".join(shallow_weights(name, folder) for name in names), [], []
    load, update = teachers.load_vit, trainer.update_ema

    def loaded(*args):
        vit = load(*args)
        made.append(weakref.ref(vit))
        return vit

    def updated(*args):
        seen.append((status("VmRSS") / 2 ** 30, all(vit() is None for vit in made)))
        return update(*args)

    arguments = ["train.py", *FLAGS, "--data-dir", str(folder / "data/folder"), "--output-dir", str(folder / "exps"),
                 "--exp-name", enc_type, "--enc-type", ",".join(names), "--enc-weights", files]
    with mock.patch.object(teachers, "load_vit", loaded), mock.patch.object(trainer, "update_ema", updated), \
            mock.patch.object(sys, "argv", arguments):
        train.main()
    for file in files.split(","):
        Path(file).unlink()
    gc.collect()
    (before, _), (after, freed) = seen
    widths = "+".join(str(TEACHERS[name].width) for name in names)
    inputs = "+".join(str(8 * TEACHERS[name].patch) for name in names)  # 8 tokens a side
    return [enc_type, widths, inputs, f"{before:.2f}", f"{after:.2f}", "yes" if freed else "NO"]


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--enc-type", nargs="+", default=list(TEACHERS), help="as in train.py (default: the table)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made_up = ["synthetic.py", str(Path(folder, "data")), "--n", "8", "--resolution", "128", "--forms", "folder"]
        with mock.patch.object(sys, "argv", made_up):
            synthetic.main()
        rows = [measure(enc_type, Path(folder)) for enc_type in args.enc_type]
    print(table(["teacher", "width", "input, px", "GiB, step 1", "GiB, step 2", "freed"], rows))
    sys.exit(int(any(row[-1] == "NO" for row in rows)))


if __name__ == "__main__":
    main()
