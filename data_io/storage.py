"""Files of one kind, images or latents, in three forms.

    {data}/{kind}/...        files at any depth                                                  Folder
    {data}/{kind}.zip        the same, stored or deflated; read when there is no such folder     Zip
    {data}/{kind}/           rows of plain .npy files, by preprocessing/dataset_tools.py pack    Packed
        index.npy            int64 (n, 2): number in each file's name, ascending, and the file's size in bytes
        00000.npy, ...       (rows, ...): row r, counted over all files, is the entry index.npy[r]
Each has dataset.json, {"labels": [[relative path, label], ...]} or {"labels": null}. Processes and threads may read
entries at the same time.
"""
import bisect
import itertools
import operator
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from data_io.index import (
    ZIP_ERRORS,
    Index,
    cached_index,
    check_equal_sizes,
    encoded,
    read_labels,
    sort_by_number,
    stamps_of,
    walk,
)
from runtime.errors import UserError, first_line
from runtime.files import ARRAY_ERRORS, array_header, check_inside, is_file, parse_array, read_bytes, reading

LARGEST = 1 << 28  # bytes of one picture or latent, unpacked: more is not read
LARGEST_LISTING = 1 << 31  # the same for dataset.json
NO_LABELS = np.empty(0, np.int64), None


def damaged(name, reason):
    return UserError(f"{name} is damaged ({reason}); make it again.")


class Folder:
    """One file per entry."""

    def __init__(self, path, index):
        self.path, self.index, self.files = path, index, {}

    def __getstate__(self):
        return {**self.__dict__, "files": {}}  # spawned loader processes open their own

    def opened(self, path):
        """The file, kept open as long as the data set."""
        if path not in self.files:
            with reading(path):
                self.files[path] = open(path, "rb", buffering=0)  # noqa: SIM115
        return self.files[path]

    @staticmethod
    def scan(path, suffix, labels):
        """({path: stamp that changes when an entry does}, Index)."""
        known = stamps_of(path / "dataset.json")
        labels = read_labels(path / "dataset.json")[:2] if labels else NO_LABELS
        folders, names, where = walk(path, suffix, sizes=suffix == ".npy")
        numbers, names, where = sort_by_number(path, names, where)
        if suffix == ".npy" and len(names):
            check_equal_sizes(path, names, where[:, 0])
        return known | folders, Index(numbers, names, where, *labels)

    def name(self, i):
        """Name of entry i, for messages."""
        return f"{self.path}/{os.fsdecode(self.index.names[i])}"

    def read(self, i):
        """The bytes of entry i."""
        return read_bytes(self.name(i))

    def array(self, i):
        """Entry i, a .npy file, as a new array."""
        return parse_array(self.read(i), self.name(i)).copy()

    def stamps(self):
        """int64 (n, 2), read anew: file size in bytes, and a stamp that changes when a file is replaced."""
        with reading(self.path):
            found = (os.stat(self.name(i)) for i in range(len(self.index.numbers)))
            return np.array([(status.st_size, status.st_mtime_ns) for status in found], np.int64)


def read_member(archive, name):
    """The bytes of `name`, a listing or note in a ZipFile. Raises UserError if it claims to be huge."""
    size = archive.getinfo(name).file_size
    if size > LARGEST_LISTING:
        raise UserError(f"{archive.filename}/{name} claims {size} bytes, more than any listing has; write the zip "
                        "again.")
    return archive.read(name)


def read_entry(file, offset, packed, method, crc, size, header=200):
    """The bytes of one entry of the zip `file`; the arguments come from the zip's directory.

    `header` guesses the length of the entry's own header: 30 bytes, the name, and extra fields of unknown length.
    Raises ZIP_ERRORS. Unpacks no more than `size` bytes.
    """
    data = memoryview(os.pread(file.fileno(), header + packed, offset))
    signature, *lengths = struct.unpack_from("<4s22xHH", data)
    start = 30 + sum(lengths)
    data = data[start:start + packed]
    if len(data) < packed:
        data = memoryview(os.pread(file.fileno(), packed, offset + start))
    if method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    if signature != b"PK\3\4" or len(data) != size or zlib.crc32(data) != crc:
        raise ValueError("wrong checksum")
    return data


