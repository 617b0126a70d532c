"""Do generated images show their captions? Retrieval among the captions' own pictures and, given CLIP, the CLIP score.

    python evaluations/agreement.py DATA/val SAMPLES
    python evaluations/agreement.py DATA/val SAMPLES --clip openai/clip-vit-large-patch14
    python evaluations/agreement.py data/emoji-captions/val SAMPLES --vae assets/vae-emoji

DATA/val is a split in the text-to-image layout, SAMPLES a folder or npz of generate_t2i.py: image i is of caption i.
The words in captions.json are needed for the CLIP score alone.
Retrieval: share of generated images whose nearest picture of the split (top-1), or one of whose 5 nearest (top-5), by
the cosine of features about their mean, is the one that their caption belongs to. Guessing gives 1 and 5 in the
number of pictures; the captions shuffled among the images 100 times show what chance makes of this sample. With --vae
the split's own pictures, through the VAE and back, are scored too: no model that uses the VAE does much better.
CLIP score: mean of 100 max(cos(image, caption), 0). Runs on several processes under torchrun.
"""
import argparse
import hashlib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees evaluations/ only

from dataset import read_texts, scan_numbered
from encoders import VAE, loading, quiet_transformers
from evaluations.evaluator import add_network_arguments, extractor_from, run
from evaluations.extract import gather_rows, join_processes, rank, shard
from evaluations.features import FEATURES, full_float32, resize
from evaluations.images import FolderImages, open_images, size_text
from evaluations.scores import load_set
from files import BadInput, run_script
from listing import scan

TOP = (1, 5)
SHUFFLES = 100
ROWS = 4096           # samples compared with all candidates at a time


def nearest(samples, candidates, k):
    """Rows of candidates (m, D) nearest to each of samples (n, D), by cosine about the candidates' mean: (n, k) int64."""
    centre = candidates.mean(0)
    candidates = F.normalize(candidates - centre, dim=1)
    return torch.cat([(F.normalize(rows - centre, dim=1) @ candidates.T).topk(k).indices for rows in samples.split(ROWS)])


def hits(found, truth):
    """Share of the rows of found (n, k) that hold truth (n,)."""
    return (found == truth[:, None]).any(1).double().mean().item()


def retrieval(samples, candidates, truth, seed=0):
    """{k: (top-k accuracy, chance, mean and highest accuracy with `truth` shuffled)} for the k in TOP up to m.

    samples (n, D), candidates (m, D) of pairwise different pictures, truth (n,) rows of candidates.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffles = [truth[torch.randperm(len(truth), generator=generator)] for _ in range(SHUFFLES)]
    scores = {}
    for k in (k for k in TOP if k <= len(candidates)):
        found = nearest(samples, candidates, k)
        by_chance = [hits(found, shuffled) for shuffled in shuffles]
        scores[k] = hits(found, truth), k / len(candidates), sum(by_chance) / SHUFFLES, max(by_chance)
    return scores


def distinct(images, batch_size):
    """Positions of the first of each set of equal pictures, and for every picture its place among them; two tensors."""
    places, first, place = {}, [], []
    for batch in images.batches(0, images.n, batch_size):
        for image in batch:
            digest = hashlib.sha256(image.tobytes()).digest()
            if digest not in places:
                places[digest] = len(first)
                first.append(len(place))
            place.append(places[digest])
    return torch.tensor(first), torch.tensor(place)


class Reconstructions:
    """The images of another source through the VAE and back."""

    def __init__(self, images, vae):
        self.images, self.vae, self.n, self.size = images, vae, images.n, images.size
        self.name = f"{images.name} through the VAE"

    def batches(self, start, stop, batch_size):
        for batch in self.images.batches(start, stop, batch_size):
            moments = self.vae.encode(torch.tensor(batch).permute(0, 3, 1, 2))
            latents = VAE.latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0]))
            yield self.vae.decode(latents).permute(0, 2, 3, 1).cpu().numpy()


class Clip:
    """A frozen CLIP from a folder or the hub: images and captions to vectors of one space."""

    def __init__(self, source, device):
        transformers = quiet_transformers()
        with loading("The CLIP", source, "--clip a folder in transformers' format"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model = transformers.CLIPModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
            self.model = model.to(device).eval().float()
        self.device = device

    @torch.no_grad()
    def images(self, batch):
        """uint8 (N, R, R, 3) -> (N, D), resized as CLIP's own preprocessing does: bicubic, to whole numbers."""
        x = torch.tensor(batch).to(self.device).permute(0, 3, 1, 2).float()
        x = resize(x, self.model.config.vision_config.image_size, "bicubic", antialias=True).round().clamp(0, 255) / 255
        mean, std = (x.new_tensor(c)[:, None, None] for c in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        with full_float32(self.device):
            return self.model.visual_projection(self.model.vision_model(pixel_values=(x - mean) / std).pooler_output)

    @torch.no_grad()
    def captions(self, texts):
        """N strings -> (N, D)."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(self.device)
        with full_float32(self.device):
            return self.model.text_projection(self.model.text_model(**tokens).pooler_output)


def clip_scores(clip, images, texts, batch_size):
    """100 max(cos, 0) of each image with its text, (n,) on process 0; None on the others."""
    start, stop = shard(images.n)
    rows = [torch.zeros(0, 1)]
    for i, batch in enumerate(images.batches(start, stop, batch_size)):
        first = start + i * batch_size
        cosine = F.cosine_similarity(clip.images(batch), clip.captions(texts[first:first + len(batch)]))
        rows.append(100 * cosine.clamp(min=0)[:, None].cpu())
    scores = gather_rows(torch.cat(rows))
    return None if scores is None else scores[:, 0]


def read_pictures(folder):
    """The pictures of a folder in the order of their numbers, and these; numbers may be left out."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is no folder; give a split with pictures such as 0.png, and what generate_t2i.py made.")
    files = scan(folder, ".png")
    if not files:
        raise BadInput(f"{folder} holds no .png file; give a split with pictures, and what generate_t2i.py made.")
    numbers = sorted(files)
    return FolderImages(folder, [folder / files[i] for i in numbers]), numbers


