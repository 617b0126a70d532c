"""Train a SiT on ImageNet latents with HASTE: feature and attention alignment, switched off at the early-stop point.

    accelerate launch train.py --model SiT-XL/2 --enc-type dinov2-vit-b --data-dir DATA --exp-name sitxl_haste

One process on a CPU or GPU: the same with `python train.py`. The same command again continues from the newest
checkpoint of {output-dir}/{exp-name}, which also holds log.txt, args.json, metrics.csv and previews/. Data are read
in the layout of dataset.py; --enc-type none is plain SiT, --attn-coeff 0 is REPA. Defaults are the paper's run; its
other runs have names, which --preset list shows.
"""
import argparse
import functools

import torch
from accelerate.utils import set_seed

from dataset import PIXELS, LatentImages, PixelImages
from encoders.teachers import TEACHERS, Teacher, load_vit
from evaluations.features import FEATURES, PRESETS
from evaluations.scores import METRICS
from loss import SILoss
from models.sit import SIT_CONFIGS, SiT_models
from runtime import memory
from runtime.errors import LARGEST_SEED, MOST_CLASSES, UserError, check_bounds, run_script
from training.early_stop import check_trigger
from training.presets import parse_with_preset
from training.start import MOST_WORKERS, make_accelerator
from training.trainer import needs_images, train

EARLY_STOP_512 = 300_000  # the paper's switch at 512 px, whatever the model
INF, BELOW_1 = float("inf"), 1 - 2 ** -53
BOUNDS = {  # argument of both training scripts -> lowest, highest
    **dict.fromkeys(("batch_size", "max_train_steps", "log_every", "checkpointing_steps", "gradient_accumulation_steps",
                     "epochs", "attn_heads", "enc_blocks", "enc_size", "eval_samples", "eval_num_steps", "resolution",
                     "trigger_every", "trigger_samples", "trigger_block"), (1, INF)),
    "num_classes": (1, MOST_CLASSES), "seed": (0, LARGEST_SEED), "trigger_threshold": (-1, 1),
    **dict.fromkeys(("sampling_steps", "eval_steps", "resume_step", "checkpoint_minutes", "keep_checkpoints", "keep_every",
                     "max_skipped_steps", "num_workers", "early_stop_point", "learning_rate", "max_grad_norm",
                     "adam_weight_decay", "adam_epsilon", "proj_coeff", "attn_coeff", "trigger_start"), (0, INF)),
    **dict.fromkeys(("cfg_prob", "ema_decay"), (0, 1)), **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, BELOW_1))}


