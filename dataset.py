"""Images, latents and conditions on disk in two layouts, and the order in which training sees them.

ImageNet, the layout of REPA and HASTE:
    {data}/images/{idx8[:5]}/img{idx8}.png                 RGB, R x R             + images/dataset.json
    {data}/vae-sd/{idx8[:5]}/img-mean-std-{idx8}.npy       float32 (8, R/f, R/f)  + vae-sd/dataset.json
dataset.json is {"labels": [[relative path, label], ...]}; in one of the two folders the labels may be null.

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
from torch.utils.data import Dataset, Sampler

from files import IMAGE_ERRORS, BadInput, check_inside, first_line, is_file, load_array, open_image, read_json, reading


def scan(folder, suffix):
    """{index in the name: relative path} of all files under `folder` that end in `suffix`."""
    found, stack = {}, [folder]
    while stack:
        with reading(folder), os.scandir(stack.pop()) as entries:
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
    if not is_file(path):
        raise BadInput(f"{path} does not exist; --data-dir must hold images/ and vae-sd/, each with a dataset.json.")
    try:
        entries = read_json(path)["labels"]
        labels = None if entries is None else {index_of(check_inside(name, path)): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not of the form {{\"labels\": [[path, label], ...]}}; make it again.") from error
    if labels is not None and len(labels) != len(entries):
        raise BadInput(f"{path} has {len(entries)} entries of {len(labels)} different indices; each image needs its own.")
    for index, label in (labels or {}).items():
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < num_classes:
            raise BadInput(f"{path}: the label of index {index} is {label}; it must be a number from 0 to "
                           f"{num_classes - 1} (--num-classes {num_classes}).")
    return labels


def load_image(path, resolution):
    """uint8 (3, R, R) of a picture of `resolution` pixels a side."""
    try:
        with open_image(path) as picture:
            if picture.mode not in ("RGB", "L", "P") or picture.size != (resolution, resolution):
                raise BadInput(f"{path} is {picture.mode} of {picture.width}x{picture.height}; expected RGB of "
                               f"{resolution}x{resolution} (--resolution).")
            picture.load()
    except FileNotFoundError as error:
        raise BadInput(f"{path} is missing; make it again.") from error
    except IMAGE_ERRORS as error:
        raise BadInput(f"{path} is no readable image ({first_line(error)}); make it again.") from error
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def load_moments(path, shape):
    """float32 (2 C, h, w) = `shape`."""
    array = load_array(path)
    if array.shape != shape or array.dtype != np.float32 or not np.isfinite(array).all():
        raise BadInput(f"{path} holds {array.dtype} {array.shape}; expected finite float32 {shape}; make it again.")
    return torch.from_numpy(array)


def check_moments(path, resolution):
    """Shape of the moments in `path`; raises BadInput unless they are square and can belong to images of `resolution`."""
    shape = load_array(path).shape
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2]:
        raise BadInput(f"{path} has shape {shape}; expected (2 x channels, side, side), mean and spread.")
    if resolution % shape[1]:
        raise BadInput(f"{path} has {shape[1]} latent pixels a side, of which --resolution {resolution} is no multiple; "
                       "encode the data at this resolution or change it.")
    return shape


def check_bytes(what, folder, files):
    """Raise BadInput unless all `files`, pairs (name, bytes), are as large as the first."""
    usual = None
    for name, size in files:
        usual = usual or size
        if size != usual:
            raise BadInput(f"{folder / name} has {size} bytes, the first {what} {usual}: its shape is another or it is "
                           "truncated; make it again.")


def digest(entries):
    """A name for a data set: the hash of plain values that describe it."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


class LatentImages(Dataset):
    """Moments, label and, while `images` is on, the picture of each entry, in the order of the index in the names.

    Pairing, labels, the latents' file sizes and the first entry are checked here, everything else when it is read.
    images=False from the start needs no images/ folder.
    """

    texts = None  # previews write nothing under the pictures

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
        self.moments_shape = check_moments(self.latent_dir / self.latent_names[0], resolution)
        with reading(self.latent_dir):  # another size is another shape or a truncated file
            check_bytes("latent", self.latent_dir, ((name, (self.latent_dir / name).stat().st_size)
                                                    for name in self.latent_names))
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

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        """uint8 (3, R, R)."""
        return load_image(self.image_dir / self.image_names[i], self.resolution)

    def moments(self, i):
        """float32 (2 C, h, w): mean, std."""
        return load_moments(self.latent_dir / self.latent_names[i], self.moments_shape)

    def condition(self, i):
        """The label, int."""
        return self.labels[i]

    def __getitem__(self, visit):
        i = visit % len(self)
        item = {"position": i, "moments": self.moments(i), "y": self.condition(i)}
        return item | {"image": self.image(i)} if self.images else item

    def fingerprint(self, files=False):
        """Text that names this data set wherever it lies: indices, labels; with `files` images' names and sizes too."""
        entries = [self.indices, self.labels]
        if files:
            with reading(self.image_dir):
                entries += [self.image_names, [(self.image_dir / name).stat().st_size for name in self.image_names]]
        return digest(entries)


