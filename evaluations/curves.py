"""Loss curves of one or more runs as a picture: python evaluations/curves.py RUN_DIR... [--out FILE]

Draws the losses, the scores of --eval-steps and the gradient trigger's mean cosine from each run's metrics.csv, with
the step at which alignment stopped.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from runtime.errors import UserError, run_script
from runtime.flags import Parser

FORMATS = (".png", ".pdf", ".svg")


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", type=Path, help="a .png, .pdf or .svg (default curves.png in the first run)")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "curves.png"
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: pictures are written as {', '.join(FORMATS)}; give a name that ends so.")
    from matplotlib.figure import Figure

    from evaluations.runs import TITLES, alignment_stop, read_table, shown
    from runtime.files import atomic_write, prepare_output, read_json
    tables = {run: read_table(run) for run in args.runs}
    drawn = [(run.name, alignment_stop(table, read_json(run / "args.json")), shown(table))
             for run, table in tables.items()]
    prepare_output(out, FORMATS)
    scores = [name for table in tables.values() for name in list(table)[list(table).index("seconds") + 1:]]
    terms = [term for term in dict.fromkeys([*TITLES, *scores]) if any(term in columns for _, _, columns in drawn)]
    figure = Figure(figsize=(4.3 * len(terms), 3.6), layout="constrained")
    axes = figure.subplots(1, len(terms), squeeze=False)
    for name, stop, columns in drawn:
        for axis, term in zip(axes[0], terms, strict=True):
            line, = axis.plot(*columns.get(term, ([], [])), label=name)
            if stop is not None:
                axis.axvline(stop, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(title=TITLES.get(term, term), xlabel="step")
            axis.grid(alpha=0.3)
    axes[0, 0].legend(title="dotted: alignment stops", fontsize=8, title_fontsize=8)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower(), dpi=120)
    print(out)


if __name__ == "__main__":
    run_script(main)