def read_samples(source, split):
    """Generated images and the numbers of their captions: in the names of files; an npz has the split's from the first on."""
    if source.is_dir():
        return read_pictures(source)
    images, numbers = open_images(source), sorted(set().union(*scan_numbered(split)))
    if images.n > len(numbers):
        raise BadInput(f"{source} has {images.n} images, {split} only {len(numbers)}; give the split that the images were made "
                       "for.")
    return images, numbers[:images.n]


def caption_texts(folder, numbers, k):
    """Caption `k` in words of the pictures `numbers`."""
    path = folder / "captions.json"
    captions = read_texts(path, {})
    if captions is None:
        raise BadInput(f"{path} does not exist; the CLIP score needs the captions in words, all else goes without --clip.")
    for i in numbers:
        if not 0 <= k < len(captions.get(i, ())):
            raise BadInput(f"--caption-index {k}: image {i} of {folder} has {len(captions.get(i, ()))} captions in words, "
                           "counted from 0; choose a lower one.")
    return [captions[i][k] for i in numbers]


def evaluate(args):
    """Scores -> dict for --json on process 0, None on the others."""
    reference, numbers = read_pictures(args.reference)
    samples, made = read_samples(args.sample, args.reference)
    position = {number: i for i, number in enumerate(numbers)}
    strangers = [number for number in made if number not in position]
    if strangers:
        raise BadInput(f"{args.sample} has an image of caption {strangers[0]}, {args.reference} no picture {strangers[0]}.png; "
                       "give the split that the images were made for.")
    if samples.size != reference.size:
        raise BadInput(f"{args.sample} has images of {size_text(samples.size)}, {args.reference} of "
                       f"{size_text(reference.size)}; compare sets of one size.")
    texts = caption_texts(args.reference, made, args.caption_index) if args.clip else None
    device = join_processes(args.device)
    extractor = extractor_from(args, device)
    sources = {"samples": samples}
    if args.vae:
        sources["VAE reconstructions"] = Reconstructions(reference, VAE(args.vae, device))
    pools = {name: load_set(source, extractor, ("kid",), batch_size=args.batch_size)
             for name, source in {"reference": reference, **sources}.items()}
    clip = None
    if args.clip:
        clip = clip_scores(Clip(args.clip, device), samples, texts, args.batch_size)
    if rank():
        return None
    first, place = distinct(reference, args.batch_size)
    candidates = pools["reference"].pool[first]
    truths = {"samples": place[[position[number] for number in made]], "VAE reconstructions": place}
    result = {"features": args.features, "n": samples.n, "candidates": len(first), "sample": str(args.sample),
              "reference": str(args.reference), "any_weights": args.any_weights, "retrieval": {}}
    for name in sources:
        scores = retrieval(pools[name].pool, candidates, truths[name])
        result["retrieval"][name] = {
            f"top-{k}": dict(zip(("accuracy", "chance", "shuffled mean", "shuffled highest"), values, strict=True))
            for k, values in scores.items()}
    if clip is not None:
        result["CLIP score"], result["clip"] = clip.mean().item(), str(args.clip)
    return result


def lines(result):
    """The text for stdout."""
    what = FEATURES[result["features"]]["retrieval"]
    for name, scores in result["retrieval"].items():
        for k, score in scores.items():
            yield (f"{what} {k} of {name} (n = {result['n'] if name == 'samples' else result['candidates']}): "
                   f"{score['accuracy']:.4f}, chance {score['chance']:.4f}; captions shuffled {SHUFFLES} times: mean "
                   f"{score['shuffled mean']:.4f}, highest {score['shuffled highest']:.4f}")
    if "CLIP score" in result:
        yield f"CLIP score (n = {result['n']}, {result['clip']}): {result['CLIP score']:.4f}"


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("reference", metavar="DATA/SPLIT", type=Path, help="split with {i}.png, for --clip with captions.json")
    add("sample", metavar="SAMPLES", type=Path, help="folder or npz of generated images")
    add_network_arguments(parser)
    parser.set_defaults(features="efficientnet-lite0")
    add("--clip", metavar="SOURCE", help="CLIP's folder or hub name: also the CLIP score")
    add("--caption-index", type=int, default=0, help="which caption of an image the CLIP score takes; default 0")
    add("--vae", metavar="SOURCE", help="also score the split's pictures through this VAE: folder or hub name")
    add("--json", metavar="OUT", help="also write the scores and what they were made of here")
    return parser.parse_args()


def main():
    run(evaluate, lines, parse_args())


if __name__ == "__main__":
    run_script(main)
