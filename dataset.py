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
    """{index in the name: relative path} of all files under `folder` that end in `suffix`."""
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
                        raise BadInput(f"{folder}: {found[index]} and {name} have one index; remove one.")
                    found[index] = name
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

    Pairing, labels, the latents' file sizes and the first entry are checked here, everything else when it is read.
    images=False from the start needs no images/ folder.
    """

    def __init__(self, data_dir, resolution, num_classes, images=True):
        self.resolution, self.images = resolution, images
        self.image_dir, self.latent_dir = Path(data_dir) / "images", Path(data_dir) / "vae-sd"
        labels = read_labels(self.latent_dir, num_classes)
        image_labels = read_labels(self.image_dir, num_classes) if images or labels is None else None
        labels = image_labels if labels is None else labels
        if not labels:
            raise BadInput(f"{data_dir} has no labels in either dataset.json; class-conditional training needs them.")
        for index, label in labels.items():
            if image_labels is not None and image_labels.get(index, label) != label:
                raise BadInput(f"{data_dir}: index {index} has label {image_labels[index]} in images/dataset.json and "
                               f"{label} in vae-sd/dataset.json; make the data again.")
        self.indices = sorted(labels)
        self.labels = [labels[index] for index in self.indices]
        self.latent_names = self.paired(self.latent_dir, ".npy")
        self.image_names = self.paired(self.image_dir, ".png") if images else []
        self.check_latents()
        self.moments(0)
        if images:
            self.image(0)

    def paired(self, folder, suffix):
        """Relative paths of the files under `folder` in the order of self.indices, exactly one for each."""
        found = scan(folder, suffix)
        for index in self.indices:
            if index not in found:
                raise BadInput(f"{folder} has no {suffix} file of index {index:08d}, which dataset.json names; make "
                               "it again.")
        if len(found) > len(self.indices):
            extra = min(set(found) - set(self.indices))
            raise BadInput(f"{folder / found[extra]} has no label or partner under its index; make it again or "
                           "remove it.")
        return [found[index] for index in self.indices]

    def check_latents(self):
        """Shape of the first latent, and the file sizes of all: another size is another shape or a truncated file."""
        first = self.latent_dir / self.latent_names[0]
        self.moments_shape = load_array(first).shape
        if len(self.moments_shape) != 3 or self.moments_shape[0] % 2 or self.moments_shape[1] != self.moments_shape[2]:
            raise BadInput(f"{first} has shape {self.moments_shape}; expected (2 x channels, side, side), mean and std.")
        if self.resolution % self.moments_shape[1]:
            raise BadInput(f"{first} has {self.moments_shape[1]} latent pixels a side, of which --resolution "
                           f"{self.resolution} is no multiple; encode the data at this resolution or change it.")
        usual = first.stat().st_size
        for name in self.latent_names:
            size = (self.latent_dir / name).stat().st_size
            if size != usual:
                raise BadInput(f"{self.latent_dir / name} has {size} bytes, the first latent {usual}: its shape is "
                               "another or it is truncated; make it again.")

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
        """Text that names this data set wherever it lies: indices, labels; with `files` images' names and sizes too."""
        entries = [self.indices, self.labels]
        if files:
            entries += [self.image_names, [(self.image_dir / name).stat().st_size for name in self.image_names]]
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
