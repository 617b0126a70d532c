"""Data sets: images, the moments of their latents, and their conditions, in three layouts.

ImageNet, the layout of REPA and HASTE (LatentImages):
    {data}/images/{idx8[:5]}/img{idx8}.png                 RGB, R x R               + images/dataset.json
    {data}/vae-sd/{idx8[:5]}/img-mean-std-{idx8}.npy       float32 (2 C, R/f, R/f)  + vae-sd/dataset.json
Latents have C channels; the files hold mean and std, before --latents-stats.
dataset.json is {"labels": [[relative path, label], ...]}; in one of the two folders the labels may be null.
{data}/classes.json may hold the names of the classes, a list in the order of the labels. Each folder may also be a zip
or packed, see data_io/storage.py. --hflip also reads vae-sd-hflip: latents of the mirrored images, under the names that
vae-sd has. Pixels (PixelImages, --vae none): images/ of that layout alone.

COCO, the layout of U-ViT (CaptionedImages):
    {data}/{train,val}/{i}.png         RGB, R x R
    {data}/{train,val}/{i}.npy         float32 (2 C, R/f, R/f): mean and log variance
    {data}/{train,val}/{i}_{k}.npy     (L, C), text tokens of caption k = 0, 1, ... of image i
    {data}/empty_context.npy           (L, C), text tokens of the empty caption
    {data}/{train,val}/captions.json   {"0": ["caption 0 of image 0", ...], ...}; optional, for previews
In both, {data}/latents.json may name the VAE and the scale of the latents, see data_io/latent_scale.py.
"""
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from data_io.captions import read_texts, scan_numbered
from data_io.index import check_equal_sizes, check_labels
from data_io.loader import CAPTION, FLIP
from data_io.moments import check_is_logvar, check_moments, check_shape, digest, has_negative_std, read_class_names
from data_io.storage import Packed, form_of, open_files
from runtime.errors import UserError
from runtime.files import is_file, load_array, read_bytes, read_json, reading
from runtime.images import decode_image


def pixel_moments(images):
    """uint8 (N, 3, R, R) -> moments float32 (N, 6, R, R) for --vae none: pixels in [-1, 1] and a std of 0."""
    mean = images.float() / 127.5 - 1
    return torch.cat([mean, torch.zeros_like(mean)], dim=1)


