"""The training loop. train.py and train_t2i.py supply model, data and teacher."""
import copy
import functools
import gc
import itertools
import logging
import math
import sys
import time
from dataclasses import dataclass

import torch

from data_io.latent_scale import scale_of
from data_io.loader import NOISE_STREAM, StepBatches, load_batches, load_noise
from encoders.teacher_cache import CachedTeacher
from encoders.teachers import Teachers
from encoders.vae import open_vae
from evaluations import score_names
from evaluations.during_training import Evaluation
from loss import sample_t, weighted_sum
from models.checkpoint import load_weights
from runtime.files import is_file, read_json, remove_temporaries, write_json
from runtime.progress import progress
from runtime.setup import PROCESS_GROUP_TIMEOUT, check_compiler, end_processes, give_back_memory, to_device
from runtime.versions import environment
from training.checkpointing import (
    check_alike,
    check_same_run,
    describe_resume,
    prune_checkpoints,
    save_checkpoint,
    set_aside_damaged,
)
from training.config import loss_weights
from training.early_stop import COSINE_COLUMN, align_decay, gradient_cosine, is_trigger_step, trigger_columns
from training.fine_tune import set_trainable
from training.fsdp import is_sharded, load_optimizer, shard, whole_module, whole_state
from training.metric_log import Metrics, start_trackers
from training.preemption import EXIT_CODE, STOP, Preemption, ignore_signals
from training.previews import Previews
from training.run_folder import DONE, open_log
from training.schedule import learning_rate
from training.sentences import describe, first_not_finite
from training.step import backward_and_step, ema_decay, update_ema

logger = logging.getLogger("haste")


@dataclass
class Phase:
    """Training up to step `end`, with or without alignment. The gradient trigger may lower `end`."""
    aligned: bool
    end: int


