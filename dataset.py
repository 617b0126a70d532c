"""Images, latents and conditions of a data set, in two layouts.

ImageNet, the layout of REPA and HASTE:
    {data}/images/{idx8[:5]}/img{idx8}.png                 RGB, R x R             + images/dataset.json
    {data}/vae-sd/{idx8[:5]}/img-mean-std-{idx8}.npy       float32 (8, R/f, R/f)  + vae-sd/dataset.json
dataset.json is {"labels": [[relative path, label], ...]}; in one of the two folders the labels may be null. Each folder
may be a zip or packed instead, see storage.py. --hflip reads latents of the mirrored images too, from vae-sd-hflip, under
the names that vae-sd has. --vae none needs images/ alone: the pixels are the latents.

COCO, the layout of U-ViT:
    {data}/{train,val}/{i}.png         RGB, R x R
    {data}/{train,val}/{i}.npy         float32 (8, R/f, R/f): mean and log variance
    {data}/{train,val}/{i}_{k}.npy     (L, C), the text tokens of caption k = 0, 1, ... of image i
    {data}/empty_context.npy           (L, C), the text tokens of no caption
and, ours, {data}/{train,val}/captions.json: {"0": ["caption 0 of image 0", ...], ...}, for the eye alone.
"""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data_io.index import check_labels
from data_io.loader import CAPTION, FLIP
from data_io.storage import Packed, form_of, open_files
from runtime.errors import UserError
from runtime.files import is_file, load_array, parse_array, read_bytes, read_json, reading
from runtime.images import decode_image

PIXELS = "none"      # --vae none: no VAE, the pixels are the latents
SD_SCALE = 0.18215   # latents = moments x this, to unit variance: Stable Diffusion's factor
PIXEL_SCALE = 2.0    # the same for pixels in [-1, 1], whose std is 0.503 in CIFAR-10's training photographs


def latent_scale(vae):
    """The factor that belongs to --vae `vae`."""
    return PIXEL_SCALE if vae == PIXELS else SD_SCALE


def pixel_moments(images):
    """uint8 (N, 3, R, R) -> moments float32 (N, 6, R, R) for --vae none: the pixels in [-1, 1], and a std of 0."""
    mean = images.float() / 127.5 - 1
    return torch.cat([mean, torch.zeros_like(mean)], dim=1)


def check_moments(array, shape, name):
    """`array`, the moments read from `name`, if they are finite float32 of `shape`; else raises UserError."""
    if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
        raise UserError(f"{name} holds {array.dtype} {array.shape}; expected finite float32 {shape}; make it again.")
    return array


def check_shape(shape, resolution, name):
    """`shape` of the moments in `name`, if they are square and can belong to images of `resolution`; else raises UserError."""
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
        raise UserError(f"{name} has shape {shape}; expected (2 x channels, side, side), mean and spread.")
    if resolution % shape[1]:
        raise UserError(f"{name} has {shape[1]} latent pixels a side, of which --resolution {resolution} is no multiple; "
                       "encode the data at this resolution or change it.")
    return shape


def check_bytes(what, folder, files):
    """Raise UserError unless all `files`, pairs (name, bytes), are as large as the first."""
    usual = None
    for name, size in files:
        usual = usual or size
        if size != usual:
            raise UserError(f"{folder / name} has {size} bytes, the first {what} {usual}: its shape is another or it is "
                           "truncated; make it again.")


