"""Checkpoints in the published format: {run}/checkpoints/{step:07d}.pt with model, ema, opt, args and steps.

For use elsewhere the EMA alone is exported to safetensors, with {"steps": N, "args": {...}} as its config:
    NAME.safetensors                           the config as JSON text in the file's metadata, under "config"
    NAME/model.safetensors, NAME/config.json   the same in two files
"""
import argparse
import hashlib
import json
import math
import re
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from data_io.latent_scale import is_scale
from models.mmdit import MMDIT_CONFIGS, MMDiT_models
from models.sit import SIT_CONFIGS, SiT_models
from runtime.errors import UserError
from runtime.files import atomic_folder, atomic_write, load_tensors, read_json, reading, write_json


def is_state(value):
    """Whether `value` is a state dict of tensors."""
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in value.items())


def is_whole(value):
    return isinstance(value, int) and value >= 0


# Entry of a checkpoint -> (check of its type, the type in words).
CONTENTS = {
    "model": (is_state, "named tensors"), "ema": (is_state, "named tensors"), "steps": (is_whole, "a number of steps"),
    "metrics": (lambda value: value is None or isinstance(value, dict), "terms of a loss"),
    "opt": (lambda value: isinstance(value, dict) and isinstance(value.get("param_groups"), list),
            "an optimizer's state and param_groups"),
    "args": (lambda value: isinstance(value, dict), "settings by name")}
# The same for the args that are used after training. All may be missing or None.
ARGS = {
    **dict.fromkeys(("model", "data_dir", "enc_type", "enc_weights", "vae"),
                    (lambda value: isinstance(value, str), "a name")),
    **dict.fromkeys(("resolution", "num_classes", "enc_blocks", "enc_size", "attn_heads",
                     "attn_teacher"), (is_whole, "a number")),
    "class_names": (lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
                    "a list of names"),
    "cfg_prob": (lambda value: isinstance(value, (int, float)), "a number"),
    "latents": (is_scale, "a scale and a shift"),
    "qk_norm": (lambda value: isinstance(value, bool), "true or false"),
    "path_type": (lambda value: value in ("linear", "cosine"), "linear or cosine"),
    "context_shape": (lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_whole, value)),
                      "two numbers")}


def check_contents(path, state, needed):
    """Raise UserError if one of the entries `needed` of a checkpoint, or one of its args, has a wrong type."""
    entries = [(repr(name), state[name], *CONTENTS[name]) for name in CONTENTS if name in state and name in needed]
    if isinstance(state["args"], dict):
        entries += [(f"{name!r} in its args", state["args"][name], *kind) for name, kind in ARGS.items()
                    if state["args"].get(name) is not None]
    for name, value, is_right, words in entries:
        if not is_right(value):
            raise UserError(f"{path} has a {type(value).__name__} for {name}, which is not {words}; give a checkpoint "
                            "of train.py.")


def saved_steps(folder):
    """{step: path} of all checkpoints in `folder`."""
    return {int(path.stem): path for path in Path(folder).glob("*.pt") if re.fullmatch("[0-9]+", path.stem)}


def load_checkpoint(path, needed=("ema",), mmap=True, verify=False):
    """A checkpoint of ours or of the published code, an export, or a plain state dict (as `ema`); `args` is a dict.

    Raises UserError when one of the keys in `needed` is missing; `verify` as in load_tensors.
    """
    path = Path(path)
    with reading(path):
        exported = path.suffix == ".safetensors" or path.is_dir()
    state = read_export(path) if exported else load_tensors(path, mmap=mmap, verify=verify)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint; give a file of train.py.")
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        state = {"ema": state}
    for key in needed:
        if key not in state:
            raise UserError(f"{path} has no '{key}'; give a checkpoint of train.py.")
    args = state.get("args", {})
    state = {**state, "args": vars(args) if isinstance(args, argparse.Namespace) else args}
    check_contents(path, state, {*needed, "args", "metrics", "steps"})
    return state


def read_export(path):
    """Read what save_export wrote to `path`, or only the weights of a safetensors file without our config."""
    if path.is_dir():
        if found := saved_steps(path) or saved_steps(path / "checkpoints"):
            raise UserError(f"{path} is the folder of a run; give one of its checkpoints, such as "
                            f"{found[max(found)]}.")
        weights = load_tensors(path / "model.safetensors")  # first: its error says that the folder is no export
        return {**read_json(path / "config.json"), "ema": weights}
    weights = load_tensors(path)
    with safetensors.safe_open(path, "pt") as file:
        config = (file.metadata() or {}).get("config", "{}")
    return {**read_json(f"The config in {path}", data=config.encode()), "ema": weights}


def save_export(path, state):
    """Write EMA, args and steps of `state`, from load_checkpoint, in the form given by the suffix of `path`.

    .safetensors: one file; .pt: a checkpoint without what only training needs; anything else: a folder.
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
        with atomic_folder(path) as folder:
            with atomic_write(folder / "model.safetensors") as file:
                file.write(safetensors.torch.save(weights))
            write_json(folder / "config.json", config, indent=2)


def weights_digest(module):
    """sha256 of a module's weights: of names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def modern_names(weights):
    """Rename weights of REPA's first release (decoder_blocks.i follow the other blocks) and iREPA's projectors."""
    first = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    return {re.sub(r"^decoder_blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) + first}", name)
            .replace(".projection_layer.", "."): value for name, value in weights.items()}


