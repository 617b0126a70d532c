"""The training loop, for classes and for text; train.py and train_t2i.py bring model, data and teacher."""
import copy
import functools
import gc
import json
import logging
import math
import sys
import time

import torch
from accelerate.utils import broadcast_object_list
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from data_io.loader import NOISE_STREAM, StepBatches, load_batches, load_noise
from dataset import PIXELS, latent_scale
from encoders.teacher_cache import CachedTeacher
from encoders.vae import VAE, open_vae
from evaluations.during_training import Evaluation, score_names
from loss import sample_t
from models.checkpoint import load_weights, saved_steps
from runtime.errors import UserError
from runtime.files import atomic_write, is_file, read_json, remove_temporaries
from runtime.processes import leave
from runtime.setup import PROCESS_GROUP_TIMEOUT, check_compiler, give_back_memory, to_device
from training.checkpointing import check_same_run, prune_checkpoints, read_newest, save_checkpoint
from training.early_stop import MEAN, alignment_weight, is_probe, probe, trigger_columns
from training.fsdp import is_sharded, load_optimizer, shard, whole, whole_module, whole_state
from training.metric_log import Metrics, start_trackers
from training.preemption import EXIT_CODE, STOP, Preemption, ignore_signals
from training.previews import Previews
from training.start import environment

logger = logging.getLogger("haste")


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all parameters in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def is_due(every, step, last):
    """Whether what happens every `every` steps (0: never) happens between `step` and `last`."""
    return every > 0 and last // every > step // every


def batch_inputs(args, accelerator, y_null, teacher, batch, draws):
    """Latents, condition and the teacher's Alignment (None without a teacher) of one micro-batch; draws as in step_noise."""
    moments, y = (batch[name].to(accelerator.device, non_blocking=True) for name in ("moments", "y"))
    with torch.no_grad():
        x = VAE.latents(moments, draws["posterior"], latent_scale(args.vae))
        dropped = (draws["drop"] < args.cfg_prob).reshape(-1, *[1] * (y.dim() - 1))
        y = torch.where(dropped, y_null, y)
        target = None
        if teacher is not None:
            with accelerator.autocast():
                target = teacher(batch["image"] if "image" in batch else batch["position"])
    return x, y, target


def batch_loss(args, accelerator, loss_fn, model, teacher, batch, draws, y_null, weight=1.0):
    """Total loss of one micro-batch, and its detached terms. `teacher` is None in Phase II; `weight` is alignment's."""
    x, y, target = batch_inputs(args, accelerator, y_null, teacher, batch, draws)
    t = sample_t(draws["u"], args.weighting, args.path_type)
    terms = loss_fn(model, x, y, target, t, draws["noise"])
    terms["denoise"] = terms["denoise"].mean()
    loss = terms["denoise"]
    if teacher is not None:
        loss = loss + weight * args.proj_coeff * terms["feature"] + weight * args.attn_coeff * terms["attention"]
    return loss, {name: value.detach() for name, value in {"loss": loss, **terms}.items()}


def backward_and_step(args, accelerator, loss, model, optimizer, wrapped_optimizer):
    """Gradients of one micro-batch; after the last one of a step they change the weights. Returns their norm, then."""
    accelerator.backward(loss)
    norm = None
    if accelerator.sync_gradients:
        accelerator.unscale_gradients()
        norm = whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        # The fused step divides gradients by grad_scale: clipping needs no pass of its own over them. The scaler's step
        # keeps this grad_scale, as the gradients are unscaled, and puts its own found_inf beside it.
        optimizer.grad_scale = ((norm + 1e-6) / args.max_grad_norm).clamp(min=1)
        if accelerator.scaler is None:  # which does the same: on the device, without waiting for it
            optimizer.found_inf = (~norm.isfinite()).float()  # 1: the fused step changes nothing
    wrapped_optimizer.step()
    wrapped_optimizer.zero_grad(set_to_none=True)
    return norm


def save(args, accelerator, run, step, model, ema, optimizer, metrics, settings, fired):
    """Checkpoint of `step`, by the main process, and then the end of those that --keep-checkpoints gives up."""
    pending = metrics.state_dict()  # first, as it raises when a loss or gradient went wrong
    seconds = metrics.seconds()
    state = {name: whole_state(part.state_dict(), accelerator.is_main_process)
             for name, part in (("model", model), ("ema", ema), ("opt", optimizer))}
    if not accelerator.is_main_process:
        return
    state |= {"args": settings, "metrics": pending, "seconds": seconds, "trigger_fired": fired}
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler.state_dict()
    logger.info(f"saved {save_checkpoint(run / 'checkpoints', step, state)}")
    prune_checkpoints(run / "checkpoints", step, args.keep_checkpoints, args.keep_every)


def read_same(accelerator, folder, step, needed):
    """read_newest by the main process; the others read the very step that it has found, or raise."""
    found = read_newest(folder, step, needed) if accelerator.is_main_process else None
    [chosen] = broadcast_object_list([found and int(found[0].stem)])
    return found if accelerator.is_main_process or chosen is None else read_newest(folder, chosen, needed)