NUMBERED = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.(png|npy)")


def scan_numbered(folder):
    """({index} of {i}.png, {index: bytes} of {i}.npy, {index: {k: bytes}} of {i}_{k}.npy), all other files left aside."""
    pictures, moments, captions = set(), {}, {}
    with reading(folder):
        if not folder.is_dir():
            raise BadInput(f"{folder} does not exist; --data-dir must hold train/, val/ and empty_context.npy.")
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
        raise BadInput(f'{path} is not of the form {{"0": ["caption", ...], ...}}; make it again or remove it.') from error
    for i, count in counts.items():
        if len(texts.get(i, ())) != count:
            raise BadInput(f"{path} has {len(texts.get(i, ()))} captions of image {i}, beside it are {count} "
                           f"({i}_0.npy, ...); encode them again.")
    return texts


class CaptionedImages(Dataset):
    """Moments, text tokens and, while `images` is on, the picture of each entry of {data}/{split}, in order of index.

    Each visit to an image shows one of its captions, drawn from (seed, epoch, position). Missing files, the sizes of
    all .npy, captions.json and the first entry are checked here, everything else when it is read. images=False from the
    start needs no pictures; latents=False, which is enough to sample, no moments either.
    """

    def __init__(self, data_dir, split, resolution, seed=0, images=True, latents=True):
        self.resolution, self.seed, self.images, self.folder = resolution, seed, images, Path(data_dir) / split
        pictures, moments, captions = scan_numbered(self.folder)
        self.indices = sorted({*pictures, *moments, *captions})
        if not self.indices:
            raise BadInput(f"{self.folder} holds no images; expected 0.png, 0.npy, 0_0.npy, ..., 1.png and so on.")
        for i in self.indices:
            texts = captions.get(i, {})
            missing = ([f"moments ({i}.npy)"] * (latents and i not in moments)
                       + [f"picture ({i}.png)"] * (images and i not in pictures)
                       + [f"caption ({i}_{k}.npy)" for k in range(max(texts, default=0) + 1) if k not in texts])
            if missing:
                raise BadInput(f"{self.folder}: image {i} has no {missing[0]}; make it again, or remove the image's other "
                               "files.")
        self.counts = [len(captions[i]) for i in self.indices]
        self.texts = read_texts(self.folder / "captions.json", dict(zip(self.indices, self.counts, strict=True)))
        check_bytes("caption", self.folder, ((f"{i}_{k}.npy", captions[i][k]) for i in self.indices for k in captions[i]))
        empty = self.folder.parent / "empty_context.npy"
        self.context_shape = load_array(empty).shape
        if len(self.context_shape) != 2:
            raise BadInput(f"{empty} has shape {self.context_shape}; expected (tokens, width).")
        self.empty_context = self.tokens(empty)
        self.condition(0)
        if latents:
            self.moments_shape = check_moments(self.folder / f"{self.indices[0]}.npy", resolution)
            check_bytes("moments", self.folder, ((f"{i}.npy", moments[i]) for i in self.indices))
            self.moments(0)
        if images:
            self.image(0)

    def __len__(self):
        return len(self.indices)

    def image(self, i):
        """uint8 (3, R, R)."""
        return load_image(self.folder / f"{self.indices[i]}.png", self.resolution)

    def moments(self, i):
        """float32 (2 C, h, w): mean, std, the log variance of the file being clamped as in Stable Diffusion's VAE."""
        mean, logvar = load_moments(self.folder / f"{self.indices[i]}.npy", self.moments_shape).chunk(2)
        return torch.cat([mean, (logvar.clamp(-30, 20) / 2).exp()])

    def tokens(self, path):
        """float32 (L, C) of one caption, or of none."""
        array = load_array(path)
        if array.shape != self.context_shape or array.dtype.kind != "f" or not np.isfinite(array).all():
            raise BadInput(f"{path} holds {array.dtype} {array.shape}; expected finite floats {self.context_shape}, the "
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
        """Text that names this data set wherever it lies: indices, captions; with `files` sizes of the images too."""
        entries = [self.indices, self.counts, self.context_shape]
        if files:
            with reading(self.folder):
                entries.append([(self.folder / f"{i}.png").stat().st_size for i in self.indices])
        return digest(entries)


class StepBatches(Sampler):
    """Micro-batches of one process for steps `first` .. `last` - 1: a function of (seed, step, place) alone.

    Global sample g = step * batch_size + place is entry g % n of epoch g // n, and each epoch is a permutation made
    from (seed, epoch). What a batch lists are visits, epoch * n + position in the data set: whatever a data set draws
    anew in each epoch is then a function of (seed, epoch, position), too. Place p belongs to micro-batch (p // micro) // processes of process (p // micro) % processes,
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
                    batch.append(epoch * self.n + int(order[g % self.n]))
                yield batch


# Streams of randomness under one seed: data order by epoch, captions by epoch and image, all other draws by step.
ORDER, DRAWS, CAPTION = 0, 1, 2


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