def infer_model_kwargs(weights):
    """Arguments of a SiT or MMDiT that follow from its weights."""
    _, channels, _, patch = weights["x_embedder.proj.weight"].shape
    kwargs = {"input_size": patch * math.isqrt(weights["pos_embed"].shape[1]), "in_channels": channels,
              "z_dims": [value.shape[0] for name, value in weights.items()
                         if re.fullmatch(r"projectors\.\d+\.(4\.)?weight", name)],
              "qk_norm": any(name.endswith("q_norm.weight") for name in weights)}
    if "projectors.0.0.weight" in weights:
        kwargs["projector_dim"] = weights["projectors.0.0.weight"].shape[0]
    if "projectors.0.weight" in weights:  # one layer
        kernel = weights["projectors.0.weight"].shape[2:]
        kwargs |= {"projector": "conv", "projector_kernel": kernel[0]} if kernel else {"projector": "linear"}
    if "y_embedder.embedding_table.weight" in weights:
        kwargs["num_classes"] = weights["y_embedder.embedding_table.weight"].shape[0] - 1  # the last is the null label
    if "context_embedder.weight" in weights:
        kwargs["context_dim"] = weights["context_embedder.weight"].shape[1]
    return kwargs


def load_weights(module, weights, path):
    """Strictly load a state dict into `module`. Raises UserError that names the first key that does not match."""
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in weights.items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UserError(f"{path} is a checkpoint of another model: {name} is {theirs.get(name, 'missing')} there "
                            f"and {ours.get(name, 'unknown')} here; give the --model and options it was trained with.")
    module.load_state_dict(weights)


def taps(args, config):
    """{encoder_depth, attn_layers}: from the training args if they fit the model, else from its table row `config`."""
    depth, pairs = args.get("encoder_depth"), args.get("attn_layers")
    fits = isinstance(pairs, list) and pairs and all(
        isinstance(pair, (list, tuple)) and [type(block) for block in pair] == [int, int]
        and 0 <= pair[0] < config["depth"] and pair[1] >= 0 for pair in pairs)
    return {"encoder_depth": depth if depth in range(1, config["depth"] + 1) else config["encoder_depth"],
            "attn_layers": [list(pair) for pair in (pairs if fits else config["attn_pairs"])]}


# kind of network -> table of sizes, constructors, a weight that only this kind has
KINDS = {"SiT": (SIT_CONFIGS, SiT_models, "y_embedder.embedding_table.weight"),
         "MMDiT": (MMDIT_CONFIGS, MMDiT_models, "context_embedder.weight")}


def find_model(weights, configs, path):
    """Name of the first row of `configs` that has the sizes of these weights."""
    width, _, _, patch = weights["x_embedder.proj.weight"].shape
    depth = 1 + max((int(name.split(".")[1]) for name in weights if "blocks." in name), default=-1)
    for name, config in configs.items():
        if (config["depth"], config["patch_size"], config.get("hidden_size", width)) == (depth, patch, width):
            return name
    raise UserError(f"{path} has {depth} blocks of width {width} and patches of {patch}, which no model here has; add "
                    "its sizes to the table in models/.")


def load_network(path, kind=None, source="ema", **typed):
    """(network with the EMA of `path`, in eval mode; its training args, as far as they are known).

    `path` is anything load_checkpoint takes; `kind` is a key of KINDS, or None for any; `source` "model" takes the
    trained weights, not their average. `typed` args win over those in the file. Sizes are read from the weights, so
    the file needs no args. The returned args have the network's model, num_classes, qk_norm, encoder_depth and
    attn_layers, and the checkpoint's steps. Raises UserError, also for args that contradict the weights.
    """
    state = load_checkpoint(path, needed=(source,))
    weights, args = modern_names(state[source]), {**state["args"], **typed}
    configs, networks, own_key = KINDS[kind or ("MMDiT" if "context_embedder.weight" in weights else "SiT")]
    required_keys = {"x_embedder.proj.weight": 4, "pos_embed": 3, own_key: 2}  # and their numbers of dimensions
    missing = [key for key in required_keys if key not in weights]
    if missing and kind:
        raise UserError(f"{path} is no checkpoint of this kind of model, having no {missing[0]}; generate.py takes "
                        "those of train.py, generate_t2i.py those of train_t2i.py.")
    if missing:
        raise UserError(f"{path} holds the weights of neither SiT nor MMDiT; give a checkpoint of train.py or "
                        "train_t2i.py.")
    if wrong := next((key for key, dims in required_keys.items() if weights[key].dim() != dims), None):
        raise UserError(f"{path} is damaged: its {wrong} has shape {tuple(weights[wrong].shape)}; use another one.")
    name = args.get("model") or find_model(weights, configs, path)
    if name not in configs:
        raise UserError(f"--model {name} is not known; use one of {', '.join(configs)}.")
    kwargs = infer_model_kwargs(weights)
    # as a whole number of this model's patches, so that load_weights finds what is wrong with another model's weights
    kwargs["input_size"] = configs[name]["patch_size"] * math.isqrt(weights["pos_embed"].shape[1])
    for key in ("num_classes", "qk_norm"):
        if key in kwargs and args.get(key) not in (None, kwargs[key]):
            raise UserError(f"--{key.replace('_', '-')} is {args[key]}, but the weights in {path} are of "
                            f"{kwargs[key]}; leave the flag out.")
    known = taps(args, configs[name])
    network = networks[name](**kwargs, encoder_depth=known["encoder_depth"],
                             attn_layers=[student for student, _ in known["attn_layers"]])
    load_weights(network, weights, path)
    names = args.get("class_names")
    args |= {"model": name, "steps": state.get("steps"), **known,
             "class_names": names if names and len(names) == kwargs.get("num_classes") else None,
             **{key: kwargs[key] for key in ("num_classes", "qk_norm") if key in kwargs}}
    return network.eval().requires_grad_(False), args