def needs_images(args, run):
    """Whether alignment is ahead, by the name of the checkpoint to go on from: Phase II needs no images."""
    newest = args.resume_step or max(saved_steps(run / "checkpoints"), default=0)
    return args.enc_type != "none" and newest < args.early_stop_point


def begin(accelerator, run, settings, metrics, previews):
    """The first step has found its input good: only from here on is anything of an earlier start changed."""
    accelerator.wait_for_everyone()  # the others' input too
    if accelerator.is_main_process:
        for folder in (run, run / "checkpoints", run / "previews"):
            remove_temporaries(folder)
        with atomic_write(run / "args.json", "w") as file:
            json.dump({**settings, "environment": environment(accelerator)}, file, indent=2)
        metrics.begin()
    if previews:
        previews.save("truth", previews.truth)


def train(args, accelerator, run, model, dataset, load_teacher, loss_fn, y_null):
    """Train `model` for args.max_train_steps steps; the same call again continues from the newest checkpoint.

    dataset[i] -> dict(position, moments, y, and image while dataset.images); y_null is the condition of no condition,
    shaped like one y. `load_teacher()` gives a Teacher, or is None; it is called, and its result held, only in Phase I.
    """
    steps_per_epoch = len(dataset) / args.batch_size
    max_steps = min(args.max_train_steps, math.ceil(args.epochs * steps_per_epoch))
    settings = {**vars(args), "data": dataset.fingerprint(), "processes": accelerator.num_processes,
                "noise_stream": NOISE_STREAM}
    device, seed = accelerator.device, args.seed
    ema = copy.deepcopy(model).requires_grad_(False).eval().to(device)
    model.to(device)
    if args.compile:  # not the average, whose previews and scores come in other shapes
        check_compiler(device)
        model.compile()
        loss_fn.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
                                  eps=args.adam_epsilon, weight_decay=args.adam_weight_decay, fused=True)

    step, pending, seconds, opt = 0, None, 0.0, None
    fired = None  # the step at which the gradient trigger ended Phase I
    found = read_same(accelerator, run / "checkpoints", args.resume_step, ("model", "ema", "opt", "args", "steps"))
    if found:
        path, state = found
        changed = check_same_run(path, state["args"], settings)
        load_weights(model, state["model"], path)
        load_weights(ema, state["ema"], path)
        if accelerator.scaler is not None and state.get("scaler"):
            accelerator.scaler.load_state_dict(state["scaler"])
        step, pending, seconds, opt = state["steps"], state.get("metrics"), state.get("seconds", 0.0), state["opt"]
        fired = state.get("trigger_fired") if args.early_stop_trigger == "gradient" else None
        logger.info(f"continuing from {path}" + "".join(f"; {n} was {old}, is {new}" for n, old, new in changed))
        if {"processes", "gradient_accumulation_steps"} & {name for name, _, _ in changed}:
            logger.info("data, noise and order stay the same; sums over the batch are rounded in another order from here on")
        if "noise_stream" not in state["args"]:
            logger.info("the noise stream has changed since: timesteps, noise and condition drop are other numbers from "
                        "here on")
    elif is_file(run / "args.json"):  # of a run that ended before its first checkpoint
        check_same_run(run / "args.json", read_json(run / "args.json"), settings)
    wrapped, wrapped_optimizer = shard(accelerator, model, optimizer, ema) if is_sharded(accelerator) else (None, None)
    if opt:
        load_optimizer(optimizer, opt, path)
    found = state = opt = None  # their memory
    shows, scores = (is_due(every, step, max_steps) for every in (args.sampling_steps, args.eval_steps))
    shows, previews, evaluation = shows and accelerator.is_main_process, None, None
    if shows or scores:
        vae = open_vae(args.vae, device)
        vae.check(*model.latent_shape[:2], args.resolution)
        evaluation = Evaluation(args, accelerator, dataset, vae, y_null, model.latent_shape) if scores else None
    early_stop = args.early_stop_point if fired is None else fired
    if load_teacher and step < early_stop and not dataset.images:  # the checkpoint that was to be read was damaged
        raise UserError(f"{run} goes on from step {step} with alignment, for which images are read; give the same command "
                       "again.")
    teacher = load_teacher().to(device) if load_teacher and step < early_stop else None
    if args.compile and teacher:
        teacher.compile()
    if args.teacher_cache and teacher:
        started = time.time()
        teacher = CachedTeacher(args.teacher_cache, teacher, dataset, accelerator)
        logger.info(f"teacher outputs in {teacher.folder} ({time.time() - started:.0f} s)")
    elif teacher:
        teacher.cast(accelerator.mixed_precision)
    start_trackers(accelerator, args)
    if shows:
        previews = Previews(args, accelerator, run / "previews", dataset, vae, y_null)
    columns = (score_names(args.eval_features, args.eval_metrics) if scores else []) + trigger_columns(args)
    metrics = Metrics(run / "metrics.csv", accelerator, step, pending, columns, args.max_skipped_steps, seconds)
    logger.info(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(dataset):,} images, steps {step} to "
                f"{max_steps}, {accelerator.num_processes} process(es) on {device}, precision "
                f"{accelerator.mixed_precision}, alignment until step {early_stop if teacher else 0}"
                + (" or until the gradients point apart" if teacher and args.early_stop_trigger == "gradient" else ""))

    y_null, begun, stopped = y_null.to(device), False, False
    compare = functools.partial(probe, args, accelerator, dataset, loss_fn,
                                functools.partial(batch_inputs, args, accelerator, y_null))
    preemption = Preemption(accelerator.num_processes, args.checkpoint_minutes, PROCESS_GROUP_TIMEOUT)
    with preemption, tqdm(total=max_steps, initial=step, disable=not accelerator.is_main_process, mininterval=1) as bar:
        while step < max_steps and not stopped:  # Phase I, then Phase II
            aligned = teacher is not None and step < early_stop
            first, end = step, min(early_stop, max_steps) if aligned else max_steps
            if not aligned and teacher is not None:
                teacher = None
                gc.collect()
                give_back_memory()
                logger.info(f"step {first}: alignment is switched off; teacher freed"
                            + ", images no longer read" * (args.vae != PIXELS))
            # Outside Phase I the projector is frozen and DDP built anew, so that it leaves the gradient exchange.
            model.projectors.requires_grad_(aligned)
            if wrapped is not model:  # not a single process in Phase II, where there is no DDP to build anew
                if wrapped is not None:
                    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)  # takes autocast off again
                    wrapped = None
                accelerator.free_memory()
                wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
            dataset.images = aligned and not isinstance(teacher, CachedTeacher)
            split = (accelerator.process_index, accelerator.num_processes, args.gradient_accumulation_steps)
            batches = StepBatches(len(dataset), args.batch_size, seed, first, end, *split)
            pin = device.type == "cuda"
            loader = zip(load_batches(dataset, batches, args.num_workers, pin, ignore_signals),
                         load_noise(batches, model.latent_shape, pin), strict=True)
            for step in range(first, end):
                shares = []
                weight = alignment_weight(args.align_decay, step, args.early_stop_point) if aligned else 0
                for _ in range(args.gradient_accumulation_steps):
                    batch, draws = next(loader)
                    draws = {name: to_device(value, device) for name, value in draws.items()}
                    if not begun:
                        begin(accelerator, run, settings, metrics, previews)
                        begun = True
                    with accelerator.accumulate(wrapped):
                        loss, terms = batch_loss(args, accelerator, loss_fn, wrapped, teacher, batch, draws, y_null, weight)
                        norm = backward_and_step(args, accelerator, loss, model, optimizer, wrapped_optimizer)
                        shares.append(terms)
                update_ema(ema, model, args.ema_decay)
                terms = {name: torch.stack([share[name] for share in shares]).mean() for name in shares[0]}
                metrics.add({**terms, "grad_norm": norm})
                bar.update()
                done, wanted = step + 1, preemption.decide()
                scored, shown = (every and done % every == 0 for every in (args.eval_steps, args.sampling_steps))
                sampled = whole_module(ema) if scored or shown else None
                probed = aligned and is_probe(args, done)
                if done % args.log_every == 0 or scored or probed:
                    values = metrics.write(([functools.partial(evaluation, sampled)] if scored else [])
                                           + ([functools.partial(compare, done, model, teacher)] if probed else []))
                    if probed and not math.isfinite(values[MEAN]):
                        logger.warning(f"step {done}: the gradients' cosine is not finite; alignment goes on")
                    if probed and values[MEAN] < args.trigger_threshold:
                        early_stop = fired = done
                    bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
                if shown and previews:
                    previews.make(sampled, done)
                saved = done % args.checkpointing_steps == 0 or done == max_steps or wanted
                if saved:
                    save(args, accelerator, run, done, model, ema, optimizer, metrics, settings, fired)
                    preemption.was_saved()
                if scored or shown or saved:
                    sampled = None
                    give_back_memory()
                stopped = wanted == STOP and done < max_steps
                if stopped or aligned and done == early_stop:
                    break
            step = done
        if not begun:  # nothing was left to do
            begin(accelerator, run, settings, metrics, previews)
        if metrics.pending:
            metrics.write()  # of the last steps, fewer than --log-every: a run that goes on replaces this row
    logger.info(f"stopped by a signal after step {done}; the same command continues" if stopped else
                f"done: {max_steps} steps in {run}")
    for tracker in accelerator.trackers:
        tracker.finish()
    loader = None  # ends its processes and threads
    leave()  # together: when one process has left, a launcher may end the others
    if stopped:
        sys.exit(EXIT_CODE)
