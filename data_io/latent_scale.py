"""Scale and shift from VAE latents to network inputs: z = (latent - shift) x scale.

{data}/latents.json names the VAE that made the latents of a data set, and their scale and shift: numbers, or lists
with one number per channel. `dataset_tools.py encode` and `stats` and preprocessing/coco.py write it:
    {"vae": "stabilityai/sd-vae-ft-mse", "vae_key": ..., "factor": 8, "channels": 4, "scale": 0.18215, "shift": 0.0}
Data and checkpoints without it have Stable Diffusion's scale.
"""
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from runtime.errors import UserError, first_line
from runtime.files import ARRAY_ERRORS, check_zip, is_file, load_tensors, read_json, write_json

NOTE = "latents.json"
PIXELS = "none"  # --vae none: no VAE, the pixels are the latents


@functools.lru_cache
def as_factor(values, device, dtype):
    """A number as it is; a tuple of one per channel as a tensor (C, 1, 1), made once for each device."""
    return torch.tensor(values, device=device, dtype=dtype).view(-1, 1, 1) if isinstance(values, tuple) else values


class LatentScale(NamedTuple):
    """scale and shift: a number each, or a tuple of one per channel."""
    scale: float | tuple
    shift: float | tuple = 0.0

    def latents(self, moments, noise):
        """A sample of the posterior, scaled: moments (N, 2 C, h, w), mean and std, noise (N, C, h, w) -> like noise."""
        mean, std = moments.chunk(2, dim=1)
        shift, scale = (as_factor(values, moments.device, moments.dtype) for values in (self.shift, self.scale))
        return (mean + std * noise - shift) * scale

    def undone(self, latents):
        """Invert scale and shift for the VAE's decoder: latents (N, C, h, w) -> the same shape."""
        shift, scale = (as_factor(values, latents.device, latents.dtype) for values in (self.shift, self.scale))
        return latents / scale + shift

    def plain(self):
        """For JSON and checkpoints."""
        return {name: list(values) if isinstance(values, tuple) else values for name, values in self._asdict().items()}

    def __str__(self):
        words = (f"{min(values):.4g} to {max(values):.4g} by channel" if isinstance(values, tuple) else f"{values:g}"
                 for values in self)
        return "scale {}, shift {}".format(*words)

    def check(self, channels, where):
        """Raise UserError unless this fits latents with `channels` channels."""
        for values in self:
            if isinstance(values, tuple) and len(values) != channels:
                raise UserError(f"{where} has mean and std of {len(values)} channels, the latents have {channels}; "
                                "give the numbers of these latents, as `dataset_tools.py stats` computes them.")


SD_SCALE = LatentScale(0.18215)  # Stable Diffusion's; gives unit variance
PIXEL_SCALE = LatentScale(2.0)   # for pixels in [-1, 1]; their std is 0.503 in CIFAR-10's training photographs


def is_scale(value):
    """Whether `value` has the form of LatentScale.plain(), with numbers that fit float32."""
    def is_number(x):
        return type(x) in (int, float) and abs(x) < 1e30

    if not isinstance(value, dict) or not {"scale", "shift"} <= value.keys():
        return False
    parts = [[part] if is_number(part) else part for part in (value["scale"], value["shift"])]
    return (all(isinstance(part, list) and part and all(map(is_number, part)) for part in parts)
            and all(x > 1e-30 for x in parts[0]))


def from_plain(value):
    """The LatentScale of a dict that is_scale accepts."""
    return LatentScale(*(tuple(value[name]) if isinstance(value[name], list) else value[name]
                         for name in LatentScale._fields))


def scale_of(args):
    """The LatentScale of a network, from its training args (a dict)."""
    if is_scale(args.get("latents")):
        return from_plain(args["latents"])
    return PIXEL_SCALE if args.get("vae") == PIXELS else SD_SCALE


def from_statistics(mean, std, multiplier=1.0):
    """The LatentScale (latent - mean) / std x multiplier; mean, std: one number per channel."""
    return LatentScale(tuple(multiplier / s for s in std), tuple(mean))


def read_statistics(path, multiplier=1.0):
    """The LatentScale in a file: mean and std per channel (.safetensors, .npz, LightningDiT's .pt), or a latents.json.

    Raises UserError.
    """
    path = Path(path)
    if path.suffix == ".json":
        return from_plain(checked(read_json(path), path))
    try:
        if path.suffix == ".npz" and is_file(path):
            check_zip(path, verify=False)
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[name] for name in ("mean", "std")}
        else:
            found = load_tensors(path)
        mean, std = (np.asarray(found[name], np.float64).reshape(-1).tolist() for name in ("mean", "std"))
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ValueError("a std that is not above 0, or other channels than of the mean")
        scale = from_statistics(mean, std, multiplier)
        if not is_scale(scale.plain()):
            raise ValueError("numbers that are not finite")
    except (*ARRAY_ERRORS, KeyError, IndexError) as error:
        raise UserError(f"{path} holds no mean and std of each channel ({first_line(error)}); give latents_stats.pt, a "
                        ".safetensors or .npz file with `mean` and `std`, or a latents.json.") from error
    return scale


def checked(note, path):
    """Return `note`, read from a NOTE file. Raises UserError if its form is wrong."""
    kinds = {"vae": str, "vae_key": str, "factor": int, "channels": int}
    if not is_scale(note) or any(type(note[name]) is not kind for name, kind in kinds.items()
                                 if note.get(name) is not None) or not 1 <= (note.get("factor") or 1) <= 2 ** 14:
        raise UserError(f"{path} does not say scale and shift of latents; make it again with `dataset_tools.py stats`, "
                        "or remove it if they are of Stable Diffusion's VAE.")
    return note


def read_note(data_dir):
    """The content of {data}/latents.json, a dict, or None."""
    path = Path(data_dir) / NOTE
    return checked(read_json(path), path) if is_file(path) else None


def check_note(data_dir, vae, key):
    """The note in `data_dir`, or None. Raises UserError if its VAE is not `vae` with weights_key `key`."""
    old = read_note(data_dir)
    if old and old.get("vae_key") not in (None, key):
        raise UserError(f"{Path(data_dir) / NOTE} says that the latents there are of {old.get('vae')}, not of "
                        f"{vae.source}; name another folder, or delete it together with those latents.")
    return old


def write_note(data_dir, vae, key):
    """Write the note that `vae` made the latents in `data_dir`, unless it exists; see check_note."""
    if check_note(data_dir, vae, key):
        return
    write_json(Path(data_dir) / NOTE, {"vae": str(vae.source), "vae_key": key, "factor": vae.factor,
                                       "channels": vae.channels, **vae.own_scale.plain()})
