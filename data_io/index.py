"""What a data set holds of one kind - images, latents: numbers, names and labels, and an index of them beside the data.

Entries are known by the number that their names end in. The tables are NumPy arrays, which loader processes share: no
reference counts lie inside, so that reading one copies no page of memory.
"""
import contextlib
import gc
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

INDEX_FROM = 20_000        # entries; fewer are listed anew at each start, which takes no time
SETTLED = 2.0              # seconds: what changed this recently could change again under the same time stamp
ZIP_ERRORS = (*ARRAY_ERRORS, struct.error)
LAST_LABEL = 1 << 62
NO_LABELS = np.empty(0, np.int64)

logger = logging.getLogger("haste")


class Listing(NamedTuple):
    """What there is of one kind, in the order of the index. `labels` is None where dataset.json says null."""
    index: np.ndarray      # int64 (n,)
    names: np.ndarray      # bytes (n,), relative paths
    where: np.ndarray      # int64 (n, k), what the form needs to find an entry
    labelled: np.ndarray   # int64 (m,), the numbers that dataset.json names, ascending
    labels: np.ndarray     # int64 (m,)


def index_of(name):
    """The number a file name ends in: '00000/img00000012.png' -> 12. Images and latents are paired by it."""
    match = re.search(r"(\d+)\.\w+$", name)
    if not match or len(match[1]) > 18:  # as many digits as int64 holds
        raise UserError(f"{name} has no index in its name; expected names such as 00000/img00000012.png.")
    return int(match[1])


def indices_of(names):
    """index_of each of names, bytes (n,) -> int64 (n,).

    Names of one length whose number is in one place, as the layouts have them, are read column by column.
    """
    columns = names.view(np.uint8).reshape(len(names), names.itemsize).T
    dot = names[0].rfind(b".") if len(names) else -1
    index, place = np.zeros(len(names), np.int64), 1
    if dot > 0 and (columns[dot] == ord(".")).all() and (columns[dot + 1:] != ord(".")).all() and columns[-1].all():
        for column in columns[dot - 1::-1]:
            digits = column - np.uint8(ord("0"))  # wraps around for what comes before 0
            if (digits > 9).all() and place > 1:
                return index
            if (digits > 9).any() or place >= 10 ** 18:
                break
            index += digits * np.int64(place)
            place *= 10
    return np.array([index_of(os.fsdecode(name)) for name in names.tolist()], np.int64)


def encoded(names):
    """Paths, str, in a list -> bytes (n,). Raises ValueError for what can be no path."""
    pieces = os.fsencode("\0".join(names)).split(b"\0") if names else []
    if len(pieces) != len(names):
        raise ValueError("a name holds a zero byte")
    return np.array(pieces, "S")


