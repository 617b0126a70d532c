"""Compare runs: samples where they are missing, scores, mean and spread over seeds, as tables and figures.

    python evaluations/compare.py exps/haste-0 exps/haste-1 exps/vanilla-0 exps/vanilla-1 --ref REF.npz
    python evaluations/compare.py exps/haste exps/vanilla --ref REF.npz --cfg 1 1.25 1.5 --steps 50 250
    python evaluations/compare.py exps/haste exps/vanilla --ref REF.npz --mode sde --steps 250 --processes 8

Runs whose settings differ in the seed alone are one row: mean (lowest to highest). Several --cfg or --steps make
curves. In --out: table.md, table.tex (for booktabs), scores.pdf (--format svg or png), samples.png with the first
images of each run, from the same noise. Samples and scores are kept in --sample-dir and reused: run the same command
to continue.
"""
import functools
import logging
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from evaluations import score_names
from evaluations.evaluator import add_score_arguments, chosen_metrics, open_scorer
from evaluations.tables import groups, latex, markdown, mean_and_spread
from runtime.errors import UserError, run_script
from runtime.flags import Parser, whole
from sampling.config import add_sampler_flags

SWEPT = {"cfg": "guidance", "steps": "steps"}  # what may have several values, and its column
UP = ("Inception Score", "Precision", "Recall")  # lower is better for all others
SHOWN = 8  # images of a run in samples.png
HANDED_ON = ("num_fid_samples", "weights", "sample_dir", "global_seed", "per_proc_batch_size", "mixed_precision")
ROOT = Path(__file__).resolve().parents[1]

logger = logging.getLogger(__name__)


def row_name(text):
    """A `type` for add_argument: a name that tables and figures can show as it is."""
    if not text.strip() or not text.isprintable() or {*text} & {*"|$\\"}:
        raise ArgumentTypeError(f"{text!r} is no name for a row; take letters, digits and spaces.")
    return text


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs")
    add("--ref", "--reference", dest="reference", metavar="REF", required=True, help="npz, folder or statistics that "
        "samples are scored against")
    add("--out", type=Path, default=Path("comparison"), metavar="DIR", help="folder of tables and figures (default "
        "comparison)")
    add("--format", choices=["pdf", "svg", "png"], default="pdf", help="of the figure of scores (default pdf)")
    add("--names", nargs="+", type=row_name, metavar="NAME", help="of the rows, such as SiT HASTE: one for each "
        "run, equal ones for seeds of one row (default: by the settings in which the runs differ)")
    add("--step", type=whole(1), metavar="N", help="checkpoint of all runs (default: the newest that all of them have)")

    add = parser.add_argument_group("samples").add_argument
    add("--num-fid-samples", type=whole(2), metavar="N", help="images of each (default 50000; from text 40192, and at "
        "most one for each image of val)")
    add("--labels", choices=["random", "balanced"], default="random", help="as generate.py's (default random)")
    add("--weights", choices=["ema", "model"], default="ema", help="as generate.py's (default ema)")
    add("--vae", help="as generate.py's (default: that of the run)")
    add("--sample-dir", default="samples/compare", metavar="DIR", help="where samples are made and looked for (default "
        "samples/compare)")
    add("--per-proc-batch-size", type=whole(1), default=32, metavar="N", help="images a batch and process (default 32)")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], default="no", help="of the sampled network (default no)")
    add("--processes", type=whole(1), default=1, metavar="N", help="number of processes that sample, "
        "one for each GPU (default 1)")
    add_sampler_flags(parser, nargs="+")
    parser.set_defaults(cfg_scale=[1.0], num_steps=[50])
    add_score_arguments(parser.add_argument_group("scores"))
    parser.set_defaults(num_samples=None)
    return parser.parse_args()


