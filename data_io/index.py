"""Index a data set: the number, name, place and label of each file, and a cache of these beside the data.

The number at the end of a file name identifies an entry. The tables are NumPy arrays: reading them changes no reference
counts, so loader processes share their memory without copies.
"""
import contextlib
import json
import logging
import os
import re
import struct
import time
from typing import NamedTuple

import numpy as np

from runtime.errors import UserError
from runtime.files import ARRAY_ERRORS, atomic_write, check_inside, is_file, read_json, reading

CACHED_FROM = 20_000       # entries; smaller data sets are indexed at once
SETTLED = 2.0              # seconds: a file changed this recently may change again with the same time stamp
ZIP_ERRORS = (*ARRAY_ERRORS, struct.error)
LAST_LABEL = 1 << 62
NUMBER = re.compile(rb"(?<!\d)(\d{1,18})\.\w+$")  # at the end of a file name; int64 holds 18 digits

logger = logging.getLogger("haste")


class Index(NamedTuple):
    """All files of one kind, in the order of their numbers. `labels` is None where dataset.json says null."""
    numbers: np.ndarray    # int64 (n,)
    names: np.ndarray      # bytes (n,), relative paths
    where: np.ndarray      # int64 (n, k): where the storage form finds an entry
    labelled: np.ndarray   # int64 (m,), the numbers that dataset.json names, ascending
    labels: np.ndarray     # int64 (m,)


def numbers_of(names):
    """The numbers that file names end in: bytes (n,) -> int64 (n,). 00000/img00000012.png -> 12."""
    matches = [NUMBER.search(name) for name in names.tolist()]
    if None in matches:
        raise UserError(f"{os.fsdecode(names[matches.index(None)])} has no index in its name; expected names such as "
                        "00000/img00000012.png.")
    return np.array([int(match[1]) for match in matches], np.int64)


def first_twice(values):
    """The first repeated item of `values`, or None."""
    seen = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def encoded(names):
    """Paths, a list of str -> bytes (n,). Raises ValueError if one cannot be a path."""
    if any("\0" in name for name in names):
        raise ValueError("a name holds a zero byte")
    return np.array([os.fsencode(name) for name in names], "S")


def read_labels(path, data=None):
    """dataset.json (or its bytes, `data`) -> numbers (n,), labels (n,) or None for null, names (n,); by number."""
    if data is None and not is_file(path):
        raise UserError(f"{path} does not exist; --data-dir must hold images/ and vae-sd/, or zips of these names, "
                        "each with a dataset.json.")
    content = read_json(path, data=data)
    try:
        entries = content["labels"]
        labels = [label for _, label in entries or ()]
        names = encoded([check_inside(name, path) for name, _ in entries or ()])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    for k, label in enumerate(labels):
        if type(label) is not int or abs(label) >= LAST_LABEL:
            raise UserError(f"{path}: the label of index {numbers_of(names[[k]])[0]} is {label}; it must be a whole "
                            "number from 0 on.")
    numbers, names, labels = sort_by_number(path, names, np.array(labels, np.int64))
    return numbers, None if entries is None else labels, names


def sort_by_number(path, names, where):
    """(numbers, names, where) by number. Raises UserError where two files have one number."""
    numbers = numbers_of(names)
    order = np.argsort(numbers, kind="stable")
    numbers, names = numbers[order], names[order]
    if (twice := np.flatnonzero(np.diff(numbers) == 0)).size:
        one, other = map(os.fsdecode, names[twice[0]:twice[0] + 2])
        raise UserError(f"{path}: {one} and {other} have one index; remove one.")
    return numbers, names, where[order]


def check_equal_sizes(path, names, sizes, what="latent"):
    """Raise UserError unless all files have the size of the first: other sizes mean other shapes or cut files."""
    sizes = np.asarray(sizes)
    if (odd := np.flatnonzero(sizes != sizes[:1])).size:
        raise UserError(f"{path}/{os.fsdecode(names[odd[0]])} has {sizes[odd[0]]} bytes, the first {what} {sizes[0]}: "
                        "its shape is another or it is truncated; make it again.")


def check_labels(files, num_classes):
    """The Index of `files`. Raises UserError for a label outside 0 .. num_classes - 1 (None: no upper limit)."""
    index = files.index
    if index.labels is not None:
        for k in np.flatnonzero((index.labels < 0) | (index.labels >= (num_classes or LAST_LABEL)))[:1]:
            limit = f"to {num_classes - 1} (--num-classes {num_classes})" if num_classes else "on"
            raise UserError(f"{files.path}/dataset.json: the label of index {index.labelled[k]} is {index.labels[k]}; "
                            f"it must be a number from 0 {limit}.")
    return index


def walk(folder, suffix, sizes=False):
    """({path of each folder: its stamp}, names of files bytes (n,), where (n, 1) their sizes if asked, else (n, 0)).

    Names are relative and end in `suffix`. Only regular files and links to them count; hidden files do not.
    """
    stamps, names, where, folders = {}, [np.empty(0, "S1")], [], [os.path.join(os.fsencode(folder), b"")]
    start, suffix = len(folders[0]), suffix.encode()
    with reading(folder):
        while folders:
            path, found = folders.pop(), []
            stamps |= stamps_of(os.fsdecode(path))
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif entry.name.endswith(suffix) and not entry.name.startswith(b"."):
                        size = entry.stat().st_size if sizes else 0  # for a broken link the error names it
                        if entry.is_file():
                            found.append(entry.path[start:])
                            where += [size] * sizes
            names.append(np.array(found, "S"))
    names = np.concatenate(names)
    return stamps, names, np.array(where, np.int64).reshape(len(names), -1 if where else 0)


def scan(folder, suffix):
    """{number in the name: relative path} of all files below `folder` that end in `suffix`."""
    numbers, names, _ = sort_by_number(folder, *walk(folder, suffix)[1:])
    return dict(zip(numbers.tolist(), map(os.fsdecode, names.tolist()), strict=True))


def stamps_of(*paths):
    """{path: stamp that changes with the file or folder}, for existing paths."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found[str(path)] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def cached_index(cache, key, make):
    """The Index in the file `cache` if no stamp has changed, else from make() -> (stamps, Index).

    An Index of at least CACHED_FROM entries is cached if the file is writable. `key`: plain values that name the index.
    """
    try:
        with np.load(cache, allow_pickle=False) as file:
            known = json.loads(file["known"].tobytes())
            paths = [os.path.join(cache.parent, name) for name in known["stamps"]]
            if known["key"] == key and [*stamps_of(*paths).values()] == [*known["stamps"].values()]:
                return Index(*(file.get(name) for name in Index._fields))
    except (*ZIP_ERRORS, KeyError, TypeError, AttributeError):
        pass  # missing or damaged
    started = time.time()
    stamps, index = make()
    changed = max(times[-1] for times in stamps.values()) / 1e9
    if len(index.numbers) < CACHED_FROM or changed > started - SETTLED:
        return index
    stamps = {os.path.relpath(path, cache.parent): times for path, times in stamps.items()}
    known = np.frombuffer(json.dumps({"key": key, "stamps": stamps}).encode(), np.uint8)
    arrays = {name: value for name, value in index._asdict().items() if value is not None}
    try:
        with atomic_write(cache) as file:
            np.savez(file, known=known, **arrays)
    except UserError as error:
        logger.info(f"{error} Until then the data are listed anew at each start.")
    return index
