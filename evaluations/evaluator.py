"""Score samples against a reference; for ADM's five numbers (IS, FID, sFID, precision, recall):

    python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz SAMPLE.npz
    torchrun --nproc-per-node 8 evaluations/evaluator.py REF.npz SAMPLE.npz --json scores.json
    python evaluations/evaluator.py heldout/ samples/ --features efficientnet-lite0 --metrics fid,kid

REF and SAMPLE are an npz with arr_0 (uint8 images), a folder of PNGs or a statistics npz (mu, sigma, mu_s,
sigma_s). Scores go to stdout, progress to stderr. README.md beside this file says which numbers compare with
which papers.
"""
import argparse
import json
import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only

from evaluations.extract import join_processes
from evaluations.features import EFFICIENTNET_PATH, FEATURES, PRESETS, load_extractor
from evaluations.scores import METRICS, check_metrics, check_pair, default_metrics, load_set, score
from files import atomic_write, check_writable, run_script
from processes import leave

logger = logging.getLogger(__name__)


def evaluate(args):
    """Scores of args.sample against args.reference -> dict for --json on process 0, None on the others."""
    metrics = [name.strip() for name in (args.metrics or "").split(",") if name.strip()]
    metrics = metrics or default_metrics(args.features, args.preset)
    check_metrics(metrics, args.features)
    check_pair(args.reference, args.sample, metrics, args.num_samples)
    device = join_processes(args.device)
    extractor = extractor_from(args, device)
    reference = load_set(args.reference, extractor, metrics, is_reference=True, batch_size=args.batch_size)
    sample = load_set(args.sample, extractor, metrics, limit=args.num_samples, batch_size=args.batch_size)
    if sample is None:
        return None
    for each in (reference, sample):
        if each.n and each.n < extractor.dim:
            logger.warning("%s: %d images are fewer than the %d features; distances of sets this small are "
                           "biased, compare at equal n only", each.name, each.n, extractor.dim)
    values = score(sample, reference, metrics, getattr(torch, args.pr_dtype), device)
    return {"scores": values, "n": sample.n, "reference_n": reference.n, "features": args.features,
            "preset": args.preset, "pr_dtype": args.pr_dtype, "any_weights": args.any_weights,
            "sample": str(args.sample), "reference": str(args.reference)}


def lines(result):
    """The text for stdout: ADM's wording for its five numbers, n beside the scores that ADM does not have."""
    counts = f"(n = {result['n'] or 'unknown'}, reference n = {result['reference_n'] or 'unknown'})"
    for name, value in result["scores"].items():
        is_adm = name in ("Inception Score", "FID", "sFID", "Precision", "Recall")
        yield f"{name if is_adm else f'{name} {counts}'}: {'n/a' if value is None else value}"


def add_network_arguments(parser):
    parser.add_argument("--features", choices=FEATURES, default="inception")
    parser.add_argument("--preset", choices=PRESETS, default="adm",
                        help="how Inception is fed: adm (default) for ImageNet, pytorch-fid for COCO")
    parser.add_argument("--inception-weights", metavar="PTH",
                        help="pt_inception-2015-12-05-6726825d.pth; downloaded if not given")
    parser.add_argument("--dinov2-weights", metavar="FILE",
                        help="DINOv2 ViT-L/14, .pth or .safetensors; downloaded if not given")
    parser.add_argument("--efficientnet-weights", metavar="FILE", default=EFFICIENTNET_PATH,
                        help="EfficientNet-Lite0's .pth; default %(default)s")
    parser.add_argument("--any-weights", action="store_true",
                        help="accept other weights than the published; such scores compare with nothing")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at a time; default 64")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")


def extractor_from(args, device):
    weights = {"inception": args.inception_weights, "dinov2-vit-l": args.dinov2_weights,
               "efficientnet-lite0": args.efficientnet_weights}[args.features]
    return load_extractor(args.features, weights, device, args.preset, verify=not args.any_weights)


def positive(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", help="npz, folder or statistics")
    parser.add_argument("sample", metavar="SAMPLE", help="npz, folder or statistics")
    add_network_arguments(parser)
    parser.add_argument("--metrics", help=f"comma-separated, of {','.join(METRICS)}; default is,fid,sfid,pr "
                        "for inception, fid with preset pytorch-fid, fid,kid for other features")
    parser.add_argument("--pr-dtype", choices=("float16", "float32"), default="float16",
                        help="precision of distances for precision and recall; default float16, as ADM's")
    parser.add_argument("--num-samples", type=positive, metavar="N", help="first N of SAMPLE; default all")
    parser.add_argument("--json", metavar="OUT", help="also write the scores and what they were made of here")
    return parser.parse_args()


def run(evaluate, lines, args):
    """Print the `lines` of what `evaluate(args)` gives and write it to args.json; logs go to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.json:
        check_writable(Path(args.json).parent)
    result = evaluate(args)
    if result:
        print(*lines(result), sep="\n")
        if args.json:
            with atomic_write(args.json, "w") as file:
                json.dump(result, file, indent=2)
    leave()


def main():
    run(evaluate, lines, parse_args())


if __name__ == "__main__":
    run_script(main)
