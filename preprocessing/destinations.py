"""Where prepared files go, a folder or an uncompressed zip, so that work can stop at any moment and be continued.

Work comes in groups of files with consecutive indices. In a folder every file appears whole, under its name, or not at
all. For a zip every group does, as a small zip in {dest}.parts/; when all are there, they are put together and the parts
removed, which takes twice the room for that time. What is there already is not made again. dataset.json appears last, so
its presence means that everything else is there and was checked. made.json says from what and how it was made; it holds
no time and no count of processes, so that the same work has the same bytes however often it was stopped.
"""
import collections
import json
import shutil
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import features

from data_io.storage import read_member
from dataset import digest
from preprocessing.sources import LISTING, find, read
from runtime.errors import UserError
from runtime.files import atomic_write, is_file, read_json, reading, remove_temporaries, write_json
from runtime.versions import version

MADE = "made.json"
NAMED = 20   # skipped pictures named on the terminal
WRITERS = 4  # files on their way to the disk at a time: waiting for it takes as long as making a picture


def image_name(index):
    """Path below images/ of the picture of this index."""
    idx8 = f"{index:08d}"
    return f"{idx8[:5]}/img{idx8}.png"


def latent_name(index):
    """Path below vae-sd/ of the moments of this index."""
    idx8 = f"{index:08d}"
    return f"{idx8[:5]}/img-mean-std-{idx8}.npy"


class Folder:
    """Files with `suffix` below the folder `path`."""

    complete = False  # one that is complete is completed again where a file is missing

    def __init__(self, path, suffix):
        self.path = self.work = Path(path)
        self.suffix = suffix

    def pieces(self):
        """{name: Piece} of what is there."""
        if not self.path.exists():
            return {}
        found = find(self.path, (self.suffix,))
        found.pop(LISTING, None)
        return found

    def note(self):
        """The note of how this was made, or None."""
        return read_json(self.path / MADE) if is_file(self.path / MADE) else None

    def holds_other_things(self):
        if not self.path.is_dir():
            return self.path.exists()
        return not self.note() and ((self.path / LISTING).exists() or bool(self.pieces()))

    def begin(self, settings, more):
        """The note of how this is made; see begin()."""
        note = begin(self.path / MADE, settings, more)
        self.clean()
        return note

    def clean(self):
        """Remove what killed processes left half-written."""
        for folder in (self.path, *(path for path in self.path.iterdir() if path.is_dir())):
            remove_temporaries(folder)

    def check_space(self, files, size):
        check_space(self.path, files * size)

    def write(self, _group, files):
        """Write pairs (name, bytes), each flushed to the disk while the next ones are made."""
        with ThreadPoolExecutor(WRITERS) as pool:
            under_way = collections.deque()
            for name, data in files:
                under_way.append(pool.submit(self.write_file, name, data))
                if len(under_way) > WRITERS:
                    under_way.popleft().result()
            for future in under_way:
                future.result()

    def write_file(self, name, data):
        with atomic_write(self.path / name) as file:
            file.write(data)

    def finish(self, made, listing):
        write_json(self.path / MADE, made, indent=1)
        write_json(self.path / LISTING, listing)


