"""Score samples against a reference, with ADM's five numbers (IS, FID, sFID, precision, recall) or others:

    python evaluations/evaluator.py VIRTUAL_imagenet256_labeled.npz SAMPLE.npz
    torchrun --nproc-per-node 8 evaluations/evaluator.py REF.npz SAMPLE.npz --json scores.json
    python evaluations/evaluator.py heldout/ samples/ --features efficientnet-lite0 --metrics fid,kid

REF and SAMPLE are each an npz with arr_0 (uint8 images), a folder of PNGs, or a statistics npz (mu, sigma, mu_s,
sigma_s). Scores go to stdout, progress to stderr. README.md beside this file says which numbers compare with which
papers.
"""
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from evaluations import EFFICIENTNET_PATH, FEATURES, METRICS, PRESETS
from runtime.errors import run_script
from runtime.flags import Parser, whole

logger = logging.getLogger(__name__)


def evaluate(args):
    """Scores of args.sample against args.reference -> dict for --json on process 0, None on the others."""
    from evaluations.scores import check_pair
    metrics = chosen_metrics(args)
    check_pair(args.reference, args.sample, metrics, args.num_samples)
    return open_scorer(args, metrics)(args.sample)


def chosen_metrics(args):
    """The names in --metrics, or the default of the features."""
    from evaluations.scores import check_metrics, default_metrics
    metrics = [name.strip() for name in (args.metrics or "").split(",") if name.strip()]
    metrics = metrics or default_metrics(args.features, args.preset)
    check_metrics(metrics, args.features)
    return metrics


def open_scorer(args, metrics):
    """A function: image source -> the result of `evaluate`. The reference is read once."""
    import torch

    from evaluations.extract import join_processes
    from evaluations.scores import load_set, score
    device = join_processes(args.device)
    extractor = extractor_from(args, device)
    reference = load_set(args.reference, extractor, metrics, is_reference=True, batch_size=args.batch_size)
    torch.cuda.empty_cache()  # compare.py samples on the same GPU in the meantime
    warned = set()

    def scored(source):
        sample = load_set(source, extractor, metrics, limit=args.num_samples, batch_size=args.batch_size)
        if sample is None:
            return None
        for each in (reference, sample):
            if each.n and each.n < extractor.dim and each.name not in warned:
                warned.add(each.name)
                logger.warning("%s: %d images are fewer than the %d features; distances of sets this small are biased, "
                               "compare them at equal n only", each.name, each.n, extractor.dim)
        values = score(sample, reference, metrics, getattr(torch, args.pr_dtype), device)
        return {"scores": values, "n": sample.n, "reference_n": reference.n,
                "reference_images": None if reference.pool is None else len(reference.pool), "features": args.features,
                "preset": args.preset, "pr_dtype": args.pr_dtype, "any_weights": args.any_weights,
                "sample": str(source), "reference": str(args.reference), "reference_made_of": reference.made_of}

    return scored


def lines(result):
    """The text for stdout: ADM's wording for its five numbers; the others also show n."""
    for name, value in result["scores"].items():
        of_reference = result["reference_images" if name.startswith("KID") else "reference_n"]
        counts = f"(n = {result['n'] or 'unknown'}, reference n = {of_reference or 'unknown'})"
        is_adm = name in ("Inception Score", "FID", "sFID", "Precision", "Recall")
        digits = "n/a" if value is None else f"{value:.3g}" if 0 < abs(value) < 0.01 else f"{value:.4f}"  # KID is small
        yield f"{name if is_adm else f'{name} {counts}'}: {digits}"


def add_network_arguments(parser):
    """The flags that choose the features and their network, for every script that extracts features."""
    add = parser.add_argument
    add("--features", choices=FEATURES, default="inception", help="default %(default)s")
    add("--preset", choices=PRESETS, default="adm",
        help="how images are prepared for Inception: adm (default) for ImageNet, pytorch-fid for COCO")
    add("--inception-weights", metavar="PTH", help="pt_inception-2015-12-05-6726825d.pth; downloaded if not given")
    add("--dinov2-weights", metavar="FILE", help="DINOv2 ViT-L/14, .pth or .safetensors; downloaded if not given")
    add("--efficientnet-weights", metavar="FILE", help=f"EfficientNet-Lite0's .pth; default {EFFICIENTNET_PATH}")
    add("--any-weights", action="store_true",
        help="accept weights other than the published ones; such scores are not comparable to others")
    add("--batch-size", type=whole(1), default=64, help="images at a time; default 64")
    add("--device", choices=("cpu", "cuda"), help="default cuda if there is a GPU")


def add_score_arguments(parser):
    """The flags of add_network_arguments and those that choose the scores."""
    add_network_arguments(parser)
    parser.add_argument("--metrics", help=f"comma-separated, of {','.join(METRICS)}; default is,fid,sfid,pr, fid with "
                        "--preset pytorch-fid, fid,kid for other features")
    parser.add_argument("--pr-dtype", choices=("float16", "float32"), default="float16",
                        help="precision of the distances for precision and recall; default float16, as ADM's")


def extractor_from(args, device):
    """The Extractor that these flags choose."""
    from evaluations.features import load_extractor
    weights = {"inception": args.inception_weights, "dinov2-vit-l": args.dinov2_weights,
               "efficientnet-lite0": args.efficientnet_weights}[args.features]
    return load_extractor(args.features, weights, device, args.preset, verify=not args.any_weights)


def given_paths(args, *but):
    """Arguments that may be input paths: all strings and paths except those named in `but`."""
    return [value for name, value in vars(args).items() if name not in but and isinstance(value, (str, Path))]


def run(evaluate, lines, args, *inputs):
    """Write the result of `evaluate(args)` to the file of --json, if given, then print its `lines`; logs go to stderr.

    `inputs`: further input files, which no argument names.
    """
    from runtime.files import prepare_output, write_json
    from runtime.setup import end_processes
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.json:
        prepare_output(args.json, (".json",), [*given_paths(args, "json"), *inputs])
    result = evaluate(args)
    if result:
        if args.json:
            write_json(args.json, result, indent=2)
        print(*lines(result), sep="\n")
    end_processes()


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("reference", metavar="REF", help="npz, folder or statistics")
    add("sample", metavar="SAMPLE", help="npz, folder or statistics")
    add_score_arguments(parser)
    add("--num-samples", type=whole(1), metavar="N", help="score the first N of SAMPLE; default all")
    add("--json", metavar="OUT", help="also write the scores, with n, features and paths, to this file")
    run(evaluate, lines, parser.parse_args())


if __name__ == "__main__":
    run_script(main)
