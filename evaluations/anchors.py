"""Score samples of the embedded data between a best and a worst case that the same run measures.

    python evaluations/anchors.py SAMPLES.npz

prints FD-EffLite0 and KID-EffLite0 of the samples against held-out and against training images, and of other sets of as
many images, and writes the same numbers to SAMPLES-scores.json:
    held-out, training through the VAE   encoded and decoded: what the VAE alone costs. The training images are not those
                                         of the reference; held-out ones are (there are few), which flatters that cell
    noise                                latents from N(0, 1), decoded: a model that has learned nothing
A Fréchet distance of few images is biased upwards, equally for sets of one n: compare the rows of one table. Both
references have one n too, all held-out images and a seeded choice of training images, so columns compare as well.
Balanced labels keep samples a little away from the data, whose classes are not balanced.
"""
import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
from encoders import VAE
from evaluations.features import EFFICIENTNET_PATH, FEATURES, load_extractor
from evaluations.images import FolderImages, decode, open_images
from evaluations.scores import check_pair, load_set, score
from files import LARGEST_SEED, atomic_write, check_bounds, run_script

METRICS = ("fid", "kid")
BATCH_SIZE = 16  # images at a time: a third faster than 64 on a CPU
NAMES = [FEATURES["efficientnet-lite0"][kind] for kind in ("distance", "kid")]


def choose(folder, count, rng):
    """uint8 (n, R, R, 3): images of a folder in an order drawn from `rng`, the first `count` (None: all)."""
    files = FolderImages(folder).files
    return np.stack([decode(files[i]) for i in rng.permutation(len(files))[:count]])


def reconstruct(vae, images):
    """uint8 (n, R, R, 3) -> the same through the VAE, by the mean of the posterior."""
    moments = [vae.encode(part) for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(BATCH_SIZE)]
    return pixels(vae, VAE.latents(torch.cat(moments), torch.zeros(())))


def pixels(vae, latents):
    """Latents (n, C, h, w) -> uint8 (n, R, R, 3)."""
    return vae.decode(latents, BATCH_SIZE).permute(0, 2, 3, 1).cpu().numpy()


def image_sets(args, n, device):
    """(references, sets): {name: uint8 (n, R, R, 3)} each; the samples stay a path."""
    rng = np.random.default_rng(args.seed)
    held_out = choose(args.data / "val/images", args.reference_images, rng)
    training = choose(args.data / "train/images", len(held_out) + n, rng)
    vae = VAE(args.vae, device)
    through = {"held-out through the VAE": reconstruct(vae, held_out[:n]),
               "training through the VAE": reconstruct(vae, training[len(held_out):])}
    shape = n, vae.vae.config.latent_channels, *(side // vae.factor for side in held_out.shape[1:3])
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    return ({"held-out": held_out, "training": training[:len(held_out)]},
            {"samples": args.samples, **through, "noise": pixels(vae, noise)})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", metavar="SAMPLES.npz", type=Path, help="what generate.py wrote")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="the embedded data (default data/emoji)")
    parser.add_argument("--vae", default="assets/vae-emoji", help="its VAE (default assets/vae-emoji)")
    parser.add_argument("--efficientnet-weights", help=f"default {EFFICIENTNET_PATH}")
    parser.add_argument("--reference-images", type=int, help="of each split (default: all held-out, as many of training)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images and the noise (default 0)")
    args = parser.parse_args()
    check_bounds(args, {"seed": (0, LARGEST_SEED), "reference_images": (2, float("inf"))})
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for split in ("val", "train"):
        check_pair(args.data / split / "images", args.samples, METRICS)
    n, device = open_images(args.samples).n, "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor("efficientnet-lite0", args.efficientnet_weights, device)
    references, sets = image_sets(args, n, device)
    references, sets = ({name: load_set(images, extractor, METRICS, batch_size=BATCH_SIZE)
                         for name, images in each.items()} for each in (references, sets))
    scores = {name: {split: score(found, reference, METRICS) for split, reference in references.items()}
              for name, found in sets.items()}
    counts = {name: found.n for name, found in {**references, **sets}.items()}

    width = max(map(len, scores))
    heads = [f"{name}, {split}" for name in NAMES for split in references]
    print(f"n = {n} images a set, {counts['held-out']} of each reference", f"{'':{width}}  {'  '.join(heads)}", sep="\n")
    for name, row in scores.items():
        cells = [(row[split][metric], len(f"{metric}, {split}")) for metric in NAMES for split in references]
        print(f"{name:{width}}  " + "  ".join(f"{value:{wide}.4g}" for value, wide in cells))
    out = args.samples.with_name(f"{args.samples.stem}-scores.json")
    with atomic_write(out, "w") as file:
        json.dump({"scores": scores, "n": counts, "seed": args.seed, "samples": str(args.samples)}, file, indent=2)
    print(out)


if __name__ == "__main__":
    run_script(main)
