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


def is_switched_off(name, values):
    """Whether a run never had this loss of alignment, which metrics.csv then has as 0."""
    return name in ("feature", "attention") and not any(values)


def read_table(run):
    """{column: ([step], [value])} of run/metrics.csv: all columns but the step, each with the rows that have it."""
    path = run / "metrics.csv"
    if not is_file(path):
        raise BadInput(f"{path} does not exist; give the folder of a run of train.py.")
    try:
        with reading(path), open(path, newline="") as file:  # a run may be writing its last line
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        if not rows:
            raise BadInput(f"{path} has no rows yet; train first.")
        table = {column: ([int(row["step"]) for row in rows if row[column]], [float(row[column]) for row in rows if row[column]])
                 for column in rows[0] if column != "step"}
        if lacking := {*TITLES, "seconds"} - table.keys():
            raise ValueError(f"it has no column {min(lacking)}")
    except (ValueError, KeyError, csv.Error) as error:
        raise BadInput(f"{path} is not a metrics.csv of train.py ({first_line(error)}); give another run's folder.") from error
    return table


def read_metrics(run):
    """The loss terms of read_table, then the scores: the columns after `seconds`, under their own names."""
    table = read_table(run)
    columns = list(table)
    return {column: table[column] for column in (*TITLES, *columns[columns.index("seconds") + 1:])}


def early_stop(settings, metrics):
    """First step without alignment of a run with these settings and metrics: the trigger's, or the one that was planned."""
    known = {name: value for name, value in settings.items() if isinstance(value, (int, float))}
    fired = [step for step, cosine in zip(*metrics.get("cosine", ([], [])), strict=True)
             if cosine < known.get("trigger_threshold", -1)]
    return min([known.get("early_stop_point", float("inf")), *fired])


def alignment_stop(table, settings):
    """Steps after which alignment was off, by where its losses end in the table; None while it goes on or if there is none.

    The table knows it to a row; within that row it is the trigger's or the early-stop point, where that lies in it.
    """
    aligned, planned = table["feature"][0], early_stop(settings, table)
    before = aligned[-1] if aligned else 0
    after = next((step for step in table["denoise"][0] if step > before), None)
    if after is None or settings.get("enc_type") == "none":
        return None
    return planned if 0 < planned and before <= planned < after else before or None


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
        stop = alignment_stop(metrics, read_json(run / "args.json"))
        for axis, term in zip(axes, terms, strict=True):
            steps, values = metrics.get(term, ([], []))
            if is_switched_off(term, values):
                steps, values = [], []
            line, = axis.plot(steps, values, label=run.name)
            if stop is not None:
                axis.axvline(stop, color=line.get_color(), linestyle=":", linewidth=1)
            axis.set(title=TITLES.get(term, term), xlabel="step")
            axis.grid(alpha=0.3)
    axes[0].legend(title="dotted: alignment stops", fontsize=8, title_fontsize=8)
    with atomic_write(out) as file:
        figure.savefig(file, format="png", dpi=120)
    print(out)


if __name__ == "__main__":
    run_script(main)
