"""Files, read and written so that nothing is half there: atomic writes, safe loading, one sentence per bad input."""
import argparse
import contextlib
import hashlib
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch


class BadInput(Exception):
    """Something the user gave cannot be used. The message is the sentence to show: what, where, what to do."""


def first_line(error):
    """The first line of an exception's message, for use inside a sentence."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def run_script(main):
    """Call `main()`; a BadInput ends the process with its sentence on stderr and exit status 1, without a traceback."""
    try:
        main()
    except BadInput as error:
        sentence = str(error).rsplit("BadInput: ", 1)[-1].strip()  # a loader's worker wraps it in a traceback's text
        sys.exit(f"error: {sentence}")


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`; it takes the name `path` only once written in full and flushed to disk."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_key(source):
    """What tells two sources of weights apart: the sha256 of a folder's safetensors, or a hub name as it is."""
    found = sorted(Path(source).glob("*.safetensors"))
    return " ".join(sha256_of(path) for path in found) or str(source)


def load_tensors(path, mmap=False):
    """Tensors and plain values of a `.safetensors` file or of anything `torch.save` wrote, without running code from it.

    Published checkpoints hold an argparse.Namespace, the only class allowed beside tensors and plain values.
    `mmap` leaves tensors on disk until they are used. Raises BadInput for a missing, damaged or refused file.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} does not exist; give the path of a weight or checkpoint file.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise BadInput(f"{path} is not a readable safetensors file ({error}); get it again.") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise BadInput(f"{path} is no torch file of tensors and plain values, or holds code, which is not run; "
                       "save it again as a plain state dict.") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise BadInput(f"{path} is damaged or not a torch file ({first_line(error)}); get it again.") from error


def load_array(path):
    """The array of a `.npy` file. Raises BadInput when it is missing, truncated or holds Python objects."""
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; make it again with the preprocessing.") from error
    except (ValueError, EOFError, OSError) as error:
        raise BadInput(f"{path} is no readable .npy file ({error}); make it again with the preprocessing.") from error
