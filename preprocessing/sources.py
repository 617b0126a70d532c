"""Read pictures from class folders, tars and zips, in place.

A tar counts as a folder of its name without ".tar": ImageNet's train archive, a tar of one tar per class, reads like
its unpacked folders. Pictures are sorted by their relative paths as strings. Labels come from a dataset.json at the
top, {"labels": [[path, label], ...]} or null; without one, a label is the place of the top-level folder in the sorted
folder names or in the file `order`. A single folder means no labels. Paths that lead out of the source are refused.
Links in archives, hidden files and special files are skipped.
"""
import os
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data_io.index import ZIP_ERRORS, first_twice
from data_io.moments import read_class_names
from data_io.storage import LARGEST, LARGEST_LISTING, read_entry
from runtime.errors import UserError, first_line
from runtime.files import check_inside, is_file, read_json, reading

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
LISTING, MADE = "dataset.json", "made.json"  # what a finished folder of ours has, and one that was begun


class Piece(NamedTuple):
    """Where a file's bytes are: in `path` as a whole, or as a member of the tar or an entry of the zip there."""
    path: str
    start: int = 0             # in a tar: first byte
    stored: int | None = None  # in a tar: number of bytes
    entry: tuple = ()          # in a zip: what read_entry takes


class Source(NamedTuple):
    names: list                # relative paths
    pieces: list
    labels: list | None        # int for each name
    classes: list | None       # names in the order of the labels, where they are known


