"""Other ways to end alignment than at a fixed step: the gradient trigger, and loss weights that decay.

The trigger (arXiv 2505.16792, appendix A) compares the gradients of alignment and denoising loss w.r.t. the weights of
one block. Once they point away from each other, alignment has done its work and is switched off.
"""
import logging
import math

import torch
from accelerate.utils import broadcast
from torch.utils.data import default_collate

from data_io.loader import StepBatches, step_noise
from loss import weighted_sum
from runtime.errors import UserError
from runtime.setup import to_device
from training.fsdp import is_sharded, whole

COSINE_COLUMN = "cosine"  # the mean, which decides; single timesteps are cosine_0.02 and so on
HEADROOM = 16  # fp16: divide the loss scale by this, as an overflow here does not lower it

logger = logging.getLogger("haste")


def align_decay(kind, step, end):
    """Factor on the alignment losses at `step` of Phase I, which ends at step `end` at the latest.

    none: 1. linear: 1 - step / end. cosine: (1 + cos(pi step / end)) / 2.
    """
    if kind == "none":
        return 1.0
    return 1 - step / end if kind == "linear" else (1 + math.cos(math.pi * step / end)) / 2


def check_trigger(args, reached):
    """Fill in --trigger-block; raises UserError for a trigger that can never decide.

    `reached` is the deepest block, 1-based, that has a gradient of an alignment loss; 0 if there is no such loss.
    """
    if not reached:
        raise UserError("--early-stop-trigger gradient compares the gradient of an alignment loss, and this run has "
                        "none; give --enc-type and a coefficient above 0, or leave the trigger at step.")
    args.trigger_block = args.trigger_block or reached
    if args.trigger_block > reached:
        raise UserError(f"--trigger-block {args.trigger_block} has no gradient of the alignment loss, which reaches "
                        f"the blocks 1 to {reached}; choose one of them.")
    if len(set(trigger_columns(args))) <= len(args.trigger_timesteps):
        times = " ".join(map(str, args.trigger_timesteps))
        raise UserError(f"--trigger-timesteps {times} must be different numbers from 0 to 1.")
    if args.trigger_start >= args.early_stop_point:
        raise UserError(f"--trigger-start {args.trigger_start} is not before --early-stop-point "
                        f"{args.early_stop_point}, where alignment ends in any case; lower the one or raise the other.")


def trigger_columns(args):
    """Columns of metrics.csv for what gradient_cosine measures."""
    gradient = args.early_stop_trigger == "gradient"
    return [COSINE_COLUMN, *(f"{COSINE_COLUMN}_{t:g}" for t in args.trigger_timesteps)] if gradient else []


def is_trigger_step(args, step):
    """Whether the gradients are compared after `step` steps of Phase I."""
    since = step - args.trigger_start
    return (args.early_stop_trigger == "gradient" and since >= 0 and since % args.trigger_every == 0
            and step < args.early_stop_point)


def gradient_cosine(trainer):
    """{column: cosine}, the same on all processes. All call it together, each with its part of the images.

    Per timestep t: the cosine between the gradients of the weighted alignment losses and of L_diff, both at t, w.r.t.
    all weights of block args.trigger_block (0 where a loss does not reach). The mean over the timesteps decides. Losses
    are averaged over all args.trigger_samples images: a small batch's noise would pull the cosine towards 0.

    Images and noise are those of step 0 at batch size args.trigger_samples, so a run's cosines depend on its weights
    alone. Gradients, random streams and fp16's scaler are left as they were: the run stays the same bit for bit.
    """
    args, accelerator, model = trainer.args, trainer.accelerator, trainer.model
    process, processes = accelerator.process_index, accelerator.num_processes
    order = StepBatches(len(trainer.dataset), args.trigger_samples, args.seed, 0, 1, process, processes)
    [samples], draws = order, step_noise(args.seed, 0, *order.places, model.latent_shape)
    micro = args.batch_size // (processes * args.gradient_accumulation_steps)
    blocks = model.blocks if hasattr(model, "blocks") else model.joint_blocks
    parameters = list(blocks[args.trigger_block - 1].parameters())
    sums = torch.zeros(len(args.trigger_timesteps), 2, sum(p.numel() for p in parameters), device=accelerator.device)
    scale = accelerator.scaler.get_scale() / HEADROOM if accelerator.scaler is not None else 1.0

    for start in range(0, len(samples), micro):
        batch = default_collate([trainer.dataset[sample] for sample in samples[start:start + micro]])
        mine = {name: to_device(value[start:start + micro], accelerator.device) for name, value in draws.items()}
        x, y, target = trainer.inputs(batch, mine)
        for both, t in zip(sums, args.trigger_timesteps, strict=True):
            for which, total in enumerate(both):  # one forward pass each: compiled models and FSDP allow one backward
                times = torch.full((len(x),), t, device=x.device)
                terms = trainer.loss_fn(model, x, y, target, times, mine["noise"])
                loss = (weighted_sum(terms, trainer.weights), terms["denoise"].mean())[which]
                total.add_(gradient(accelerator, scale * loss, model, parameters), alpha=len(x))

    cosines = []
    for both in sums:
        alignment, denoising = accelerator.reduce(both, reduction="sum").double()
        cosines.append(alignment @ denoising / (alignment.norm() * denoising.norm()))
    cosines = torch.stack(cosines)
    values = broadcast(torch.cat([cosines.mean()[None], cosines])).tolist()
    measured = dict(zip(trigger_columns(args), values, strict=True))
    logger.info(f"step {trainer.step}: gradients of alignment and denoising by block {args.trigger_block}, "
                + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    return measured


def gradient(accelerator, loss, model, parameters):
    """Gradient of `loss` w.r.t. `parameters` as one float32 vector. Leaves no .grad and calls no DDP hook.

    FSDP supports backward() only, which averages over the processes.
    """
    if not is_sharded(accelerator):
        parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().float() for part in parts])
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    model.zero_grad(set_to_none=True)
    return torch.cat([whole(part).flatten().float() for part in parts])