def some_moments(data):
    """Numbers of the first, middle and last moments of a data set."""
    return [data.moments(i).flatten().tolist() for i in (0, len(data) // 2, len(data) - 1)]


def digest(entries):
    """A name for a data set: the hash of plain values that describe it."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


class LatentImages(Dataset):
    """Moments, label and, while `images` is on, the picture of each entry, in the order of the index in the names.

    Pairing, labels, the latents' file sizes and the first entry are checked here, everything else when it is read.
    images=False from the start needs no images/. With `hflip` each visit shows the image or its mirror image, drawn from
    (seed, epoch, position), the latter by the latent that was made of it. num_classes=None: labels have no upper limit.
    """

    texts = None  # previews write nothing under the pictures
    latent_scale = SD_SCALE

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False):
        self.resolution, self.images, self.seed, self.hflip = resolution, images, seed, hflip
        self.pictures = self.mirrored = None
        self.latents = open_files(data_dir, "vae-sd", ".npy")
        named = check_labels(self.latents, num_classes)
        if images or named.labels is None:
            pictures = open_files(data_dir, "images", ".png")
            named = self.same_labels(data_dir, named, check_labels(pictures, num_classes))
        if named.labels is None or not named.labels.size:
            raise UserError(f"{data_dir} has no labels in either dataset.json; class-conditional training needs them.")
        self.indices, self.labels = named.labelled, named.labels
        self.check_paired(self.latents, ".npy")
        self.moments_shape = self.shape_of(self.latents)
        self.moments(0)
        if images:
            self.pictures = pictures
            self.check_paired(self.pictures, ".png")
            self.image(0)
        if hflip:
            if not form_of(data_dir, "vae-sd-hflip")[1].exists():
                raise UserError(f"--hflip needs latents of the mirrored images, and {data_dir} has no vae-sd-hflip; make them "
                               "with preprocessing/dataset_tools.py encode --hflip.")
            self.mirrored = open_files(data_dir, "vae-sd-hflip", ".npy", labels=False)
            self.check_paired(self.mirrored, ".npy")
            if (shape := self.shape_of(self.mirrored)) != self.moments_shape:
                raise UserError(f"{self.mirrored.path} holds latents of shape {shape}, {self.latents.path} of "
                               f"{self.moments_shape}; make the former again from the same images by the same VAE.")

    @staticmethod
    def same_labels(data_dir, latents, images):
        """Of these two listings the one with labels; raises UserError when neither has any or one entry has two."""
        if latents.labels is not None and images.labels is not None:
            common, a, b = np.intersect1d(latents.labelled, images.labelled, assume_unique=True, return_indices=True)
            for k in np.flatnonzero(latents.labels[a] != images.labels[b])[:1]:
                raise UserError(f"{data_dir}: index {common[k]} has label {images.labels[b][k]} in images/dataset.json and "
                               f"{latents.labels[a][k]} in vae-sd/dataset.json; make the data again.")
        return images if latents.labels is None else latents

    def check_paired(self, files, suffix):
        """Raise UserError unless `files` has exactly one of each of self.indices."""
        found = files.listing.index
        if (missing := np.setdiff1d(self.indices, found, assume_unique=True)).size:
            raise UserError(f"{files.path} has no {suffix} file of index {missing[0]:08d}, which dataset.json names; make "
                           "it again.")
        if (extra := np.setdiff1d(found, self.indices, assume_unique=True)).size:
            raise UserError(f"{files.name(int(np.searchsorted(found, extra[0])))} has no label or partner under its index; "
                           "make it again or remove it.")

    def shape_of(self, files):
        """The shape of moments, by the first of `files`."""
        shape = files.shape if isinstance(files, Packed) else parse_array(files.read(0), files.name(0)).shape
        return check_shape(shape, self.resolution, files.name(0))

    def read(self, files, i, row):
        """Entry i of `files` into `row`: moments float32 (2 C, h, w) or a picture uint8 (3, R, R)."""
        if isinstance(files, Packed):
            if (files.shape, files.dtype) != (row.shape, row.dtype):
                raise UserError(f"{files.path} holds rows of {files.dtype} {files.shape}; expected {row.dtype} {row.shape} "
                               "(--resolution); pack the data again or change it.")
            files.fill(i, row)
        elif files is self.pictures:
            row[...] = decode_image(files.read(i), files.name(i), self.resolution)
        else:
            row[...] = check_moments(parse_array(files.read(i), files.name(i)), row.shape, files.name(i))
        if row.dtype == np.float32 and not np.isfinite(row).all():
            check_moments(row, row.shape, files.name(i))

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        """uint8 (3, R, R)."""
        row = np.empty((3, self.resolution, self.resolution), np.uint8)
        self.read(self.pictures, i, row)
        return torch.from_numpy(row)

    def moments(self, i):
        """float32 (2 C, h, w): mean, std."""
        row = np.empty(self.moments_shape, np.float32)
        self.read(self.latents, i, row)
        return torch.from_numpy(row)

    def condition(self, i):
        """The label, int."""
        return int(self.labels[i])

    @property
    def decodes(self):
        """Whether a batch asks for work beyond reading: see load_batches."""
        return self.images and not isinstance(self.pictures, Packed)

    def shows_mirrored(self, visit):
        """Whether this visit is to the mirror image."""
        return self.hflip and np.random.default_rng(
            (self.seed, FLIP, *divmod(visit, len(self)))).random() < 0.5

    def batch(self, visits):
        """What __getitem__ gives, of several visits: each value has one more dimension, read in place."""
        positions = np.array(visits) % len(self)
        moments = np.empty((len(visits), *self.moments_shape), np.float32)
        images = np.empty((len(visits), 3, self.resolution, self.resolution), np.uint8) if self.images else None
        for n, (visit, i) in enumerate(zip(visits, positions.tolist(), strict=True)):
            mirrored = self.shows_mirrored(visit)
            self.read(self.mirrored if mirrored else self.latents, i, moments[n])
            if self.images:
                self.read(self.pictures, i, images[n])
                if mirrored:
                    images[n] = images[n, :, :, ::-1]
        items = {"position": positions, "moments": moments, "y": self.labels[positions]}
        items |= {"image": images} if self.images else {}
        return {name: torch.from_numpy(value) for name, value in items.items()}

    def __getitem__(self, visit):
        return {name: value[0] for name, value in self.batch([visit]).items()}

    def fingerprint(self, files=False):
        """Text that names this data set wherever it lies and in whatever form: indices, labels and three of the latents, which
        another VAE or another crop would have made differently; with `files` images' names and sizes too."""
        entries = [self.indices.tolist(), self.labels.tolist(), some_moments(self)]
        if files:
            names, sizes = (self.pictures.listing.names, self.pictures.sizes()) if self.pictures else (self.indices[:0],) * 2
            entries += [[os.fsdecode(name) for name in names.tolist()], sizes.tolist()]
        return digest(entries)


class PixelImages(LatentImages):
    """The same for --vae none: moments are the pixels of images/ in [-1, 1], with a std of 0; no vae-sd is needed.

    Images are read in every phase; `images` says whether they are handed out as such too. `hflip` mirrors the pixels.
    """

    latent_scale = PIXEL_SCALE

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False):
        self.resolution, self.images, self.seed, self.hflip = resolution, images, seed, hflip
        self.latents = self.mirrored = None
        self.pictures = open_files(data_dir, "images", ".png")
        named = check_labels(self.pictures, num_classes)
        if named.labels is None or not named.labels.size:
            raise UserError(f"{self.pictures.path}/dataset.json has no labels; class-conditional training needs them.")
        self.indices, self.labels = named.labelled, named.labels
        self.check_paired(self.pictures, ".png")
        self.moments_shape = (6, resolution, resolution)
        self.image(0)

    def moments(self, i):
        """float32 (6, R, R): the pixels in [-1, 1], zeros."""
        return pixel_moments(self.image(i)[None])[0]

    @property
    def decodes(self):
        return not isinstance(self.pictures, Packed)

    def batch(self, visits):
        positions = np.array(visits) % len(self)
        images = np.empty((len(visits), 3, self.resolution, self.resolution), np.uint8)
        for n, (visit, i) in enumerate(zip(visits, positions.tolist(), strict=True)):
            self.read(self.pictures, i, images[n])
            if self.shows_mirrored(visit):
                images[n] = images[n, :, :, ::-1]
        images = torch.from_numpy(images)
        items = {"position": torch.from_numpy(positions), "moments": pixel_moments(images),
                 "y": torch.from_numpy(self.labels[positions])}
        return items | {"image": images} if self.images else items


NUMBERED = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.(png|npy)")


def scan_numbered(folder):
    """({index} of {i}.png, {index: bytes} of {i}.npy, {index: {k: bytes}} of {i}_{k}.npy), all other files left aside."""
    pictures, moments, captions = set(), {}, {}
    with reading(folder):
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; --data-dir must hold train/, val/ and empty_context.npy.")
        with os.scandir(folder) as entries:
            for entry in entries:
                match = NUMBERED.fullmatch(entry.name)
                if match and match[3] == "npy":  # the size of a picture says nothing
                    i, size = int(match[1]), entry.stat().st_size
                    if match[2]:
                        captions.setdefault(i, {})[int(match[2])] = size
                    else:
                        moments[i] = size
                elif match and not match[2]:
                    pictures.add(int(match[1]))
    return pictures, moments, captions


def read_texts(path, counts):
    """{index: [caption, ...]} from captions.json, or None if there is none. `counts`: {index: number of captions}."""
    if not is_file(path):
        return None
    captions = read_json(path)
    try:
        texts = {int(i): [" ".join(text.split()) for text in captions] for i, captions in captions.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f'{path} is not of the form {{"0": ["caption", ...], ...}}; make it again or remove it.') from error
    for i, count in counts.items():
        if len(texts.get(i, ())) != count:
            raise UserError(f"{path} has {len(texts.get(i, ()))} captions of image {i}, beside it are {count} "
                           f"({i}_0.npy, ...); encode them again.")
    return texts


class CaptionedImages(Dataset):
    """Moments, text tokens and, while `images` is on, the picture of each entry of {data}/{split}, in order of index.

    Each visit to an image shows one of its captions, drawn from (seed, epoch, position). Missing files, the sizes of
    all .npy, captions.json and the first entry are checked here, everything else when it is read. images=False from the
    start needs no pictures; latents=False, which is enough to sample, no moments either.
    """

    latent_scale = SD_SCALE
    decodes = True  # a caption is a file of its own: its captions keep a process busy

    def __init__(self, data_dir, split, resolution, seed=0, images=True, latents=True):
        self.resolution, self.seed, self.images, self.folder = resolution, seed, images, Path(data_dir) / split
        pictures, moments, captions = scan_numbered(self.folder)
        self.indices = sorted({*pictures, *moments, *captions})
        if not self.indices:
            raise UserError(f"{self.folder} holds no images; expected 0.png, 0.npy, 0_0.npy, ..., 1.png and so on.")
        for i in self.indices:
            texts = captions.get(i, {})
            missing = ([f"moments ({i}.npy)"] * (latents and i not in moments)
                       + [f"picture ({i}.png)"] * (images and i not in pictures)
                       + [f"caption ({i}_{k}.npy)" for k in range(max(texts, default=0) + 1) if k not in texts])
            if missing:
                raise UserError(f"{self.folder}: image {i} has no {missing[0]}; make it again, or remove the image's other "
                               "files.")
        self.counts = [len(captions[i]) for i in self.indices]
        self.texts = read_texts(self.folder / "captions.json", dict(zip(self.indices, self.counts, strict=True)))
        check_bytes("caption", self.folder, ((f"{i}_{k}.npy", captions[i][k]) for i in self.indices for k in captions[i]))
        empty = self.folder.parent / "empty_context.npy"
        self.context_shape = load_array(empty).shape
        if len(self.context_shape) != 2:
            raise UserError(f"{empty} has shape {self.context_shape}; expected (tokens, width).")
        self.empty_context = self.tokens(empty)
        self.condition(0)
        if latents:
            first = self.folder / f"{self.indices[0]}.npy"
            self.moments_shape = check_shape(load_array(first).shape, resolution, first)
            check_bytes("moments", self.folder, ((f"{i}.npy", moments[i]) for i in self.indices))
            self.moments(0)
        if images:
            self.image(0)

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        """uint8 (3, R, R)."""
        path = self.folder / f"{self.indices[i]}.png"
        return torch.from_numpy(decode_image(read_bytes(path), path, self.resolution).copy())

    def moments(self, i):
        """float32 (2 C, h, w): mean, std, the log variance of the file being clamped as in Stable Diffusion's VAE."""
        path = self.folder / f"{self.indices[i]}.npy"
        mean, logvar = torch.from_numpy(check_moments(load_array(path), self.moments_shape, path)).chunk(2)
        return torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()])

    def tokens(self, path):
        """float32 (L, C) of one caption, or of none."""
        array = load_array(path)
        if array.shape != self.context_shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{path} holds {array.dtype} {array.shape}; expected finite floats {self.context_shape}, the "
                           "shape of empty_context.npy; encode all texts with one encoder.")
        return torch.from_numpy(array).float()

    def condition(self, i, k=0):
        """float32 (L, C): the tokens of caption `k`."""
        return self.tokens(self.folder / f"{self.indices[i]}_{k}.npy")

    def text(self, i, k=0):
        """Caption `k` in words, where `texts` is not None."""
        return self.texts[self.indices[i]][k]

    def __getitem__(self, visit):
        epoch, i = divmod(visit, len(self))
        k = int(np.random.default_rng((self.seed, CAPTION, epoch, i)).integers(self.counts[i]))
        item = {"position": i, "moments": self.moments(i), "y": self.condition(i, k)}
        return item | {"image": self.image(i)} if self.images else item

    def fingerprint(self, files=False):
        """The same of indices, number of captions, shape of the text and three of the latents; with `files` sizes of images."""
        entries = [self.indices, self.counts, self.context_shape, some_moments(self)]
        if files:
            with reading(self.folder):
                entries.append([(self.folder / f"{i}.png").stat().st_size for i in self.indices])
        return digest(entries)
