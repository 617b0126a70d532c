"""Checkpoints in the published format: {run}/checkpoints/{step:07d}.pt with model, ema, opt, args and steps."""
from pathlib import Path

import torch

from files import BadInput, atomic_write, load_tensors

# What must be equal for a run to go on; everything else may change and is reported. `data` is the fingerprint.
IDENTITY = ("model", "num_classes", "resolution", "qk_norm", "path_type", "prediction", "weighting", "enc_type",
            "encoder_depth", "attn_layers", "data")


def save_checkpoint(folder, step, state):
    """Write `state` (plain values and tensors) as step `step`; a half-written file never has the final name."""
    path = Path(folder) / f"{step:07d}.pt"
    with atomic_write(path) as file:
        torch.save({**state, "steps": step}, file)
    return path


def load_checkpoint(path, needed=("ema",), mmap=True):
    """A checkpoint of ours or of the published code, or a plain state dict (as `ema`), with `args` as a dict.

    Raises BadInput when one of the keys in `needed` is not there.
    """
    state = load_tensors(path, mmap=mmap)
    if not isinstance(state, dict):
        raise BadInput(f"{path} holds a {type(state).__name__}, not a checkpoint; give a file of train.py.")
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        state = {"ema": state}
    for key in needed:
        if key not in state:
            raise BadInput(f"{path} has no '{key}'; give a checkpoint of train.py.")
    args = state.get("args", {})
    return {**state, "args": args if isinstance(args, dict) else vars(args)}


def load_weights(module, weights, path):
    """Strictly load a state dict into `module`; a mismatch is one sentence with its first key."""
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise BadInput(f"{path} is a checkpoint of another model: {name} is {theirs.get(name, 'missing')} there "
                           f"and {ours.get(name, 'unknown')} here; give the --model and options it was trained with.")
    module.load_state_dict(weights)


def find_checkpoint(folder, step=0):
    """Path of the checkpoint of `step` in `folder`, of the newest for 0, or None when there is none at all."""
    found = {int(path.stem): path for path in Path(folder).glob("*.pt") if path.stem.isdigit()}
    if step and step not in found:
        there = ", ".join(map(str, sorted(found))) or "none"
        raise BadInput(f"{folder} has no checkpoint of step {step} (there: {there}); choose another --resume-step.")
    return found[step or max(found)] if found else None


def check_same_run(path, saved, args):
    """Refuse to go on with another run's checkpoint; return the other settings that changed, as (name, old, new).

    Values that a checkpoint does not know, such as the data of a published one, are not compared.
    """
    def plain(value):
        return [list(v) if isinstance(v, tuple) else v for v in value] if isinstance(value, (list, tuple)) else value

    for name in IDENTITY:
        if name in saved and name in args and plain(saved[name]) != plain(args[name]):
            raise BadInput(f"{path} belongs to another run: {name} was {saved[name]} and is now {args[name]}; use "
                           "another --exp-name, or the settings of that run.")
    return [(name, saved[name], value) for name, value in args.items()
            if name in saved and name not in IDENTITY and plain(saved[name]) != plain(value)]
