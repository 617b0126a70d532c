"""One or more runs as one HTML page to open in a browser: no server, no network, nothing beside the file.

    python evaluations/report.py RUN_DIR... [--samples FOLDER_OR_PICTURE...] [--out report.html]

On the page: settings (with several runs, what tells them apart comes first), curves of losses and scores to zoom into,
with the point where alignment stops, previews along the run, samples, what student and teacher attend to and their
features for a few images, step time, machine and versions. The newest checkpoint, its data and its teacher are needed
for the attention and the features; where one is missing, that part says so.
"""
import argparse
import base64
import io
import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
from checkpoints import check_contents, saved_steps
from evaluations.curves import TITLES, alignment_stop, is_switched_off, read_table
from evaluations.images import FolderImages, decode
from evaluations.student import look_inside
from files import BadInput, atomic_write, check_bounds, is_file, read_json, reading, run_script
from pictures import image_grid
from runtime.setup import take_from_launcher
from train import add_training_arguments

PARTS = Path(__file__).with_name("page")  # of the page: the template, and the scripts that go into it
TITLES = {**TITLES, "loss": "total loss", "grad_norm": "gradient norm", "skipped": "skipped steps",
          "step_time": "milliseconds a step", "cosine": "cosine of the losses' gradients"}
LARGEST = 768  # pixels a side of a picture on the page; larger ones are made smaller
PREVIEWS = 24  # of a run at most, evenly spread
GRID = 36  # pictures of a samples folder that has no grid beside it
SAMPLING = ("mode", "num_steps", "heun", "cfg_scale", "guidance_low", "guidance_high", "global_seed", "labels")  # settings shown


