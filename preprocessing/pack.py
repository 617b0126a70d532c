"""Data in ImageNet's layout, in a folder or zips, to the packed form that train.py reads fastest.

    python preprocessing/dataset_tools.py pack --source DATA --dest PACKED

writes PACKED/images/, PACKED/vae-sd/ and, where DATA has it, PACKED/vae-sd-hflip/, each with
    00000.npy, 00001.npy, ...   rows by number: pictures uint8 (n, 3, R, R), moments float32 (n, 2 C, h, w)
    index.npy                   int64 (N, 2): the number in each file's name, and the file's size in bytes
    made.json                   the source, rows per file, and for each file a hash of its source files
    dataset.json                names and labels as usual; written last: its presence means that the folder is complete
Pictures become pixels, so that training decodes nothing: 252 GB for ImageNet at 256 px, as much as PNGs without
compression, beside 42 GB of latents. --latents-only leaves them out: put the source's images or images.zip, or a link
to it, beside PACKED/vae-sd. --images-only leaves the latents out. Every picture and latent is read and checked. Files
are written atomically: after any stop the same command writes only what is missing, with the same bytes. It rewrites
the rows files whose source entries were replaced since (by time stamp or checksum).
"""
import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from data_io.latent_scale import NOTE, read_note
from data_io.storage import form_of
from dataset import LatentImages, PixelImages, digest
from preprocessing.destinations import MADE, check_settings, check_space, write_classes
from runtime.errors import UserError
from runtime.files import atomic_write, check_output, read_json, remove_temporaries, write_json, writing
from runtime.flags import pixels, whole
from runtime.progress import progress

ROWS = 10_000      # per file, at least: 2 GB of pixels at 256 px
FILES = 128        # per kind, at most: a run keeps them all open


def write_shard(path, places, read, first, done, stop):
    """Write the rows read(i) of `places`, each like `first`; call `done` after each. Raises UserError after `stop`."""
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(first.dtype),
                                                    "fortran_order": False, "shape": (len(places), *first.shape)})
        for i in places:
            if stop.is_set():
                raise UserError(f"{path} is left for the next start, as another file could not be made.")
            file.write(np.ascontiguousarray(read(i)))
            done()


def begin(folder, made, table, parts):
    """Write made.json and index.npy of a new `folder`, or check those of a folder that is continued.

    Removes the files among `parts` whose source has changed. Raises UserError if the folder holds other data.
    """
    old = {}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(folder)
        if any(folder.iterdir()):
            if not (folder / MADE).is_file():
                raise UserError(f"{folder} holds something that is not packed; name another --dest.")
            old = read_json(folder / MADE)
            check_settings(folder, {**old, "files": made["files"]}, made)
        if (old.get("files") or made["files"]) == made["files"] and (folder / "index.npy").is_file():
            return  # an older note has no "files"
        for name in ("dataset.json", "index.npy"):  # a stop before the new ones must not leave the old ones
            (folder / name).unlink(missing_ok=True)
        for path in parts:
            if old.get("files", {}).get(path.name) != made["files"][path.name]:
                path.unlink(missing_ok=True)
        write_json(folder / MADE, made)
        with atomic_write(folder / "index.npy") as file:  # now the folder counts as packed, though incomplete
            np.save(file, table)


def pack_kind(folder, read, entries, source, rows=None, threads=1, stamps=None):
    """Write or complete one kind of data in `folder`.

    read(i): array or tensor of entry i, all alike; entries: [(number, name, label, size in bytes), ...] by number;
    source: identifies the data; rows: entries per file; stamps: for each entry, a value that changes with its file.
    """
    numbers, names, labels, sizes = zip(*entries, strict=True)
    rows, first = rows or max(ROWS, math.ceil(len(entries) / FILES)), np.asarray(read(0))
    parts = {folder / f"{start // rows:05d}.npy": range(start, min(start + rows, len(entries)))
             for start in range(0, len(entries), rows)}
    files = {path.name: digest([sizes[places.start:places.stop], (stamps or [])[places.start:places.stop]])
             for path, places in parts.items()}
    begin(folder, {"data": source, "names": digest(names), "rows": rows, "row": list(first.shape), "files": files},
          np.stack([numbers, sizes], axis=1), parts)
    missing = {path: places for path, places in parts.items() if not path.is_file()}
    left = sum(map(len, missing.values()))
    check_space(folder, first.nbytes * left)
    stop = threading.Event()
    bar = progress(len(entries), folder.name, "entry", len(entries) - left)
    with bar, ThreadPoolExecutor(threads) as pool:
        try:
            for future in as_completed([pool.submit(write_shard, path, places, read, first, bar.update, stop)
                                        for path, places in missing.items()]):
                future.result()
        finally:
            stop.set()
    write_json(folder / "dataset.json", {"labels": list(zip(names, labels, strict=True))})


def add_arguments(add):
    add("--source", type=Path, required=True, help="folder with images and vae-sd, as folders or zips")
    add("--dest", type=Path, required=True, help="folder to write")
    add("--resolution", type=pixels, default=256, help="image side in pixels (default 256)")
    add("--latents-only", action="store_true", help="leave the images out")
    add("--images-only", action="store_true", help="leave the latents out, for train.py --vae none")
    add("--rows", type=whole(1),
        help=f"entries a file (default {ROWS}, and more where that would make over {FILES} files)")
    add("--num-workers", type=whole(1), default=os.cpu_count(), help="threads (default: one per core)")


def run(args):
    if args.images_only and args.latents_only:
        raise UserError("--images-only and --latents-only together leave nothing to pack; give one of them.")
    hflip = not args.images_only and form_of(args.source, "vae-sd-hflip")[1].exists()
    layout = functools.partial(PixelImages if args.images_only else LatentImages, resolution=args.resolution,
                               num_classes=None, images=not args.latents_only, hflip=hflip)
    data = layout(args.source)
    source = data.fingerprint()
    kinds = [each for each in (("vae-sd", data.latents, data.moments), ("images", data.pictures, data.image),
                               ("vae-sd-hflip", data.mirrored, lambda i: data.moments(i, mirrored=True))) if each[1]]
    for kind, _, _ in kinds:
        check_output(args.dest / kind, (), [files.path for _, files, _ in kinds])
    for kind, files, read in kinds:
        names, table = map(os.fsdecode, files.index.names.tolist()), files.stamps()
        entries = list(zip(data.indices.tolist(), names, data.labels.tolist(), table[:, 0].tolist(), strict=True))
        pack_kind(args.dest / kind, read, entries, source, args.rows, args.num_workers, table[:, 1].tolist())
    write_classes(args.dest / "images", data.class_names)
    if not args.images_only and (note := read_note(args.source)):
        write_json(args.dest / NOTE, note)
    packed = layout(args.dest)
    there, ours = ([files.stamps()[:, 0].tolist() for files in (each.latents, each.pictures, each.mirrored) if files]
                   for each in (data, packed))  # sizes of the files
    if packed.fingerprint() != source or there != ours:
        raise UserError(f"{args.source} has changed while it was packed; delete {args.dest} and pack it again.")
    print(f"{args.dest}: {len(packed)} entries")
