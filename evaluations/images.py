"""Images to score: an npz, a folder or an array, read as a stream of uint8 batches.

A set of images has `name`, `n`, `size` (H, W) and `batches(start, stop, batch_size)` of uint8 (b, H, W, 3). An npz is
read front to back inside its zip, so a 10 GB `arr_0` needs the memory of one batch.
"""
import hashlib
import math
import os
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from runtime.errors import UserError, first_line
from runtime.files import ARRAY_ERRORS, array_header, is_file, reading, sha256_of
from runtime.images import IMAGE_ERRORS, open_image

SUFFIXES = (".png", ".jpg", ".jpeg")
LARGEST = 1 << 29                 # bytes of a batch of uint8; as float32 it takes four times as much
CHUNK = 1 << 24                   # bytes read at a time while skipping to the first image
DECODERS = 8                      # threads: Pillow releases the interpreter lock while it decodes


class ArrayImages:
    """uint8 images (n, H, W, 3) in memory, NumPy or CPU tensor. `digest()` of a set is a sha256 that tells it apart."""

    def __init__(self, array, name="array"):
        array = np.asarray(array)
        check_layout(array.dtype, array.shape, name)
        self.name, self.array, self.n, self.size = name, array, len(array), array.shape[1:3]

    def digest(self):
        return hashlib.sha256(np.ascontiguousarray(self.array)).hexdigest()

    def batches(self, start, stop, batch_size):
        for i in range(start, stop, batch_size):
            yield self.array[i:min(i + batch_size, stop)]


class NpzImages:
    """`arr_0` of an npz file, uint8 (n, H, W, 3), read as a stream."""

    def __init__(self, path):
        self.name = str(path)
        with self.member() as (file, size):
            try:
                shape, fortran, dtype, self.header = array_header(file.peek(1024))
            except ValueError as error:
                raise UserError(f"arr_0 of {self.name} has no readable .npy header ({error}); write it "
                                "again.") from error
            check_layout(dtype, shape, f"arr_0 of {self.name}")
            if fortran:
                raise UserError(f"arr_0 of {self.name} is in Fortran order; make it contiguous.")
            if math.prod(shape) != size - self.header:
                raise EOFError(f"{math.prod(shape)} bytes of pixels expected, {size - self.header} there")
        self.n, self.size = shape[0], shape[1:3]

    def digest(self):
        return sha256_of(self.name)

    @contextmanager
    def member(self):
        """(file, its bytes) of `arr_0`. Raises UserError for damage, also while the caller reads."""
        try:
            with zipfile.ZipFile(self.name) as archive, archive.open("arr_0.npy") as file:
                yield file, archive.getinfo("arr_0.npy").file_size
        except ARRAY_ERRORS as error:
            raise UserError(f"{self.name} is damaged or cut short ({error}); write it again.") from error

    def batches(self, start, stop, batch_size):
        check_batch(self.name, min(batch_size, stop - start), self.size)
        shape = *self.size, 3
        with self.member() as (file, _):
            for left in range(self.header + start * math.prod(shape), 0, -CHUNK):
                read_exactly(file, min(left, CHUNK))
            for i in range(start, stop, batch_size):
                count = min(batch_size, stop - i)
                yield np.frombuffer(read_exactly(file, count * math.prod(shape)), np.uint8).reshape(count, *shape)


class FolderImages:
    """PNG or JPEG files of one size below a folder, in the order of their relative paths, or the given `files`."""

    def __init__(self, path, files=None):
        self.name = str(path)
        with reading(path):
            self.files = files if files is not None else sorted(
                file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES
                and (file.is_file() or not file.exists()))  # no pipes; broken links fail later
        if not self.files:
            raise UserError(f"{path} holds no {', '.join(SUFFIXES)} file; give a folder of images or an npz.")
        self.n, self.size = len(self.files), decode(self.files[0]).shape[:2]

    def digest(self):
        return hashlib.sha256("".join(map(sha256_of, self.files)).encode()).hexdigest()

    def batches(self, start, stop, batch_size):
        check_batch(self.name, min(batch_size, stop - start), self.size)
        with ThreadPoolExecutor(DECODERS) as threads:
            for i in range(start, stop, batch_size):
                files = self.files[i:min(i + batch_size, stop)]
                yield np.stack(list(threads.map(lambda file: decode(file, self.size), files)))