def common_step(runs, step):
    """`step`, or the newest step at which every run has a checkpoint. Raises UserError."""
    from models.checkpoint import saved_steps
    found = {run: sorted(saved_steps(run / "checkpoints")) for run in runs}
    common = set.intersection(*map(set, found.values()))
    step = max(common, default=None) if step is None else step
    if step not in common:
        steps = "; ".join(f"{run} has {', '.join(map(str, known)) or 'none'}" for run, known in found.items())
        raise UserError(f"No step{f' {step}' if step else ''} is among the checkpoints of all runs: {steps}; give "
                        "--step one that is, or train them further.")
    return step


def run_names(runs):
    """Name each run by its folder; add the parent folder where two names are equal."""
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = ["-".join(run.resolve().parts[-2:]) for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"The runs {', '.join(map(str, runs))} are not all different; give each once.")
    return names


def places_by_name(names, runs):
    """{name: indices in `runs`}; `names` (from --names) has one entry per run."""
    if len(names) != len(runs):
        raise UserError(f"--names gives {len(names)} names to {len(runs)} runs; give one for each.")
    return {name: [i for i, other in enumerate(names) if other == name] for name in names}


# ---- samples ----

def number_of_samples(asked, settings):
    """--num-fid-samples, or the default: generate_t2i.py makes at most one image for each image of val."""
    from data_io.captions import scan_numbered
    folders = {Path(one["data_dir"]) / "val" for one in settings if "num_classes" not in one and "data_dir" in one}
    most = [len(set().union(*scan_numbered(folder))) for folder in folders if folder.is_dir()]
    return min([asked or (40_192 if folders else 50_000), *most])


def planned_samples(args, run, name, settings, step, cfg, steps):
    """(folder of PNGs, generate.py's flags {name: value}) of one run, guidance and number of steps."""
    from sampling.images import SAMPLING, folder_name
    flags = {flag: getattr(args, flag) for flag in (*SAMPLING, *HANDED_ON) if flag != "path_type"}
    has_classes = "num_classes" in settings
    balanced = "balanced-" * (has_classes and args.labels == "balanced")
    flags |= {"ckpt": str(run / f"checkpoints/{step:07d}.pt"), "vae": args.vae or settings.get("vae") or "ema",
              "cfg_scale": cfg, "num_steps": steps, "prefix": f"{name}-{steps}-steps-{balanced}"}
    flags |= {"labels": args.labels} if has_classes else {"data_dir": settings["data_dir"]}
    return folder_name(Namespace(**flags, resolution=settings["resolution"]), settings["model"]), flags


def make_samples(folder, flags, processes):
    """Call generate.py. It makes the missing images and refuses a folder made with other settings."""
    script = ROOT / ("generate.py" if "labels" in flags else "generate_t2i.py")
    words = [as_flag(name, value) for name, value in flags.items()]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    logger.info("%s: making samples", folder.name)
    run_generate([*launcher, str(script), *words])


def run_generate(command):
    done = subprocess.run([sys.executable, *command], check=False, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"Sampling failed with status {done.returncode}, see above; fix that and give the same command "
                        "again.")