def add_training_arguments(parser):
    """Arguments of both training scripts."""
    flag = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--output-dir", default="exps", help="folder of all runs (default exps)")
    add("--exp-name", required=True, help="name of this run, a folder in --output-dir")
    add("--logging-dir", default="logs", help="tracker files, inside --output-dir (default logs)")
    add("--report-to", choices=["wandb", "tensorboard", "none"], default="wandb",
        help="tracker beside log.txt and metrics.csv (default wandb)")
    add("--log-every", type=int, default=50, help="steps between metrics, each a sync with the device (default 50)")
    add("--sampling-steps", type=int, default=10_000, help="steps between preview grids, 0 = none (default 10000)")
    add("--resume-step", type=int, default=0, help="continue from this checkpoint (default 0: the newest)")
    add("--resolution", type=int, default=256, help="image side in pixels (default 256)")
    add("--batch-size", type=int, default=256, help="images a step over all processes (default 256)")
    add("--vae", default="stabilityai/sd-vae-ft-mse", help="VAE of previews and scores: hub name or diffusers folder; "
        "none = no VAE, the network is trained on the pixels of DATA/images (train.py)")
    add("--eval-steps", type=int, default=0, help="steps between scores of the EMA's samples, 0 = none (default 0)")
    add("--eval-samples", type=int, default=5000, help="images made for a score (default 5000)")
    add("--eval-num-steps", type=int, default=50, help="Euler steps that make them, without guidance (default 50)")
    add("--eval-metrics", nargs="+", choices=METRICS, default=["fid", "kid"], help="default fid kid; pr: precision and recall")
    add("--eval-ref", help="what they are compared with: npz, statistics file or folder of images")
    add("--eval-features", choices=FEATURES, default="inception", help="features of the scores (default inception)")
    add("--eval-preset", choices=PRESETS, default="adm", help="how Inception is fed: adm (default), or pytorch-fid for COCO")
    add("--eval-weights", help="weights of that network: a file (default: from the hub, or the embedded one)")
    add("--enc-type", default="dinov2-vit-b", help=f"teacher: {', '.join(TEACHERS)} or none (default dinov2-vit-b)")
    add("--enc-weights", help="the teacher's weights: timm's or torch.hub's file (default: from the hub)")
    add("--enc-blocks", type=int, help="use only the teacher's first N blocks; features are those of the last one used, "
        "after the final norm (default all)")
    add("--enc-size", type=int, help="pixels a side that the teacher sees, its outputs being resampled to the "
        "student's tokens (default: its patch x the student's tokens a side, as published)")
    add("--enc-precision", choices=["no", "fp16", "bf16"], help="of the teacher alone (default: that of --mixed-precision)")
    add("--teacher-cache", help="folder that keeps the teacher's outputs for the whole data set, computed once, for "
        "data sets small enough (default: none)")
    add("--proj-coeff", type=float, default=0.5, help="weight of the feature loss (default 0.5)")
    add("--attn-coeff", type=float, default=0.5, help="weight of the attention loss (default 0.5)")
    add("--attn-layers", help='pairs student:teacher of 0-based blocks, such as "2:7,3:9,4:11" (default: the paper\'s)')
    add("--attn-heads", type=int, default=12, help="heads aligned, at most what both sides have (default 12)")
    add("--allow-tf32", action="store_true", help="TF32 matrix products on Ampere and newer")
    add("--mixed-precision", choices=["no", "fp16", "bf16"], help="default: fp16 or bf16 where accelerate's launcher or its "
        "configuration says so, else fp16, in float32 on a CPU; the flag wins over the launcher, whose \"no\" is also what it says "
        "unasked and does not count")
    add("--epochs", type=int, default=1400, help="upper limit on passes over the data (default 1400)")
    add("--max-train-steps", type=int, default=400_000, help="optimizer steps (default 400000)")
    add("--checkpointing-steps", type=int, default=50_000, help="steps between checkpoints (default 50000)")
    add("--checkpoint-minutes", type=float, default=0, help="a checkpoint also when this many minutes have passed since the "
        "last one, 0 = none (default 0)")
    add("--keep-checkpoints", type=int, default=0, help="keep the newest N only, 0 = all (default 0)")
    add("--keep-every", type=int, default=0, help="with --keep-checkpoints: and those of each multiple of N steps (default "
        "0: none)")
    add("--gradient-accumulation-steps", type=int, help="micro-batches a step (default: what accelerate's launcher says, else 1; "
        "the flag wins)")
    add("--learning-rate", type=float, default=1e-4, help="constant (default 1e-4)")
    add("--adam-beta1", type=float, default=0.9, help="default 0.9")
    add("--adam-beta2", type=float, default=0.999, help="default 0.999")
    add("--adam-weight-decay", type=float, default=0.0, help="default 0")
    add("--adam-epsilon", type=float, default=1e-8, help="default 1e-8")
    add("--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm (default 1)")
    add("--max-skipped-steps", type=int, help="stop when more steps in a row than this have a loss or gradient that is not "
        "finite; such a step changes no weight (default 0, for gradients under fp16's scaler 20)")
    add("--ema-decay", type=float, default=0.9999, help="of the weights' average, per step (default 0.9999)")
    add("--seed", type=int, default=0, help="of weights, data order and noise (default 0)")
    add("--num-workers", type=int, help="loader processes per process, threads where nothing is decoded (default: the process's "
        f"share of the cores it may run on, at most {MOST_WORKERS})")
    add("--path-type", choices=["linear", "cosine"], default="linear", help="interpolant (default linear)")
    add("--prediction", choices=["v"], default="v", help="what the network predicts: the velocity")
    add("--weighting", choices=["uniform", "lognormal"], default="uniform", help="of t (default uniform)")
    add("--cfg-prob", type=float, default=0.1, help="share of conditions dropped for guidance (default 0.1)")
    add("--fused-attn", action=flag, default=True, help="fused attention (default on)")
    add("--compile", action="store_true", help="torch.compile the blocks of model and teacher: a minute more at the start")
    add("--grad-checkpointing", action="store_true", help="keep no activations inside blocks: less memory, more time")
    add("--qk-norm", action=flag, default=False, help="LayerNorm on q and k (default off)")
    add("--encoder-depth", type=int, help="1-based block whose output is projected (default: the paper's for the model)")
    add("--early-stop-point", type=int, help="first step without alignment (default: the paper's for the model)")
    add("--early-stop-trigger", choices=["step", "gradient"], default="step", help="gradient: alignment also ends, before that "
        "step, once its gradient points away from denoising's; see trigger.py (default step)")
    add("--trigger-start", type=int, default=50_000, help="steps before the gradients are first compared (default 50000)")
    add("--trigger-every", type=int, default=10_000, help="steps from one comparison to the next (default 10000)")
    add("--trigger-samples", type=int, default=2048, help="training images of a comparison, over all processes (default 2048)")
    add("--trigger-timesteps", type=float, nargs="+", default=[0.02, 0.1, 0.5, 0.8], help="default 0.02 0.1 0.5 0.8")
    add("--trigger-block", type=int, help="1-based block by whose weights the gradients are taken (default: the deepest that "
        "alignment reaches; the paper's 5 for SiT-B/2)")
    add("--trigger-threshold", type=float, default=-0.05, help="alignment ends when the mean cosine over the timesteps is "
        "less (default -0.05)")
    add("--align-decay", choices=["none", "linear", "cosine"], default="none", help="factor on both coefficients at step s of "
        "early-stop point E: linear 1 - s/E, cosine (1 + cos(pi s/E))/2 (default none: 1)")


