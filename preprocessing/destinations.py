"""Write prepared files to a folder or an uncompressed zip. Work can stop at any moment and be continued.

Files are written atomically and once. The files of a zip lie in {dest}.parts/ until all are there; joining them takes
twice the disk space. dataset.json comes last: it means that everything is there and was checked. made.json records the
source and the settings, without times or process counts, so that stops never change a byte.
"""
import contextlib
import functools
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

from PIL import features

from data_io.loader import work_ahead
from data_io.storage import read_member
from dataset import digest
from preprocessing.sources import LISTING, MADE, find, read
from runtime.errors import UserError
from runtime.files import atomic_write, check_output, is_file, read_json, reading, remove_temporaries, write_json
from runtime.progress import progress
from runtime.versions import version

CLASSES = "classes.json"
NAMED = 20   # skipped pictures named on the terminal
WRITERS = 4  # files being flushed at a time: a flush takes as long as making a picture


def image_name(index):
    """Path of picture `index` below images/."""
    return f"{index // 1000:05d}/img{index:08d}.png"


def latent_name(index):
    """Path of the moments `index` below vae-sd/."""
    return f"{index // 1000:05d}/img-mean-std-{index:08d}.npy"


class Destination:
    """Files with `suffix` in the folder `path`, or in the zip `path` if it ends in .zip."""

    def __init__(self, path, suffix):
        self.path, self.suffix = Path(path), suffix
        self.is_zip = self.path.suffix == ".zip"
        self.complete = self.is_zip and self.path.exists()  # a folder gets its missing files
        self.work = self.path.with_name(self.path.name + ".parts") if self.is_zip else self.path

    def pieces(self):
        """{name: Piece} of the existing files."""
        where = self.path if self.complete else self.work
        found = find(where, (self.suffix,)) if where.exists() else {}
        found.pop(LISTING, None)
        return found

    def note(self):
        """The note (made.json) of the finished zip or of the folder, or None."""
        if not self.is_zip:
            return read_json(self.path / MADE) if is_file(self.path / MADE) else None
        with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), zipfile.ZipFile(self.path) as archive:
            return read_json(self.path / MADE, data=read_member(archive, MADE))

    def begin(self, settings, more):
        """Remove half-written files of killed processes and return the note; see begin()."""
        if self.complete:
            note = self.note()
            check_settings(self.path, note, settings)
            shutil.rmtree(self.work, ignore_errors=True)
        else:
            note = begin(self.work / MADE, settings, more)
            for folder in (self.work, *(path for path in self.work.iterdir() if path.is_dir())):
                remove_temporaries(folder)
        if self.is_zip:
            remove_temporaries(self.path.parent, self.path.name)
        return note

    def write(self, files):
        """Write pairs (name, bytes), each flushed to the disk while the next ones are made."""
        for _ in work_ahead(self.write_file, files, WRITERS, WRITERS):
            pass

    def write_file(self, name_and_data):
        name, data = name_and_data
        with atomic_write(self.work / name) as file:
            file.write(data)

    def finish(self, made, listing):
        if not self.is_zip:
            write_json(self.path / MADE, made, indent=1)
            write_json(self.path / LISTING, listing)
            return
        pieces = self.pieces()
        with (atomic_write(self.path) as file, zipfile.ZipFile(file, "w") as archive,
              progress(len(pieces), "zip", "file") as bar):
            for name in sorted(pieces):
                add(archive, name, read(pieces[name], name))
                bar.update()
            add(archive, MADE, json.dumps(made, indent=1).encode())
            add(archive, LISTING, json.dumps(listing).encode())
        shutil.rmtree(self.work, ignore_errors=True)


def add(archive, name, data):
    """Store an entry whose bytes depend on nothing but its name and data."""
    info = zipfile.ZipInfo(name)  # of 1980
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def open_destination(path, suffix, source):
    """The Destination `path`. Raises UserError if it lies in the source or holds files not made here."""
    check_output(path, (), [source])
    with reading(path):
        destination = Destination(path, suffix)
        folder = not destination.is_zip and destination.path.is_dir()
        if destination.path.exists() and not destination.note() and (
                not folder or (destination.path / LISTING).exists() or destination.pieces()):
            raise UserError(f"{path} is there already and was not made by this tool; name another --dest, or remove "
                            "it.")
    return destination


def origin(path):
    """The settings that shaped the pictures if `convert` wrote the source, else None."""
    note = Destination(path, ".png").note()
    return [note.get(key) for key in ("resolution", "transform", "pictures")] if note else None


