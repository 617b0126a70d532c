"""Check latents' moments and class names read from files."""
import hashlib
import json
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.files import is_file, read_json


def check_moments(array, shape, name, is_std=False):
    """Return `array`, moments read from `name`. Raises UserError unless they are finite float32 of `shape`.

    With `is_std` the second half holds standard deviations, else log variances.
    """
    if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
        raise UserError(f"{name} holds {array.dtype} {array.shape}; expected finite float32 {shape}; make it again.")
    if is_std and has_negative_std(array):
        raise UserError(f"{name} holds a negative std: it looks like mean and log variance, the text-to-image layout; "
                        "encode the data anew, for classes.")
    return array


def has_negative_std(moments):
    """Whether a std in moments (..., 2 C, h, w) is below 0."""
    return bool((moments[..., moments.shape[-3] // 2:, :, :] < 0).any())


def check_shape(shape, resolution, name):
    """Return `shape`, of the moments in `name`. Raises UserError unless it is square and fits `resolution`."""
    if len(shape) != 3 or not all(shape) or shape[0] % 2 or shape[1] != shape[2]:
        raise UserError(f"{name} has shape {shape}; expected (2 x channels, side, side), mean and spread.")
    if resolution % shape[1]:
        raise UserError(f"{name} has {shape[1]} latent pixels a side, of which --resolution {resolution} is no "
                        "multiple; encode the data at this resolution or change it.")
    return shape


def digest(entries):
    """sha256 of plain values, as JSON."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def check_is_logvar(moments, names):
    """Raise UserError if no spread in `moments`, some of the data, is below 0: log variances nearly always are."""
    if moments and all((array[len(array) // 2:] >= 0).all() for array in moments):
        raise UserError(f"{names[0]} and others hold no negative log variance: they look like mean and std, the "
                        "ImageNet layout; encode the data anew, for text.")


def read_class_names(folder, labels):
    """The names in `folder`/classes.json, in the order of the labels, or None. Raises UserError."""
    path = Path(folder) / "classes.json"
    return read_names(path, labels.max() + 1) if is_file(path) else None


def read_names(path, classes, exactly=False):
    """The names of at least `classes` classes (with `exactly`, just as many), from a JSON list. Raises UserError."""
    names = read_json(path, list)
    if not all(isinstance(name, str) for name in names) or len(names) < classes or (exactly and len(names) > classes):
        raise UserError(f"{path} must hold a list of {classes} names, one for each class; make it again, or leave it "
                        "out.")
    return names
