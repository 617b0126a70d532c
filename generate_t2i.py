"""Sample images from a checkpoint of train_t2i.py: of the captions of {data}/val, or of your own texts.

    torchrun --nproc_per_node=8 generate_t2i.py --ckpt exps/t2i_haste/checkpoints/0250000.pt --data-dir DATA
    python generate_t2i.py --ckpt exps/t2i_haste/checkpoints/0250000.pt --prompt "a red bus" --prompt "two cats"
    python generate_t2i.py --ckpt exps/t2i_haste/checkpoints/0250000.pt --prompts prompts.txt --cfg-scale 4 --seed 1

Works like generate.py. Image {i:06d}.png is made from caption --caption-index of image i of {data}/val, by its tokens
on disk. Own texts are encoded by --text-encoder, which must be the encoder of the data. captions.txt, beside the
images, lists the captions in the order of the file names, one per line, if their text is known.
Folders of own texts begin with {model}-{name of the --prompts file} or, with --prompt, {model}-prompts-{hash}.
Defaults are the paper's protocol on COCO: SDE, 250 steps, guidance 2.25, one image of each of 40,192 captions.
"""
import hashlib
import json

import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import torch

from dataset import CaptionedImages
from encoders.text import CLIP, TextEncoder
from models.checkpoint import weights_digest
from models.mmdit import MMDIT_CONFIGS
from runtime.errors import UserError, run_script
from runtime.files import atomic_write
from runtime.flags import Parser, whole
from runtime.setup import end_processes
from sampling.config import add_sampling_flags
from sampling.images import MAX_IMAGES, open_checkpoint, sample_folder, sample_images, start
from sampling.prompts import read_prompts


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("this task").add_argument
    add("--model", choices=MMDIT_CONFIGS, help="default: the checkpoint's")
    add("--data-dir", default="../data/coco256_features", help="folder with val/ and empty_context.npy")
    add("--num-fid-samples", type=whole(1, MAX_IMAGES), default=40_192, help="images to make, at most one for "
        "each image of val (default 40192)")
    add("--caption-index", type=int, default=0, help="which caption of each image of val (default 0, the first)")
    add("--prompt", action="append", default=[], help="own text instead of the captions of val; repeat for more")
    add("--prompts", help="file of own texts, a line each")
    add("--text-encoder", default=CLIP, help="of own texts: hub name or local folder")
    add("--num-classes", type=int, help="no effect: the published script takes it, too, and text has no classes")
    add_sampling_flags(parser)
    parser.set_defaults(mode="sde", num_steps=250, cfg_scale=2.25, context_shape=None)
    args = parser.parse_args()
    del args.num_classes
    return args


def own_texts(args, texts, state):
    """(file numbers, texts, tokens(i) -> (L, C), tokens of the empty text (L, C), hash of the encoder)."""
    encoder = TextEncoder(args.text_encoder, state.device, length=args.context_shape and args.context_shape[0])
    if state.is_main_process and (count := encoder.count_cut(texts)):
        print(f"{count} of {len(texts)} texts are longer than {encoder.length} tokens: their ends are not seen")
    # One at a time, so that no text depends on its neighbours in a batch.
    return (list(range(len(texts))), texts, lambda i: encoder([texts[i]])[0], encoder([""])[0],
            weights_digest(encoder.model))


def val_captions(args):
    """The same for caption --caption-index of each image of {data}/val; texts is None if only tokens are stored.

    The hash covers the tokens of the first caption and of the empty text, which depend on the encoder.
    """
    k, data = args.caption_index, CaptionedImages(args.data_dir, "val", args.resolution, images=False, latents=False)
    for number, count in zip(data.indices, data.counts, strict=True):
        if not 0 <= k < count:
            raise UserError(f"--caption-index {k}: image {number} of {data.folder} has captions 0 to {count - 1}.")
    texts = [data.text(i, k) for i in range(len(data))] if data.texts else None
    seen = hashlib.sha256(torch.stack([data.condition(0, k), data.empty_context]).numpy()).hexdigest()
    return data.indices, texts, lambda i: data.condition(i, k), data.empty_context, seen


def main():
    args = parse_args()
    state = start(args)
    (prompts, name), own = read_prompts(args), bool(args.prompt or args.prompts)
    model, vae, identity = open_checkpoint(args, "MMDiT", state.device)
    if own:
        numbers, texts, tokens, empty, seen = own_texts(args, prompts, state)
        args.data_dir, args.caption_index, args.prompt, args.prompts = None, None, prompts, None  # not used: not saved
    else:
        numbers, texts, tokens, empty, seen = val_captions(args)
        args.text_encoder = None
    shape, width = list(empty.shape), model.context_embedder.in_features
    if shape != (args.context_shape or [shape[0], width]):
        raise UserError(f"{args.ckpt} takes text of {args.context_shape or f'width {width}'}, "
                        f"{args.data_dir or args.text_encoder} gives (tokens, width) = {shape}; use the text encoder "
                        "and length it was trained with.")
    if state.is_main_process and texts is None:
        print(f"{args.data_dir}/val has no captions.json: there will be no captions.txt")
    if state.is_main_process and args.num_fid_samples > len(numbers):
        print(f"there are {len(numbers)} captions: one image of each is made")
    listed = hashlib.sha256(json.dumps([numbers, texts]).encode()).hexdigest()
    identity |= {"tokens_sha256": seen, "captions_sha256": None if own else listed}
    folder = sample_folder(args, f"{args.model}-{name}" if own else args.model, state, identity)
    names = [f"{number:06d}" for number in numbers[:args.num_fid_samples]]
    texts = texts and texts[:len(names)]
    if state.is_main_process and texts:
        with atomic_write(folder / "captions.txt") as file:
            file.writelines(f"{text}\n".encode() for text in texts)
    sample_images(args, state, model, vae, folder, lambda i, rng: (tokens(i), empty), names, texts=texts)
    end_processes()


if __name__ == "__main__":
    run_script(main, continues=True)
