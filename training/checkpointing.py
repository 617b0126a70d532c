"""Save, find, resume from and prune the checkpoints of a run."""
import logging
import os
from pathlib import Path
from textwrap import shorten

import torch
from accelerate.utils import broadcast_object_list, gather_object

from data_io.latent_scale import PIXELS, scale_of
from models.checkpoint import load_checkpoint, saved_steps
from runtime.errors import Unreadable, UserError
from runtime.files import atomic_write, writing

logger = logging.getLogger("haste")

# These settings must be equal on resume; all others may change, which is logged. `data` is the data's fingerprint,
# `conditions` a hash of some captions' tokens.
MUST_MATCH_ON_RESUME = ("model", "num_classes", "resolution", "qk_norm", "path_type", "prediction", "weighting",
                        "time_shift", "enc_type", "projector", "projector_kernel", "encoder_depth", "attn_layers",
                        "attn_teacher", "latents", "data", "conditions")

MAY_DIFFER_BY_PROCESS = ("num_workers", "data_dir", "output_dir", "logging_dir", "teacher_cache", "enc_weights", "vae",
                         "latents_stats", "init_from", "eval_ref", "eval_weights")


def save_checkpoint(folder, step, state):
    """Write `state`, plain values and tensors, as the checkpoint of `step`, atomically.

    Raises UserError, and writes nothing, if a weight is not finite or the disk is full; older files stay as they were.
    """
    path = Path(folder) / f"{step:07d}.pt"
    for part in ("model", "ema"):
        for name, value in state[part].items():
            if not value.isfinite().all():
                raise UserError(f"{name} of {part} is not finite at step {step}, which is not saved; the checkpoint "
                                "before it is intact. Lower --learning-rate and run the command again.")
    with atomic_write(path) as file:
        torch.save({**state, "steps": step}, file)
    return path


def prune_checkpoints(folder, step, keep, every=0):
    """Delete checkpoints up to `step`, except the newest `keep` (0: all) and multiples of `every` (0: none).

    Later ones stay: --resume-step went back to before them, and the run will overwrite them.
    """
    past = sorted(number for number in saved_steps(folder) if number <= step)
    for number in past[:-keep] if keep else ():
        if not every or number % every:
            (Path(folder) / f"{number:07d}.pt").unlink(missing_ok=True)


def is_dense(value):
    return torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta


def is_metrics(value):
    rows = value.get("rows")
    return (is_dense(rows) and rows.dim() == 2 and rows.is_floating_point() and isinstance(value.get("names"), list)
            and isinstance(value.get("in_a_row", 0), int))


NEEDED = ("model", "ema", "opt", "args", "steps")  # by a resume
# Checks of the entries that only a resume reads, beside CONTENTS of models/checkpoint.py. None counts as missing.
RESUMED = {"model": lambda value: all(map(is_dense, value.values())), "metrics": is_metrics,
           "seconds": lambda value: type(value) in (int, float) and 0 <= value < float("inf"),
           "history": lambda value: isinstance(value, str), "scaler": lambda value: isinstance(value, dict),
           "trigger_fired": lambda value: type(value) is int}
RESUMED["ema"] = RESUMED["model"]


def check_resumed(path, state):
    """Raise UserError for an entry of the checkpoint `state` that a resume cannot use."""
    for name, is_right in RESUMED.items():
        if state.get(name) is not None and not is_right(state[name]):
            raise UserError(f"{path} has a '{name}' that no train.py wrote; give a whole checkpoint, or delete this "
                            "one to go on from the one before.")


