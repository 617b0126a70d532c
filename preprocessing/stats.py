"""Write the scale and shift of a data set's latents to DATA/latents.json; training reads it, checkpoints keep it.

    python preprocessing/dataset_tools.py stats --data=DATA                               # mean and std of each channel
    python preprocessing/dataset_tools.py stats --data=DATA --vae=FOLDER                  # from the VAE's config
    python preprocessing/dataset_tools.py stats --data=DATA --latents-stats=latents_stats.pt    # from a file

`encode` has already written that file with the numbers from the VAE's config. The first form computes mean and std over
all latents in DATA/vae-sd (captioned images: DATA/train) for z = (latent - mean) / std x multiplier. They describe
samples of the posterior: variance = variance of the means + mean of the variances. A run that was begun with other
numbers cannot be continued.
"""
import logging
from pathlib import Path

import numpy as np

from data_io.captions import scan_numbered
from data_io.latent_scale import NOTE, checked, from_statistics, read_note, read_statistics
from data_io.loader import work_ahead
from data_io.moments import check_moments, check_shape
from data_io.storage import form_of, open_files
from encoders.vae import VAE
from preprocessing.sources import check_finished
from runtime.errors import UserError
from runtime.files import load_array, weights_key, write_json
from runtime.flags import number, whole
from runtime.progress import progress

THREADS = 8  # that read latents

logger = logging.getLogger("haste")


def open_moments(data):
    """(moments(i) -> float32 (2 C, h, w), mean and variance; their number) of a data set in either layout."""
    if not form_of(data, "vae-sd")[1].exists() and (data / "train").is_dir():
        paths = [data / "train" / f"{i}.npy" for i in sorted(scan_numbered(data / "train")[1])]

        def captioned(i):
            mean, logvar = halves(load_array(paths[i]), paths[i], is_std=False)
            return mean, np.exp(np.clip(logvar, -30, 20))

        return captioned, some(len(paths), data)
    check_finished(data / "vae-sd")
    files = open_files(data, "vae-sd", ".npy", labels=False)

    def labelled(i):
        mean, std = halves(files.array(i), files.name(i), is_std=True)
        return mean, std ** 2

    return labelled, some(len(files.index.numbers), data)


def some(count, data):
    """`count`, not 0."""
    if not count:
        raise UserError(f"{data} holds no latents; give the folder that has vae-sd or, for captioned images, train.")
    return count


def halves(array, name, is_std):
    """Mean and spread of the moments read from `name`, checked."""
    return np.split(check_moments(array, check_shape(array.shape, 0, name), name, is_std), 2)


def sums(moments, i):
    """float64 (2, C): mean of a sample and of its square over the pixels of latent i."""
    mean, variance = (part.astype(np.float64) for part in moments(i))
    return np.stack([mean.mean(axis=(1, 2)), (mean ** 2 + variance).mean(axis=(1, 2))])


def channel_statistics(data, threads=THREADS, most=None):
    """(mean, std) of each channel, lists, over the first `most` latents. Raises UserError where a std is 0."""
    moments, count = open_moments(data)
    count = min(count, most or count)
    total = 0
    with progress(count, "stats", "latent") as bar:
        for each in work_ahead(lambda i: sums(moments, i), range(count), threads):
            total = total + each
            bar.update()
    mean, square = total / count
    std = np.sqrt(np.maximum(square - mean ** 2, 0))
    if not np.isfinite(std).all() or (std <= 0).any():
        raise UserError(f"The latents of {data} have a channel whose std is 0 or not finite; make them again.")
    return mean.tolist(), std.tolist()


def add_arguments(add):
    add("--data", type=Path, required=True, help="folder of the data set, train.py's --data-dir")
    add("--vae", help="hub name or diffusers folder of the VAE that made the latents: takes the numbers of its config "
        "where no --latents-stats are given")
    add("--latents-stats", metavar="FILE", help="mean and std of each channel: .safetensors, .npz, LightningDiT's .pt")
    add("--multiplier", type=number(1e-6), default=1.0, help="std that latents are scaled to, where mean and std are "
        "used (default 1)")
    add("--max-images", type=whole(1), help="take the first N latents only (default: all)")
    add("--num-workers", type=whole(1), default=THREADS, help=f"threads that read latents (default {THREADS})")


def run(args):
    note = read_note(args.data) or {}
    if args.vae:
        vae = VAE(args.vae)
        note |= {"vae": args.vae, "vae_key": weights_key(args.vae), "factor": vae.factor, "channels": vae.channels}
    if args.latents_stats:
        scale = read_statistics(args.latents_stats, args.multiplier)
    elif args.vae:
        scale = vae.own_scale
    else:
        scale = from_statistics(*channel_statistics(args.data, args.num_workers, args.max_images), args.multiplier)
    scale.check(open_moments(args.data)[0](0)[0].shape[0], args.latents_stats or args.vae or args.data)
    write_json(args.data / NOTE, checked(note | scale.plain(), args.data / NOTE))
    logger.info(f"{args.data / NOTE}: {scale}")
