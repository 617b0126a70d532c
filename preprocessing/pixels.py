"""Decode pictures to RGB and crop them as published.

Pillow converts to RGB, as in ADM and the published tool: grey, palette and CMYK become RGB; transparency is dropped, or
laid on `background`; an animation gives its first frame, 16 bits a channel the high byte; EXIF's orientation is not
applied. Crops take and return Pillow images; they raise ValueError for sizes they cannot crop.
"""
import io
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from runtime.errors import UserError, first_line
from runtime.images import IMAGE_ERRORS, IMAGE_FORMATS

FORMATS = (*IMAGE_FORMATS, "GIF", "WEBP", "BMP", "TIFF", "PPM")  # Pillow decodes these without another program
DAMAGE = (*IMAGE_ERRORS, EOFError, LookupError, TypeError, OverflowError, MemoryError, struct.error, zlib.error)


def read_rgb(data, name, background=None):
    """Bytes of a picture -> RGB. Raises UserError, with `name`, if they are no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.mode in ("I", "F"):
                raise UserError(f"{name} has more than 16 bits a channel (mode {image.mode}); convert it to 8-bit RGB.")
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if background and image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        reason = "no known kind" if data else "empty"
        raise UserError(f"{name} is no readable image ({reason}); replace or remove it.") from error
    except DAMAGE as error:
        raise UserError(f"{name} is no readable image ({first_line(error)}); replace or remove it.") from error


def unchanged(image, side):
    """The image, which must be a square of this side."""
    if image.size != (side, side):
        raise ValueError(f"it is {image.width}x{image.height}, not {side}x{side}; give a --resolution")
    return image


def stretch(image, side):
    """Resized with LANCZOS, whatever its shape."""
    return image.resize((side, side), Image.LANCZOS)


def center_crop_dhariwal(image, side):
    """ADM's crop: halved with BOX while the short side is 2 `side` or more, BICUBIC to `side`, centre square."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = side / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"it is {image.width}x{image.height} and would become {width}x{height} before the crop")
    image = image.resize((width, height), Image.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def center_crop(image, side):
    """The centre square of the short side, resized with LANCZOS."""
    return fit_centre(image, side, side)


def center_crop_wide(image, width, height):
    """The largest centre part of width : height, resized with LANCZOS, between black bars that make it square.

    The published tool counts the rows to keep at the final size and so stretches pictures; this does not. Both refuse
    pictures that would have to be enlarged.
    """
    if image.width < width or image.height < height:
        raise ValueError(f"it is {image.width}x{image.height}, smaller than {width}x{height}")
    canvas = Image.new("RGB", (width, width))
    canvas.paste(fit_centre(image, width, height), (0, (width - height) // 2))
    return canvas


def fit_centre(image, width, height):
    """The largest centre part of width : height, resized with LANCZOS to that size."""
    w = max(min(image.width, round(image.height * width / height)), 1)
    h = max(min(image.height, round(image.width * height / width)), 1)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h)).resize((width, height), Image.LANCZOS)


def png_bytes(image):
    """PNG without compression, as the published tool writes it: fast to write and read. Pixels, no colour profile."""
    out = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(out, "PNG", compress_level=0)
    return out.getvalue()