@dataclass
class Planned:
    """A set that is not made yet, for checks."""
    name: str
    n: int
    size: tuple
    batches = None


class Reconstructions:
    """Another set's images, encoded by the VAE (mean of the posterior) and decoded."""

    def __init__(self, images, vae):
        self.images, self.vae = images, vae
        self.name, self.n, self.size = f"{images.name} through the VAE", images.n, images.size

    def batches(self, start, stop, batch_size):
        for batch in self.images.batches(start, stop, batch_size):
            moments = self.vae.encode(torch.tensor(batch).permute(0, 3, 1, 2))
            latents = self.vae.latent_scale.latents(moments, torch.zeros(()))
            yield self.vae.decode(latents).permute(0, 2, 3, 1).cpu().numpy()


def open_images(source, required=True):
    """The images of an npz, a folder, a uint8 array (n, H, W, 3), or a set of images as above.

    Raises UserError for anything but uint8 RGB images. An npz without arr_0 is None unless `required`.
    """
    if hasattr(source, "batches"):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return ArrayImages(source)
    if os.path.isdir(source):
        return FolderImages(source)
    if "arr_0" in npz_keys(source):
        return NpzImages(source)
    if required:
        raise UserError(f"{source} has no key arr_0; store images there, uint8 (n, height, width, 3).")
    return None


def npz_keys(path):
    """Names of the arrays in an npz file; reads its directory only."""
    if not is_file(path):  # zipfile would seek the end of a device
        what = "is no regular file" if os.path.exists(path) else "does not exist"
        raise UserError(f"{path} {what}; give an npz file or a folder of images.")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    except ARRAY_ERRORS as error:
        raise UserError(f"{path} is not a whole npz file ({error}); write or download it again.") from error


def read_exactly(file, count):
    data = file.read(count)
    if len(data) != count:
        raise EOFError(f"{count - len(data)} bytes of image data missing")
    return data


def check_layout(dtype, shape, name):
    if dtype != np.uint8:
        raise UserError(f"{name} has dtype {dtype}; images must be uint8, 0 to 255.")
    if len(shape) != 4 or shape[3] != 3 or 0 in shape:
        raise UserError(f"{name} has shape {tuple(shape)}; images must be (n, height, width, 3), n at least 1.")
    if shape[1] * shape[2] > Image.MAX_IMAGE_PIXELS:
        raise UserError(f"{name} has images of {size_text(shape[1:3])}, more than {Image.MAX_IMAGE_PIXELS} pixels; "
                        "give smaller ones.")


def check_batch(name, count, size):
    """Raise UserError for a batch that needs too much memory: a small file can hold huge black images."""
    if (needed := count * size[0] * size[1] * 3) > LARGEST:
        raise UserError(f"{count} images of {size_text(size)} of {name} take {needed} bytes at a time, more than "
                        f"{LARGEST}; give a smaller --batch-size or smaller images.")


def decode(file, size=None):
    """Image file -> uint8 (H, W, 3). Raises UserError unless it is RGB or grey and, if given, of `size` = (H, W)."""
    try:
        with open_image(file) as image:
            if image.mode not in ("RGB", "L") or "transparency" in image.info:
                raise UserError(f"{file} has mode {image.mode}; convert to 8-bit RGB without transparency.")
            if size and (image.height, image.width) != tuple(size):
                raise UserError(f"{file} is {size_text((image.height, image.width))}, others of its set are "
                                f"{size_text(size)}; all images of a set must have one size.")
            return np.asarray(image.convert("RGB"))
    except IMAGE_ERRORS as error:
        raise UserError(f"{file} cannot be decoded ({first_line(error)}); write it again.") from error


def check_equal_sizes(first, second):
    """Raise UserError for two sets whose images have different sizes."""
    if tuple(first.size) != tuple(second.size):
        raise UserError(f"{first.name} has images of {size_text(first.size)} but {second.name} of "
                        f"{size_text(second.size)}; compare sets of one size.")


def size_text(size):
    return f"{size[0]}x{size[1]}"
