"""The folder of a run as plain values and pictures, for curves.py and report.py."""
import base64
import csv
import io
import itertools
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from evaluations.images import FolderImages, decode
from evaluations.student import look_inside
from evaluations.tables import sampling_words
from loss import ALIGNMENT_LOSSES
from models.checkpoint import check_contents, saved_steps
from runtime.errors import UserError, first_line
from runtime.files import is_file, is_folder, read_json, reading
from runtime.images import image_grid

TITLES = {"denoise": "denoising loss", **{name: row.title for name, row in ALIGNMENT_LOSSES.items()}}
WEIGHTS = [row.flag for row in ALIGNMENT_LOSSES.values()]  # settings
LARGEST = 768  # pixels a side of a picture on the page; larger ones are scaled down
PREVIEWS = 24  # most previews of a run, evenly spread
GRID = 36  # pictures shown of a samples folder without a grid beside it


def read_table(run):
    """Read run/metrics.csv -> {column: ([step], [value])}; empty cells are left out."""
    path = run / "metrics.csv"
    if not is_file(path):
        raise UserError(f"{path} does not exist; give the folder of a run of train.py.")
    try:
        with reading(path), open(path, newline="") as file:  # a run may be writing its last line
            rows = [row for row in csv.DictReader(file) if None not in row and None not in row.values()]
        if not rows:
            raise UserError(f"{path} has no rows yet; train first.")
        table = {column: ([int(row["step"]) for row in rows if row[column]],
                          [float(row[column]) for row in rows if row[column]]) for column in rows[0]}
        del table["step"]
        if missing := {"denoise", "seconds"} - table.keys():
            raise ValueError(f"it has no column {min(missing)}")
    except (ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path} is not a metrics.csv of train.py ({first_line(error)}); give another run's "
                        "folder.") from error
    return table


def read_settings(run):
    """args.json of the run in folder `run`."""
    if not is_file(run / "args.json"):
        what = "holds no args.json" if is_folder(run) else "does not exist"
        raise UserError(f"{run} {what}; give the folder of a run of train.py.")
    settings = read_json(run / "args.json")
    check_contents(run / "args.json", {"args": settings}, ())
    for name, kind in (("model", str), ("resolution", int), ("batch_size", int)):
        if not isinstance(settings.get(name), kind):
            raise UserError(f"{run}/args.json has no {name}; give the folder of a run of train.py.")
    return settings


def shown(table):
    """The columns to draw: not the cosines at single times, nor what was off (all 0), nor a constant rate."""
    return {name: (steps, values) for name, (steps, values) in table.items()
            if steps and name != "seconds" and not name.startswith("cosine_")
            and (any(values) or name not in (*ALIGNMENT_LOSSES, "skipped"))
            and (name != "learning_rate" or len(set(values)) > 1)}


def alignment_stop(table, settings):
    """The last step with alignment; None while it continues or if the run has no alignment.

    The table tells in which row the alignment losses end. Within that row it is the planned stop or the gradient
    trigger's step, whichever is earlier.
    """
    last = max((step for name in ALIGNMENT_LOSSES if name in table for step in table[name][0]), default=0)
    after = next((step for step in table["denoise"][0] if step > last), None)
    if after is None or (not last and settings.get("enc_type") == "none"):
        return None
    known = {name: value for name, value in settings.items() if isinstance(value, (int, float))}
    fired = [step for step, cosine in zip(*table.get("cosine", ([], [])), strict=True)
             if cosine < known.get("trigger_threshold", -1)]
    stop = min([known.get("early_stop_point", float("inf")), *fired])
    return stop if 0 < stop and last <= stop < after else last or None


def curves(table):
    """{steps, hours, columns: {name: [[step, value], ...]}} of read_table's result; hours are summed seconds."""
    steps, seconds = table["seconds"]
    step_time = steps, (1000 * np.array(seconds) / np.diff(steps, prepend=0)).tolist()
    columns = {name: [[x, y] for x, y in zip(*values, strict=True) if np.isfinite(y)]
               for name, values in {**shown(table), "step_time": step_time}.items()}
    return {"steps": steps, "hours": (np.cumsum(seconds) / 3600).round(6).tolist(), "columns": columns}


