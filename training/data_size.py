"""Resolution, VAE and scale of the latents, found in the data before anything else is read."""
import os
import re
from pathlib import Path

from data_io.latent_scale import PIXEL_SCALE, PIXELS, SD_SCALE, from_plain, read_note, read_statistics
from encoders.vae import VAES
from runtime.errors import UserError
from runtime.files import array_header, weights_key
from runtime.images import IMAGE_ERRORS, open_image

RESOLUTION = 256  # if the data do not tell
SD_FACTOR = 8  # pixels per latent pixel and side of Stable Diffusion's VAE, the default one of --vae


def side_of(folder, suffixes):
    """Side of the first image, latent or packed file below `folder`, in its own pixels; None if none can be read."""
    for path, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if not name.endswith(suffixes) or name.startswith(".") or name == "index.npy" or \
                    re.fullmatch(r"\d+_\d+\.npy", name):  # a caption
                continue
            try:
                if name.endswith(".png"):
                    with open_image(Path(path, name)) as picture:
                        return picture.width
                with open(Path(path, name), "rb") as file:
                    return array_header(file.read(1 << 16))[0][-1]
            except (*IMAGE_ERRORS, IndexError):
                return None  # the data set will report the error
    return None


def find_resolution(given, data_dir, folder="images", crop=False):
    """Image side: `given` (--resolution), else from the images in `folder`, else from the latents, else RESOLUTION.

    Raises UserError if `given` contradicts the images, even if the run does not read them. `crop` requires `given`, and
    the images may be larger.
    """
    data = Path(data_dir)
    pictures = side_of(data / folder, (".png", ".npy") if folder == "images" else (".png",))
    if crop:
        if not given or given > (pictures or 0):
            raise UserError(f"--random-crop cuts --resolution pixels out of larger images, and those in {data} have "
                            f"{pictures or 'no'} pixels a side; give a --resolution below that, or leave it out.")
        return given
    if given and pictures and given != pictures:
        raise UserError(f"--resolution is {given}, but the images in {data} have {pictures} pixels a side; leave the "
                        "flag out, or prepare the data anew at this resolution.")
    latents = side_of(data / ("vae-sd" if folder == "images" else folder), (".npy",))
    note = read_note(data) or {}
    return given or pictures or (latents * (note.get("factor") or SD_FACTOR) if latents else RESOLUTION)


def find_latents(args):
    """Fill in --vae from the data's note, and `latents`: the scale and shift of this run, as plain values.

    `latents` None: --encode-online takes them from the config of its VAE.
    Raises UserError for settings that contradict each other.
    """
    note, online = None if args.vae == PIXELS else read_note(args.data_dir), vars(args).get("encode_online")
    if args.vae is None:
        args.vae = (note or {}).get("vae") or VAES["mse"]
    if args.vae == PIXELS and (args.latents_stats or online):
        raise UserError(f"--{'encode-online' if online else 'latents-stats'} is for a VAE's latents, and --vae none "
                        "has pixels; leave one of them out.")
    if vars(args).get("random_crop") and not online:
        raise UserError("--random-crop cuts images, of which there are no latents; give --encode-online, too.")
    if online and note and note.get("vae_key") != weights_key(VAES.get(args.vae, args.vae)):
        note = None  # about other latents, which are not read
    scale = PIXEL_SCALE if args.vae == PIXELS else from_plain(note) if note else None if online else SD_SCALE
    scale = read_statistics(args.latents_stats) if args.latents_stats else scale
    args.latents = scale and scale.plain()