def read_newest(folder, step):
    """(path, state) of the checkpoint of `step` in `folder`; 0: the newest readable one. (None, {}) without any.

    For a damaged one, log it and try the one before. Raises UserError if none can be read.
    """
    found = saved_steps(folder)
    if step and step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step} (there: {there}); choose another --resume-step.")
    for number in [step] if step else sorted(found, reverse=True):
        try:
            state = load_checkpoint(found[number], NEEDED, verify=True)
        except Unreadable as error:
            if step:
                raise
            logger.warning(f"{error} Trying the checkpoint before it.")
            continue
        check_resumed(found[number], state)
        return found[number], state
    if found:
        raise UserError(f"{folder} has no checkpoint that can be read; put a whole one there, or delete them to start "
                        "anew.")
    return None, {}


def set_aside_damaged(folder, step):
    """Rename the checkpoints after `step`, which read_newest chose, to *.pt.damaged: pruning no longer counts them."""
    for number, path in saved_steps(folder).items():
        if number > step:
            with writing(path):
                os.replace(path, f"{path}.damaged")


def read_for_all(accelerator, folder, step):
    """read_newest for all processes: rank 0 picks the checkpoint, all others load it."""
    found = read_newest(folder, step) if accelerator.is_main_process else (None, {})
    [chosen] = broadcast_object_list([found[0] and int(found[0].stem)])
    return found if accelerator.is_main_process or chosen is None else read_newest(folder, chosen)


def describe_resume(path, saved, changed):
    """Log the checkpoint, the settings that changed, and what they mean for the numbers."""
    logger.info(f"continuing from {path}" + "".join(f"; {name} was {old}, is {new}" for name, old, new in changed))
    if {"processes", "gradient_accumulation_steps"} & {name for name, _, _ in changed}:
        logger.info("data, noise and order stay the same; sums over the batch are rounded in another order from here "
                    "on")
    if "noise_stream" not in saved:
        logger.info("the noise stream has changed since: timesteps, noise and condition drop are other numbers from "
                    "here on")


def check_alike(accelerator, settings):
    """Raise UserError on all processes if their settings differ: flags, launcher's variables, or data on local disks.

    Paths and the number of loader processes may differ.
    """
    mine = {name: value for name, value in settings.items() if name not in MAY_DIFFER_BY_PROCESS}
    every = gather_object([mine | {"mixed_precision": accelerator.mixed_precision}])
    if differing := sorted({name for other in every for name in other if other[name] != every[0].get(name)}):
        raise UserError(f"The processes of this run have different settings: {', '.join(differing)}; give all of "
                        "them one command, one accelerate configuration and the same data.")


def check_same_run(path, saved, args):
    """Refuse to go on with another run's checkpoint; return the other settings that changed, as (name, old, new).

    Values that a checkpoint lacks, such as the data of a published one, are not compared.
    """
    def plain(value):
        if torch.is_tensor(value):  # never in our checkpoints
            return "a tensor"
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    if "vae" in saved and "vae" in args and (PIXELS == saved["vae"]) != (PIXELS == args["vae"]):
        raise UserError(f"{path} was trained with --vae {saved['vae']}, and --vae is now {args['vae']}: pixels and a "
                        "VAE's latents do not mix; use another --exp-name, or the --vae of that run.")
    saved = {"time_shift": 1.0, **saved, "latents": scale_of(saved).plain()}  # older ones lack these
    for name in MUST_MATCH_ON_RESUME:
        if name in saved and name in args and plain(saved[name]) != plain(args[name]):
            old, new = saved[name], args[name]
            if name == "latents":
                old, new = ({key: value for key, value in each.items() if saved[name][key] != args[name][key]}
                            for each in (old, new))
            if name == "conditions":
                raise UserError(f"{path} belongs to another run: its captions had other tokens, as of another text "
                                "encoder; use another --exp-name, or the data of that run.")
            raise UserError(f"{path} belongs to another run: {name} was {shorten(str(old), 200)} and is now "
                            f"{shorten(str(new), 200)}; use another --exp-name, or the settings of that run.")
    return [(name, saved[name], value) for name, value in args.items()
            if name in saved and name not in MUST_MATCH_ON_RESUME and plain(saved[name]) != plain(value)]