class Zip(Folder):
    """One member of a zip per entry.

    Reads members by their offset in the archive. zipfile takes twice as long (58 us per latent of 32 KB instead of 25)
    and keeps a Python object per member, which every loader process would copy.
    """

    OFFSET, PACKED, METHOD, CRC, SIZE = range(5)  # columns of Index.where

    @staticmethod
    def scan(path, suffix, labels):
        known, listed = stamps_of(path), path / "dataset.json"
        try:
            with zipfile.ZipFile(path) as archive:
                content = read_member(archive, listed.name) if labels and listed.name in archive.NameToInfo else None
                labels = read_labels(listed, content)[:2] if labels else NO_LABELS
                members = [member for member in archive.filelist if member.filename.endswith(suffix)
                           and not member.filename.rpartition("/")[2].startswith(".")]
                names = encoded([check_inside(member.filename, path) for member in members])
                columns = ("header_offset", "compress_size", "compress_type", "CRC", "file_size", "flag_bits")
                row = np.dtype((np.int64, len(columns)))
                where = np.fromiter(map(operator.attrgetter(*columns), members), row, len(members))
        except ZIP_ERRORS as error:
            raise UserError(f"{path} is no readable zip ({first_line(error)}); write it again.") from error
        known_method = np.isin(where[:, Zip.METHOD], (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        for k in np.flatnonzero(~known_method | (where[:, -1] & 1 == 1))[:1]:  # flag bit 0: encrypted
            raise UserError(f"{path}/{os.fsdecode(names[k])} is encrypted or packed in another way than stored or "
                            "deflated; write the zip again.")
        for k in np.flatnonzero(where[:, Zip.SIZE] > LARGEST)[:1]:
            raise UserError(f"{path}/{os.fsdecode(names[k])} claims {where[k, Zip.SIZE]} bytes, more than any image or "
                            "latent has; write the zip again.")
        numbers, names, where = sort_by_number(path, names, where[:, :-1])
        if suffix == ".npy":
            check_equal_sizes(path, names, where[:, Zip.SIZE])
        return known, Index(numbers, names, where, *labels)

    def read(self, i):
        file = self.opened(self.path)
        try:
            return read_entry(file, *self.index.where[i].tolist(), 94 + len(self.index.names[i]))
        except ZIP_ERRORS as error:
            raise damaged(self.name(i), first_line(error)) from error

    def stamps(self):
        return self.index.where[:, (self.SIZE, self.CRC)]


class Packed(Folder):
    """Rows of .npy files: `dtype` and `shape` are those of a row."""

    def __init__(self, path, index):
        super().__init__(path, index)
        self.shards = sorted(file for file in path.glob("*.npy") if file.name != "index.npy")
        heads = [self.head(file) for file in self.shards]
        shapes, dtypes, self.offsets = zip(*heads, strict=True) if heads else ([(0,)], [np.dtype("V1")], ())
        self.starts = [0, *itertools.accumulate(shape[0] for shape in shapes)]
        self.shape, self.dtype, rows = shapes[0][1:], dtypes[0], self.starts[-1]
        if rows != len(index.numbers) or {shape[1:] for shape in shapes} != {self.shape} or set(dtypes) != {self.dtype}:
            raise UserError(f"{path} has {rows} rows in {len(self.shards)} files for {len(index.numbers)} entries, or "
                            "of different shapes; pack the data again.")

    @staticmethod
    def head(path):
        """(shape, dtype, bytes before the rows) of a file of rows."""
        try:
            with open(path, "rb") as file:
                shape, fortran, dtype, offset = array_header(file.read(1 << 16))
                expected = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
                if fortran or not shape or os.fstat(file.fileno()).st_size != expected:
                    raise ValueError(f"{expected} bytes expected")
        except (OSError, ValueError) as error:
            raise damaged(path, first_line(error)) from error
        return shape, dtype, offset

    @staticmethod
    def scan(path, suffix, labels):
        known = stamps_of(path, path / "index.npy", path / "dataset.json")
        try:
            table = np.load(path / "index.npy", allow_pickle=False)
        except ARRAY_ERRORS as error:
            raise damaged(path / "index.npy", first_line(error)) from error
        if table.ndim != 2 or table.shape[1] != 2 or table.dtype != np.int64 or (np.diff(table[:, 0]) <= 0).any():
            raise damaged(path / "index.npy", "int64 (n, 2) with ascending numbers expected")
        if not is_file(path / "dataset.json"):
            raise UserError(f"{path} is not packed to its end, having no dataset.json; run the command that packs it "
                            "again.")
        numbers, values, names = read_labels(path / "dataset.json")
        if not np.array_equal(numbers, table[:, 0]):
            raise UserError(f"{path}/dataset.json names other entries than index.npy; pack the data again.")
        return known, Index(numbers, names, table[:, 1:].copy(), numbers, values)

    def name(self, i):
        shard = bisect.bisect_right(self.starts, i) - 1
        return f"{self.shards[shard]}, row {i - self.starts[shard]} ({os.fsdecode(self.index.names[i])}),"

    def array(self, i):
        """Entry i, of self.shape and self.dtype."""
        return self.arrays([i])[0]

    def arrays(self, places):
        """The entries at these places, (n, *self.shape)."""
        rows = np.empty((len(places), *self.shape), self.dtype)
        for i, row in zip(places, rows, strict=True):
            shard = bisect.bisect_right(self.starts, i) - 1
            start = self.offsets[shard] + (i - self.starts[shard]) * row.nbytes
            file = self.opened(self.shards[shard])
            try:
                read = os.preadv(file.fileno(), [row.reshape(-1).view(np.uint8)], start)
            except OSError as error:
                raise damaged(self.name(i), first_line(error)) from error
            if read != row.nbytes:
                raise damaged(self.name(i), "cut short while in use")
        return rows

    def stamps(self):
        changed = [os.stat(path).st_mtime_ns for path in self.shards]
        return np.stack([self.index.where[:, 0], np.repeat(changed, np.diff(self.starts))], axis=1)


def form_of(data_dir, kind):
    """(Folder, Zip or Packed, its path)."""
    folder, archive = Path(data_dir) / kind, Path(data_dir) / f"{kind}.zip"
    with reading(folder):
        if not folder.is_dir() and archive.is_file():
            return Zip, archive
        return (Packed if (folder / "index.npy").is_file() else Folder), folder


def open_files(data_dir, kind, suffix, labels=True):
    """The files of one kind. Raises UserError for missing files and for names, sizes or labels that do not fit.

    Without `labels` no dataset.json is needed. A large index is kept in {data}/.index-{kind} with the time stamps of
    all folders (of the zip, of a packed form's lists), which change when a file comes, goes or is replaced. Overwriting
    a file in place changes no stamp: its content is checked when it is read.
    """
    form, path = form_of(data_dir, kind)
    key = {"form": form.__name__, "suffix": suffix, "labels": labels, "version": 2}
    return form(path, cached_index(Path(data_dir) / f".index-{kind}", key, lambda: form.scan(path, suffix, labels)))
