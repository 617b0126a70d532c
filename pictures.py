"""Many images as one picture, with a caption under each if there is text."""
import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MIN_CELL = 64  # pixels: smaller images are shown larger, by whole pixels
MAX_LINES = 4  # of a caption; a longer one ends in "..."


def image_grid(images, columns=None, texts=None):
    """uint8 (N, 3, R, R) -> one picture uint8 (rows H, columns W, 3); missing cells are white.

    W is R, or its first multiple from MIN_CELL on. H = W, or more where `texts`, one string per image, are written
    under them.
    """
    images = images.cpu()
    if (times := math.ceil(MIN_CELL / images.shape[3])) > 1:
        images = images.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3)
    if texts is not None:
        images = torch.cat([images, caption_strips(texts, images.shape[3])], dim=2)
    n, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    cells = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    cells[:n] = images
    return cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, 3).numpy()


def caption_strips(texts, width):
    """N strings -> uint8 (N, 3, h, width): black on white, all as high as the one with the most lines needs."""
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
    """`text` in lines of as many characters as keep length(line) within `width`, MAX_LINES at most."""
    lines = []
    for characters in range(max(len(text), 4), 3, -1):
        lines = textwrap.wrap(text, characters, max_lines=MAX_LINES, placeholder="...")
        if all(length(line) <= width for line in lines):
            break
    return lines
