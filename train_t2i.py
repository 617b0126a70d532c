"""Train an MMDiT on captioned latents with HASTE: feature and attention alignment, off at the early-stop point.

    accelerate launch train_t2i.py --enc-type dinov2-vit-b --data-dir DATA --exp-name t2i_haste
    accelerate launch train_t2i.py --preset mmdit-haste --data-dir DATA --exp-name mmdit_haste
    accelerate launch train_t2i.py --config exps/t2i_haste/args.json --exp-name t2i_haste_1 --seed 1

Only model, data and condition differ from train.py. Data have the layout of U-ViT's COCO scripts, see dataset.py. Each
time an image is used, one of its captions is drawn at random; with probability --cfg-prob it is dropped. Number and
width of the text tokens are read from the data. Defaults are the published run.
"""
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from models.mmdit import MMDIT_CONFIGS, MMDiT_models
from runtime.errors import UserError, run_script
from runtime.flags import Parser
from training.config import add_training_flags, finalize_args
from training.presets import parse_with_preset


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("this task").add_argument
    add("--model", choices=MMDIT_CONFIGS, default="MMDiT", help="default MMDiT")
    add("--data-dir", default="../data/coco256_features", help="folder with train/ and empty_context.npy")
    add("--zero-init", action="store_true", help="adaLN-zero: v = 0 at the start (default: PyTorch's, as published)")
    add_training_flags(parser)
    args = parse_with_preset(parser, "train_t2i.py")
    finalize_args(args, MMDIT_CONFIGS[args.model])
    return args


def main():
    args = parse_args()
    from accelerate.utils import set_seed  # late: a wrong flag is refused before these load

    from data_io.latent_scale import PIXELS
    from dataset import CaptionedImages
    from training.start import align_and_train, logger, model_arguments, needs_images, open_run

    if args.vae == PIXELS:
        raise UserError("--vae none, training on pixels, is for train.py; give train_t2i.py the VAE of its latents.")
    with open_run(args) as (accelerator, run, found):
        dataset = CaptionedImages(args.data_dir, "train", args.resolution, args.seed,
                                  images=needs_images(args, found[1]))
        if dataset.texts is None:
            logger.info(f"{dataset.folder} has no captions.json: previews are without captions")
        args.context_shape = list(dataset.context_shape)  # saved in the checkpoint, to sample from own texts
        sizes = model_arguments(args, MMDIT_CONFIGS[args.model], dataset.moments_shape)
        set_seed(args.seed)
        model = MMDiT_models[args.model](context_dim=args.context_shape[1], zero_init=args.zero_init, **sizes)
        align_and_train(args, accelerator, run, found, model, dataset, dataset.empty_context)


if __name__ == "__main__":
    run_script(main, continues=True)
