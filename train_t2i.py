"""Train an MMDiT on captioned latents with HASTE: feature and attention alignment, off at the early-stop point.

    accelerate launch train_t2i.py --enc-type dinov2-vit-b --data-dir DATA --exp-name t2i_haste

Everything but model, data and condition is train.py's. Data are read in the layout of U-ViT's COCO scripts, see
dataset.py; each visit to an image shows one of its captions at random, and with probability --cfg-prob none at all.
Width and number of the text tokens are those of the data. Defaults are the published run.
"""
import argparse

from accelerate.utils import set_seed

from dataset import PIXELS, CaptionedImages
from models.mmdit import MMDIT_CONFIGS, MMDiT_models
from runtime.errors import UserError, run_script
from train import add_training_arguments, align_and_train, model_arguments, resolve
from training.presets import parse_with_preset
from training.start import make_accelerator
from training.trainer import logger, needs_images


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    add = parser.add_argument
    add("--model", choices=MMDIT_CONFIGS, default="MMDiT", help="default MMDiT")
    add("--data-dir", default="../data/coco256_features", help="folder with train/ and empty_context.npy")
    add("--zero-init", action="store_true", help="adaLN-zero: v = 0 at the start (default: PyTorch's, as published)")
    return parse_with_preset(parser, "train_t2i.py")


def main():
    args = parse_args()
    config = MMDIT_CONFIGS[args.model]
    resolve(args, config)
    if args.vae == PIXELS:
        raise UserError("--vae none, training on pixels, is for train.py; give train_t2i.py the VAE of its latents.")
    accelerator, run = make_accelerator(args)
    dataset = CaptionedImages(args.data_dir, "train", args.resolution, args.seed, images=needs_images(args, run))
    if dataset.texts is None:
        logger.info(f"{dataset.folder} has no captions.json: previews are without captions")
    args.context_shape = list(dataset.context_shape)  # kept in the checkpoint, for sampling from own texts
    sizes = model_arguments(args, config, dataset.moments_shape)
    set_seed(args.seed)
    model = MMDiT_models[args.model](context_dim=args.context_shape[1], zero_init=args.zero_init, **sizes)
    align_and_train(args, accelerator, run, model, dataset, dataset.empty_context)


if __name__ == "__main__":
    run_script(main)
