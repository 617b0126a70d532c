"""Pictures of any source to RGB PNGs of one size, on all cores: {dest}/{idx8[:5]}/img{idx8}.png and dataset.json.

    python preprocessing/dataset_tools.py convert --source=IMAGENET_DIR --dest=DATA/images \\
        --resolution=256x256 --transform=center-crop-dhariwal

The source is a folder with a folder, or a tar, per class; ImageNet's ILSVRC2012_img_train.tar as it is; another tar; a
zip; any of them may have labels in a dataset.json. --dest is a folder or, where its name ends in .zip, an uncompressed
zip. Pictures are numbered in the order of their paths; the numbers of skipped pictures stay unused. After any stop, run
the same command to continue; in a complete folder it makes missing pictures. The names of class folders go to
classes.json beside --dest, in DATA, in the order of their labels.
"""
import functools
import os
import re

from torch.utils.data import DataLoader

from dataset import digest
from preprocessing import destinations, pixels
from preprocessing.sources import open_source, read
from runtime.errors import UserError, first_line
from runtime.flags import whole
from runtime.progress import progress

GROUP = 64  # pictures a worker takes at a time, and in a part of a zip
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal")


def make_transform(name, resolution, source):
    """(function RGB image -> RGB square, its side) for --transform and --resolution; both may be None."""
    if resolution is None:
        if name:
            raise UserError(f"--transform {name} needs a --resolution; give one, such as 256x256.")
        side = first_side(source)
        return functools.partial(pixels.unchanged, side=side), side
    match = re.fullmatch(r"([1-9]\d*)[x,]([1-9]\d*)", resolution)
    if not match:
        raise UserError(f"--resolution {resolution} is not understood; write it as 256x256.")
    width, height = int(match[1]), int(match[2])
    if width * max(width, height) > pixels.Image.MAX_IMAGE_PIXELS:
        raise UserError(f"--resolution {resolution} is more than {pixels.Image.MAX_IMAGE_PIXELS} pixels; choose a "
                        "smaller one.")
    if name == "center-crop-wide" and height < width:
        return functools.partial(pixels.center_crop_wide, width=width, height=height), width
    if name == "center-crop-wide" or width != height:
        raise UserError(f"--resolution {resolution}: it must be wider than high for center-crop-wide, which adds bars, "
                        "and square for all else; change it or the --transform.")
    crop = {"center-crop": pixels.center_crop, "center-crop-dhariwal": pixels.center_crop_dhariwal}
    return functools.partial(crop.get(name, pixels.stretch), side=width), width


def first_side(source):
    """Side of the first readable picture: the size of all pictures without --resolution."""
    for name, piece in zip(source.names, source.pieces, strict=True):
        try:
            width, height = pixels.read_rgb(read(piece, name), name).size
        except UserError:
            continue
        if width != height:
            raise UserError(f"{name} is {width}x{height} and no square; convert the pictures with a --resolution "
                            "first.")
        return width
    raise UserError(f"None of {len(source.names)} pictures can be read, {source.names[0]} being the first; get them "
                    "again.")


def in_groups(items, size):
    """Lists of up to `size` items."""
    return [items[start:start + size] for start in range(0, len(items), size)]


def in_processes(work, groups, workers, bar):
    """[work(group), ...], computed in `workers` processes; `bar` moves on by the length of each group."""
    workers = min(workers, len(groups)) if workers > 1 else 0
    results = []
    try:
        loader = DataLoader(groups, batch_size=None, num_workers=workers, collate_fn=work,
                            multiprocessing_context="fork" if workers else None)  # copies no list of a million names
        for group, result in zip(groups, loader, strict=True):
            results.append(result)
            bar.update(len(group))
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(f"A worker process has ended ({first_line(error)}), perhaps for lack of memory; the same "
                        "command goes on, with fewer --num-workers if need be.") from error
    return results


def convert_group(source, destination, transform, on_error, parent, places):
    """Write the pictures at these places of the source -> {place: reason} of unusable ones."""
    failures = {}

    def files():
        for i in places:
            if os.getpid() != parent != os.getppid():
                os._exit(1)  # the parent was killed: write nothing that could mix with the next run
            try:
                yield destinations.image_name(i), convert_picture(source, transform, i)
            except UserError as error:
                if on_error == "stop":
                    raise
                failures[i] = str(error)

    destination.write(files())
    return failures


def convert_picture(source, transform, i):
    """Picture i as PNG bytes. Raises UserError if it cannot be used."""
    name = source.names[i]
    image = pixels.read_rgb(read(source.pieces[i], name), name)
    try:
        return pixels.png_bytes(transform(image))
    except ValueError as error:
        raise UserError(f"{name} cannot be used: {error}.") from error


def check_pictures(where, side, entries):
    """Read back the PNGs `entries`, pairs (name, Piece). Raises UserError for a wrong one."""
    for name, piece in entries:
        size = pixels.read_rgb(read(piece, f"{where}/{name}"), f"{where}/{name}").size
        if size != (side, side):
            raise UserError(f"{where}/{name} is {size[0]}x{size[1]}, expected {side}x{side}; delete it and run the "
                            "command again.")


def add_arguments(add):
    add("--source", required=True, help="folder, .zip or .tar of pictures")
    add("--dest", required=True, help="folder or .zip to write")
    add("--resolution", help="size of the result, such as 256x256 (default: as it is)")
    add("--transform", choices=TRANSFORMS, help="how a picture is cut to a square (default: it is not: its "
        "sides are stretched)")
    add("--class-order", metavar="FILE", help="names of the class folders in the order of their labels, one a line "
        "(default: alphabetical)")
    add("--max-images", type=whole(1), help="take the first N pictures only (default: all)")
    add("--num-workers", type=whole(1), default=CORES, help="processes (default: one per core)")
    add("--on-error", choices=("skip", "stop"), default="skip", help="what to do about pictures that cannot be used: "
        "leave them out and list them in made.json, or end with the first (default skip)")


def run(args):
    source = open_source(args.source, args.max_images, args.class_order)
    transform, side = make_transform(args.transform, args.resolution, source)
    if args.resolution and not args.transform:
        print("Pictures that are not square are stretched; --transform=center-crop-dhariwal cuts them to squares.")
    destination = destinations.open_destination(args.dest, ".png", args.source)
    made = destination.begin({"command": "convert", "resolution": args.resolution, "transform": args.transform,
                              "pictures": digest([source.names, source.labels])}, {"source": args.source})
    destinations.write_classes(args.dest, source.classes)
    names = [destinations.image_name(i) for i in range(len(source.names))]
    have = destination.pieces()
    destinations.check_older(have, names, source)
    if destination.complete:
        print(f"{args.dest} is complete; there is nothing to do.")
        return
    todo = [[i for i in places if names[i] not in have] for places in in_groups(range(len(names)), GROUP)]
    todo = [places for places in todo if places]
    missing = sum(map(len, todo))
    files = 2 * missing + len(have) if destination.is_zip else missing  # a zip needs its parts and itself
    destinations.check_space(destination.work, files * 3 * side ** 2)

    failures = {}
    work = functools.partial(convert_group, source, destination, transform, args.on_error, os.getpid())
    with progress(len(names), "convert", "image", len(names) - missing) as bar:
        for failed in in_processes(work, todo, args.num_workers, bar):
            failures |= failed

    pieces, labels = destinations.all_written(destination, names, source.labels, failures)
    with progress(len(pieces), "check", "file") as bar:
        work = functools.partial(check_pictures, args.dest, side)
        in_processes(work, in_groups(sorted(pieces.items()), GROUP), args.num_workers, bar)
    destinations.finish(destination, made, labels, failures)