class Zip:
    """The same for a zip: parts while the work goes on, then one file."""

    def __init__(self, path, suffix):
        self.path, self.suffix = Path(path), suffix
        self.work = self.path.with_name(self.path.name + ".parts")
        self.complete = self.path.exists()

    def parts(self):
        return [self.path] if self.complete else sorted(self.work.glob("[0-9]*.zip"))

    def pieces(self):
        found = {}
        for part in self.parts():
            found.update(find(part, (self.suffix,)))
        found.pop(LISTING, None)
        return found

    def note(self):
        """The note in the complete zip; None while it is not."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                return read_json(self.path / MADE, data=read_member(archive, MADE))
        except (OSError, KeyError, zipfile.BadZipFile):
            return None

    def holds_other_things(self):
        return self.path.exists() and not self.note()

    def begin(self, settings, more):
        if self.complete:
            check_settings(self.path, self.note(), settings)
        note = self.note() if self.complete else begin(self.work / MADE, settings, more)
        self.clean()
        return note

    def clean(self):
        if self.complete:
            shutil.rmtree(self.work, ignore_errors=True)
        remove_temporaries(self.path.parent, self.path.name)

    def check_space(self, files, size):
        check_space(self.work, (2 * files + len(self.pieces())) * size)  # parts, and all of them once more

    def write(self, group, files):
        part = self.work / f"{group:06d}.zip"
        old = find(part, (self.suffix,)) if part.exists() else {}
        with atomic_write(part) as file, zipfile.ZipFile(file, "w") as archive:
            for name, piece in old.items():
                add(archive, name, read(piece, name))
            for name, data in files:
                add(archive, name, data)

    def finish(self, made, listing):
        pieces = self.pieces()
        with atomic_write(self.path) as file, zipfile.ZipFile(file, "w") as archive:
            for name in sorted(pieces):
                add(archive, name, read(pieces[name], name))
            for name, value in ((MADE, made), (LISTING, listing)):
                add(archive, name, json.dumps(value, indent=1 if name == MADE else None).encode())
        self.complete = True
        self.clean()


def add(archive, name, data):
    """Store an entry whose bytes depend on nothing but its name and data."""
    info = zipfile.ZipInfo(name)  # of 1980
    info.external_attr = 0o644 << 16
    archive.writestr(info, data)


def destination_at(path, suffix):
    return (Zip if Path(path).suffix == ".zip" else Folder)(path, suffix)


def open_destination(path, suffix, source):
    """Folder, or Zip for a name in .zip. Raises UserError when it is in the source or holds what was not made here."""
    ours, theirs = Path(path).resolve(), Path(source).resolve()
    if theirs in (ours, *ours.parents) or (theirs.is_dir() and ours in theirs.parents):
        raise UserError(f"--dest {path} and --source {source} lie in each other, so that output would become input; name "
                       "another --dest.")
    with reading(path):
        destination = destination_at(path, suffix)
        foreign = destination.holds_other_things()
    if foreign:
        raise UserError(f"{path} is there already and was not made by this tool; name another --dest, or remove it.")
    return destination


def origin(path):
    """What shaped the pictures of a source that `convert` wrote, or None."""
    note = destination_at(path, ".png").note()
    return [note.get(key) for key in ("resolution", "transform", "pictures")] if note else None


def begin(path, settings, more=None):
    """Note at `path` how the files beside it are being made, from `settings`, `more` and these versions -> the note.

    Raises UserError when it was begun with other settings.
    """
    old = read_json(path) if path.is_file() else settings
    check_settings(path.parent, old, settings)
    note = {**settings, **(more or {}), "versions": sorted({*old.get("versions", ()), versions()})}
    write_json(path, note)
    return note


def check_settings(where, old, settings):
    changed = ", ".join(key for key in settings if old.get(key) != settings[key])
    if changed:
        raise UserError(f"{where} was begun with other settings ({changed}); delete it or name another --dest.")


def versions():
    """What the bytes written depend on, beside the input."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("pillow", "numpy", "torch", "diffusers", "transformers"))
    return f"{packages}, libjpeg-turbo {features.version('libjpeg_turbo')}"


def check_space(folder, size):
    """Raise UserError unless `size` bytes fit into the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(f"{size / 1e9:.1f} GB are needed in {folder}, which has {free / 1e9:.1f} GB free; make room, or name "
                       "another --dest.")


def check_names(destination, pieces, expected):
    """Raise UserError unless the files there are exactly those expected."""
    for name in sorted(pieces.keys() ^ set(expected)):
        wrong = "is missing from" if name not in pieces else "does not belong into"
        raise UserError(f"{name} {wrong} {destination.path}; was it changed meanwhile? Run the command again, or delete "
                       f"{destination.path} first.")


def finish(destination, made, labels, skipped):
    """The last files, and a word on the terminal. labels: {name: label or None} of what was made; skipped: sentences."""
    if not labels:
        raise UserError(f"None of {len(skipped)} pictures could be used; the first: {skipped[0]}")
    entries = [[name, labels[name]] for name in sorted(labels)]
    made = {**made, "count": len(entries), "files": digest(entries), "skipped": skipped}
    destination.finish(made, {"labels": None if None in labels.values() else entries})
    if skipped:
        print("\n".join([*skipped[:NAMED], *["..."] * (len(skipped) > NAMED)]), file=sys.stderr)
    classes = len(set(labels.values()) - {None})
    print(f"{destination.path}: {len(labels):,} files, {f'{classes:,} classes' if classes else 'no labels'}, {len(skipped):,} "
          f"pictures skipped{f', as {MADE} says' if skipped else ''}")