class LatentDataset(Dataset):
    """The base of all layouts: samples, batches and the fingerprint.

    A layout's __init__ opens and checks the files and sets
        resolution, seed   side of the images R; seed of everything drawn anew in each epoch
        images             whether samples include the image; training turns it off when alignment ends
        indices            the number of each entry in its file names, ascending
        moments_shape      (2 C, h, w)
    and the layout has four methods, i = 0 .. len(self) - 1:
        image(i)           uint8 (3, R, R)
        moments(i)         float32 (2 C, h, w): mean and std
        condition(i)       label (int) or text tokens, float32 (L, C)
        identity()         plain values that, together with the moments, identify this data set
    A layout that draws its condition (captions) or mirrors its images overrides sample_condition or sample_pair.
    """

    texts = None        # captions or class names, if any; text(i) returns one
    class_names = None  # in the order of the labels, if known
    hflip = False
    vae = None          # encodes images in the training step, see encoders/online.py
    decodes = True      # whether a sample needs more than reading; see data_io/loader.py

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, sample_id):
        """Entry i = sample_id % n as epoch sample_id // n sees it: {position, moments, y, image while self.images}."""
        epoch, i = divmod(int(sample_id), len(self))
        moments, image = self.sample_pair(i, self.is_mirrored(sample_id))
        sample = {"position": i, "moments": moments, "y": self.sample_condition(i, epoch)}
        return sample | {"image": image} if self.images else sample

    def batch(self, sample_ids):
        """The samples as one dict of tensors, each with a batch dimension in front."""
        return default_collate([self[sample_id] for sample_id in sample_ids])

    def is_mirrored(self, sample_id):
        """Whether this sample is mirrored: drawn from (seed, epoch, position)."""
        return self.hflip and np.random.default_rng((self.seed, FLIP, *divmod(sample_id, len(self)))).random() < 0.5

    def sample_pair(self, i, mirrored):
        """(moments, image or None) of a sample."""
        image = self.image(i) if self.images else None
        return self.moments(i), image

    def sample_condition(self, i, epoch):
        return self.condition(i)

    def fingerprint(self):
        """Hash of this data set, the same in any folder and storage form.

        It covers identity() and the moments of three entries, which depend on VAE and crop.
        """
        moments = [self.moments(i).flatten().tolist() for i in (0, len(self) // 2, len(self) - 1)]
        return digest([*self.identity(), moments])

    def conditions_key(self):
        """String that changes with the conditions where identity() does not cover them."""
        return ""

    def image_stamps(self):
        """Values that change when an image is replaced by one of equal size: modification times, checksums in a zip.

        The teacher cache compares them: reading all images at each start takes too long. Copies with `cp -p` keep them.
        """
        raise UserError("--teacher-cache needs image_stamps() of this data layout; see docs/extending.md.")


class LatentImages(LatentDataset):
    """ImageNet's layout. Entries are in the order of the numbers in their names.

    __init__ checks pairing, labels, the latents' file sizes and the first entry; everything else is checked when it is
    read. images=False from the start needs no images/. num_classes=None: any label from 0 on. With `hflip` each sample
    is the image or its mirror image, with the latent that was encoded from it.
    """

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False):
        self.resolution, self.images, self.seed, self.hflip = resolution, images, seed, hflip
        self.pictures = self.mirrored = None
        self.latents = open_files(data_dir, "vae-sd", ".npy")
        index = check_labels(self.latents, num_classes)
        if images or index.labels is None:
            pictures = open_files(data_dir, "images", ".png")
            index = merge_labels(data_dir, index, check_labels(pictures, num_classes))
        self.set_labels(data_dir, index, "no labels in either dataset.json")
        self.check_paired(self.latents, ".npy")
        self.moments_shape = self.shape_of(self.latents)
        self.moments(0)
        if images:
            self.pictures = pictures
            self.check_paired(self.pictures, ".png")
            self.image(0)
        if hflip:
            if not form_of(data_dir, "vae-sd-hflip")[1].exists():
                raise UserError(f"--hflip needs latents of the mirrored images, and {data_dir} has no vae-sd-hflip; "
                                "make them with preprocessing/dataset_tools.py encode --hflip.")
            check_mirrored(Path(data_dir))
            self.mirrored = open_files(data_dir, "vae-sd-hflip", ".npy", labels=False)
            self.check_paired(self.mirrored, ".npy")
            if (shape := self.shape_of(self.mirrored)) != self.moments_shape:
                raise UserError(f"{self.mirrored.path} holds latents of shape {shape}, {self.latents.path} of "
                                f"{self.moments_shape}; make the former again from the same images by the same VAE.")

    def set_labels(self, data_dir, index, problem):
        if index.labels is None or not index.labels.size:
            raise UserError(f"{data_dir} has {problem}; class-conditional training needs them.")
        self.indices, self.labels = index.labelled, index.labels
        self.texts = self.class_names = read_class_names(data_dir, self.labels)

    def check_paired(self, files, suffix):
        """Raise UserError unless `files` has exactly one file for each of self.indices."""
        found = files.index.numbers
        if (missing := np.setdiff1d(self.indices, found, assume_unique=True)).size:
            raise UserError(f"{files.path} has no {suffix} file of index {missing[0]:08d}, which dataset.json names; "
                            "make it again.")
        if (extra := np.setdiff1d(found, self.indices, assume_unique=True)).size:
            raise UserError(f"{files.name(int(np.searchsorted(found, extra[0])))} has no label or partner under its "
                            "index; make it again or remove it.")

    def shape_of(self, files):
        """The shape of the moments, read from the first of `files`."""
        return check_shape(files.array(0).shape, self.resolution, files.name(0))

    def image(self, i):
        return self.picture(i, self.resolution)

    def picture(self, i, side):
        """uint8 (3, side, side): image i as stored. Raises UserError for another side."""
        files, shape = self.pictures, (3, side, side)
        if not isinstance(files, Packed):
            return torch.from_numpy(decode_image(files.read(i), files.name(i), side).copy())
        if (files.shape, files.dtype) != (shape, np.uint8):
            raise UserError(f"{files.path} holds rows of {files.dtype} {files.shape}; expected uint8 {shape} "
                            "(--resolution); pack the data again or change it.")
        return torch.from_numpy(files.array(i))

    def moments(self, i, mirrored=False):
        """float32 (2 C, h, w): mean, std; `mirrored`: those of the mirror image."""
        files = self.mirrored if mirrored else self.latents
        return torch.from_numpy(check_moments(files.array(i), self.moments_shape, files.name(i), is_std=True))

    def condition(self, i):
        return int(self.labels[i])

    def text(self, i):
        """The name of the class. Needs `texts`."""
        return self.class_names[self.labels[i]]

    def sample_pair(self, i, mirrored):
        image = self.image(i) if self.images else None
        return self.moments(i, mirrored), image.flip(-1) if mirrored and self.images else image

    def batch(self, sample_ids):
        """The same; packed rows are read straight into the batch, which is up to three times as fast."""
        files = {"moments": self.latents} | ({"image": self.pictures} if self.images else {})
        if self.hflip or not all(isinstance(each, Packed) for each in files.values()):
            return super().batch(sample_ids)
        positions = np.array(sample_ids) % len(self)
        batch = {name: each.arrays(positions.tolist()) for name, each in files.items()}
        if not np.isfinite(batch["moments"]).all() or has_negative_std(batch["moments"]):
            for i in positions.tolist():
                self.moments(i)  # raises, naming the entry
        batch |= {"position": positions, "y": self.labels[positions]}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    @property
    def decodes(self):
        return self.images and not isinstance(self.pictures, Packed)

    def identity(self):
        return self.indices.tolist(), self.labels.tolist()

    def image_stamps(self):
        return self.pictures.stamps().tolist()


def check_mirrored(data_dir):
    """Raise UserError if encode's notes in folders say that vae-sd-hflip was not mirrored, or made by another VAE."""
    plain, mirrored = (read_json(path) if is_file(path) else {} for path in (
        data_dir / "vae-sd/made.json", data_dir / "vae-sd-hflip/made.json"))
    if mirrored.get("hflip") is False or plain.get("vae") and plain["vae"] != mirrored.get("vae", plain["vae"]):
        raise UserError(f"{data_dir}/vae-sd-hflip was not made with --hflip, or by another VAE than vae-sd; make it "
                        "again with preprocessing/dataset_tools.py encode --hflip.")


def merge_labels(data_dir, latents, images):
    """The one of two Index objects that has labels. Raises UserError if an entry has a different label in each."""
    if latents.labels is not None and images.labels is not None:
        common, a, b = np.intersect1d(latents.labelled, images.labelled, assume_unique=True, return_indices=True)
        for k in np.flatnonzero(latents.labels[a] != images.labels[b])[:1]:
            raise UserError(f"{data_dir}: index {common[k]} has label {images.labels[b][k]} in images/dataset.json "
                            f"and {latents.labels[a][k]} in vae-sd/dataset.json; make the data again.")
    return images if latents.labels is None else latents


class PixelImages(LatentImages):
    """ImageNet's layout for --vae none: moments are the pixels of images/ in [-1, 1], with a std of 0.

    Images are read in every phase; `images` says whether samples include them. `hflip` mirrors the pixels.
    """

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False):
        self.resolution, self.images, self.seed, self.hflip = resolution, images, seed, hflip
        self.latents = self.mirrored = None
        self.pictures = open_files(data_dir, "images", ".png")
        self.set_labels(data_dir, check_labels(self.pictures, num_classes), "no labels in images/dataset.json")
        self.check_paired(self.pictures, ".png")
        self.moments_shape = (6, resolution, resolution)
        self.image(0)

    def moments(self, i):
        return pixel_moments(self.image(i)[None])[0]

    def sample_pair(self, i, mirrored):
        image = self.image(i).flip(-1) if mirrored else self.image(i)
        return pixel_moments(image[None])[0], image

    @property
    def decodes(self):
        return not isinstance(self.pictures, Packed)


