"""Sample images from a checkpoint of train_t2i.py: of the captions of {data}/val, or of your own texts.

    torchrun --nproc_per_node=8 generate_t2i.py --ckpt exps/t2i_haste/checkpoints/0250000.pt --data-dir DATA
    python generate_t2i.py --ckpt exps/t2i_haste/checkpoints/0250000.pt --prompt "a red bus" --prompt "two cats"

All that generate.py's docstring says holds here. Image {i:06d}.png is made from caption --caption-index of image i of
{data}/val, from its tokens on disk; own texts go through --text-encoder, which must be the one of the data. The
captions are in captions.txt beside the pictures, a line each in the order of the names, where they are known in words.
Folders of own texts begin with {model}-{name of the --prompts file} or, with --prompt, {model}-prompts-{hash of the texts}.
Defaults are the paper's protocol on COCO: SDE, 250 steps, guidance 2.25, one image of each of 40,192 captions.
"""
import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from dataset import CaptionedImages
from generate import add_sampling_arguments, make_images, read_checkpoint, ready, sample_folder, setup, write_outputs
from models.mmdit import MMDIT_CONFIGS, MMDiT_models
from runtime.errors import UserError, run_script
from runtime.files import atomic_write
from runtime.setup import end_processes
from sampling.pipeline import CLIP


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sampling_arguments(parser)
    parser.set_defaults(mode="sde", num_steps=250, cfg_scale=2.25)
    add = parser.add_argument
    add("--model", choices=MMDIT_CONFIGS, help="default: the checkpoint's, else MMDiT")
    add("--data-dir", default="../data/coco256_features", help="folder with val/ and empty_context.npy")
    add("--num-fid-samples", type=int, default=40_192, help="images to make, at most one per caption (default 40192)")
    add("--caption-index", type=int, default=0, help="which caption of each image of val (default 0, the first)")
    add("--prompt", action="append", default=[], help="own text instead of the captions of val; repeat for more")
    add("--prompts", help="file of own texts, a line each")
    add("--text-encoder", default=CLIP, help="of own texts: hub name or local folder")
    return parser.parse_args()


def read_prompts(args):
    """The texts of --prompt and --prompts."""
    if args.prompts is None:
        return args.prompt
    try:
        lines = Path(args.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {args.prompts} cannot be read ({error}); give a text file, a line per image.") from error
    prompts = [*args.prompt, *(line for line in lines if line.strip())]
    if not prompts:
        raise UserError(f"--prompts {args.prompts} holds no text; give a line per image.")
    return prompts


def prompts_name(args, prompts):
    """What a folder of own texts is called: as their file or, of texts on the command line, by a hash, so that none mix."""
    if not args.prompt:
        return Path(args.prompts).stem
    return f"prompts-{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]}"


class Captions(NamedTuple):
    """What to sample: image number -> its file's number, its caption in words (None: unknown), its tokens (L, C)."""

    numbers: list
    texts: list | None
    tokens: Callable
    empty: torch.Tensor  # (L, C), the tokens of no caption


def own_texts(args, texts, device):
    """`texts` through --text-encoder, one at a time, so that none depends on its neighbours in a batch."""
    from encoders.text import TextEncoder
    encoder = TextEncoder(args.text_encoder, device, length=args.context_shape and args.context_shape[0])
    return Captions(list(range(len(texts))), texts, lambda i: encoder([texts[i]])[0], encoder([""])[0])


def val_captions(args):
    """Caption --caption-index of each image of {data}/val."""
    k, data = args.caption_index, CaptionedImages(args.data_dir, "val", args.resolution, images=False, latents=False)
    for number, count in zip(data.indices, data.counts, strict=True):
        if not 0 <= k < count:
            raise UserError(f"--caption-index {k}: image {number} of {data.folder} has captions 0 to {count - 1}.")
    texts = [data.text(i, k) for i in range(len(data))] if data.texts else None
    return Captions(data.indices, texts, lambda i: data.condition(i, k), data.empty_context)


def main():
    args = parse_args()
    state = setup(args)
    weights, sizes, vae = read_checkpoint(args, state.device, MMDIT_CONFIGS, "context_embedder.weight", model="MMDiT",
                                          context_shape=None)
    prompts, name = read_prompts(args), args.model
    if prompts:  # what is not used must not tell two runs apart
        name = f"{args.model}-{prompts_name(args, prompts)}"
        args.data_dir, args.caption_index, args.prompt, args.prompts = None, None, prompts, None
        captions = own_texts(args, [" ".join(text.split()) for text in prompts], state.device)
    else:
        args.text_encoder, captions = None, val_captions(args)
    shape, width = list(captions.empty.shape), sizes["context_dim"]
    if shape != (args.context_shape or [shape[0], width]):
        raise UserError(f"{args.ckpt} takes text of {args.context_shape or f'width {width}'}, {args.data_dir or args.text_encoder} "
                       f"gives (tokens, width) = {shape}; use the text encoder and length it was trained with.")
    if state.is_main_process and captions.texts is None:
        print(f"{args.data_dir}/val has no captions.json: there will be no captions.txt")
    if args.num_fid_samples > len(captions.numbers):
        args.num_fid_samples = len(captions.numbers)
        if state.is_main_process:
            print(f"there are {args.num_fid_samples} captions: one image of each is made")
    model = ready(MMDiT_models[args.model](**sizes), weights, args, state.device)
    folder = sample_folder(args, name)

    def path_of(i):
        return folder / f"{captions.numbers[i]:06d}.png"

    make_images(args, folder, model, vae, lambda i, rng: (captions.tokens(i), captions.empty), path_of)
    texts = captions.texts and captions.texts[:args.num_fid_samples]
    if state.is_main_process and texts:
        with atomic_write(folder / "captions.txt") as file:
            file.writelines(f"{text}\n".encode() for text in texts)
    write_outputs(args, folder, path_of, texts=texts)
    end_processes()


if __name__ == "__main__":
    run_script(main)
