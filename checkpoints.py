"""Checkpoints in the published format: {run}/checkpoints/{step:07d}.pt with model, ema, opt, args and steps.

For use elsewhere the EMA alone is exported to safetensors, with {"steps": N, "args": {...}} as its config:
    NAME.safetensors                           the config as JSON text in the file's metadata, under "config"
    NAME/model.safetensors, NAME/config.json   the same in two files
"""
import argparse
import json
import logging
import os
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from dataset import PIXELS
from files import BadInput, Unreadable, atomic_write, first_line, load_tensors, read_json, reading, writing

logger = logging.getLogger("haste")

# What must be equal for a run to go on; everything else may change and is reported. `data` is the fingerprint.
IDENTITY = ("model", "num_classes", "resolution", "qk_norm", "path_type", "prediction", "weighting", "enc_type",
            "encoder_depth", "attn_layers", "data")


def save_checkpoint(folder, step, state):
    """Write `state` (plain values and tensors) as step `step`; a half-written file never has the final name.

    Raises BadInput, and writes nothing, when a weight is not finite or there is no room; older files are as they were.
    """
    path = Path(folder) / f"{step:07d}.pt"
    for part in ("model", "ema"):
        for name, value in state[part].items():
            if not value.isfinite().all():
                raise BadInput(f"{name} of {part} is not finite at step {step}, which is not saved; the checkpoint before "
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


def is_state(value):
    """Whether `value` is a state dict of tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def is_optimizer_state(value):
    """Whether `value` is what an optimizer's state_dict() gives, for at least one group of parameters."""
    return (isinstance(value, dict) and isinstance(value.get("state"), dict) and bool(value.get("param_groups"))
            and isinstance(value["param_groups"], list)
            and all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in value["param_groups"])
            and all(isinstance(i, int) and isinstance(entry, dict) for i, entry in value["state"].items()))


def is_metrics(value):
    """Whether `value` is of Metrics.state_dict()."""
    return value is None or (isinstance(value, dict) and isinstance(value.get("rows"), torch.Tensor)
                             and value["rows"].dim() == 2 and isinstance(value.get("names"), (list, tuple)))


def is_whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# What a checkpoint may hold under each name, and in words. A scaler's state and other entries are plain values or None.
CONTENTS = {
    "model": (is_state, "named tensors"), "ema": (is_state, "named tensors"), "metrics": (is_metrics, "terms of a loss"),
    "opt": (is_optimizer_state, "an optimizer's state and param_groups"), "steps": (is_whole, "a number of steps"),
    "args": (lambda value: isinstance(value, dict), "settings by name")}
ARGS = {  # the same of what is used of its args after training; all may be missing or None
    **dict.fromkeys(("model", "data_dir", "enc_type", "enc_weights", "vae"),
                    (lambda value: isinstance(value, str), "a name")),
    **dict.fromkeys(("resolution", "enc_blocks", "enc_size", "attn_heads"), (is_whole, "a number")),
    "num_classes": (is_whole, "a number"), "qk_norm": (lambda value: isinstance(value, bool), "true or false"),
    "path_type": (lambda value: value in ("linear", "cosine"), "linear or cosine"),
    "context_shape": (lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_whole, value)),
                      "two numbers")}


def check_contents(path, state, needed):
    """Raise BadInput for one of the entries `needed` of a checkpoint, or of its args, that is not of its kind."""
    entries = [(repr(name), state[name], *CONTENTS[name]) for name in CONTENTS if name in state and name in needed]
    if isinstance(state["args"], dict):
        entries += [(f"{name!r} in its args", state["args"][name], *kind) for name, kind in ARGS.items()
                    if state["args"].get(name) is not None]
    for name, value, is_right, words in entries:
        if not is_right(value):
            raise BadInput(f"{path} has a {type(value).__name__} for {name}, which is not {words}; give a checkpoint of "
                           "train.py.")


def load_checkpoint(path, needed=("ema",), mmap=True, verify=False):
    """A checkpoint of ours or of the published code, an export, or a plain state dict (as `ema`), with `args` as a dict.

    Raises BadInput when one of the keys in `needed` is not there; `verify` as in load_tensors.
    """
    path = Path(path)
    with reading(path):
        exported = path.suffix == ".safetensors" or path.is_dir()
    state = read_export(path) if exported else load_tensors(path, mmap=mmap, verify=verify)
    if not isinstance(state, dict):
        raise BadInput(f"{path} holds a {type(state).__name__}, not a checkpoint; give a file of train.py.")
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        state = {"ema": state}
    for key in needed:
        if key not in state:
            raise BadInput(f"{path} has no '{key}'; give a checkpoint of train.py.")
    args = state.get("args", {})
    state = {**state, "args": vars(args) if isinstance(args, argparse.Namespace) else args}
    check_contents(path, state, {*needed, "args", "metrics"})
    return state


