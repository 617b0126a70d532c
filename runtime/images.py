"""Decode and write images; image grids with captions."""
import io
import math
import struct
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from runtime.errors import UserError, first_line
from runtime.files import atomic_write

try:
    import imagecodecs
except ImportError:  # Pillow decodes everything
    imagecodecs = None

GAP = 2  # white pixels between the pictures of a grid
MIN_CELL = 64  # pixels: smaller images are enlarged by a whole factor
MAX_LINES = 4  # of a caption; a longer one ends in "..."


def image_grid(images, columns=None, texts=None):
    """uint8 (N, 3, R, R) -> one picture uint8 (h, w, 3) of cells H x W, GAP apart; missing cells are white.

    W is the smallest multiple of R from MIN_CELL on. `texts`, one per image, go below the images; without them H = W.
    """
    images = images.cpu()
    if (times := math.ceil(MIN_CELL / images.shape[3])) > 1:
        images = images.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    if texts is not None:
        images = torch.cat([images, caption_strips(texts, images.shape[3])], dim=2)
    n, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    height, width = height + GAP, width + GAP
    cells = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    cells[:n, :, :-GAP, :-GAP] = images
    grid = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3)
    return grid[:-GAP, :-GAP].numpy()


def caption_strips(texts, width):
    """N strings -> uint8 (N, 3, h, width): black on white, all as high as the longest one needs."""
    font = ImageFont.load_default(max(9, width // 16))
    margin, line_height = 2, math.ceil(font.getbbox("Ag|")[3]) + 1
    lines = [wrap(text, width - 2 * margin, font.getlength) for text in texts]
    height = max(map(len, lines)) * line_height + 3 * margin
    strips = []
    for text in lines:
        strip = Image.new("RGB", (width, height), "white")
        for i, line in enumerate(text):
            ImageDraw.Draw(strip).text((margin, margin + i * line_height), line, "black", font)
        strips.append(np.asarray(strip))
    return torch.from_numpy(np.stack(strips)).permute(0, 3, 1, 2)


def wrap(text, width, length):
    """`text` in lines as long as fit: length(line) <= `width`, MAX_LINES at most."""
    lines, text = [], text[:MAX_LINES * width]  # a character is a pixel wide at least
    for characters in range(max(min(len(text), width), 4), 3, -1):
        lines = textwrap.wrap(text, characters, max_lines=MAX_LINES, placeholder="...")
        if all(length(line) <= width for line in lines):
            break
    return lines


# What a damaged image may raise; DecompressionBombError: its header claims more than MAX_IMAGE_PIXELS.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
IMAGE_FORMATS = ("PNG", "JPEG")  # Pillow knows many more, and hands some of them (EPS) to other programs


def open_image(file):
    """Pillow's image of a path or an open file, of IMAGE_FORMATS only. Raises IMAGE_ERRORS."""
    return Image.open(file, formats=IMAGE_FORMATS)


def decode_image(data, name, resolution):
    """The bytes of a picture of `resolution` pixels a side -> uint8 (3, R, R). Raises UserError about `name`.

    imagecodecs decodes plain RGB PNGs: it takes two thirds of Pillow's time and refuses every damaged file, which
    Pillow does not. Pillow decodes the rest.
    """
    if imagecodecs is not None and data[12:26] == struct.pack(">4sIIBB", b"IHDR", resolution, resolution, 8, 2):
        try:
            pixels = imagecodecs.png_decode(data)
        except imagecodecs.PngError as error:
            raise unreadable(name, error) from error
        if pixels.shape == (resolution, resolution, 3):  # not where one colour is marked as transparent
            return pixels.transpose(2, 0, 1)
    try:
        with open_image(io.BytesIO(data)) as picture:
            if picture.mode not in ("RGB", "L", "P") or picture.size != (resolution, resolution):
                raise UserError(f"{name} is {picture.mode} of {picture.width}x{picture.height}; expected RGB of "
                                f"{resolution}x{resolution} (--resolution).")
            picture.load()
            return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
    except IMAGE_ERRORS as error:
        raise unreadable(name, error) from error


def reason(error):
    """What is wrong with a picture. Pillow names the object in memory that it could not identify."""
    return "no PNG or JPEG" if isinstance(error, UnidentifiedImageError) else first_line(error)


def unreadable(name, error):
    return UserError(f"{name} is no readable image ({reason(error)}); make it again.")


def write_png(path, image):
    """Write `image`, uint8 (H, W, 3), atomically."""
    with atomic_write(path) as file:
        Image.fromarray(image).save(file, "PNG")
