"""The flags of train.py and train_t2i.py in groups, each with its range beside it, and what follows from the model."""
import argparse
import os
import sys
from pathlib import PurePath

from evaluations import FEATURES, METRICS, PRESETS
from loss import ALIGNMENT_LOSSES, uses
from models.layers import PROJECTORS
from runtime.errors import MAX_SEED, UserError
from runtime.flags import number, pixels, whole
from sampling.cache import CACHES
from training.schedule import SCHEDULES

EARLY_STOP_512 = 300_000  # the paper's switch at 512 px, whatever the model
# A worker decodes about 150 images/s of 256 px (benchmarks/README.md): 12 feed 1,800 images/s. Packed data need 1.
MAX_WORKERS = 12
PRECISIONS = ["no", "fp16", "bf16"]
BELOW_1 = 1 - 2 ** -53
# Larger values are typing errors, which would cost memory or hours before they show.
step, steps, images = whole(0, 10 ** 10), whole(1, 10 ** 10), whole(1, 10 ** 7)


def run_name(text):
    """A `type` for add_argument: the path of a folder inside --output-dir."""
    path = PurePath(text)
    if not path.parts or path.is_absolute() or ".." in path.parts or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a folder inside --output-dir; give a plain name.")
    return text


def enc_type(text):
    """A `type` for --enc-type: "list" prints the table and exits."""
    if text == "list":
        from encoders.teachers import teacher_list  # imports timm, which --help does not need
        print(teacher_list())
        sys.exit()
    return text


