"""Loss terms of a run: kept on the device, checked for NaN and infinity, written to metrics.csv and the tracker."""
import csv
import logging
import math
import secrets
import time
from pathlib import Path

import torch

from loss import ALIGNMENT_LOSSES
from runtime.errors import UserError
from runtime.files import atomic_write, check_writable, is_file, reading, writing

TERMS = ("loss", "denoise", *ALIGNMENT_LOSSES, "grad_norm")
COLUMNS = ["step", *TERMS, "learning_rate", "skipped", "seconds"]
SCALER_SKIPS = 20  # in a row: each halves fp16's loss scale, which starts at 2 ** 16, so more will not help

logger = logging.getLogger("haste")


def start_trackers(accelerator, args, run):
    """Start wandb or tensorboard, if asked for; wandb runs offline with WANDB_MODE=offline.

    wandb continues the run whose id is in the folder `run`. Its own step can only grow, so "step" is logged as a value.
    """
    folder = Path(args.output_dir) / args.logging_dir
    if args.report_to != "none" and accelerator.is_main_process:
        check_writable(folder)
    config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(args).items()}
    if args.report_to != "wandb":
        with writing(folder / args.exp_name):
            return accelerator.init_trackers(args.exp_name, config=config)
    import wandb  # only when asked for
    kept, settings = run / "wandb-id.txt", {
        "name": args.exp_name, "dir": str(folder), "resume": "allow", "entity": args.wandb_entity,
        "tags": args.wandb_tags}
    if accelerator.is_main_process:
        if not is_file(kept):
            with atomic_write(kept, "w") as file:
                file.write(secrets.token_hex(4))
        with reading(kept):
            settings["id"] = kept.read_text(errors="replace").strip()
    try:
        accelerator.init_trackers(args.wandb_project, config=config, init_kwargs={"wandb": settings})
        if accelerator.is_main_process:
            accelerator.get_tracker("wandb", unwrap=True).define_metric("*", step_metric="step")
    except (wandb.errors.Error, ValueError) as error:  # ValueError: bad environment variables
        raise UserError(f"wandb could not start ({error}); run `wandb login`, set WANDB_MODE=offline, or use "
                        "--report-to none.") from error