class Trainer:
    """A run, from its newest checkpoint to its last step. The same command again continues it.

    dataset[i] -> dict(position, y, moments unless dataset.vae encodes, and image while dataset.images); y_null is the
    null condition, shaped like one y. `load_teacher()` returns Teachers, or is None; it is called, and its result kept,
    in Phase I only. `found`: (path, state) of the checkpoint to continue from; the state is {} at the start.
    """

    def __init__(self, args, accelerator, run, model, dataset, load_teacher, loss_fn, y_null, found=(None, {})):
        self.args, self.accelerator, self.run_folder, self.found = args, accelerator, run, found
        self.model, self.dataset, self.loss_fn, self.load_teacher = model, dataset, loss_fn, load_teacher
        self.weights, self.y_null = loss_weights(args), y_null.to(accelerator.device)
        self.latent_scale = scale_of(vars(args))
        self.max_steps = min(args.max_train_steps, math.ceil(args.epochs * len(dataset) / args.batch_size))
        self.settings = {**vars(args), "data": dataset.fingerprint(), "conditions": dataset.conditions_key(),
                         "processes": accelerator.num_processes, "noise_stream": NOISE_STREAM}
        del self.settings["resume_step"]  # of this start only; a new run from args.json has no such checkpoint
        self.ema = copy.deepcopy(model).requires_grad_(False).eval().to(accelerator.device)
        model.to(accelerator.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay, fused=True)
        self.ddp_model = self.ddp_optimizer = self.teacher = self.previews = self.evaluation = None
        self.step, self.stopping, self.begun = 0, False, False
        self.trigger_fired = None  # the step at which the gradient trigger ended Phase I

    @property
    def alignment_end_step(self):
        """The first step without alignment."""
        return self.args.early_stop_point if self.trigger_fired is None else self.trigger_fired

    # ---- a run, in the order things happen ----

    def run(self):
        """Train to the last step, or until a signal; then the process exits with EXIT_CODE."""
        self.prepare()
        with self.preemption, self.bar:
            for phase in self.phases():
                batches = self.start_phase(phase)
                while self.step < phase.end and not self.stopping:
                    self.train_step(phase, batches)
                    self.after_step(phase)
            self.begin()  # if no step was left
            if self.metrics.pending:
                self.log_row()  # the last steps, fewer than --log-every: a resumed run rewrites this row
        batches = None  # ends the loader's processes and threads
        self.finish()

    def prepare(self):
        """Apply the checkpoint and load all that the run needs. Changes no existing file but log.txt."""
        if self.args.compile:  # not the EMA: previews and scores have other shapes
            check_compiler(self.accelerator.device)
            self.model.compile()
            self.loss_fn.compile()
        check_alike(self.accelerator, {**self.settings, "last step": self.max_steps})
        saved = self.resume(*self.found)
        open_log(self.run_folder, ["checkpoints"] + ["previews"] * bool(self.args.sampling_steps))
        self.open_scores()
        if self.load_teacher and self.step < min(self.alignment_end_step, self.max_steps):
            self.open_teacher()
        start_trackers(self.accelerator, self.args, self.run_folder)
        columns = score_names(self.args.eval_features, self.args.eval_metrics) if self.evaluation else []
        self.metrics = Metrics(self.run_folder / "metrics.csv", self.accelerator, self.step, saved,
                               columns + trigger_columns(self.args), self.args.max_skipped_steps,
                               functools.partial(first_not_finite, self))
        self.preemption = Preemption(self.accelerator.num_processes, self.args.checkpoint_minutes,
                                     PROCESS_GROUP_TIMEOUT)
        self.bar = progress(self.max_steps, "training", "step", self.step, self.accelerator.is_main_process)
        describe(self)

    def phases(self):
        """The phases that are left: alignment, then denoising only."""
        if self.teacher is not None:
            yield Phase(True, min(self.alignment_end_step, self.max_steps))
        if self.step < self.max_steps and not self.stopping:
            yield Phase(False, self.max_steps)

    def start_phase(self, phase):
        """Set projector, DDP and loader for `phase`; returns an iterator of (batch, draws) after reading the first."""
        if not phase.aligned and self.teacher is not None:
            self.teacher = None
            gc.collect()
            give_back_memory()
            freed = "" if self.args.enc_type == "none" else "; teacher freed"
            logger.info(f"step {self.step}: alignment is switched off{freed}")
        # In Phase II freeze the projector and rebuild DDP, so that its gradients are no longer synchronised.
        set_trainable(self.model, self.args.freeze, phase.aligned)
        self.wrap()
        self.dataset.images = phase.aligned and self.teacher.sees_images
        batches = self.batches(phase)
        first = next(batches)
        self.begin()
        return itertools.chain([first], batches)

    def train_step(self, phase, batches):
        """One optimizer step, of --gradient-accumulation-steps micro-batches, and the EMA's."""
        args, shares = self.args, []
        factor = align_decay(args.align_decay, self.step, args.early_stop_point) if phase.aligned else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, self.step, self.max_steps)
        for _ in range(args.gradient_accumulation_steps):
            batch, draws = next(batches)
            with self.accelerator.accumulate(self.ddp_model):
                loss, terms = self.loss(batch, draws, factor)
                norm = backward_and_step(args, self.accelerator, loss, self.model, self.optimizer, self.ddp_optimizer)
            shares.append(terms)
        update_ema(self.ema, self.model, ema_decay(args, self.step))
        self.step += 1
        means = {name: torch.stack([share[name] for share in shares]).mean() for name in shares[0]}
        self.metrics.add({**means, "grad_norm": norm})
        self.bar.update()

    def after_step(self, phase):
        """What is due after a step: scores, trigger, log, previews, checkpoint."""
        args, step, wanted = self.args, self.step, self.preemption.decide()
        scored, shown = (every and step % every == 0 for every in (args.eval_steps, args.sampling_steps))
        compared = phase.aligned and is_trigger_step(args, step)
        sampled = whole_module(self.ema) if scored or shown else None
        measures = [functools.partial(self.evaluation, sampled)] if scored else []
        measures += [functools.partial(gradient_cosine, self)] if compared else []
        if step % args.log_every == 0 or measures:
            values = self.log_row(measures)
            if compared:
                self.trigger(phase, values[COSINE_COLUMN])
        if shown and self.previews:
            self.previews.make(sampled, step)
        saved = step % args.checkpointing_steps == 0 or step == self.max_steps or wanted
        if saved:
            self.save()
            self.preemption.was_saved()
        if scored or shown or saved:
            sampled = None
            give_back_memory()
        self.stopping = wanted == STOP and step < self.max_steps

    def trigger(self, phase, cosine):
        """End `phase` here if the gradients of alignment and denoising point apart."""
        if not math.isfinite(cosine):
            logger.warning(f"step {self.step}: the gradients' cosine is not finite; alignment continues")
        if cosine < self.args.trigger_threshold:
            phase.end = self.trigger_fired = self.step

    def finish(self):
        """Last line of the log; all processes exit together, as a launcher may kill the last ones."""
        logger.info(f"stopped by a signal after step {self.step}; the same command continues" if self.stopping else
                    f"{DONE}{self.max_steps} steps in {self.run_folder}")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        end_processes()
        if self.stopping:
            sys.exit(EXIT_CODE)

    # ---- parts of a step ----

    def inputs(self, batch, draws):
        """Latents, condition and the teacher's Alignment (None in Phase II) of a micro-batch; draws: see step_noise."""
        y = to_device(batch["y"], self.accelerator.device)
        with torch.no_grad():
            moments = (to_device(batch["moments"], self.accelerator.device) if "moments" in batch
                       else self.dataset.encode(batch["image"]))
            x = self.latent_scale.latents(moments, draws["posterior"])
            dropped = (draws["drop"] < self.args.cfg_prob).reshape(-1, *[1] * (y.dim() - 1))
            y = torch.where(dropped, self.y_null, y)
            target = None
            if self.teacher is not None:
                with self.accelerator.autocast():
                    target = self.teacher(batch["image" if self.teacher.sees_images else "position"])
        return x, y, target

    def loss(self, batch, draws, factor=1.0):
        """Total loss of a micro-batch, and its terms, detached. `factor` is on the alignment losses."""
        x, y, target = self.inputs(batch, draws)
        t = sample_t(draws["u"], self.args.weighting, self.args.path_type, self.args.time_shift)
        terms = self.loss_fn(self.ddp_model, x, y, target, t, draws["noise"])
        terms["denoise"] = terms["denoise"].mean()
        loss = terms["denoise"] if target is None else weighted_sum(terms, self.weights, factor, terms["denoise"])
        return loss, {name: value.detach() for name, value in {"loss": loss, **terms}.items()}

    def batches(self, phase):
        """Iterator of (batch, draws on the device) of each micro-batch of this process, up to the end of `phase`."""
        args, accelerator = self.args, self.accelerator
        order = StepBatches(len(self.dataset), args.batch_size, args.seed, self.step, phase.end,
                            accelerator.process_index, accelerator.num_processes, args.gradient_accumulation_steps)
        pin = accelerator.device.type == "cuda"
        loader = load_batches(self.dataset, order, args.num_workers, pin, ignore_signals)
        for batch, draws in zip(loader, load_noise(order, self.model.latent_shape, pin), strict=True):
            yield batch, {name: to_device(value, accelerator.device) for name, value in draws.items()}

    def wrap(self):
        """Prepare model and optimizer for a phase. FSDP, and one process in Phase II, need no new wrapping."""
        if self.ddp_model is self.model:
            return
        if self.ddp_model is not None:
            self.accelerator.unwrap_model(self.ddp_model, keep_fp32_wrapper=False)  # removes autocast again
            self.ddp_model = None
            self.accelerator.free_memory()
        self.ddp_model, self.ddp_optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def log_row(self, measures=()):
        """Write a row of metrics.csv, with what the functions `measures` return; returns its values."""
        values = self.metrics.write(measures, learning_rate=learning_rate(self.args, self.step - 1, self.max_steps))
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        return values

    # ---- start and end ----

    def resume(self, path, state):
        """Load the `state` of the checkpoint at `path`; without one check the folder. Returns the unused entries."""
        settings, begun = self.settings, self.run_folder / "args.json"
        if not path and is_file(begun):  # a run that ended before its first checkpoint
            check_same_run(begun, read_json(begun), settings)
        if path:
            changed = check_same_run(path, state["args"], settings)
            load_weights(self.model, state.pop("model"), path)
            load_weights(self.ema, state.pop("ema"), path)
            if self.accelerator.scaler is not None and state.get("scaler"):
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step = state["steps"]
            if self.args.early_stop_trigger == "gradient":
                self.trigger_fired = state.get("trigger_fired")
            describe_resume(path, state["args"], changed)
        if is_sharded(self.accelerator):
            self.ddp_model, self.ddp_optimizer = shard(self.accelerator, self.model, self.optimizer, self.ema)
        if path:
            load_optimizer(self.optimizer, state.pop("opt"), path)
        return state

    def open_scores(self):
        """The VAE, scores and previews, if steps are left at which they are due."""
        args, accelerator = self.args, self.accelerator
        shows, scores = (every > 0 and self.max_steps // every > self.step // every
                         for every in (args.sampling_steps, args.eval_steps))
        if not (shows or scores):
            return
        vae = self.dataset.vae or open_vae(args.vae, accelerator.device, self.latent_scale)
        vae.check(*self.model.latent_shape[:2], args.resolution)
        if scores:
            self.evaluation = Evaluation(args, accelerator, self.dataset, vae, self.y_null, self.model.latent_shape)
        if shows and accelerator.is_main_process:
            self.previews = Previews(args, accelerator, self.run_folder / "previews", self.dataset, vae, self.y_null)

    def open_teacher(self):
        """The teacher, or the cache of its outputs."""
        args, accelerator = self.args, self.accelerator
        self.teacher = self.load_teacher().to(accelerator.device)
        if args.compile:
            self.teacher.compile()
        if args.teacher_cache:
            started = time.time()
            self.teacher = Teachers([CachedTeacher(args.teacher_cache, teacher, self.dataset, accelerator)
                                     for teacher in self.teacher.parts])
            for cached in self.teacher.parts:
                logger.info(f"teacher outputs in {cached.folder} ({time.time() - started:.0f} s)")
        else:
            self.teacher.cast(accelerator.mixed_precision)

    def begin(self):
        """Called after the first batch loads, on all processes; only now modify files of an earlier start."""
        if self.begun:
            return
        self.begun = True
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            for folder in (self.run_folder, self.run_folder / "checkpoints", self.run_folder / "previews"):
                remove_temporaries(folder)
            write_json(self.run_folder / "args.json",
                       {**self.settings, "environment": environment(self.accelerator)}, indent=2)
            self.metrics.begin()
            if not self.args.resume_step:
                set_aside_damaged(self.run_folder / "checkpoints", self.step)
            prune_checkpoints(self.run_folder / "checkpoints", self.step, self.args.keep_checkpoints,
                              self.args.keep_every)  # a kill may have come between a checkpoint and this
        if self.previews:
            self.previews.save("truth", self.previews.truth)

    def save(self):
        """Write a checkpoint, then delete those that --keep-checkpoints does not keep. All processes call it."""
        args, accelerator = self.args, self.accelerator
        state = self.metrics.state_dict()  # first, as it raises when a loss or gradient went wrong
        state |= {"args": self.settings, "trigger_fired": self.trigger_fired}
        for name, part in (("model", self.model), ("ema", self.ema), ("opt", self.optimizer)):
            state[name] = whole_state(part.state_dict(), accelerator.is_main_process)
        if not accelerator.is_main_process:
            return
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        logger.info(f"saved {save_checkpoint(self.run_folder / 'checkpoints', self.step, state)}")
        prune_checkpoints(self.run_folder / "checkpoints", self.step, args.keep_checkpoints, args.keep_every)
