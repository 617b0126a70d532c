"""Save, find, resume from and prune the checkpoints of a run."""
import logging
import os
from pathlib import Path

import torch

from dataset import PIXELS
from models.checkpoint import load_checkpoint, saved_steps
from runtime.errors import Unreadable, UserError
from runtime.files import atomic_write, writing

logger = logging.getLogger("haste")

# What must be equal for a run to go on; everything else may change and is reported. `data` is the fingerprint.
MUST_MATCH_ON_RESUME = ("model", "num_classes", "resolution", "qk_norm", "path_type", "prediction", "weighting", "enc_type",
            "encoder_depth", "attn_layers", "data")


def save_checkpoint(folder, step, state):
    """Write `state` (plain values and tensors) as step `step`; a half-written file never has the final name.

    Raises UserError, and writes nothing, when a weight is not finite or there is no room; older files are as they were.
    """
    path = Path(folder) / f"{step:07d}.pt"
    for part in ("model", "ema"):
        for name, value in state[part].items():
            if not value.isfinite().all():
                raise UserError(f"{name} of {part} is not finite at step {step}, which is not saved; the checkpoint before "
                               "it is intact. Lower --learning-rate and run the command again.")
    with atomic_write(path) as file:
        torch.save({**state, "steps": step}, file)
    return path


def prune_checkpoints(folder, step, keep, every=0):
    """Delete checkpoints up to `step` but for the newest `keep` (0: all) and those of multiples of `every` (0: none).

    Later ones stay: --resume-step has gone back behind them, and the run will write them again.
    """
    past = sorted(number for number in saved_steps(folder) if number <= step)
    for number in past[:-keep] if keep else ():
        if not every or number % every:
            (Path(folder) / f"{number:07d}.pt").unlink(missing_ok=True)


def read_newest(folder, step, needed):
    """(path, state) of the checkpoint of `step` in `folder`, for 0 of the newest that can be read; None when it is empty.

    A damaged one is named in the log and the one before it is tried; when that is good, *.pt.damaged is its name from
    then on, so that it is no longer one of those to keep. Raises UserError when none is left.
    """
    found, damaged = saved_steps(folder), []
    if step and step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step} (there: {there}); choose another --resume-step.")
    for number in [step] if step else sorted(found, reverse=True):
        try:
            state = load_checkpoint(found[number], needed, verify=True)
        except Unreadable as error:
            if step:
                raise
            logger.warning(f"{error} Trying the checkpoint before it.")
            damaged.append(found[number])
            continue
        for path in damaged:
            with writing(path):
                os.replace(path, f"{path}.damaged")
        return found[number], state
    if found:
        raise UserError(f"{folder} has no checkpoint that can be read; put a whole one there, or delete them to start anew.")
    return None


def check_same_run(path, saved, args):
    """Refuse to go on with another run's checkpoint; return the other settings that changed, as (name, old, new).

    Values that a checkpoint does not know, such as the data of a published one, are not compared.
    """
    def plain(value):
        return [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, (list, tuple)) else value

    if "vae" in saved and "vae" in args and (PIXELS == saved["vae"]) != (PIXELS == args["vae"]):
        raise UserError(f"{path} was trained with --vae {saved['vae']}, and --vae is now {args['vae']}: pixels and a "
                       "VAE's latents do not mix; use another --exp-name, or the --vae of that run.")
    for name in MUST_MATCH_ON_RESUME:
        if name in saved and name in args and plain(saved[name]) != plain(args[name]):
            raise UserError(f"{path} belongs to another run: {name} was {saved[name]} and is now {args[name]}; use "
                           "another --exp-name, or the settings of that run.")
    return [(name, saved[name], value) for name, value in args.items()
            if name in saved and name not in MUST_MATCH_ON_RESUME and plain(saved[name]) != plain(value)]

