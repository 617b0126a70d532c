"""One or more runs as one HTML page to open in a browser: no server, no network, no other files.

    python evaluations/report.py RUN_DIR... [--samples FOLDER_OR_PICTURE...] [--out report.html]

The page shows settings (those that differ between runs come first), zoomable curves of losses and scores with the step
at which alignment stops, previews along the run, samples, attention and features of student and teacher for a few
images, step time, machine and versions. Attention and features need the newest checkpoint, its data and its
teacher; if one is missing, the page says so. Samples have the run, step and guidance of their settings.json, the grid
beside them, and the scores in SAMPLES-scores.json beside them: baselines.py writes it, and evaluator.py with --json.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from runtime.errors import run_script
from runtime.flags import Parser, number, whole

PARTS = Path(__file__).with_name("page")  # the template and the scripts that go into it
TITLES = {"loss": "total loss", "grad_norm": "gradient norm", "learning_rate": "learning rate",
          "skipped": "skipped steps", "step_time": "milliseconds a step", "cosine": "cosine of the losses' gradients"}


def page(data):
    """The HTML: the template with the scripts and `data`."""
    template, *scripts = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "curves.js", "page.js"))
    finite = json.loads(json.dumps(data), parse_constant=str)  # a browser's JSON has no infinity and no nan
    text = json.dumps(finite, separators=(",", ":")).replace("<", "\\u003c")  # else data could close the script element
    return template.replace("/* script */", "\n".join(scripts)).replace("{{ data }}", text)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    add("--samples", nargs="+", type=Path, default=[], metavar="PATH", help="folders of generate.py or pictures; "
        "scores are read from PATH-scores.json beside each, as of baselines.py or evaluator.py --json")
    add("--images", type=whole(0), default=4, help="images for attention and features, 0 = leave them out (default 4)")
    add("--t", type=number(0, 1), default=0.5, help="time at which the student sees them, 0 = no noise (default 0.5)")
    add("--out", type=Path, help="page to write (default report.html in the first run)")
    args = parser.parse_args()
    from evaluations import runs, tables
    from runtime.files import atomic_write, prepare_output
    out = args.out or args.runs[0] / "report.html"
    settings = [runs.read_settings(run) for run in args.runs]
    prepare_output(out, (".html", ".htm"))
    teacher = next((known for known in settings if known.get("enc_type") != "none"), {})
    data = {"title": ", ".join(run.resolve().name for run in args.runs), "labels": tables.labels(settings),
            "losses": list(runs.TITLES), "titles": {**runs.TITLES, **TITLES},
            "weights": [flag for flag in runs.WEIGHTS if any(known.get(flag) for known in settings)],
            "samples": [runs.samples(path) for path in args.samples],
            "runs": [runs.read_run(run, args.images, args.t, teacher) for run in args.runs]}
    with atomic_write(out, "w") as file:
        file.write(page(data))
    print(out)


if __name__ == "__main__":
    run_script(main)
