"""Scores of samples of the embedded data, beside the best and the worst that can be expected, measured in the same run.

    python evaluations/baselines.py SAMPLES.npz

prints FD-EffLite0 and KID-EffLite0 of the samples and of other sets of as many images, against held-out and against
training images, and writes the same numbers to SAMPLES-scores.json:
    held-out, training through the VAE   encoded and decoded: the cost of the VAE alone. These training images are not
                                         in the reference; the held-out ones are, so that cell looks too good
    noise                                latents from N(0, 1), decoded: a model that has learned nothing
A Fréchet distance of few images is biased upwards, equally at equal n: compare within one table only. Balanced labels
cost the samples a little, because the classes of the data are not balanced.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from evaluations import EFFICIENTNET_PATH, score_names
from evaluations.evaluator import run
from runtime.errors import MAX_SEED, UserError, run_script
from runtime.flags import Parser, whole

METRICS = ("fid", "kid")
NAMES = score_names("efficientnet-lite0", METRICS)


def image_sets(args, n, device):
    """({name: images} of the references, {name: images} of the sets to score, of `n` images each)."""
    import numpy as np
    import torch

    from encoders.vae import VAE
    from evaluations.images import FolderImages, Reconstructions
    rng, vae = np.random.default_rng(args.seed), VAE(args.vae, device)

    def shuffled(split):
        files = FolderImages(args.data / split / "images").files
        return [files[i] for i in rng.permutation(len(files))]

    def images(files):
        return FolderImages(args.data, files)

    held_out, training = shuffled("val")[:args.reference_images], shuffled("train")
    count = len(held_out)  # of both references
    if n > min(count, len(training) - count):
        raise UserError(f"{args.samples} has {n} images, more than the {count} held-out or the {len(training) - count} "
                        "other training images that they are compared with; give fewer samples.")
    references = {"held-out": images(held_out), "training": images(training[:count])}
    latent = vae.channels, *(side // vae.factor for side in references["held-out"].size)
    noise = vae.decode(torch.from_numpy(rng.standard_normal((n, *latent), dtype=np.float32)))
    return references, {
        "samples": args.samples,
        "held-out through the VAE": Reconstructions(images(held_out[:n]), vae),
        "training through the VAE": Reconstructions(images(training[count:count + n]), vae),
        "noise": noise.permute(0, 2, 3, 1).cpu().numpy()}


def evaluate(args):
    """Scores of each set against each reference, for the JSON file."""
    from evaluations.extract import join_processes, rank
    from evaluations.features import load_extractor
    from evaluations.images import open_images
    from evaluations.scores import check_pair, load_set, score
    for split in ("val", "train"):
        check_pair(args.data / split / "images", args.samples, METRICS)
    device = join_processes()
    extractor = load_extractor("efficientnet-lite0", args.efficientnet_weights, device)
    references, sets = (
        {name: load_set(images, extractor, METRICS) for name, images in each.items()}
        for each in image_sets(args, open_images(args.samples).n, device))
    if rank():  # the first process has the features of all
        return None
    scores = {name: {split: score(found, reference, METRICS) for split, reference in references.items()}
              for name, found in sets.items()}
    counts = {name: found.n for name, found in {**references, **sets}.items()}
    return {"scores": scores, "n": counts, "seed": args.seed, "samples": str(args.samples)}


def lines(result):
    """The table for stdout."""
    counts, width = result["n"], max(map(len, result["scores"]))
    columns = [(name, split, f"{name}, {split}") for name in NAMES for split in ("held-out", "training")]
    yield f"n = {counts['samples']} images a set, {counts['held-out']} of each reference"
    yield "  ".join([" " * width, *(head for _, _, head in columns)])
    for set_name, row in result["scores"].items():
        values = (f"{row[split][name]:{len(head)}.4g}" for name, split, head in columns)
        yield "  ".join([f"{set_name:{width}}", *values])


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("samples", metavar="SAMPLES.npz", type=Path, help="what generate.py wrote")
    add("--data", type=Path, default=Path("data/emoji"), help="the embedded data (default data/emoji)")
    add("--vae", default="assets/vae-emoji", help="its VAE (default assets/vae-emoji)")
    add("--efficientnet-weights", help=f"default {EFFICIENTNET_PATH}")
    add("--reference-images", type=whole(2), help="of each split (default: all held-out, as many of training)")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="of the choice of images and the noise (default 0)")
    args = parser.parse_args()
    args.json = args.samples.parent / f"{args.samples.stem}-scores.json"
    run(evaluate, lambda result: [*lines(result), args.json], args)


if __name__ == "__main__":
    run_script(main)