def read(piece, name, largest=LARGEST):
    """The bytes of a piece; errors call it `name`. Raises UserError if it is damaged or larger than `largest`."""
    try:
        with open(piece.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size if piece.stored is None else piece.stored
            if max(piece.entry[1::3] or [size]) > largest:
                raise UserError(f"{name} has more than {largest >> 20} MiB, which no picture needs; replace it.")
            if piece.entry:
                return bytes(read_entry(file, *piece.entry))
            file.seek(piece.start)
            return file.read(size)
    except ZIP_ERRORS as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{name} cannot be read ({reason}); replace or remove it.") from error


def find(path, suffixes=SUFFIXES):
    """{relative path: Piece} of the files with these suffixes, and of dataset.json, in a folder, .tar or .zip."""
    path = Path(path)
    try:
        if path.is_dir():
            found = in_folder(path)
        elif path.suffix in (".zip", ".tar") and path.is_file():
            found = in_zip(path) if path.suffix == ".zip" else in_tar(path)
        else:
            raise UserError(f"{path} is no folder, .zip or .tar; give one that is there as --source.")
        found = tqdm(found, f"list {path.name}", unit=" files", delay=3, leave=False, disable=None)  # if it takes long
        return {name: piece for name, piece in found if name.lower().endswith(suffixes) or name == LISTING}
    except (*ZIP_ERRORS, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read ({reason}); get it again.") from error


def in_folder(folder, prefix=""):
    with os.scandir(folder) as entries:
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from in_folder(entry.path, f"{name}/")
            elif entry.is_file() and name.endswith(".tar"):
                yield from in_tar(entry.path, name.removesuffix(".tar"), nested=False)
            elif entry.is_file() or not os.path.exists(entry.path):  # reading a broken link raises UserError
                yield name, Piece(entry.path)


def in_tar(path, prefix="", nested=True):
    with open(path, "rb") as file:
        yield from members(file, str(path), prefix, 0, nested)


def members(file, path, prefix, base, nested):
    """Files in the tar that `file` is, which lies at byte `base` of `path`, and in tars in it if `nested`."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            name = member_name(member.name, path, prefix)
            if name is None or not member.isreg() or member.issparse():
                continue
            start = base + member.offset_data
            if not name.endswith(".tar"):
                yield name, Piece(path, start, member.size)
            elif nested:
                yield from members(tar.extractfile(member), path, name.removesuffix(".tar"), start, nested=False)
            else:
                raise UserError(f"{path} holds a tar, {member.name}, and lies in a folder or tar itself; give it as "
                                "--source.")
        file.seek(tar.offset)  # tarfile takes a damaged header for the end
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"{prefix or 'it'} is damaged or cut short at byte {base + tar.offset}")


def in_zip(path):
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = member_name(info.filename, path)
            if name is None or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{path} is encrypted or packed by another method than deflate; zip its files again.")
            yield name, Piece(str(path), entry=(info.header_offset, info.compress_size, info.compress_type, info.CRC,
                                                info.file_size))


def member_name(name, path, prefix=""):
    """The name of an archive's member as a relative path below `prefix`; None when it is hidden."""
    inside = PurePosixPath(check_inside(name, path))
    hidden = not inside.parts or any(part.startswith(".") for part in inside.parts)
    return None if hidden else (prefix / inside).as_posix()


def open_source(path, max_images=None, order=None):
    """The first `max_images` pictures of a source, or all. Raises UserError for what cannot be read or labelled.

    order: a file with the names of all class folders in label order, one per line. A classes.json beside the source may
    name the classes of a dataset.json.
    """
    found = find(path)
    listing = found.pop(LISTING, None)
    names = sorted(found)
    if not names:
        raise UserError(f"{path} holds no pictures ({', '.join(SUFFIXES)}); give another --source.")
    if listing is None:
        check_finished(Path(path))
        classes = class_folders(names, path, order)
        numbers = {name: i for i, name in enumerate(classes or ())}
        labels = classes and {name: numbers[name.partition("/")[0]] for name in names}
    elif order:
        raise UserError(f"The labels of {path} are in its {LISTING}, so that --class-order {order} has nothing to set; "
                        "leave one of them out.")
    else:
        labels = listed_labels(names, listing, Path(path) / LISTING)
        classes = labels and read_class_names(Path(path).parent, np.array([*labels.values()]))
    names = names[:max_images]
    return Source(names, [found[name] for name in names], labels and [labels[name] for name in names], classes)


def check_finished(folder):
    """Raise UserError for a folder that `convert` or `encode` has begun and not finished."""
    if is_file(folder / LISTING) or not is_file(folder / MADE):
        return
    if (command := read_json(folder / MADE).get("command")) in ("convert", "encode"):
        raise UserError(f"{folder} has a {MADE} but no {LISTING}: it is not finished; let {command} end first.")


def class_folders(names, path, order):
    """The top-level folders in the order of their labels, or None if there are fewer than two."""
    folders = sorted({name.partition("/")[0] for name in names if "/" in name})
    loose = next((name for name in names if "/" not in name), None)
    if loose and folders:
        raise UserError(f"{path} has pictures beside its folders, such as {loose}; move them into the folder of a "
                        f"class, or give labels in {LISTING}.")
    if order is None:
        return folders if len(folders) > 1 else None
    if not folders:
        raise UserError(f"{path} has no class folders, which --class-order {order} could name; leave it out.")
    with reading(order), open(order, encoding="utf-8-sig", errors="surrogateescape") as file:  # as folders are named
        listed = [name for line in file if (name := line.strip())]
    if twice := first_twice(listed):
        raise UserError(f"--class-order {order} names {twice} twice; give each class folder one line.")
    if missing := next((name for name in folders if name not in listed), None):
        raise UserError(f"--class-order {order} does not name the class folder {missing}; give each of them one line.")
    return listed


def listed_labels(names, listing, path):
    """{name: label} from dataset.json, or None where it says null."""
    entries = read_json(path, data=read(listing, path, LARGEST_LISTING)).get("labels")
    if entries is None:
        return None
    try:
        listed = [(PurePosixPath(check_inside(name, path)).as_posix(), label) for name, label in entries]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    if twice := first_twice(name for name, _ in listed):
        raise UserError(f"{path} names {twice} twice; keep one of the two entries.")
    labels, there = dict(listed), set(names)
    for name, label in labels.items():
        if type(label) is not int or label < 0:
            raise UserError(f"{path}: the label of {name} is {label}; it must be a whole number from 0 on.")
        if name not in there:
            raise UserError(f"{path} names {name}, which is not there; make {LISTING} again.")
    if unlabelled := next((name for name in names if name not in labels), None):
        raise UserError(f"{path} has no label of {unlabelled}; make it again, or remove the picture.")
    return labels
