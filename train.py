"""Train a SiT on ImageNet latents with HASTE: feature and attention alignment, switched off at the early-stop point.

    accelerate launch train.py --model SiT-XL/2 --enc-type dinov2-vit-b --data-dir DATA --exp-name sitxl_haste
    accelerate launch train.py --preset sit-b-2-repa --data-dir DATA --exp-name sitb_repa
    accelerate launch train.py --config exps/sitb_repa/args.json --exp-name sitb_repa_1 --seed 1

On one device use `python train.py`. Run the same command again to continue from the newest checkpoint. The folder
{output-dir}/{exp-name} also holds log.txt, args.json, metrics.csv and previews/. --enc-type none trains a plain SiT.
Defaults are the paper's run; --preset list shows its other runs, REPA's and plain ones too.
"""
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from models.sit import SIT_CONFIGS, SiT_models
from runtime.errors import MAX_CLASSES, UserError, run_script
from runtime.flags import Parser, whole
from training.config import add_training_flags, finalize_args
from training.presets import parse_with_preset


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("this task").add_argument
    add("--model", choices=SIT_CONFIGS, default="SiT-XL/2", metavar="NAME", help=f"{', '.join(SIT_CONFIGS)} "
        "(default SiT-XL/2)")
    add("--data-dir", default="../data/imagenet256", help="folder with images/ and, for a VAE, vae-sd/, zips of them, "
        "or what `dataset_tools.py pack` made")
    add("--num-classes", type=whole(1, MAX_CLASSES), help="default: as many as the data's labels, 1000 for ImageNet")
    add("--encode-online", action="store_true", help="read images only, and encode them by --vae in each training step "
        "(default off: latents are read)")
    add("--hflip", action="store_true", help="random horizontal flip; needs "
        "DATA/vae-sd-hflip, --encode-online or --vae none (default off, as published)")
    add("--random-crop", action="store_true", help="with --encode-online: cut --resolution pixels out of larger "
        "images, at random")
    add_training_flags(parser)
    args = parse_with_preset(parser, "train.py")
    finalize_args(args, SIT_CONFIGS[args.model])
    for flag in ("hflip", "random_crop"):
        if getattr(args, flag) and args.teacher_cache:
            raise UserError(f"--{flag.replace('_', '-')} shows images that --teacher-cache has no outputs of; give one "
                            "of them.")
    return args


def main():
    args = parse_args()
    import torch  # late: a wrong flag is refused before these load
    from accelerate.utils import set_seed

    from encoders.online import class_layout
    from training.start import align_and_train, count_classes, model_arguments, needs_images, open_run

    with open_run(args) as (accelerator, run, found):
        layout = class_layout(vars(args), accelerator.device)
        with accelerator.local_main_process_first():  # it writes the file index, the others read it
            dataset = layout(args.data_dir, args.resolution, args.num_classes, images=needs_images(args, found[1]),
                             seed=args.seed, hflip=args.hflip)
        count_classes(args, dataset)
        args.class_names = dataset.class_names  # saved in the checkpoints
        sizes = model_arguments(args, SIT_CONFIGS[args.model], dataset.moments_shape)
        set_seed(args.seed)
        model = SiT_models[args.model](num_classes=args.num_classes, **sizes)
        align_and_train(args, accelerator, run, found, model, dataset, torch.tensor(model.null_label))


if __name__ == "__main__":
    run_script(main, continues=True)
