"""Sample images from a checkpoint of train.py: a folder of PNGs, an .npz for the ADM suite, and a preview grid.

    torchrun --nproc_per_node=8 generate.py --model SiT-XL/2 --ckpt exps/sitxl_haste/checkpoints/0400000.pt \\
        --mode sde --num-steps 250 --cfg-scale 1.65 --guidance-high 0.72
    python generate.py --ckpt exps/RUN/checkpoints/0400000.pt --num-fid-samples 72 --labels balanced --cfg-scale 4
    python generate.py --ckpt exps/RUN/checkpoints/0400000.pt --num-fid-samples 10000 --cfg-scale 1 --seed 1

On one device use `python generate.py`. Model, resolution, classes and path are read from the checkpoint. Image i
depends on --seed and i only, not on the number of processes or, up to rounding, on the batch size. Run the same
command again to make only the missing images. Output, in --sample-dir:
    {model}-{ckpt}-size-{R}-vae-{vae}-cfg-{w}-seed-{seed}-{mode}-high-{high}/{i:06d}.png, and beside it .npz (arr_0
    uint8 (n, R, R, 3)) and -grid.png
"""
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)

import numpy as np
import torch

from data_io.moments import read_names
from models.sit import SIT_CONFIGS
from runtime.errors import MAX_CLASSES, run_script
from runtime.flags import Parser, whole
from runtime.setup import end_processes
from sampling.config import add_sampling_flags
from sampling.images import GRID_IMAGES, MAX_IMAGES, open_checkpoint, sample_folder, sample_images, start


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("this task").add_argument
    add("--model", choices=SIT_CONFIGS, metavar="NAME", help=f"{', '.join(SIT_CONFIGS)} (default: the checkpoint's)")
    add("--num-classes", type=whole(1, MAX_CLASSES), help="default: the checkpoint's")
    add("--num-fid-samples", type=whole(1, MAX_IMAGES), default=50_000, help="images to make (default 50000)")
    add("--labels", choices=["random", "balanced"], default="random", help="classes drawn at random, or i mod classes "
        "(default random)")
    add("--class-names", dest="names_file", help="JSON file with the names of the classes in their order, to be "
        "written into the grid (default: the checkpoint's)")
    add_sampling_flags(parser)
    parser.set_defaults(class_names=None)
    return parser.parse_args()


def main():
    args = parse_args()
    state = start(args)
    model, vae, identity = open_checkpoint(args, "SiT", state.device)
    class_names = read_names(args.names_file, args.num_classes, True) if args.names_file else args.class_names
    folder = sample_folder(args, args.model, state, identity)

    def label(i, rng):
        return int(rng.integers(args.num_classes)) if args.labels == "random" else i % args.num_classes

    def condition(i, rng):
        return torch.tensor(label(i, rng)), torch.tensor(model.null_label)

    texts = None
    if class_names:
        shown = range(min(GRID_IMAGES, args.num_fid_samples))
        texts = [class_names[label(i, np.random.default_rng((args.global_seed, i)))] for i in shown]
    columns = args.num_classes if args.labels == "balanced" and args.num_classes <= 16 else None
    names = [f"{i:06d}" for i in range(args.num_fid_samples)]
    sample_images(args, state, model, vae, folder, condition, names, columns, texts)
    end_processes()


if __name__ == "__main__":
    run_script(main, continues=True)
