"""Images and latents on disk in the ImageNet layout of REPA and HASTE, and the order in which training sees them.

    {data}/images/{idx8[:5]}/img{idx8}.png                 RGB, R x R             + images/dataset.json
    {data}/vae-sd/{idx8[:5]}/img-mean-std-{idx8}.npy       float32 (8, R/f, R/f)  + vae-sd/dataset.json

dataset.json is {"labels": [[relative path, label], ...]}; in one of the two folders the labels may be null.
"""
import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, Sampler

from files import BadInput, load_array


def scan(folder, suffix):
    """{index in the name: (relative path, size in bytes)} of all files under `folder` that end in `suffix`."""
    found, stack = {}, [folder]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    stack.append(entry.path)
                elif entry.name.endswith(suffix) and not entry.name.startswith("."):
                    name = os.path.relpath(entry.path, folder)
                    index = index_of(name)
                    if index in found:
                        raise BadInput(f"{folder}: {found[index][0]} and {name} have the same index; remove one of them.")
                    found[index] = (name, entry.stat().st_size)
    return found


def index_of(name):
    """The number a file name ends in: '00000/img00000012.png' -> 12. Images and latents are paired by it."""
    match = re.search(r"(\d+)\.\w+$", name)
    if not match:
        raise BadInput(f"{name} has no index in its name; expected names such as 00000/img00000012.png.")
    return int(match[1])


