"""Where pictures lie: class folders, tars of classes or of pictures, zips. They are read in place, never unpacked.

A tar counts as a folder of its name without ".tar": ImageNet's train archive, a tar of one tar per class, reads like
its unpacked folders. Pictures are in the order of their relative paths as strings. Labels are those of a dataset.json
at the top, {"labels": [[path, label], ...]} or null; without one the label is the place of the top-level folder among
their sorted names, and one folder alone means no labels. Names that lead out of the source are refused. Links in
archives, which may lead anywhere, and names that begin with a dot are passed over.
"""
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data_io.index import ZIP_ERRORS
from data_io.storage import LARGEST, LARGEST_LISTING
from runtime.errors import UserError, first_line
from runtime.files import check_inside, read_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
LISTING = "dataset.json"
ZIP_HEADER = 30            # bytes before an entry's name, whose length and that of an extra field end them


class Piece(NamedTuple):
    """Where a file's bytes are: in `path` as a whole, or as a member of the tar or an entry of the zip there."""
    path: str
    start: int = 0             # of the bytes; in a zip, of the header before them
    stored: int | None = None  # bytes from there on; None: to the end
    size: int | None = None    # in a zip: bytes once inflated
    crc: int | None = None     # in a zip: their checksum
    deflated: bool = False     # in a zip: whether they need inflating


class Source(NamedTuple):
    names: list                # relative paths
    pieces: list
    labels: list | None        # int for each name


def read(piece, name, largest=LARGEST):
    """The bytes of a piece, called `name` in errors. Raises UserError for what is damaged or larger than `largest`."""
    try:
        if (os.path.getsize(piece.path) if piece.stored is None else max(piece.stored, piece.size or 0)) > largest:
            raise UserError(f"{name} has more than {largest >> 20} MiB, which no picture needs; replace it.")
        with open(piece.path, "rb") as file:
            file.seek(piece.start)
            if piece.size is not None:
                header = file.read(ZIP_HEADER)
                file.seek(sum(struct.unpack("<HH", header[-4:])), os.SEEK_CUR)
            data = file.read() if piece.stored is None else file.read(piece.stored)
        if piece.size is not None:
            if piece.deflated:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, piece.size)  # never more than was announced
            if len(data) != piece.size or zlib.crc32(data) != piece.crc:
                raise ValueError("its checksum is wrong")
    except (OSError, ValueError, struct.error, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{name} cannot be read ({reason}); replace or remove it.") from error
    return data


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
            elif name.endswith(".tar"):
                yield from in_tar(entry.path, name.removesuffix(".tar"), nested=False)
            elif entry.is_file() or entry.is_symlink():  # a link to nothing is found out, and named, when it is read
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
        file.seek(tar.offset)  # where tarfile stopped, which takes a damaged header for the end
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
            yield name, Piece(str(path), info.header_offset, info.compress_size, info.file_size, info.CRC,
                              info.compress_type == zipfile.ZIP_DEFLATED)


def member_name(name, path, prefix=""):
    """The name of an archive's member as a relative path below `prefix`; None when it is hidden."""
    inside = PurePosixPath(check_inside(name, path))
    hidden = not inside.parts or any(part.startswith(".") for part in inside.parts)
    return None if hidden else (prefix / inside).as_posix()


def open_source(path, max_images=None):
    """The first `max_images` pictures of a source, or all. Raises UserError for what cannot be read or labelled."""
    found = find(path)
    listing = found.pop(LISTING, None)
    names = sorted(found)
    if not names:
        raise UserError(f"{path} holds no pictures ({', '.join(SUFFIXES)}); give another --source.")
    labels = class_labels(names, path) if listing is None else listed_labels(names, listing, Path(path) / LISTING)
    names = names[:max_images]
    return Source(names, [found[name] for name in names], labels and [labels[name] for name in names])


def class_labels(names, path):
    """{name: place of its top-level folder among all of them}, or None where there are not several."""
    tops = {name: name.partition("/")[0] if "/" in name else None for name in names}
    loose = next((name for name, top in tops.items() if top is None), None)
    numbers = {top: i for i, top in enumerate(sorted(set(tops.values()) - {None}))}
    if loose and numbers:
        raise UserError(f"{path} has pictures beside its folders, such as {loose}; move them into the folder of a "
                        f"class, or give labels in {LISTING}.")
    return {name: numbers[top] for name, top in tops.items()} if len(numbers) > 1 else None


def listed_labels(names, listing, path):
    """{name: label} from dataset.json, or None where it says null."""
    entries = read_json(path, data=read(listing, path, LARGEST_LISTING)).get("labels")
    if entries is None:
        return None
    try:
        labels = {PurePosixPath(check_inside(name, path)).as_posix(): label for name, label in entries}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    there = set(names)
    for name, label in labels.items():
        if not isinstance(label, int) or isinstance(label, bool) or label < 0:
            raise UserError(f"{path}: the label of {name} is {label}; it must be a whole number from 0 on.")
        if name not in there:
            raise UserError(f"{path} names {name}, which is not there; make {LISTING} again.")
    unlabelled = next((name for name in names if name not in labels), None)
    if unlabelled:
        raise UserError(f"{path} has no label of {unlabelled}; make it again, or remove the picture.")
    return labels