def add_training_flags(parser):
    """The flags of both training scripts. Defaults are the paper's run."""
    on_off = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--exp-name", type=run_name, required=True, help="name of this run, a folder in --output-dir")
    add("--output-dir", default="exps", help="folder of all runs (default exps)")
    add("--max-train-steps", type=steps, default=400_000, help="optimizer steps (default 400000)")
    add("--epochs", type=steps, default=1400, help="upper limit on passes over the data (default 1400)")
    add("--seed", type=whole(0, MAX_SEED), default=0, help="of weights, data order and noise (default 0)")

    add = parser.add_argument_group("data").add_argument
    add("--resolution", type=pixels, help="image side in pixels (default: that of the images; without "
        "images by latents and VAE, else 256)")
    add("--batch-size", type=images, default=256, help="images a step over all processes (default 256)")
    add("--num-workers", type=whole(0, 1024), help="loader processes per process; threads where nothing is decoded "
        f"(default: the process's share of the cores, at most {MAX_WORKERS})")
    add("--vae", help="VAE of previews and scores: hub name or diffusers folder; none: train on pixels, without a VAE "
        "(train.py) (default: the one that made the latents, by DATA/latents.json, else stabilityai/sd-vae-ft-mse)")
    add("--legacy", action=argparse.BooleanOptionalAction, help="no effect: REPA's script takes it")
    add("--latents-stats", metavar="FILE", help="train on (latent - mean) / std of each channel: .safetensors, .npz or "
        "LightningDiT's .pt with mean and std, or a latents.json (default: DATA/latents.json, else latent x 0.18215)")
    add("--cfg-prob", type=number(0, 1), default=0.1, help="share of conditions dropped for guidance (default 0.1)")

    add = parser.add_argument_group("model").add_argument
    add("--qk-norm", action=on_off, default=False, help="LayerNorm on q and k (default off)")
    add("--path-type", choices=["linear", "cosine"], default="linear", help="interpolant (default linear)")
    add("--weighting", choices=["uniform", "lognormal"], default="uniform", help="distribution of t (default uniform)")
    add("--time-shift", type=number(0.01, 100), default=1.0, metavar="S", help="train at S t / (1 + (S - 1) t): above "
        "1 more of t is noisy, for larger latents (default 1)")
    add("--prediction", choices=["v"], default="v", help="what the network predicts: the velocity")

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--init-from", metavar="CKPT", help="begin with the weights of this checkpoint, of ours or published, or an "
        "export: at step 0, with an optimizer of its own (default: at random)")
    add("--init-weights", choices=["ema", "model"], default="ema", help="its EMA or its trained weights (default ema)")
    add("--freeze", nargs="+", metavar="PATTERN", help='weights that stay as they are: names of parts or '
        'patterns, such as "blocks.[0-3]" x_embedder (default none)')

    add = parser.add_argument_group("alignment").add_argument
    for name, row in ALIGNMENT_LOSSES.items():
        add(f"--{row.flag.replace('_', '-')}", type=number(0), default=row.default,
            help=f"weight of the {name} loss (default {row.default:g})")
    add("--enc-type", type=enc_type, default="dinov2-vit-b", help="teacher, `--enc-type list` shows all, a comma list "
        "of several, or none (default dinov2-vit-b)")
    add("--enc-weights", help="the teacher's weights: a file of timm, torch.hub, transformers or the authors, a comma "
        "list for several teachers (default: from the hub)")
    add("--enc-blocks", type=whole(1), help="use the teacher's first N blocks only; features are the last one's, after "
        "the final norm (default all)")
    add("--enc-size", type=pixels, help="pixels a side that the teacher sees (default: its patch x the student's "
        "tokens a side, so that both have as many)")
    add("--resample", choices=["student", "teacher"], default="student", help="whose features and attention are "
        "resampled to the other's tokens, where --enc-size gives the teacher more or fewer (default student)")
    add("--teacher-cache", help="folder that keeps the teacher's outputs for all images, computed once (default: none)")
    add("--projector", choices=PROJECTORS, default="mlp", help="from the student's tokens to the teacher's width: "
        "REPA's MLP (default), one linear layer, or iREPA's convolution on the grid of tokens")
    add("--projector-kernel", type=int, choices=(1, 3, 5, 7), default=3, help="side of this convolution, in tokens "
        "(default 3)")
    add("--spatial-norm", type=number(0, 1), metavar="A", help="iREPA's normalisation of the teacher's features over "
        "the tokens, (y - A mean) / std; 0.6 there (default: none)")
    add("--encoder-depth", type=whole(1), help="1-based block whose output is projected (default: the paper's for the "
        "model)")
    add("--attn-layers", help='pairs student:teacher of 0-based blocks, such as "2:7,3:9,4:11" (default: the paper\'s)')
    add("--attn-teacher", type=whole(1), default=1, help="which of several teachers attention is aligned to (default "
        "1, the first)")
    add("--attn-heads", type=whole(1), default=12, help="heads aligned, at most what both sides have (default 12)")

    group = parser.add_argument_group("early stop")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--early-stop-point", type=step, help="first step without alignment (default: the paper's for "
           "the model)")
    either("--early-stop-fraction", type=number(1e-9, 1), metavar="F", help="early-stop point as a fraction of "
           "--max-train-steps")
    add("--align-decay", choices=["none", "linear", "cosine"], default="none", help="factor on the alignment losses at "
        "step s of early-stop point E: linear 1 - s/E, cosine (1 + cos(pi s/E))/2 (default none: 1)")
    add("--early-stop-trigger", choices=["step", "gradient"], default="step", help="gradient: alignment also ends once "
        "its gradient points away from denoising's, see training/early_stop.py (default step)")
    add("--trigger-start", type=step, default=50_000, help="step of the first comparison (default 50000)")
    add("--trigger-every", type=steps, default=10_000, help="steps between comparisons (default 10000)")
    add("--trigger-samples", type=images, default=2048, help="training images of a comparison (default 2048)")
    add("--trigger-timesteps", type=number(0, 1), nargs="+", default=[0.02, 0.1, 0.5, 0.8], metavar="T",
        help="t at which gradients are compared (default 0.02 0.1 0.5 0.8)")
    add("--trigger-block", type=whole(1), help="1-based block whose weights' gradients are compared (default: the "
        "deepest that alignment reaches; the paper: 5 for SiT-B/2)")
    add("--trigger-threshold", type=number(-1, 1), default=-0.05, help="alignment ends when the mean cosine over the "
        "timesteps is less (default -0.05)")

    add = parser.add_argument_group("optimizer").add_argument
    add("--learning-rate", type=number(0), default=1e-4, help="AdamW's, after warm-up (default 1e-4)")
    add("--lr-schedule", choices=SCHEDULES, default="constant", help="cosine and linear end at 0 (default constant)")
    add("--lr-warmup-steps", type=step, default=0, help="steps of linear warm-up (default 0)")
    add("--adam-beta1", type=number(0, BELOW_1), default=0.9, help="default 0.9")
    add("--adam-beta2", type=number(0, BELOW_1), default=0.999, help="default 0.999")
    add("--adam-weight-decay", type=number(0), default=0.0, help="default 0")
    add("--adam-epsilon", type=number(1e-20), default=1e-8, help="default 1e-8")
    add("--max-grad-norm", type=number(0), default=1.0, help="gradients are clipped to this norm (default 1)")
    add("--max-skipped-steps", type=step, help="stop after more steps in a row than this whose loss or gradient is "
        "not finite; such a step changes no weight (default 0; for gradients under fp16's scaler 20)")
    add("--ema-decay", type=number(0, 1), default=0.9999, help="EMA decay per step (default 0.9999)")
    add("--ema-warmup", action="store_true", help="for short runs: the decay after n steps is (1 + n) / (10 + n) at "
        "most (default off)")

    add = parser.add_argument_group("precision and speed").add_argument
    add("--mixed-precision", choices=PRECISIONS, help="default: fp16 or bf16 if accelerate's launcher says so, else "
        "fp16 on a GPU and float32 on a CPU. The flag wins over the launcher")
    add("--enc-precision", choices=PRECISIONS, help="of the teacher alone (default: that of --mixed-precision)")
    add("--allow-tf32", action="store_true", help="TF32 matrix products on Ampere and newer")
    add("--gradient-accumulation-steps", type=images, help="micro-batches a step (default: what accelerate's "
        "launcher says, else 1)")
    add("--grad-checkpointing", action="store_true", help="keep no activations inside blocks: less memory, more time")
    add("--fused-attn", action=on_off, default=True, help="fused attention (default on)")
    add("--compile", action="store_true", help="torch.compile the blocks of model and teacher: a minute more at the "
        "start")

    add = parser.add_argument_group("checkpoints").add_argument
    add("--checkpointing-steps", type=steps, default=50_000, help="steps between checkpoints (default 50000)")
    add("--checkpoint-minutes", type=number(0), default=0, help="also save when this many minutes have passed since "
        "the last checkpoint, 0 = never (default 0)")
    add("--keep-checkpoints", type=step, default=0, help="keep the newest N only, 0 = all (default 0)")
    add("--keep-every", type=step, default=0, help="with --keep-checkpoints: keep multiples of N steps too "
        "(default 0)")
    add("--resume-step", type=step, default=0, help="continue from this checkpoint (default 0: the newest)")

    add = parser.add_argument_group("logging").add_argument
    add("--log-every", type=steps, default=50, help="steps between rows of metrics.csv, each a sync with the device "
        "(default 50)")
    add("--sampling-steps", type=step, default=10_000, help="steps between preview grids, 0 = none (default 10000)")
    add("--report-to", choices=["wandb", "tensorboard", "none"], default="wandb", help="tracker beside log.txt and "
        "metrics.csv (default wandb)")
    add("--wandb-project", default="HASTE", metavar="NAME", help="default HASTE")
    add("--wandb-entity", metavar="NAME", help="user or team (default: wandb's own)")
    add("--wandb-tags", nargs="+", metavar="TAG", help="of the run (default: none)")
    add("--logging-dir", default="logs", help="tracker files, inside --output-dir (default logs)")

    add = parser.add_argument_group("scores").add_argument
    add("--eval-steps", type=step, default=0, help="steps between scores of the EMA's samples, 0 = none (default "
        "0)")
    add("--eval-samples", type=images, default=5000, help="images made for a score (default 5000)")
    add("--eval-num-steps", type=whole(1, 10 ** 5), default=50, help="Euler steps that make them, without guidance "
        "(default 50)")
    add("--eval-cache", choices=CACHES, default="none", help="skip work between these steps, as generate.py's --cache "
        "(default none)")
    add("--eval-cache-interval", type=whole(1, 10 ** 5), default=3, help="interval of --eval-cache (default 3)")
    add("--eval-metrics", nargs="+", choices=METRICS, default=["fid", "kid"], help="default fid kid; pr: precision, "
        "recall")
    add("--eval-ref", help="what they are compared with: npz, statistics file or folder of images")
    add("--eval-features", choices=FEATURES, default="inception", help="features of the scores (default inception)")
    add("--eval-preset", choices=PRESETS, default="adm", help="image preprocessing for Inception: adm (default), "
        "or pytorch-fid for COCO")
    add("--eval-weights", help="weights of that network: a file (default: from the hub; efficientnet-lite0's "
        "from a package)")


