"""Atomic writes, safe loading, file hashes and locks."""
import argparse
import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import lzma
import math
import os
import pickle
import shutil
import stat
import tempfile
import tokenize
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from runtime.errors import Unreadable, UserError, first_line
from runtime.torchscript import is_script, read_script

# What reading a damaged .npy or .npz may raise: NumPy parses headers as Python, zipfile refuses some methods.
ARRAY_ERRORS = (OSError, ValueError, EOFError, OverflowError, MemoryError, SyntaxError, TypeError, tokenize.TokenError,
                RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writing(path):
    """Turn a failure to write `path` (no space, no permission, no such folder) into UserError."""
    path = Path(path)
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError):  # torch.save raises a RuntimeError while it handles the write's error
            error = error.__context__
        if not isinstance(error, OSError):
            raise
        named = None if error.filename is None else Path(error.filename)
        if named and named not in path.parents and named.parent != path.parent and path not in named.parents:
            raise  # about another file, which the caller was reading
        remedy = "make room" if error.errno in NO_ROOM else "name a folder that can be written to"
        raise UserError(f"{path} could not be written ({error.strerror or error}), what was there before is as it was; "
                        f"{remedy} and run the command again.") from error


@contextlib.contextmanager
def reading(path):
    """Turn a failure to read `path` or below it (no permission, a link to nowhere, too long a name) into UserError."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or path)
        raise UserError(f"{name} cannot be read ({error.strerror or error}); give another path, or make this one "
                        "readable.") from error


def is_file(path):
    """Whether `path` is a file. Raises UserError if that cannot be checked."""
    return stat.S_ISREG(mode_of(path))


def is_folder(path):
    """Whether `path` is a folder. Raises UserError if that cannot be checked."""
    return stat.S_ISDIR(mode_of(path))


def mode_of(path):
    """st_mode, 0 if `path` does not exist. (pathlib's tests treat unreadable paths as absent from Python 3.14 on.)"""
    with reading(path):
        try:
            return os.stat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return 0


def check_writable(folder):
    """Make `folder` if it is missing; raises UserError unless it is writable. Leaves no test file behind."""
    with writing(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a temporary file beside `path`, renamed to `path` once it is complete and flushed to disk.

    Raises UserError when it cannot be written; `path` then stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """The same for a folder that is not there yet: yields a temporary one, renamed to `path` at the end."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        temporary.mkdir(parents=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder, begin=""):
    """Delete what killed processes left in `folder`: temporary files and folders whose names start with `begin`."""
    for leftover in Path(folder).glob(".*.tmp"):
        if leftover.name.startswith(f".{begin}"):
            with writing(leftover):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink(missing_ok=True)


def check_output(out, suffixes, inputs=()):
    """Raise UserError where writing `out` would destroy one of `inputs` or a file of another kind. Links are followed.

    A file `out` may replace one that ends in one of `suffixes`. Without suffixes `out` is a folder: it must not lie in
    an input, nor contain one that is not a zip. Inputs may be None or a name on the hub.
    """
    there, ours = mode_of(out), Path(out).resolve()
    if suffixes and not Path(out).name:
        raise UserError(f"{str(out)!r} names no file to write; give one that ends in {' or '.join(suffixes)}.")
    for each in inputs:
        if not each or not mode_of(each):
            continue
        if suffixes and there and os.path.samefile(out, each):
            raise UserError(f"{out} is {each} itself, which is read here; name another output.")
        theirs = Path(each).resolve()
        if not suffixes and (theirs in (ours, *ours.parents) or (theirs.suffix != ".zip" and ours in theirs.parents)):
            raise UserError(f"{out} and {each} lie in each other, so that output would become input; name another "
                            "output.")
    if suffixes and there and not (stat.S_ISREG(there) and ours.suffix.lower() in suffixes):
        kind = "folder" if stat.S_ISDIR(there) else "file of another kind"
        raise UserError(f"{out} is a {kind} and is not written over; name another output, ending in "
                        f"{' or '.join(suffixes)}.")


def prepare_output(out, suffixes=(), inputs=()):
    """check_output, then make the parent folder of `out` and delete temporary files of `out` left by killed processes.

    Without suffixes `out` must not exist yet.
    """
    check_output(out, suffixes, inputs)
    if not suffixes and mode_of(out):
        raise UserError(f"{out} is there already and is not written over; name another file or folder, or delete it.")
    check_writable(Path(out).parent)
    remove_temporaries(Path(out).parent, f"{Path(out).name}.")


@contextlib.contextmanager
def locked(path, wanted=True):
    """Hold the file `path` as a lock, if `wanted`. The system releases it when the process ends."""
    with contextlib.ExitStack() as stack:
        if wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "w"))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_inside(name, where):
    """`name`, a relative path read from the file `where`; raises UserError when it leads out of its folder."""
    if name.startswith(("/", "\\")) or (".." in name and ".." in name.replace("\\", "/").split("/")):
        raise UserError(f"{where} names {name}, which lies outside its folder; only relative paths below it are read.")
    return name


def read_json(path, kind=dict, data=None):
    """The value in a JSON file, or in its bytes `data`. Raises UserError unless it is there, JSON and a `kind`."""
    if data is None and mode_of(path) and not is_file(path):  # a device has no end
        raise UserError(f"{path} is no regular file; give one in JSON.")
    try:
        value = json.loads((Path(path).read_bytes() if data is None else data).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read as JSON ({reason}); make it again.") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}; make it again.")
    return value


def write_json(path, value, indent=None):
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=indent)


def sha256_of(path):
    digest = hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_key(source):
    """Identifies a source of weights: the sha256 of a folder's safetensors, or the hub name itself."""
    with reading(source):
        found = sorted(Path(source).glob("*.safetensors"))
    return " ".join(sha256_of(path) for path in found) or str(source)


def load_tensors(path, mmap=False, verify=False):
    """Tensors and plain values of a `.safetensors` file or of a file of `torch.save`, without running code from it.

    argparse.Namespace, as in published checkpoints, is the only class allowed. Of a TorchScript archive only tensors
    are read. `mmap` leaves tensors on disk until they are used; `verify` compares checksums. Raises UserError for a
    missing file, Unreadable for a damaged or refused one.
    """
    path = Path(path)
    if not is_file(path):
        what = "is a folder" if is_folder(path) else "is no regular file" if mode_of(path) else "does not exist"
        raise UserError(f"{path} {what}; give the path of a weight or checkpoint file.")
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError, MemoryError) as error:
            raise Unreadable(f"{path} is not a readable safetensors file ({error}); get it again.") from error
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            check_zip(path, verify)
            if is_script(path):
                return read_script(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except pickle.UnpicklingError as error:
        raise Unreadable(f"{path} is no torch file of tensors and plain values, or holds code, which is not run; "
                         "save it again as a plain state dict.") from error
    except (*ARRAY_ERRORS, KeyError, AttributeError, IndexError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's fault, not the file's
            raise UserError(f"{path} cannot be read now ({first_line(error)}); fix that and try again.") from error
        raise Unreadable(f"{path} is damaged or not a torch file ({first_line(error)}); get it again.") from error


def check_zip(path, verify):
    """Raise ValueError for a zip that unpacks to far more than it holds or, with `verify`, has a wrong checksum."""
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > 2 * path.stat().st_size:
            raise ValueError("it claims to unpack to far more than it holds")
        if verify and (broken := archive.testzip()):
            raise ValueError(f"wrong checksum of {broken}")


@functools.lru_cache(maxsize=64)
def _parse_header(header):
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("Python objects, which are not read")
    if not dtype.isnative or dtype.itemsize > 8:
        raise ValueError(f"numbers of type {dtype.str}, which PyTorch does not know; save them as float32")
    return shape, fortran, dtype


def array_header(data):
    """(shape, whether in Fortran's order, dtype, bytes before the numbers) of a `.npy` file that begins with `data`.

    Raises ValueError. Files of one kind share a header, which is parsed once.
    """
    short = data[6:7] == b"\1"
    length = 10 + int.from_bytes(data[8:10], "little") if short else 12 + int.from_bytes(data[8:12], "little")
    try:
        return *_parse_header(bytes(data[:length])), length
    except ARRAY_ERRORS as error:
        raise ValueError(first_line(error)) from error


def parse_array(data, name):
    """The array in the bytes of a `.npy` file, not copied. Raises UserError, calling the file `name`."""
    try:
        shape, fortran, dtype, start = array_header(data)
        count = math.prod(shape)
        if count * dtype.itemsize > len(data) - start:  # checked before the claimed memory is taken
            raise ValueError(f"{count * dtype.itemsize} bytes of numbers expected, {len(data) - start} there")
        return np.frombuffer(data, dtype, count, start).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise UserError(f"{name} is no readable .npy file ({first_line(error)}); make it again with the "
                        "preprocessing.") from error


def load_array(path):
    """The array of a `.npy` file. Raises UserError when it is missing, truncated or holds Python objects."""
    return parse_array(read_bytes(path), path).copy()


def read_bytes(path):
    """The content of a data file. Raises UserError."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = "is missing" if missing else f"cannot be read ({error.strerror or error})"
        raise UserError(f"{path} {reason}; make it again with the preprocessing.") from error