class CaptionedImages(LatentDataset):
    """COCO's layout: {data}/{split} in the order of the image numbers. Each sample has one caption, drawn at random.

    __init__ checks for missing files, the sizes of all .npy, captions.json and the first entry; everything else is
    checked when it is read. images=False from the start needs no pictures; latents=False, for sampling, no moments.
    """

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
                raise UserError(f"{self.folder}: image {i} has no {missing[0]}; make it again, or remove the image's "
                                "other files.")
        self.counts = [len(captions[i]) for i in self.indices]
        self.texts = read_texts(self.folder / "captions.json", dict(zip(self.indices, self.counts, strict=True)))
        sizes = {f"{i}_{k}.npy": size for i in self.indices for k, size in captions[i].items()}
        check_equal_sizes(self.folder, [*sizes], [*sizes.values()], "caption")
        empty = self.folder.parent / "empty_context.npy"
        self.context_shape = load_array(empty).shape
        if len(self.context_shape) != 2:
            raise UserError(f"{empty} has shape {self.context_shape}; expected (tokens, width).")
        self.empty_context = self.tokens(empty)
        self.condition(0)
        if latents:
            first = self.folder / f"{self.indices[0]}.npy"
            self.moments_shape = check_shape(load_array(first).shape, resolution, first)
            names = [f"{i}.npy" for i in self.indices]
            check_equal_sizes(self.folder, names, [moments[i] for i in self.indices], "moments")
            some = sorted({*np.linspace(0, len(names) - 1, 16).astype(int).tolist()})
            check_is_logvar([load_array(self.folder / names[i]) for i in some], [self.folder / names[i] for i in some])
            self.moments(0)
        if images:
            self.image(0)

    def image(self, i):
        path = self.folder / f"{self.indices[i]}.png"
        return torch.from_numpy(decode_image(read_bytes(path), path, self.resolution).copy())

    def moments(self, i):
        """float32 (2 C, h, w): mean, std. The file's log variance is clamped as in Stable Diffusion's VAE."""
        path = self.folder / f"{self.indices[i]}.npy"
        mean, logvar = torch.from_numpy(check_moments(load_array(path), self.moments_shape, path)).chunk(2)
        return torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()])

    def tokens(self, path):
        """float32 (L, C) of one caption, or of the empty one."""
        array = load_array(path)
        if array.shape != self.context_shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(f"{path} holds {array.dtype} {array.shape}; expected finite floats {self.context_shape}, "
                            "the shape of empty_context.npy; encode all texts with one encoder.")
        return torch.from_numpy(array.astype(np.float32))

    def condition(self, i, k=0):
        """float32 (L, C): the tokens of caption `k`."""
        return self.tokens(self.folder / f"{self.indices[i]}_{k}.npy")

    def sample_condition(self, i, epoch):
        """The tokens of the caption that this epoch shows: drawn from (seed, epoch, position)."""
        k = np.random.default_rng((self.seed, CAPTION, epoch, i)).integers(self.counts[i])
        return self.condition(i, int(k))

    def text(self, i, k=0):
        """The text of caption `k`. Needs `texts`."""
        return self.texts[self.indices[i]][k]

    def identity(self):
        return self.indices, self.counts, self.context_shape

    def conditions_key(self):
        some = [self.condition(i) for i in (0, len(self) // 2, len(self) - 1)]
        return digest([tokens.flatten().tolist() for tokens in (self.empty_context, *some)])

    def image_stamps(self):
        with reading(self.folder):
            found = (os.stat(self.folder / f"{i}.png") for i in self.indices)
            return [[status.st_size, status.st_mtime_ns] for status in found]