def speed(durations, stop, batch_size):
    """[[phase, median milliseconds a step, images a second]] from `durations`, [[step, milliseconds], ...].

    The first row includes start-up, so it counts only if it is the only row.
    """
    rows = [(before, step, time) for (before, _), (step, time) in itertools.pairwise([(0, 0), *durations])]
    rows = rows[1:] or rows
    phases = {} if stop is None else {"with alignment": [time for _, step, time in rows if step <= stop],
                                      "after it stops": [time for before, _, time in rows if before >= stop]}
    if not any(phases.values()):
        phases = {"all steps": [time for _, _, time in rows]}
    medians = [(name, statistics.median(times)) for name, times in phases.items() if times]
    return [[name, round(time, 2), round(1000 * batch_size / time, 1) if time else None] for name, time in medians]


def picture(pixels):
    """uint8 (h, w, 3) -> data URI: PNG for small pictures, JPEG for large ones, at most LARGEST pixels a side."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((LARGEST, LARGEST), Image.LANCZOS)
    kind, options = ("png", {}) if image.width * image.height <= 400 ** 2 else ("jpeg", {"quality": 88})
    image.save(file, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def previews(folder):
    """[[title, picture]] of a run's previews/: the true images first, then at most PREVIEWS steps, evenly spread."""
    steps = sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
    chosen = {round(i) for i in np.linspace(0, len(steps) - 1, min(PREVIEWS, len(steps)))}
    found = [("the data", folder / "truth.png")] if is_file(folder / "truth.png") else []
    found += [(f"step {int(steps[i].stem):,}", steps[i]) for i in sorted(chosen)]
    return [[title, picture(decode(path))] for title, path in found]


def samples(path):
    """{name, caption, picture, scores} of a folder of generate.py, or of a picture."""
    with reading(path):
        if not path.exists():
            raise UserError(f"--samples {path} does not exist; give a folder of pictures or a picture.")
    path = path.absolute()  # "." has no name
    grid, scores, settings = path.with_name(f"{path.name}-grid.png"), path.with_name(f"{path.name}-scores.json"), {}
    if is_file(path) or is_file(grid):
        pixels = decode(path if is_file(path) else grid)
    else:
        images = FolderImages(path)
        first = next(images.batches(0, min(GRID, images.n), GRID))
        pixels = image_grid(torch.from_numpy(first).permute(0, 3, 1, 2))
    if is_file(path / "settings.json"):
        settings = read_json(path / "settings.json")
    return {"name": path.name.removesuffix(".png"), "picture": picture(pixels),
            "scores": read_scores(scores) if is_file(scores) else {},
            "caption": sampling_words(settings | made_from(settings))}


def made_from(settings):
    """{run, step} of the checkpoint that made a samples folder; outside a run folder, `run` is the file's name."""
    path, step = Path(str(settings.get("ckpt", ""))), settings.get("steps")
    run = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
    return {name: value for name, value in (("run", run), ("step", step)) if value not in ("", None)}


def read_scores(path):
    """{set: {reference: {metric: value}}} from the JSON of baselines.py or evaluator.py (one set, one reference)."""
    scores = read_json(path).get("scores")
    if not isinstance(scores, dict) or not scores:
        raise UserError(f"{path} has no scores; make it again by baselines.py or evaluator.py --json, or remove it.")
    return scores if all(isinstance(row, dict) for row in scores.values()) else {"samples": {"": scores}}


def inside(run, count, t, teacher):
    """look_inside for the newest checkpoint, with pictures as text, or {"missing": the reason}."""
    steps = saved_steps(run / "checkpoints")
    if not count or not steps:
        return {"missing": "Left out (--images 0)." if not count else f"{run}/checkpoints holds no checkpoint yet."}
    try:
        found = look_inside(steps[max(steps)], count, t, teacher)
    except UserError as error:
        return {"missing": str(error)}
    for name in ("images", "teacher_colours", "student_colours"):
        found[name] = list(map(picture, found[name]))
    for pair in found["pairs"]:
        for side in ("teacher_maps", "student_maps"):
            pair[side] = [base64.b64encode(maps.tobytes()).decode() for maps in pair[side]]
    return {**found, "step": max(steps), "t": t}


def read_run(run, count, t, teacher):
    """What the page shows of the run in folder `run`; `teacher` as for look_inside."""
    table, settings = read_table(run), read_settings(run)
    environment, found = settings.pop("environment", None), curves(table)
    stop = alignment_stop(table, settings)
    return {"name": run.resolve().name, "settings": settings, "environment": environment, "stop": stop, **found,
            "speed": speed(found["columns"]["step_time"], stop, settings["batch_size"]),
            "previews": previews(run / "previews"), "inside": inside(run, count, t, teacher)}
