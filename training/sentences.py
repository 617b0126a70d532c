"""What a run logs about itself: at its start, and why a loss is not finite."""
import logging

from accelerate.utils import gather_object

from data_io.loader import StepBatches, load_noise
from loss import ALIGNMENT_LOSSES
from runtime.setup import to_device
from training.config import EARLY_STOP_512, loss_weights
from training.presets import NEVER, PRESETS
from training.step import ema_decay

LARGEST_LATENT = 1e4  # those of a VAE are about 1

logger = logging.getLogger("haste")


def describe_alignment(args, config):
    """One line: what is aligned, with which weights, until when, and where the default comes from."""
    def by(name, default, whose):
        if args.preset and PRESETS[args.preset][1].get(name) == getattr(args, name):
            return f"by --preset {args.preset}"
        return whose if getattr(args, name) == default else f"by --{name.replace('_', '-')}"

    target = "" if args.enc_type == "none" else f" to {args.enc_type}"
    if not loss_weights(args):
        return "no alignment"
    losses = [f"{name} x {getattr(args, row.flag):g} ({by(row.flag, row.default, 'by default')})"
              for name, row in ALIGNMENT_LOSSES.items() if getattr(args, row.flag) or (row.default and target)]
    stop = f"until step {args.early_stop_point}" if args.early_stop_point < NEVER else "to the end"
    default = EARLY_STOP_512 if args.resolution == 512 else config["early_stop_point"]
    whose = by("early_stop_point", default, f"by {args.model}'s default")
    if args.early_stop_fraction is not None:
        whose = "by --early-stop-fraction"
    if args.early_stop_trigger == "gradient":
        stop += ", or until the gradients point apart"
    return f"aligned{target}: {', '.join(losses)}, {stop} ({whose})"


def describe(trainer):
    """Log size, steps and devices of the run, its current phase, and what its steps are too few for."""
    args, accelerator, alignment = trainer.args, trainer.accelerator, "without alignment"
    if trainer.teacher:
        alignment = f"alignment until step {trainer.alignment_end_step}"
    elif trainer.load_teacher:
        alignment = f"alignment has ended at step {trainer.alignment_end_step}"
    logger.info(f"{sum(p.numel() for p in trainer.model.parameters()):,} parameters, {len(trainer.dataset):,} images "
                f"of {args.resolution} pixels, steps {trainer.step} to {trainer.max_steps}, "
                f"{accelerator.num_processes} process(es) on {accelerator.device}, precision "
                f"{accelerator.mixed_precision}, {alignment}")
    if trainer.dataset.vae:
        logger.info(f"images are encoded in each step by {args.vae}")
    if trainer.teacher and args.early_stop_trigger == "step" and trainer.max_steps <= args.early_stop_point < NEVER:
        logger.warning(f"Alignment never stops in this run: its early-stop point {args.early_stop_point} is not "
                       f"before the last step {trainer.max_steps}; --early-stop-fraction 0.25 would stop it at step "
                       f"{round(0.25 * trainer.max_steps)}.")
    due = [(trainer.step // every + 1) * every for every, part in (
        (args.sampling_steps, trainer.previews), (args.eval_steps, trainer.evaluation)) if part]
    if due and min(due) * (1 - ema_decay(args, min(due))) < 0.999:
        logger.info(f"previews and scores from step {min(due)} on use an EMA (--ema-decay {args.ema_decay}) that "
                    "still holds much of the initial weights; --ema-warmup or a smaller decay suits a short run")


def first_not_finite(trainer, step):
    """Why the losses of `step` are not finite, and what to do, if latents or teacher are the cause; else None.

    Makes the inputs of that step again. All processes call it together.
    """
    args, accelerator, found = trainer.args, trainer.accelerator, None
    order = StepBatches(len(trainer.dataset), args.batch_size, args.seed, step - 1, step, accelerator.process_index,
                        accelerator.num_processes, args.gradient_accumulation_steps)
    for ids, draws in zip(order, load_noise(order, trainer.model.latent_shape, False), strict=True):
        on_device = {name: to_device(value, accelerator.device) for name, value in draws.items()}
        x, _, target = trainer.inputs(trainer.dataset.batch(ids), on_device)
        outputs = [] if target is None else [*target.features, *(part for qk in target.attention.values()
                                                                 for part in (qk.q, qk.k))]
        if not (largest := x.abs().max().item()) < LARGEST_LATENT:
            found = (f"The latents of the data reach {largest:.3g}: see that --data-dir was encoded by the VAE that "
                     "the run is for, and is in the layout that this script reads.")
        elif not all(value.isfinite().all() for value in outputs):
            found = "The teacher's output is not finite: get --enc-weights again, or give --enc-precision no."
    return next(filter(None, gather_object([found])), None)