def loss_weights(args):
    """{name: weight} of the alignment losses that are trained."""
    weights = {name: getattr(args, row.flag) for name, row in ALIGNMENT_LOSSES.items()}
    return {name: weight for name, weight in weights.items() if weight > 0}


def aligned_pairs(args):
    """The pairs of blocks whose attention is compared; [] if no loss compares attention."""
    return args.attn_layers if uses(loss_weights(args), "student", "attention") else []


def parse_pairs(text):
    """'2:7,3:9' -> [[2, 7], [3, 9]]."""
    try:
        pairs = [[int(block) for block in pair.split(":")] for pair in text.split(",")]
    except ValueError:
        pairs = []
    if not pairs or any(len(pair) != 2 or min(pair) < 0 for pair in pairs):
        raise UserError(f"--attn-layers {text!r} is not understood; write student:teacher pairs such as "
                        '"2:7,3:9,4:11".')
    return pairs


def finalize_args(args, config):
    """Fill in defaults that depend on the model (`config`, its table row); refuse flags that contradict each other."""
    if args.encoder_depth is None:
        args.encoder_depth = config["encoder_depth"]
    from training.data_size import find_latents, find_resolution  # import torch, which --help does not need
    find_latents(args)
    args.resolution = find_resolution(args.resolution, args.data_dir, "images" if "num_classes" in args else "train",
                                      crop=vars(args).get("random_crop", False))
    if args.early_stop_fraction is not None:
        args.early_stop_point = round(args.early_stop_fraction * args.max_train_steps)
    elif args.early_stop_point is None:
        args.early_stop_point = EARLY_STOP_512 if args.resolution == 512 else config["early_stop_point"]
    args.attn_layers = parse_pairs(args.attn_layers) if args.attn_layers else [list(p) for p in config["attn_pairs"]]
    if args.enc_type == "none" or all(ALIGNMENT_LOSSES[name].teacher is None for name in loss_weights(args)):
        if args.enc_type != "none" and os.environ.get("RANK", "0") == "0":
            print(f"--enc-type {args.enc_type} has no effect: the weights of its losses are 0.", file=sys.stderr)
        args.enc_type = "none"
        vars(args).update({row.flag: 0.0 for row in ALIGNMENT_LOSSES.values() if row.teacher})
    if args.enc_type != "none":
        from encoders.teachers import split_teachers, teacher_row  # imports timm, which --help does not need
        teachers = [teacher_row(name) for name, _ in split_teachers(args.enc_type, args.enc_weights)]
        if args.attn_teacher > len(teachers):
            raise UserError(f"--attn-teacher {args.attn_teacher} is none of the {len(teachers)} that --enc-type names; "
                            "choose one of them.")
        if len(teachers) > 1 and not uses(loss_weights(args), "teacher", "features"):
            raise UserError(f"--enc-type names {len(teachers)} teachers, but attention is aligned to one of them only; "
                            "give --proj-coeff, or this one teacher.")
    if args.keep_every and not args.keep_checkpoints:
        raise UserError("--keep-every says what --keep-checkpoints spares; give both, or neither to keep all.")
    if args.eval_steps and not args.eval_ref:
        raise UserError("--eval-steps needs something to compare with; give --eval-ref an npz, statistics or folder.")
    if args.encoder_depth > config["depth"]:
        raise UserError(f"--encoder-depth {args.encoder_depth} is outside 1 to {config['depth']}, the model's depth.")
    if any(student >= config["depth"] for student, _ in args.attn_layers):
        raise UserError(f"--attn-layers names a student block past {config['depth'] - 1}, the model's last.")
    if args.early_stop_trigger == "gradient":
        from training.early_stop import check_trigger  # imports accelerate, which --help does not need
        reached = [args.encoder_depth] * any(ALIGNMENT_LOSSES[name].student != "attention"
                                             for name in loss_weights(args))
        reached += [student + 1 for student, _ in aligned_pairs(args)]
        check_trigger(args, max(reached, default=0))