def parse_labels(content, path):
    """What dataset.json holds, read from `path` -> numbers int64 (n,), ascending, labels int64 (n,), names bytes (n,).

    Labels are None for null.
    """
    try:
        entries = content["labels"]
        labels = [label for _, label in entries or ()]
        names = encoded([check_inside(name, path) for name, _ in entries or ()])
        numbers = indices_of(names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    if (different := len(np.unique(numbers))) < len(numbers):
        raise UserError(f"{path} has {len(numbers)} entries of {different} different indices; each image needs its own.")
    for k, label in enumerate(labels):
        if type(label) is not int or abs(label) >= LAST_LABEL:
            raise UserError(f"{path}: the label of index {numbers[k]} is {label}; it must be a whole number from 0 on.")
    order = np.argsort(numbers)
    return numbers[order], None if entries is None else np.array(labels, np.int64)[order], names[order]


def arranged(path, names, where):
    """(index, names, where) in the order of the index. names: bytes (n,), where: (n, k).

    Raises UserError where two entries have one index.
    """
    index = indices_of(names)
    order = np.argsort(index, kind="stable")
    index, names = index[order], names[order]
    if (twice := np.flatnonzero(np.diff(index) == 0)).size:
        one, other = map(os.fsdecode, names[twice[0]:twice[0] + 2])
        raise UserError(f"{path}: {one} and {other} have one index; remove one.")
    return index, names, where[order]


def check_equal_sizes(path, names, sizes):
    """Raise UserError unless all files, of latents, are as large as the first: another size is another shape or a cut file."""
    if (odd := np.flatnonzero(sizes != sizes[:1])).size:
        raise UserError(f"{path}/{os.fsdecode(names[odd[0]])} has {sizes[odd[0]]} bytes, the first latent {sizes[0]}: its "
                       "shape is another or it is truncated; make it again.")


def labels_of(path):
    """parse_labels of the file `path`."""
    if not is_file(path):
        raise missing_labels(path)
    return parse_labels(read_json(path), path)


def check_labels(files, num_classes):
    """The Listing of `files`; raises UserError for a label outside 0 .. num_classes - 1 (None: without that limit)."""
    listing = files.listing
    if listing.labels is not None:
        for k in np.flatnonzero((listing.labels < 0) | (listing.labels >= (num_classes or LAST_LABEL)))[:1]:
            limits = f"a number from 0 to {num_classes - 1} (--num-classes {num_classes})" if num_classes else "0 or more"
            raise UserError(f"{files.path}/dataset.json: the label of index {listing.labelled[k]} is {listing.labels[k]}; it "
                           f"must be {limits}.")
    return listing


def missing_labels(path):
    return UserError(f"{path} does not exist; --data-dir must hold images/ and vae-sd/, or zips of these names, each with "
                    "a dataset.json.")


def walk(folder, suffix, sizes=False):
    """Below `folder`: {path of each folder: its stamp}, names (n,) of files, where (n, 1) their sizes if asked, else (n, 0).

    Names are bytes, relative and end in `suffix`; hidden files are left aside.
    """
    stamps, names, where, stack = {}, [np.empty(0, "S1")], [], [b""]
    root, suffix = os.path.join(os.fsencode(folder), b""), suffix.encode()
    while stack:
        below, found = stack.pop(), []
        stamps |= stamps_of(os.fsdecode(root + below))
        with reading(folder), os.scandir(root + below) as entries:
            for entry in entries:
                name = entry.name
                if entry.is_dir():
                    stack.append(below + name + b"/")
                elif name.endswith(suffix) and not name.startswith(b"."):
                    found.append(below + name)
                    if sizes:
                        where.append(entry.stat().st_size)
        if found:
            names.append(np.array(found))
    names = np.concatenate(names)
    return stamps, names, np.array(where, np.int64).reshape(len(names), -1 if where else 0)


def scan(folder, suffix):
    """{index in the name: relative path} of all files below `folder` that end in `suffix`."""
    index, names, _ = arranged(folder, *walk(folder, suffix)[1:])
    return dict(zip(index.tolist(), map(os.fsdecode, names.tolist()), strict=True))


def stamps_of(*paths):
    """{path: what changes when the file or folder does}, of those that exist."""
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            found[str(path)] = [status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return found


def indexed(cache, key, make):
    """The Listing of make() -> (stamps, Listing), or, as long as all stamps are the same, the one in the file `cache`.

    It is kept there from INDEX_FROM entries on, if the file can be written. `key`: plain values that tell listings apart.
    """
    try:
        with np.load(cache, allow_pickle=False) as file:
            known = json.loads(file["known"].tobytes())
            paths = [os.path.join(cache.parent, name) for name in known["stamps"]]
            if known["key"] == key and [*stamps_of(*paths).values()] == [*known["stamps"].values()]:
                return Listing(*(file.get(name) for name in Listing._fields))
    except (*ZIP_ERRORS, KeyError, TypeError, AttributeError):
        pass  # there is none, or a damaged one
    started, is_collecting = time.time(), gc.isenabled()
    gc.disable()  # many small objects and no cycles: to look for some takes a third of the time
    try:
        stamps, listing = make()
    finally:
        if is_collecting:
            gc.enable()
    changed = max(times[-1] for times in stamps.values()) / 1e9
    if len(listing.index) < INDEX_FROM or changed > started - SETTLED:
        return listing
    stamps = {os.path.relpath(path, cache.parent): times for path, times in stamps.items()}
    known = np.frombuffer(json.dumps({"key": key, "stamps": stamps}).encode(), np.uint8)
    arrays = {name: value for name, value in listing._asdict().items() if value is not None}
    try:
        with atomic_write(cache) as file:
            np.savez(file, known=known, **arrays)
    except UserError as error:
        logger.info(f"{error} Until then the data are listed anew at each start.")
    return listing
