"""Pictures to the moments of a VAE's posterior: {dest}/{idx8[:5]}/img-mean-std-{idx8}.npy and dataset.json.

    python preprocessing/dataset_tools.py encode --source=DATA/images --dest=DATA/vae-sd
    torchrun --nproc_per_node=8 preprocessing/dataset_tools.py encode --source=DATA/images --dest=DATA/vae-sd

Each file is float32 (2 C, R/f, R/f), mean and std, unscaled. The source is what `convert` wrote, a folder or zip, or
any other source of squares of one size. The index comes from the picture's name, img{idx8}.png, or else is its place
among the paths. --dest is a folder or, if its name ends in .zip, an uncompressed zip. Process p takes the batches p,
p + processes, ...; an incomplete batch is computed again as a whole, so stops and the number of processes change no
byte. latents.json beside --dest names the VAE, with scale and shift, for training.
"""
import functools
import io
import itertools
import os
import re
from pathlib import Path

import numpy as np
import torch

from data_io.latent_scale import check_note, write_note
from data_io.loader import work_ahead
from data_io.moments import check_moments
from dataset import digest
from encoders.vae import VAE
from evaluations.images import check_batch
from preprocessing import destinations, pixels
from preprocessing.convert import first_side, in_groups
from preprocessing.sources import open_source, read
from runtime.errors import UserError
from runtime.files import parse_array, weights_key
from runtime.flags import whole
from runtime.progress import progress
from runtime.setup import PROCESS_GROUP_TIMEOUT, connect, end_processes, tune

BATCH_SIZE = 64
THREADS = 8  # that read pictures


def filled(batch, size):
    """`batch` with its last item repeated up to `size`: a network can round batches of another shape otherwise."""
    return batch + [batch[-1]] * (size - len(batch))


def ahead(load, groups, threads):
    """[load(item), ...] of each group, in order; the next group is loaded while the caller works on this one."""
    results = work_ahead(load, itertools.chain.from_iterable(groups), threads, max(map(len, groups), default=1))
    for group in groups:
        yield list(itertools.islice(results, len(group)))


def encoded(vae, groups, load, size, threads, spread="std"):
    """For each group of at most `size` items, [moments (2 C, h, w) or UserError, ...].

    load(item) -> uint8 (3, R, R), or the UserError that says why there is no picture.
    """
    for loaded in ahead(load, groups, threads):
        images = [item for item in loaded if not isinstance(item, UserError)]
        moments = iter(vae.encode(torch.stack(filled(images, size)), spread).numpy() if images else ())
        yield [item if isinstance(item, UserError) else next(moments) for item in loaded]


def indices_of(names):
    """The index of each picture: from its name if all names have the layout's form, else its place."""
    matches = [re.fullmatch(r"(?:.*/)?img(\d{8})\.png", name) for name in names]
    indices = [int(match[1]) for match in matches if match]
    return indices if len(set(indices)) == len(names) else list(range(len(names)))


def pictures_key(source, path, note):
    """Identifies the source in made.json: what `convert` made it from, so that pictures added later from repaired files
    change nothing; else names and labels. An older `note` has both."""
    origin = destinations.origin(path)
    exact = digest([source.names, source.labels, origin])
    return exact if not origin or (note or {}).get("pictures") == exact else digest([origin])


def load_picture(source, side, on_error, hflip, i):
    """uint8 (3, side, side) of picture i, mirrored if asked, or the UserError that says what is wrong with it."""
    name = source.names[i]
    try:
        image = pixels.read_rgb(read(source.pieces[i], name), name)
        if image.size != (side, side):
            raise UserError(f"{name} is {image.width}x{image.height}, the first picture {side}x{side}; convert them to "
                            "one size.")
    except UserError as error:
        if on_error == "stop":
            raise
        return error
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (picture.flip(-1) if hflip else picture).contiguous()


def npy_bytes(array):
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(array, np.float32))
    return out.getvalue()


def check_latent(where, entry):
    """Shape of the moments of an entry (name, Piece), read back; raises UserError unless they are finite float32."""
    name = f"{where}/{entry[0]}"
    array = parse_array(read(entry[1], name), name)
    return check_moments(array, array.shape, name).shape


def encode_groups(vae, groups, load, names, have, destination, batch_size, threads, advance):
    """Encode groups of places in the source, write missing files -> {place: sentence} of unusable pictures."""
    failures = {}

    def files():
        for places, group in zip(groups, encoded(vae, groups, load, batch_size, threads), strict=True):
            made = []
            for i, moments in zip(places, group, strict=True):
                if isinstance(moments, UserError):
                    failures[i] = str(moments)
                elif not np.isfinite(moments).all():
                    raise UserError(f"The moments for {names[i]} are not finite; use another --model-url.")
                elif names[i] not in have:
                    made.append((names[i], npy_bytes(moments)))
            yield made
            advance(len(places))

    for _ in work_ahead(destination.write, files(), 1, 1):  # one group is written while the next one is encoded
        pass
    return failures