def parse_pairs(text):
    """'2:7,3:9' -> [[2, 7], [3, 9]]."""
    try:
        pairs = [[int(block) for block in pair.split(":")] for pair in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise UserError(f'--attn-layers {text!r} is not understood; write student:teacher pairs such as "2:7,3:9,4:11".')
    return pairs


def resolve(args, config):
    """Fill in what depends on the model: encoder depth, pairs and early-stop point of its row in the config table."""
    if args.encoder_depth is None:
        args.encoder_depth = config["encoder_depth"]
    if args.early_stop_point is None:
        args.early_stop_point = EARLY_STOP_512 if args.resolution == 512 else config["early_stop_point"]
    args.attn_layers = parse_pairs(args.attn_layers) if args.attn_layers else [list(p) for p in config["attn_pairs"]]
    if args.enc_type == "none" or args.proj_coeff == args.attn_coeff == 0:
        args.enc_type, args.proj_coeff, args.attn_coeff = "none", 0.0, 0.0
    if args.enc_type not in (*TEACHERS, "none"):
        raise UserError(f"--enc-type {args.enc_type} is not known; use one of {', '.join(TEACHERS)} or none.")
    check_bounds(args, BOUNDS)
    if args.keep_every and not args.keep_checkpoints:
        raise UserError("--keep-every says what --keep-checkpoints spares; give both, or neither to keep all.")
    if args.eval_steps and not args.eval_ref:
        raise UserError("--eval-steps needs something to compare with; give --eval-ref an npz, statistics or folder.")
    if not 1 <= args.encoder_depth <= config["depth"]:
        raise UserError(f"--encoder-depth {args.encoder_depth} is outside 1 to {config['depth']}, the model's depth.")
    if any(student >= config["depth"] for student, _ in args.attn_layers):
        raise UserError(f"--attn-layers names a student block past {config['depth'] - 1}, the model's last.")
    if args.early_stop_trigger == "gradient":
        check_trigger(args)


def load_teacher(args, grid):
    """The Teacher that args ask for, with `grid` tokens a side."""
    blocks = [teacher for _, teacher in args.attn_layers] if args.attn_coeff else []
    return Teacher(load_vit(args.enc_type, args.enc_weights), grid, blocks, args.enc_blocks, features=args.proj_coeff > 0,
                   precision=args.enc_precision, input_size=args.enc_size)


def model_arguments(args, config, moments_shape):
    """Arguments that both kinds of model take, for latents of these moments."""
    channels, side, _ = moments_shape
    if side % config["patch_size"]:
        raise UserError(f"--model {args.model} cuts latents into patches of {config['patch_size']}, of which {side}, the "
                       f"latents' side at --resolution {args.resolution}, is no multiple; choose another patch.")
    return {"input_size": side, "in_channels": channels // 2, "encoder_depth": args.encoder_depth,
            "attn_layers": [student for student, _ in args.attn_layers] if args.attn_coeff else [],
            "z_dims": TEACHERS[args.enc_type][1:] if args.proj_coeff else (),
            "qk_norm": args.qk_norm, "fused_attn": args.fused_attn, "grad_checkpointing": args.grad_checkpointing}


def align_and_train(args, accelerator, run, model, dataset, y_null):
    """Train with the losses and the teacher that args ask for."""
    loss_fn = SILoss(args.path_type, args.weighting, args.attn_layers if args.attn_coeff else [], args.attn_heads)
    grid = model.input_size // model.patch_size
    teacher = None if args.enc_type == "none" else functools.partial(load_teacher, args, grid)
    with memory.explained(args, accelerator, model):
        train(args, accelerator, run, model, dataset, teacher, loss_fn, y_null)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_arguments(parser)
    add = parser.add_argument
    add("--model", choices=SIT_CONFIGS, default="SiT-XL/2", help="default SiT-XL/2")
    add("--data-dir", default="../data/imagenet256", help="folder with images/ and, for a VAE, vae-sd/, zips of "
        "them, or what `dataset_tools.py pack` made")
    add("--num-classes", type=int, default=1000, help="default 1000")
    add("--hflip", action="store_true", help="show every image as it is or mirrored, at random; needs "
        "DATA/vae-sd-hflip, or --vae none (default off, as published)")
    return parse_with_preset(parser, "train.py")


def main():
    args = parse_args()
    config = SIT_CONFIGS[args.model]
    resolve(args, config)
    if args.hflip and args.teacher_cache:
        raise UserError("--hflip shows images that --teacher-cache has no outputs of; give one of them.")
    accelerator, run = make_accelerator(args)
    with accelerator.local_main_process_first():  # it lists the files and keeps the index, which the others read
        kind = PixelImages if args.vae == PIXELS else LatentImages
        dataset = kind(args.data_dir, args.resolution, args.num_classes, images=needs_images(args, run), seed=args.seed,
                       hflip=args.hflip)
    sizes = model_arguments(args, config, dataset.moments_shape)
    set_seed(args.seed)
    model = SiT_models[args.model](num_classes=args.num_classes, **sizes)
    align_and_train(args, accelerator, run, model, dataset, torch.tensor(model.null_label))


if __name__ == "__main__":
    run_script(main)