def read_labels(folder, num_classes):
    """{index: label} from `folder`/dataset.json, or None where it says null."""
    path = folder / "dataset.json"
    try:
        labels = json.loads(path.read_text())["labels"]
        labels = None if labels is None else {index_of(name): label for name, label in labels}
    except FileNotFoundError as error:
        raise BadInput(f"{path} does not exist; --data-dir must hold images/ and vae-sd/, each with a "
                       "dataset.json.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    for index, label in (labels or {}).items():
        if not isinstance(label, int) or not 0 <= label < num_classes:
            raise BadInput(f"{path}: the label of index {index} is {label}; it must be a number from 0 to "
                           f"{num_classes - 1} (--num-classes {num_classes}).")
    return labels


class LatentImages(Dataset):
    """Moments, label and, while `images` is on, the picture of each entry, in the order of the index in the names.

    Pairing, labels, file sizes and the first entry are checked here, everything else when it is read.
    """

    def __init__(self, data_dir, resolution, num_classes, images=True):
        self.resolution, self.images = resolution, images
        self.image_dir, self.latent_dir = Path(data_dir) / "images", Path(data_dir) / "vae-sd"
        labels, image_labels = read_labels(self.latent_dir, num_classes), read_labels(self.image_dir, num_classes)
        labels = image_labels if labels is None else labels
        if not labels:
            raise BadInput(f"{data_dir} has no labels in either dataset.json; class-conditional training needs them.")
        for index, label in labels.items():
            if image_labels is not None and image_labels.get(index, label) != label:
                raise BadInput(f"{data_dir}: index {index} has label {image_labels[index]} in images/dataset.json and "
                               f"{label} in vae-sd/dataset.json; make the data again.")
        found_images, found_latents = scan(self.image_dir, ".png"), scan(self.latent_dir, ".npy")
        self.indices = sorted(labels)
        for kind, folder, found in (("image", self.image_dir, found_images), ("latent", self.latent_dir, found_latents)):
            for index in self.indices:
                if index not in found:
                    raise BadInput(f"{folder} has no {kind} of index {index:08d}, which dataset.json names; make it again.")
            for index in found:
                if index not in labels:
                    raise BadInput(f"{folder / found[index][0]} has no label or partner under its index; make it again "
                                   "or remove it.")
        usual = found_latents[self.indices[0]][1]
        for index in self.indices:
            name, size = found_latents[index]
            if size != usual:
                raise BadInput(f"{self.latent_dir / name} has {size} bytes, the first latent {usual}: its shape is "
                               "another or it is truncated; make it again.")
        self.labels = [labels[index] for index in self.indices]
        self.image_names = [found_images[index][0] for index in self.indices]
        self.latent_names = [found_latents[index][0] for index in self.indices]
        self.image_sizes = [found_images[index][1] for index in self.indices]
        first = self.latent_dir / self.latent_names[0]
        self.moments_shape = load_array(first).shape
        if len(self.moments_shape) != 3 or self.moments_shape[0] % 2 or self.moments_shape[1] != self.moments_shape[2]:
            raise BadInput(f"{first} has shape {self.moments_shape}; expected (2 x channels, side, side), mean and std.")
        if resolution % self.moments_shape[1]:
            raise BadInput(f"{first} has {self.moments_shape[1]} latent pixels a side, of which --resolution {resolution} "
                           "is no multiple; encode the data at this resolution or change it.")
        self.image(0), self.moments(0)

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        """uint8 (3, R, R)."""
        path = self.image_dir / self.image_names[i]
        try:
            with Image.open(path) as picture:
                picture.load()
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise BadInput(f"{path} is no readable image ({error}); make it again.") from error
        if picture.mode not in ("RGB", "L", "P") or picture.size != (self.resolution, self.resolution):
            raise BadInput(f"{path} is {picture.mode} of {picture.width}x{picture.height}; expected RGB of "
                           f"{self.resolution}x{self.resolution} (--resolution).")
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()

    def moments(self, i):
        """float32 (2 C, h, w): mean, std."""
        path = self.latent_dir / self.latent_names[i]
        array = load_array(path)
        if array.shape != self.moments_shape or array.dtype != np.float32 or not np.isfinite(array).all():
            raise BadInput(f"{path} holds {array.dtype} {array.shape}; expected finite float32 {self.moments_shape}; "
                           "make it again.")
        return torch.from_numpy(array)

    def condition(self, i):
        """The label, int."""
        return self.labels[i]

    def __getitem__(self, i):
        item = {"position": i, "moments": self.moments(i), "y": self.condition(i)}
        return item | {"image": self.image(i)} if self.images else item

    def fingerprint(self, files=False):
        """Text that names this data set wherever it lies: indices and labels; with `files` also names and file sizes."""
        entries = [self.indices, self.labels] + ([self.image_names, self.image_sizes] if files else [])
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


class StepBatches(Sampler):
    """Micro-batches of one process for steps `first` .. `last` - 1: a function of (seed, step, place) alone.

    Global sample g = step * batch_size + place is entry g % n of epoch g // n, and each epoch is a permutation made
    from (seed, epoch). Place p belongs to micro-batch (p // micro) // processes of process (p // micro) % processes,
    with micro = batch_size / (processes * accumulation).
    """

    def __init__(self, n, batch_size, seed, first, last, process=0, processes=1, accumulation=1):
        self.n, self.batch_size, self.seed, self.steps = n, batch_size, seed, range(first, last)
        self.accumulation = accumulation
        self.places = [process_places(batch_size, process, processes, accumulation, a) for a in range(accumulation)]

    def __len__(self):
        return len(self.steps) * self.accumulation

    def __iter__(self):
        epoch, order = None, None
        for step in self.steps:
            for places in self.places:
                batch = []
                for g in range(step * self.batch_size + places.start, step * self.batch_size + places.stop):
                    if g // self.n != epoch:
                        epoch = g // self.n
                        order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.n)
                    batch.append(int(order[g % self.n]))
                yield batch


ORDER, DRAWS = 0, 1  # streams of randomness under one seed: data order by epoch, all other draws by step


def process_places(batch_size, process, processes, accumulation, micro_step):
    """The slice of the global batch that is one process's micro-batch."""
    micro = batch_size // (processes * accumulation)
    start = (micro_step * processes + process) * micro
    return slice(start, start + micro)


def step_draws(seed, step, batch_size, latent_shape):
    """All random numbers of one step, for the whole global batch, so that no process or worker count changes them.

    u, drop: uniform (B,), for the timestep and the condition drop; noise, posterior: standard normal (B, C, h, w).
    """
    rng = np.random.default_rng((seed, DRAWS, step))
    shape = (batch_size, *latent_shape)
    return {"u": torch.from_numpy(rng.random(batch_size, dtype=np.float32)),
            "drop": torch.from_numpy(rng.random(batch_size, dtype=np.float32)),
            "noise": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
            "posterior": torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))}
