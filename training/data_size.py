"""The resolution of a data set, by one of its files, before anything else is read."""
import os
from pathlib import Path

from runtime.errors import UserError
from runtime.files import array_header
from runtime.images import IMAGE_ERRORS, open_image

RESOLUTION = 256  # where the data do not tell
SD_FACTOR = 8  # pixels per latent pixel and side of Stable Diffusion's VAE, the default one of --vae


def side_of(folder, suffixes):
    """Pixels a side of the first picture, latent or file of rows below `folder`; None where none can be read."""
    for path, _, files in os.walk(folder, followlinks=True):
        for name in files:
            if not name.endswith(suffixes) or name.startswith(".") or name == "index.npy":
                continue
            try:
                if name.endswith(".png"):
                    with open_image(Path(path, name)) as picture:
                        return picture.width
                with open(Path(path, name), "rb") as file:
                    return array_header(file.read(1 << 16))[0][-1]
            except (*IMAGE_ERRORS, IndexError):
                return None  # the data set says what is wrong with it
    return None


def find_resolution(given, data_dir, folder="images"):
    """`given` (--resolution), or that of the pictures in `folder`, or of Stable Diffusion's latents, or RESOLUTION.

    Raises UserError for a given one that the pictures contradict, whether the run reads them or not.
    """
    data = Path(data_dir)
    pictures = side_of(data / folder, (".png", ".npy") if folder == "images" else (".png",))
    if given and pictures and given != pictures:
        raise UserError(f"--resolution is {given}, but the images in {data} have {pictures} pixels a side; leave the "
                        "flag out, or prepare the data anew at this resolution.")
    latents = side_of(data / "vae-sd", (".npy",))
    return given or pictures or (latents * SD_FACTOR if latents else RESOLUTION)
