"""Loss curves of one or more runs as a picture: python evaluations/curves.py RUN_DIR... [--out FILE.png]

Reads metrics.csv of each run and draws its loss terms, the scores of --eval-steps and the mean cosine of the gradient
trigger, with the step at which alignment stopped.
"""
import argparse
import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
from files import BadInput, atomic_write, first_line, is_file, read_json, reading, run_script

TITLES = {"denoise": "denoising loss", "feature": "feature loss (-cosine)", "attention": "attention loss (nats)"}


def read_metrics(run):
    """{term: ([step], [value])} of the rows of run/metrics.csv that have the term: losses, then the scores.

    Scores, and the trigger's cosines, are the columns after `seconds`, under their own names.
    """
    path = run / "metrics.csv"
    if not is_file(path):
        raise BadInput(f"{path} does not exist; give the folder of a run of train.py.")
    try:
        with reading(path), open(path, newline="") as file:  # a run may be writing its last line
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        if not rows:
            raise BadInput(f"{path} has no rows yet; train first.")
        columns = list(rows[0])
        terms = [*TITLES, *columns[columns.index("seconds") + 1:]]
        return {term: ([int(row["step"]) for row in rows if row[term]], [float(row[term]) for row in rows if row[term]])
                for term in terms}
    except (ValueError, KeyError, csv.Error) as error:
        raise BadInput(f"{path} is not a metrics.csv of train.py ({first_line(error)}); give another run's folder.") from error


def early_stop(settings, metrics):
    """First step without alignment of a run with these settings and metrics: the trigger's, or the one that was planned."""
    known = {name: value for name, value in settings.items() if isinstance(value, (int, float))}
    fired = [step for step, cosine in zip(*metrics.get("cosine", ([], [])), strict=True)
             if cosine < known.get("trigger_threshold", -1)]
    return min([known.get("early_stop_point", float("inf")), *fired])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--out", type=Path, help="picture to write (default curves.png in the first run)")
    args = parser.parse_args()
    out = args.out or args.runs[0] / "curves.png"
    found = {run: read_metrics(run) for run in args.runs}
    terms = list(dict.fromkeys(term for metrics in found.values() for term in metrics if not term.startswith("cosine_")))
    figure, axes = plt.subplots(1, len(terms), figsize=(4.3 * len(terms), 3.6), constrained_layout=True)
    for run, metrics in found.items():
        settings = read_json(run / "args.json")
        for axis, term in zip(axes, terms, strict=True):
            line, = axis.plot(*metrics.get(term, ([], [])), label=run.name)
            stop = early_stop(settings, metrics)
            if metrics["feature"][0] and stop < settings.get("max_train_steps", 0):
                axis.axvline(stop, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(title=TITLES.get(term, term), xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend(title="dotted: alignment stops", fontsize=8, title_fontsize=8)
    with atomic_write(out) as file:
        figure.savefig(file, format="png", dpi=120)
    print(out)


if __name__ == "__main__":
    run_script(main)