def read_export(path):
    """What save_export wrote to `path`, a folder or file; of a safetensors file without our config the weights alone."""
    weights = load_tensors(path / "model.safetensors" if path.is_dir() else path)
    if path.is_dir():
        return {**read_json(path / "config.json"), "ema": weights}
    try:
        with safetensors.safe_open(path, "pt") as file:
            config = json.loads((file.metadata() or {}).get("config", "{}"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} has metadata that are no JSON ({first_line(error)}); export the checkpoint again.") from error
    if not isinstance(config, dict):
        raise BadInput(f"{path} has a {type(config).__name__} as its config, not a dict; export the checkpoint again.")
    return {**config, "ema": weights}


def save_export(path, state):
    """Write EMA, args and steps of `state`, from load_checkpoint, in the form that the suffix of `path` says.

    .safetensors: one file; .pt: a checkpoint as train.py's, without what only training needs; anything else: a folder.
    """
    path, config = Path(path), {name: state[name] for name in ("steps", "args") if name in state}
    weights = {name: value.clone(memory_format=torch.contiguous_format) for name, value in state["ema"].items()}
    if path.suffix == ".pt":
        with atomic_write(path) as file:
            torch.save({"ema": weights, **config}, file)
    elif path.suffix == ".safetensors":
        with atomic_write(path) as file:
            file.write(safetensors.torch.save(weights, {"config": json.dumps(config)}))
    else:
        with atomic_write(path / "model.safetensors") as file:
            file.write(safetensors.torch.save(weights))
        with atomic_write(path / "config.json", "w") as file:
            json.dump(config, file, indent=2)


def sizes_of(weights):
    """What the weights of a SiT or MMDiT tell of its sizes, as arguments of the network."""
    sizes = {"in_channels": weights["x_embedder.proj.weight"].shape[1],
             "z_dims": [value.shape[0] for name, value in weights.items()
                        if name.startswith("projectors.") and name.endswith(".4.weight")],
             "qk_norm": any(name.endswith("q_norm.weight") for name in weights)}
    if "projectors.0.0.weight" in weights:
        sizes["projector_dim"] = weights["projectors.0.0.weight"].shape[0]
    if "y_embedder.embedding_table.weight" in weights:
        sizes["num_classes"] = weights["y_embedder.embedding_table.weight"].shape[0] - 1  # the last row is no class
    if "context_embedder.weight" in weights:
        sizes["context_dim"] = weights["context_embedder.weight"].shape[1]
    return sizes


def load_weights(module, weights, path):
    """Strictly load a state dict into `module`; a mismatch is one sentence with its first key."""
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise BadInput(f"{path} is a checkpoint of another model: {name} is {theirs.get(name, 'missing')} there "
                           f"and {ours.get(name, 'unknown')} here; give the --model and options it was trained with.")
    module.load_state_dict(weights)


def saved_steps(folder):
    """{step: path} of all checkpoints in `folder`."""
    return {int(path.stem): path for path in Path(folder).glob("*.pt") if path.stem.isdigit()}


def read_newest(folder, step, needed):
    """(path, state) of the checkpoint of `step` in `folder`, for 0 of the newest that can be read; None when it is empty.

    A damaged one is named in the log and the one before it is tried; when that is good, *.pt.damaged is its name from
    then on, so that it is no longer one of those to keep. Raises BadInput when none is left.
    """
    found, damaged = saved_steps(folder), []
    if step and step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise BadInput(f"{folder} has no checkpoint of step {step} (there: {there}); choose another --resume-step.")
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
        raise BadInput(f"{folder} has no checkpoint that can be read; put a whole one there, or delete them to start anew.")
    return None


def check_same_run(path, saved, args):
    """Refuse to go on with another run's checkpoint; return the other settings that changed, as (name, old, new).

    Values that a checkpoint does not know, such as the data of a published one, are not compared.
    """
    def plain(value):
        return [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, (list, tuple)) else value

    if "vae" in saved and "vae" in args and (PIXELS == saved["vae"]) != (PIXELS == args["vae"]):
        raise BadInput(f"{path} was trained with --vae {saved['vae']}, and --vae is now {args['vae']}: pixels and a "
                       "VAE's latents do not mix; use another --exp-name, or the --vae of that run.")
    for name in IDENTITY:
        if name in saved and name in args and plain(saved[name]) != plain(args[name]):
            raise BadInput(f"{path} belongs to another run: {name} was {saved[name]} and is now {args[name]}; use "
                           "another --exp-name, or the settings of that run.")
    return [(name, saved[name], value) for name, value in args.items()
            if name in saved and name not in IDENTITY and plain(saved[name]) != plain(value)]