def track(accelerator, values, step):
    """Hand {name: number} of `step` to the tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":
            tracker.log({**values, "step": step})
        else:
            tracker.log(values, step=step)


def rows_of(text):
    """(column names, rows) of a metrics.csv, without lines that a crash cut short or filled with other bytes."""
    reader = csv.DictReader(line for line in text.splitlines() if line.isascii() and line.isprintable())
    rows = [row for row in reader if None not in row and None not in row.values() and row.get("step", "").isdigit()]
    return list(reader.fieldnames or ()), rows


class Metrics:
    """Loss terms of each step, kept on the device until `write` puts their means into metrics.csv and the tracker.

    `saved`, the checkpoint of `start_step`, holds an earlier state_dict(): with it a run that was stopped anywhere
    writes the same rows as one that was not. `scores` names more columns. explain(step) may return why a loss is not
    finite.
    """

    def __init__(self, path, accelerator, start_step, saved, scores=(), max_skipped=None, explain=lambda step: None):
        self.path, self.accelerator, self.explain = path, accelerator, explain
        self.columns = [*COLUMNS, *scores]
        self.step, self.unseen = start_step, []
        self.names, self.pending = TERMS, []
        state = saved.get("metrics")
        if state and state["rows"].shape[1] == len(TERMS):  # else from a version with other losses
            self.names, self.pending = state["names"], list(state["rows"])
        self.max_skipped, self.in_a_row = max_skipped, (state or {}).get("in_a_row", 0)
        self.started = time.monotonic() - (saved.get("seconds") or 0.0)
        # metrics.csv as it was then: the file may now hold rows of a branch that --resume-step began and left
        self.saved_history = saved.get("history")

    def begin(self):
        """Rewrite the file without the rows after the checkpoint that the run resumes: they are made again."""
        names, rows = rows_of(self.history() if self.saved_history is None else self.saved_history)
        self.columns += [name for name in names if name not in self.columns]
        with atomic_write(self.path, "w") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(row for row in rows if int(row["step"]) <= self.step - len(self.pending))

    def history(self):
        """The text of metrics.csv, on the main process."""
        if not (self.accelerator.is_main_process and is_file(self.path)):
            return ""
        with reading(self.path):
            return self.path.read_text(encoding="utf-8", errors="replace")

    def add(self, terms):
        """Add the next step's `terms`: one detached scalar tensor per name of TERMS that this phase has."""
        self.unseen.append(torch.stack([terms[name].float() if name in terms else terms["loss"].new_zeros(())
                                        for name in TERMS]))
        self.names = [name for name in TERMS if name in terms]

    def flush(self):
        """Move the terms of the steps since the last call to `pending`. This is the only sync with the device.

        A step with a term that is not finite changed no weight; it is logged. Raises UserError, naming step and term,
        for more than `max_skipped` in a row: 0 by default, SCALER_SKIPS if fp16's scale was too high.
        """
        rows = self.accelerator.reduce(torch.stack(self.unseen), reduction="mean").cpu() if self.unseen else []
        self.unseen = []
        for row in rows:
            self.step += 1
            self.in_a_row = 0 if row.isfinite().all() else self.in_a_row + 1
            if not self.in_a_row:
                continue
            values = dict(zip(TERMS, row.tolist(), strict=True))
            terms = ", ".join(f"{name} {values[name]:.4g}" for name in self.names)
            culprit = next(name for name in (*TERMS[1:], "loss") if not math.isfinite(values[name]))
            scaled = self.accelerator.scaler is not None and culprit == "grad_norm"
            allowed = SCALER_SKIPS * scaled if self.max_skipped is None else self.max_skipped
            if self.in_a_row > allowed:
                advice = self.explain(self.step) or ("Lower --learning-rate, use --mixed-precision bf16, or allow "
                                                     "more of them with --max-skipped-steps.")
                raise UserError(f"{culprit} is not finite at step {self.step} ({terms}), in {self.in_a_row} step(s) in "
                                f"a row; no weight was changed by them and the last checkpoint is intact. {advice}")
            logger.info(f"step {self.step} is skipped: {culprit} is not finite ({terms})")
        self.pending += rows

    def state_dict(self):
        """For a checkpoint: the rows, and the terms not yet in a row. All processes call it; raises as flush does."""
        self.flush()
        rows = torch.stack(self.pending) if self.pending else torch.zeros(0, len(TERMS))
        return {"metrics": {"names": list(self.names), "rows": rows, "in_a_row": self.in_a_row},
                "seconds": self.seconds(), "history": self.history()}

    def seconds(self):
        """Seconds since the last row."""
        return time.monotonic() - self.started

    def write(self, measures=(), **more):
        """Write one row and return its values: means over the steps since the last row and over all processes.

        Skipped steps are counted, not averaged. `more` values go into the same row, and what the functions `measures`
        return, {name: value}; their time does not count as the steps'.
        """
        self.flush()
        rows = torch.stack(self.pending)
        finite = rows.isfinite().all(dim=1)
        means = {name: value for name, value in zip(TERMS, rows[finite].mean(dim=0).tolist(), strict=True)
                 if name in self.names}
        seconds = self.seconds()
        values = {**means, **more, "skipped": int((~finite).sum())}
        for measure in measures:
            values |= measure()
        if self.accelerator.is_main_process:
            with writing(self.path), open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(
                    {"step": self.step, **{name: f"{value:.6g}" for name, value in values.items()},
                     "seconds": f"{seconds:.3f}"})
        track(self.accelerator, {**values, "steps_per_second": len(rows) / max(seconds, 1e-9)}, self.step)
        self.pending, self.started = [], time.monotonic()
        return values