def begin(path, settings, more=()):
    """Write the note `path` on how the files beside it are made and return it. Raises UserError for other settings."""
    old = read_json(path) if path.is_file() else settings
    check_settings(path.parent, old, settings)
    note = {**settings, **dict(more), "versions": sorted({*old.get("versions", ()), versions()})}
    write_json(path, note)
    return note


def check_settings(where, old, settings):
    changed = ", ".join(key for key in settings if old.get(key) != settings[key])
    if changed:
        raise UserError(f"{where} was begun with other settings ({changed}); delete it or name another --dest.")


def versions():
    """Library versions that the written bytes depend on."""
    names = ("pillow", "numpy", "torch", "diffusers", "transformers")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{packages}, libjpeg-turbo {features.version('libjpeg_turbo')}"


def amount(size):
    """Bytes in words: 12.3 MB."""
    return next(f"{size / unit:,.1f} {name}" for name, unit in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
                if size >= unit or name == "KB")


def check_space(folder, size):
    """Raise UserError unless `size` bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{amount(size)} are needed in {folder}, which has {amount(free)} free; make room, or name "
                        "another --dest.")


def all_written(destination, names, labels, failures):
    """({name: Piece}, {name: label or None}) of all files but those of `failures`, {place: sentence}.

    Raises UserError unless the files there are exactly these. `labels` may be None.
    """
    pieces = destination.pieces()
    expected = {name: labels and labels[i] for i, name in enumerate(names) if i not in failures}
    for name in sorted(pieces.keys() ^ expected.keys()):
        wrong = "is missing from" if name not in pieces else "does not belong into"
        raise UserError(f"{name} {wrong} {destination.path}; was it changed meanwhile? Run the command again, or "
                        f"delete {destination.path} first.")
    return pieces, expected


def check_older(have, names, source):
    """Raise UserError if a picture of `source` is newer than the file made from it, at its place in `names`.

    have: {name of a file: Piece}.
    """
    changed = functools.cache(os.path.getmtime)  # an archive is looked up once
    with reading(LISTING):  # an error names its own file
        newer = [(picture, have[name].path) for name, picture, piece in zip(names, source.names, source.pieces,
                                                                            strict=True)
                 if name in have and changed(piece.path) > changed(have[name].path)]
    if newer:
        picture, path = newer[0]
        raise UserError(f"{len(newer):,} pictures are newer than the files that were made of them, such as {picture} "
                        f"and {path}; delete these files and run the command again, or, where the pictures are the "
                        "same, touch these files.")


def write_classes(dest, names):
    """Write `names`, of classes in the order of their labels, to classes.json beside `dest`, where training reads it.

    An existing file stays: a user may have written it.
    """
    path = Path(os.path.abspath(dest)).with_name(CLASSES)  # do not follow links
    if names is None:
        return
    if is_file(path):
        if read_json(path, list) != names:
            print(f"{path} names other classes than the source; it stays as it is.", file=sys.stderr)
        return
    remove_temporaries(path.parent, CLASSES)
    try:
        write_json(path, names)
    except UserError as error:  # the folder is not ours; training does not need the names
        print(error, file=sys.stderr)
    by_number = sorted(names, key=int) if all(map(str.isdecimal, names)) else names
    if names == sorted(names) != by_number:
        label, name = next((i, name) for i, name in enumerate(names) if name != by_number[i])
        print(f"The class folders are numbers, and labels follow the alphabetical order: {name} has label {label}; "
              "convert --class-order FILE sets another order.", file=sys.stderr)


def finish(destination, made, labels, failures):
    """Write the last files and report on the terminal. labels: {name: label or None}; failures: {place: sentence}."""
    skipped = [failures[i] for i in sorted(failures)]
    if not labels:
        raise UserError(f"None of {len(skipped)} pictures could be used; the first: {skipped[0]}")
    entries = [[name, labels[name]] for name in sorted(labels)]
    made = {**made, "count": len(entries), "files": digest(entries), "skipped": skipped}
    destination.finish(made, {"labels": None if None in labels.values() else entries})
    if skipped:
        print("\n".join([*skipped[:NAMED], *["..."] * (len(skipped) > NAMED)]), file=sys.stderr)
    classes = len(set(labels.values()) - {None})
    print(f"{destination.path}: {len(labels):,} files, {f'{classes:,} classes' if classes else 'no labels'}, "
          f"{len(skipped):,} pictures skipped{f', as {MADE} says' if skipped else ''}")