def as_flag(name, value):
    """One command-line argument."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"


def is_sampled(folder, flags):
    """Whether all images of these flags are in the .npz, made after the checkpoint."""
    from evaluations.images import open_images
    from runtime.files import is_file, read_json
    npz, ckpt = folder.with_name(f"{folder.name}.npz"), Path(flags["ckpt"])
    if not (is_file(npz) and is_file(folder / "settings.json")) or npz.stat().st_mtime < ckpt.stat().st_mtime:
        return False
    made = read_json(folder / "settings.json")
    return all(made[name] == value for name, value in flags.items() if name in made) \
        and open_images(npz).n == flags["num_fid_samples"]


# ---- scores ----

def stamp_of(reference):
    """A value that changes with the files of a reference: of each, or of all in a folder, size and newest time."""
    found = [path.lstat() for path in (reference.rglob("*") if reference.is_dir() else [reference.resolve()])]
    return [len(found), sum(each.st_size for each in found), max(each.st_mtime_ns for each in found)]


def scores_of(folder, args, metrics, open_once):
    """{score: value} of samples: read from the file beside them, else computed by open_once() and written there."""
    from runtime.files import is_file, read_json, write_json
    path, npz = (folder.with_name(folder.name + ending) for ending in ("-scores.json", ".npz"))
    result = read_json(path) if is_file(path) and path.stat().st_mtime >= npz.stat().st_mtime else {}
    asked = {"reference_stamp": args.reference_stamp,
             "features": args.features, "preset": args.preset, "pr_dtype": args.pr_dtype,
             "any_weights": args.any_weights, "reference": str(args.reference)}
    names = score_names(args.features, metrics)
    if not (asked.items() <= result.items() and set(names) <= set(result["scores"])):
        result = open_once()(npz) | asked
        write_json(path, result, indent=2)
    return {name: result["scores"][name] for name in names if result["scores"][name] is not None}


# ---- tables and figures ----

def heading(score):
    return f"{score} {chr(0x2191) if score in UP else chr(0x2193)}"  # an arrow up or down


def table_of(points, scores, swept):
    """(header, rows) of points {(label, cfg, steps): [{score: value} of each seed]}."""
    header = ["run", *(SWEPT[name] for name in swept), "seeds", *map(heading, scores)]
    rows = []
    for (label, cfg, steps), found in points.items():
        place = {"cfg": f"{cfg:g}", "steps": steps}
        values = (mean_and_spread([one[score] for one in found if score in one]) for score in scores)
        rows.append([label, *(place[name] for name in swept), len(found), *values])
    return header, rows


def draw(path, points, scores, swept):
    """One panel per score: a curve per label over the swept setting, or without one a point per label.

    If both settings are swept, each number of steps has a row of panels. Panels of one score share their axes.
    """
    from matplotlib.figure import Figure

    from runtime.files import atomic_write
    labels = list(dict.fromkeys(label for label, _, _ in points))
    rows = sorted({steps for _, _, steps in points}) if len(swept) == 2 else [None]
    figure = Figure(figsize=(3.6 * len(scores), 3 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(scores), squeeze=False, sharex=True, sharey="col")
    for row, line in zip(rows, axes, strict=True):
        for score, axis in zip(scores, line, strict=True):
            for i, label in enumerate(labels):
                found = {steps if swept == ["steps"] else cfg if swept else i: [one[score] for one in each]
                         for (name, cfg, steps), each in points.items() if name == label and row in (None, steps)}
                xs, colour = sorted(found), f"C{i}"
                axis.plot(xs, [sum(found[x]) / len(found[x]) for x in xs], label=label, color=colour,
                          marker="o" if swept else "_", markersize=4 if swept else 18)
                if any(len(values) > 1 for values in found.values()):
                    axis.fill_between(xs, *([f(found[x]) for x in xs] for f in (min, max)), color=colour, alpha=0.15)
                    axis.plot(*zip(*((x, y) for x in xs for y in found[x]), strict=True), ".", color=colour, alpha=0.6)
                axis.set_xticks(xs if swept else range(len(labels)), None if swept else [""] * len(labels))
            axis.ticklabel_format(axis="y", useOffset=False)
            axis.grid(alpha=0.3)
            axis.margins(x=0.25 if not swept else 0.05)
        if row is not None:
            line[0].set_ylabel(f"{row} steps")
    for score, top, bottom in zip(scores, axes[0], axes[-1], strict=True):
        top.set_title(heading(score))
        bottom.set_xlabel({"cfg": "guidance scale", "steps": "steps"}[swept[0]] if swept else "")
    if max(map(len, points.values())) > 1:
        figure.suptitle("dots: seeds; line: their mean", fontsize=8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(3, len(labels)))
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:], dpi=150)


def draw_samples(path, folders):
    """Write a grid with a row per run: its first images, each row from the same noise. folders: {run: its PNGs}."""
    import numpy as np
    import torch

    from evaluations.images import decode
    from runtime.images import image_grid, write_png
    shown = [(name, sorted(folder.glob("*.png"))[:SHOWN]) for name, folder in folders.items()]
    pictures = torch.from_numpy(np.stack([decode(file) for _, files in shown for file in files])).permute(0, 3, 1, 2)
    texts = [name if i == 0 else "" for name, files in shown for i in range(len(files))]
    write_png(path, image_grid(pictures, len(shown[0][1]), texts))


def main():
    args = parse_args()
    from evaluations.images import Planned, open_images
    from evaluations.runs import read_settings
    from evaluations.scores import OF_BOTH, check_pair
    from runtime.files import atomic_write, check_writable
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_writable(args.out)
    settings, names = [read_settings(run) for run in args.runs], run_names(args.runs)
    args.num_fid_samples = number_of_samples(args.num_fid_samples, settings)
    step, metrics = common_step(args.runs, args.step), chosen_metrics(args)
    open_once = functools.cache(lambda: open_scorer(args, metrics))
    together = places_by_name(args.names, args.runs) if args.names else groups(settings, names)
    values = {"cfg": args.cfg_scale, "steps": args.num_steps}
    swept = [name for name in SWEPT if len(set(values[name])) > 1]
    planned = {(label, cfg, steps): [(label if args.names else names[i],
                                      *planned_samples(args, args.runs[i], names[i], settings[i], step, cfg, steps))
                                     for i in places]
               for steps in sorted(set(args.num_steps)) for cfg in sorted(set(args.cfg_scale))
               for label, places in together.items()}
    sides = {one["resolution"]: run for run, one in zip(args.runs, settings, strict=True)}
    for side, run in sides.items():  # opening a reference may list many files: once for each size
        check_pair(args.reference, Planned(f"the samples of {run}", args.num_fid_samples, (side, side)), metrics)
    if {*metrics} <= {*OF_BOTH} and open_images(args.reference, required=False) is None:
        raise UserError(f"{args.reference} holds statistics only, and --metrics {','.join(metrics)} needs images; "
                        "choose other --metrics, or a reference with images.")
    points, folders, args.reference_stamp = {}, {}, stamp_of(Path(args.reference))
    for place, samples in planned.items():
        points[place] = []
        for name, folder, flags in samples:
            if not is_sampled(folder, flags):
                open_once()  # before sampling: unusable weights must fail at once, not after hours
                make_samples(folder, flags, args.processes)
            points[place].append(scores_of(folder, args, metrics, open_once))
            folders.setdefault(name, folder)
    scores = [score for score in score_names(args.features, metrics)
              if all(score in one for found in points.values() for one in found)]
    header, rows = table_of(points, scores, swept)
    cfg, steps = (", ".join(f"{value:g}" for value in values[name]) for name in ("cfg", "steps"))
    balanced = ", as many of each class" * (args.labels == "balanced" and all("num_classes" in one for one in settings))
    note = (f"Step {step:,}; {args.num_fid_samples:,} samples, {args.mode}, {steps} steps, guidance {cfg}{balanced}; "
            f"against {args.reference}. Several seeds: mean (lowest to highest).")
    for name, text in (("table.md", f"{note}\n\n{markdown(header, rows)}\n"),
                       ("table.tex", f"% {note}\n{latex(header, rows, header.index('seeds'))}\n")):
        with atomic_write(args.out / name, "w") as file:
            file.write(text)
    draw(args.out / f"scores.{args.format}", points, scores, swept)
    draw_samples(args.out / "samples.png", folders)
    print(f"{note}\n\n{markdown(header, rows)}\n\n{args.out}: table.md, table.tex, scores.{args.format}, samples.png")


if __name__ == "__main__":
    run_script(main, continues=True)