def encode(source_path, dest, model_url, max_images=None, batch_size=BATCH_SIZE, threads=THREADS, on_error="skip",
           hflip=False):
    """Run the whole command; all processes call it. Raises UserError."""
    from accelerate import PartialState  # here, so that --help is fast
    from accelerate.utils import gather_object
    state = PartialState()
    source = open_source(source_path, max_images)
    side = first_side(source)
    names = [destinations.latent_name(index) for index in indices_of(source.names)]
    asked, batch_size = batch_size, min(batch_size, len(names))
    check_batch(source_path, batch_size, (side, side))
    destination = destinations.open_destination(dest, ".npy", source_path)
    have = destination.pieces()
    share = in_groups(range(len(names)), batch_size)[state.process_index::state.num_processes]
    groups = [places for places in share if any(names[i] not in have for i in places)]
    vae = VAE(model_url, state.device) if any(name not in have for name in names) else None
    if vae and side % vae.factor:
        raise UserError(f"The pictures have {side} pixels a side, no multiple of {vae.factor}, the factor of "
                        f"{model_url}; convert them at another --resolution.")
    state.wait_for_everyone()  # all processes have read the existing files
    if state.is_main_process:
        settings = {"command": "encode", "vae": weights_key(model_url), "batch_size": asked, "hflip": hflip,
                    "pictures": pictures_key(source, source_path, destination.note())}
        beside = Path(os.path.abspath(dest)).parent
        if vae:
            check_note(beside, vae, settings["vae"])
        made = destination.begin(settings, {"source": str(source_path), "model_url": str(model_url)})
        destinations.check_older(have, names, source)
        if vae:  # only now: latents of another VAE have been refused
            write_note(beside, vae, settings["vae"])
        destinations.write_classes(dest, source.classes)
        if destination.complete and len(have) + len(made["skipped"]) < len(names):
            raise UserError(f"{source_path} has {len(names)} pictures, {dest} latents of {len(have)}, and nothing is "
                            "added to a finished zip; delete it and run the command again.")
    state.wait_for_everyone()
    if destination.complete:
        state.print(f"{dest} is complete; there is nothing to do.")
        return

    failures = {}
    if vae:
        load = functools.partial(load_picture, source, side, on_error, hflip)
        with progress(len(names), "encode", "image", len(have), state.is_main_process) as bar:
            def advance(done):
                bar.update(min(done * state.num_processes, bar.total - bar.n))

            failures = encode_groups(vae, groups, load, names, have, destination, batch_size, threads, advance)
    for failed in gather_object([failures]):  # which also waits for all
        failures |= failed

    pieces, labels = destinations.all_written(destination, names, source.labels, failures)
    share, shapes = sorted(pieces.items())[state.process_index::state.num_processes], set()
    with progress(len(share), "check", "file", shown=state.is_main_process) as bar:
        for found in ahead(functools.partial(check_latent, dest), in_groups(share, BATCH_SIZE), threads):
            shapes.update(found)
            bar.update(len(found))
    shapes = sorted(set(gather_object(list(shapes))))
    if len(shapes) > 1:
        raise UserError(f"{dest} holds moments of shapes {shapes[0]} and {shapes[1]}; delete it and run the command "
                        "again.")
    if state.is_main_process:
        destinations.finish(destination, made, labels, failures)
    state.wait_for_everyone()


def add_arguments(add):
    add("--source", required=True, help="folder or .zip of pictures, as `convert` wrote it")
    add("--dest", required=True, help="folder or .zip to write")
    add("--vae", "--model-url", dest="model_url", default="stabilityai/sd-vae-ft-mse",
        help="VAE: hub name or diffusers folder (default stabilityai/sd-vae-ft-mse)")
    add("--max-images", type=whole(1), help="take the first N pictures only (default: all)")
    add("--batch-size", type=whole(1), default=BATCH_SIZE,
        help=f"pictures at a time and process (default {BATCH_SIZE})")
    add("--num-workers", type=whole(1), default=THREADS,
        help=f"threads that read pictures, per process (default {THREADS})")
    add("--hflip", action="store_true", help="encode the mirror images, for train.py --hflip: --dest=DATA/vae-sd-hflip "
        "beside the latents of the pictures as they are")
    add("--allow-tf32", action="store_true", help="TF32 in the VAE on Ampere and newer: faster, less exact")
    add("--on-error", choices=("skip", "stop"), default="skip", help="what to do about pictures that cannot be used: "
        "leave them out and list them in made.json, or end with the first (default skip)")


def start(allow_tf32):
    """Start the processes of a script that encodes, with kernels that give the same bytes in each run.

    -> accelerate's PartialState.
    """
    from accelerate import PartialState  # here, so that --help is fast
    state = connect(lambda: PartialState(cpu=not torch.cuda.is_available(), timeout=PROCESS_GROUP_TIMEOUT))
    tune(allow_tf32)
    torch.backends.cudnn.deterministic = True
    return state


def run(args):
    start(args.allow_tf32)
    encode(args.source, args.dest, args.model_url, args.max_images, args.batch_size, args.num_workers, args.on_error,
           args.hflip)
    end_processes()
