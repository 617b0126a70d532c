"""Loss curves of one or more runs as a picture: python evaluations/curves.py RUN_DIR... [--out FILE.png]

Draws the losses, the scores of --eval-steps and the gradient trigger's mean cosine from each run's metrics.csv, with
the step at which alignment stopped.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from evaluations import start


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    parser.add_argument("--out", type=Path, help="picture to write (default curves.png in the first run)")
    return parser.parse_args()


def main():
    args = parse_args()
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from evaluations.runs import TITLES, alignment_stop, is_switched_off, read_metrics
    from runtime.files import atomic_write, read_json
    out = args.out or args.runs[0] / "curves.png"
    found = {run: read_metrics(run) for run in args.runs}
    terms = dict.fromkeys(term for metrics in found.values() for term in metrics if not term.startswith("cosine_"))
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
    start(parse_args, main)