def picture(image):
    """An Image -> data URI: PNG while it is small, JPEG where that would make the page heavy."""
    image = image.convert("RGB")
    image.thumbnail((LARGEST, LARGEST), Image.LANCZOS)
    file = io.BytesIO()
    kind = "png" if image.width * image.height <= 400 ** 2 else "jpeg"
    image.save(file, kind, **({} if kind == "png" else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def curves(table):
    """{steps, hours, columns: {name: [[step, value], ...]}} of a table of curves.py; hours are the sum of its seconds.

    Left out are a trigger's cosines at single times, beside their mean, skipped steps where there are none, and a loss that was
    switched off, which metrics.csv has as 0.
    """
    steps, seconds = table["seconds"]
    columns = {name: values for name, values in table.items() if values[0] and name != "seconds"
               and not name.startswith("cosine_") and not (name == "skipped" and not any(values[1]))
               and not is_switched_off(name, values[1])}
    durations = [1000 * taken / (step - before) for step, before, taken in zip(steps, [0, *steps[:-1]], seconds, strict=True)]
    columns["step_time"] = (steps, durations)
    finite = {name: [[x, y] for x, y in zip(*values, strict=True) if np.isfinite(y)] for name, values in columns.items()}
    return {"steps": steps, "hours": (np.cumsum(seconds) / 3600).round(6).tolist(), "columns": finite}


def speed(durations, stop, batch_size):
    """[[phase, milliseconds a step, images a second]] of [step, milliseconds] pairs: medians over rows within a phase.

    Without the first row, in which everything is done for the first time, if there are others.
    """
    rows = [(before, step, time) for (before, _), (step, time) in itertools.pairwise([(0, 0), *durations])]
    rows = rows[1:] or rows
    phases = {} if stop is None else {"with alignment": [time for _, step, time in rows if step <= stop],
                                      "after it stops": [time for before, _, time in rows if before >= stop]}
    if not any(phases.values()):
        phases = {"all steps": [time for _, _, time in rows]}
    medians = [(name, statistics.median(times)) for name, times in phases.items() if times]
    return [[name, round(time, 2), round(1000 * batch_size / time, 1) if time else None] for name, time in medians]


def previews(folder):
    """[[title, picture]] of a run's previews/: the true images first, then at most PREVIEWS steps evenly spread."""
    steps = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    chosen = {round(i) for i in np.linspace(0, len(steps) - 1, min(PREVIEWS, len(steps)))}
    found = [("the data", folder / "truth.png")] if is_file(folder / "truth.png") else []
    found += [(f"step {int(steps[i].stem):,}", steps[i]) for i in sorted(chosen)]
    return [[title, picture(Image.fromarray(decode(path)))] for title, path in found]


def samples(path):
    """{name, settings, picture, scores} of a folder of generate.py, or of a picture."""
    with reading(path):
        if not path.exists():
            raise BadInput(f"--samples {path} does not exist; give a folder of pictures or a picture.")
    grid, scores = (path.with_name(f"{path.name}-{name}") for name in ("grid.png", "scores.json"))  # beside the folder
    if is_file(path) or is_file(grid):
        image = decode(path if is_file(path) else grid)
    else:
        images = FolderImages(path)
        pixels = np.stack([decode(file, images.size) for file in images.files[:GRID]])
        image = image_grid(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    settings = read_json(path / "settings.json") if is_file(path / "settings.json") else {}
    return {"name": path.name.removesuffix(".png"), "picture": picture(Image.fromarray(image)),
            "scores": read_scores(scores) if is_file(scores) else {},
            "settings": {name: settings[name] for name in SAMPLING if name in settings}}


def read_scores(path):
    """{set: {reference: {metric: value}}} of what anchors.py wrote, or evaluator.py, which compares one set with one."""
    scores = read_json(path).get("scores")
    if not isinstance(scores, dict) or not scores:
        raise BadInput(f"{path} has no scores; make it again by anchors.py or evaluator.py --json, or remove it.")
    nested = all(isinstance(found, dict) and all(isinstance(row, dict) for row in found.values()) for found in scores.values())
    return scores if nested else {"samples": {"": scores}}


def inside(run, count, t, teacher):
    """What look_inside gives of the newest checkpoint, as text and pictures, or {"missing": the sentence that says why not}."""
    steps = saved_steps(run / "checkpoints")
    if not count or not steps:
        return {"missing": "Left out (--images 0)." if not count else f"{run}/checkpoints holds no checkpoint yet."}
    try:
        found = look_inside(steps[max(steps)], count, t, teacher)
    except BadInput as error:
        return {"missing": str(error)}
    found["step"], found["t"] = max(steps), t
    for name in ("images", "teacher_colours", "student_colours"):
        found[name] = [picture(Image.fromarray(image)) for image in found[name]]
    for pair in found["pairs"]:
        for side in ("teacher_maps", "student_maps"):
            pair[side] = [base64.b64encode(maps.tobytes()).decode() for maps in pair[side]]
    return found


def read_settings(run):
    """args.json of the run in folder `run`."""
    settings = read_json(run / "args.json")
    check_contents(run / "args.json", {"args": settings}, ())
    if not isinstance(settings.get("batch_size"), int):
        raise BadInput(f"{run}/args.json has no batch_size; give the folder of a run of train.py.")
    return settings


def read_run(run, count, t, teacher):
    """All that the page shows of the run in folder `run`; `teacher` as for look_inside."""
    table, settings = read_table(run), read_settings(run)
    environment, found = settings.pop("environment", None), curves(table)
    stop = alignment_stop(table, settings)
    return {"name": run.resolve().name, "settings": settings, "environment": environment, "stop": stop, **found,
            "speed": speed(found["columns"]["step_time"], stop, settings["batch_size"]),
            "previews": previews(run / "previews"), "inside": inside(run, count, t, teacher)}


def defaults():
    """Defaults of the flags that both training scripts have."""
    parser = argparse.ArgumentParser()
    add_training_arguments(parser)
    args = parser.parse_args(["--exp-name", ""])
    take_from_launcher(args, {})
    return vars(args)


def page(data):
    """The HTML: the template with script and data in their places."""
    template, *scripts = ((PARTS / name).read_text(encoding="utf-8") for name in ("page.html", "curves.js", "page.js"))
    finite = json.loads(json.dumps(data), parse_constant=str)  # a setting may be infinite, which a browser's JSON has not
    text = json.dumps(finite, separators=(",", ":")).replace("<", "\\u003c")  # else it could end the script element
    return template.replace("/* script */", "\n".join(scripts)).replace("{{ data }}", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    add("--samples", nargs="+", type=Path, default=[], metavar="PATH", help="folders of generate.py or pictures")
    add("--images", type=int, default=4, help="images for attention and features, 0 = leave them out (default 4)")
    add("--t", type=float, default=0.5, help="time at which the student sees them, 0 = no noise (default 0.5)")
    add("--out", type=Path, help="page to write (default report.html in the first run)")
    args = parser.parse_args()
    check_bounds(args, {"images": (0, float("inf")), "t": (0, 1)})
    out = args.out or args.runs[0] / "report.html"
    settings = [read_settings(run) for run in args.runs]
    teacher = next((known for known in settings if known.get("enc_type") != "none"), {})
    runs = [read_run(run, args.images, args.t, teacher) for run in args.runs]
    data = {"titles": TITLES, "defaults": defaults(), "runs": runs, "samples": [samples(path) for path in args.samples]}
    with atomic_write(out, "w") as file:
        file.write(page(data))
    print(out)


if __name__ == "__main__":
    run_script(main)
