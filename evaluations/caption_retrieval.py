"""Do generated images show their captions? Retrieval among the captions' own pictures and, with --clip, the CLIP score.

    python evaluations/caption_retrieval.py DATA/val SAMPLES
    python evaluations/caption_retrieval.py DATA/val SAMPLES --clip openai/clip-vit-large-patch14
    python evaluations/caption_retrieval.py data/emoji-captions/val SAMPLES --vae assets/vae-emoji

DATA/val is a split in the text-to-image layout, SAMPLES a folder or npz of generate_t2i.py: image i is of caption i.
Retrieval: share of generated images whose nearest picture of the split (top-1), or one of whose 5 nearest (top-5), is
the one that the caption belongs to, by the cosine of features about their mean. Chance is 1 and 5 divided by the number
of pictures. Shuffling the captions 100 times measures the chance level of these samples. --vae also
scores the split's own pictures, encoded and decoded by the VAE: no model that uses the VAE does much better.
CLIP score: mean of 100 max(cos(image, caption), 0); it alone needs the words in captions.json. Runs on several
processes under torchrun.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only
from evaluations import FEATURES
from evaluations.evaluator import add_network_arguments, extractor_from, run
from runtime.errors import UserError, run_script
from runtime.flags import Parser, whole


def evaluate(args):
    """Scores -> dict for --json on process 0, None on the others."""
    from encoders.vae import VAE
    from evaluations.captioned import Clip, caption_texts, clip_scores, distinct, read_pictures, read_samples
    from evaluations.extract import join_processes, rank
    from evaluations.images import Reconstructions, check_equal_sizes
    from evaluations.metrics import retrieval
    from evaluations.scores import load_set
    reference, numbers = read_pictures(args.reference)
    samples, made = read_samples(args.sample, args.reference)
    position = {number: i for i, number in enumerate(numbers)}
    if unknown := [number for number in made if number not in position]:
        raise UserError(f"{args.sample} has an image of caption {unknown[0]}, {args.reference} no picture "
                        f"{unknown[0]}.png; give the split that the images were made for.")
    check_equal_sizes(samples, reference)
    texts = caption_texts(args.reference, made, args.caption_index) if args.clip else None
    device = join_processes(args.device)
    extractor = extractor_from(args, device)
    sets = {"reference": reference, "samples": samples}
    if args.vae:
        sets["VAE reconstructions"] = Reconstructions(reference, VAE(args.vae, device))
    features = {name: load_set(images, extractor, ("kid",), batch_size=args.batch_size)
                for name, images in sets.items()}
    scores = clip_scores(Clip(args.clip, device), samples, texts, args.batch_size) if args.clip else None
    if rank():
        return None
    first, place = distinct(reference, args.batch_size)
    truths = {"samples": place[[position[number] for number in made]], "VAE reconstructions": place}
    candidates = features.pop("reference").pool[first]
    result = {"features": args.features, "n": samples.n, "candidates": len(first), "sample": str(args.sample),
              "reference": str(args.reference), "any_weights": args.any_weights, "retrieval": {}}
    for name, found in features.items():
        result["retrieval"][name] = {
            f"top-{k}": dict(zip(("accuracy", "chance", "shuffled mean", "shuffled highest"), values, strict=True))
            for k, values in retrieval(found.pool, candidates, truths[name]).items()}
    if args.clip:
        result["CLIP score"], result["clip"] = scores.mean().item(), str(args.clip)
    return result


def lines(result):
    """The text for stdout."""
    what = FEATURES[result["features"]]["retrieval"]
    for name, scores in result["retrieval"].items():
        for k, score in scores.items():
            yield (f"{what} {k} of {name} (n = {result['n'] if name == 'samples' else result['candidates']}): "
                   f"{score['accuracy']:.4f}, chance {score['chance']:.4f}; captions shuffled 100 times: mean "
                   f"{score['shuffled mean']:.4f}, highest {score['shuffled highest']:.4f}")
    if "CLIP score" in result:
        yield f"CLIP score (n = {result['n']}, {result['clip']}): {result['CLIP score']:.4f}"


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("reference", metavar="DATA/SPLIT", type=Path, help="split with {i}.png, for --clip also captions.json")
    add("sample", metavar="SAMPLES", type=Path, help="folder or npz of generated images")
    add_network_arguments(parser)
    parser.set_defaults(features="efficientnet-lite0")
    add("--clip", metavar="SOURCE", help="CLIP's folder or hub name: also compute the CLIP score")
    add("--caption-index", type=whole(0), default=0, help="which caption of an image the CLIP score takes; default 0")
    add("--vae", metavar="SOURCE", help="also score the split's pictures through this VAE: folder or hub name")
    add("--json", metavar="OUT", help="also write the scores, with n, features and paths, to this file")
    args = parser.parse_args()
    run(evaluate, lines, args, args.reference / "captions.json")


if __name__ == "__main__":
    run_script(main)
