"""Start a training run: launcher's settings, processes, cores, model and teacher."""
import contextlib
import functools
import importlib.util
import logging
import os
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)

from data_io.latent_scale import NOTE, scale_of
from encoders.teachers import load_teachers, split_teachers, teacher_row
from loss import SILoss, uses
from models.mmdit import MMDIT_CONFIGS
from models.sit import SIT_CONFIGS
from runtime import memory
from runtime.errors import MAX_CLASSES, UserError
from runtime.setup import PROCESS_GROUP_TIMEOUT, connect, share_of_cores, tune
from training import run_folder
from training.checkpointing import read_for_all
from training.config import MAX_WORKERS, aligned_pairs, loss_weights
from training.fine_tune import check_frozen, init_from
from training.preemption import listen
from training.sentences import describe_alignment
from training.trainer import Trainer

# Flags that accelerate's launcher may set instead: environment variable, our default, allowed values.
LAUNCHER = {"mixed_precision": ("ACCELERATE_MIXED_PRECISION", None, ("no", "fp16", "bf16")),
            "gradient_accumulation_steps": ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1, range(1, 10 ** 6))}

logger = logging.getLogger("haste")


def take_from_launcher(args):
    """Fill in the flags of LAUNCHER that are None in args, from the launcher's variables or our defaults.

    A given flag wins; returns a warning for each one that the launcher contradicts. Raises UserError if the launcher's
    value would be used but is not allowed. accelerate launch says "no" if nothing was set.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise UserError(f"ACCELERATE_USE_{name} is not supported; choose MULTI_GPU or FSDP with fsdp_version 2 in "
                            "accelerate's configuration.")
    differing = []
    for name, (variable, default, allowed) in LAUNCHER.items():
        flag, given = f"--{name.replace('_', '-')}", getattr(args, name)
        said = os.environ.get(variable, "").strip().lower()
        if said in ("", "no"):
            said = None
        elif isinstance(default, int) and said.isdecimal():
            said = int(said)
        if given is not None:
            if said not in (None, given):
                differing.append(f"{flag} {given} is used; the launcher says {said} ({variable}).")
            continue
        if said is not None and said not in allowed:
            raise UserError(f"{variable} is {said}, set by the environment or accelerate's launcher; it must be "
                           + (", ".join(allowed) if isinstance(allowed, tuple) else "a whole number from 1 on")
                           + f". Change it or give {flag}, which wins.")
        setattr(args, name, default if said is None else said)
    return differing


def make_accelerator(args):
    """Accelerator and run folder. fp16 needs a GPU: on a CPU the run is in float32, and says so if fp16 was asked for.

    Fills in what args leave to the launcher and to the machine: mixed_precision, gradient_accumulation_steps,
    num_workers.
    """
    listen()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING, force=True)
    logging.raiseExceptions = False  # a full disk loses lines of log.txt, not the run
    has_gpu, run = torch.cuda.is_available(), Path(args.output_dir) / args.exp_name
    warnings = take_from_launcher(args)
    args.mixed_precision = precision = args.mixed_precision or ("fp16" if has_gpu else "no")
    if precision == "fp16" and not has_gpu:
        warnings.append("--mixed-precision fp16 needs a GPU: training in float32 on this CPU.")
        precision = "no"
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        raise UserError(f"--report-to {args.report_to} needs the package {args.report_to}; install it, or give "
                        "--report-to none.")
    if args.compile:  # made for whole models, it would split each compiled block at DDP's buckets
        torch._dynamo.config.optimize_ddp = False
    accelerator = connect(lambda: Accelerator(
        cpu=not has_gpu,  # without it, several processes on a CPU form no group
        # Gradients live in DDP's buckets, not beside them; the only buffers are constant. No static_graph: without
        # find_unused_parameters DDP does not walk the graph, so there is nothing to save.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT),
                         DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        # As a plugin: the launcher's variable would override the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        mixed_precision=precision, log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=args.output_dir,
                                            logging_dir=str(Path(args.output_dir) / args.logging_dir))))
    split = accelerator.num_processes * args.gradient_accumulation_steps
    if args.batch_size % split:
        raise UserError(f"--batch-size {args.batch_size} is global and must be a multiple of processes x accumulation "
                        f"= {split}; change one of them.")
    if args.enc_precision == "fp16" and not has_gpu:
        raise UserError("--enc-precision fp16 needs a GPU; use bf16 or no.")
    if args.early_stop_trigger == "gradient" and args.trigger_samples % accelerator.num_processes:
        raise UserError(f"--trigger-samples {args.trigger_samples} must be a multiple of the number of processes = "
                        f"{accelerator.num_processes}; change it.")
    if args.num_workers is None:
        args.num_workers = min(MAX_WORKERS, share_of_cores())
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if accelerator.is_main_process:
        run_folder.collect_log(run)
    logger.info("started")  # so that the last line tells how the newest start ended
    for sentence in warnings:
        logger.warning(sentence)
    tune(args.allow_tf32)
    return accelerator, run


@contextlib.contextmanager
def open_run(args):
    """(Accelerator, run folder, (path, state) of the checkpoint to continue from) for the time of a run."""
    accelerator, run = make_accelerator(args)
    with run_folder.opened(run, accelerator.is_main_process):
        yield accelerator, run, read_for_all(accelerator, run / "checkpoints", args.resume_step)


def needs_images(args, state):
    """Whether alignment is still ahead of the checkpoint `state`: Phase II reads no images."""
    end = args.early_stop_point
    if args.early_stop_trigger == "gradient" and state.get("trigger_fired") is not None:
        end = state["trigger_fired"]
    return args.enc_type != "none" and state.get("steps", 0) < end


def count_classes(args, dataset):
    """Fill in --num-classes from the class names or the labels; log how many classes have no image."""
    if not hasattr(dataset, "labels"):  # a layout of another kind
        if args.num_classes is None:
            raise UserError("These data have no labels to count; give --num-classes.")
        return
    if args.num_classes is None:
        args.num_classes = len(dataset.class_names or range(int(dataset.labels.max()) + 1))
        logger.info(f"--num-classes {args.num_classes}, by the labels of {args.data_dir}")
    if args.num_classes > MAX_CLASSES:
        raise UserError(f"The labels of {args.data_dir} go up to {args.num_classes - 1}, past {MAX_CLASSES}; number "
                        "the classes from 0 on.")
    if empty := args.num_classes - len(np.unique(dataset.labels)):
        logger.warning(f"{empty} of the {args.num_classes} classes have no image in {args.data_dir}: they are not "
                       "trained.")


def open_teachers(args, grid):
    """The Teachers that args ask for, with `grid` tokens a side."""
    return load_teachers(args.enc_type, args.enc_weights, grid, [teacher for _, teacher in aligned_pairs(args)],
                         args.attn_teacher, num_blocks=args.enc_blocks, precision=args.enc_precision,
                         features=uses(loss_weights(args), "teacher", "features"), input_size=args.enc_size,
                         resample=args.resample)


def model_arguments(args, config, moments_shape):
    """Arguments that both kinds of model take, for latents of these moments."""
    channels, side, _ = moments_shape
    scale_of(vars(args)).check(channels // 2, args.latents_stats or Path(args.data_dir) / NOTE)
    if side % config["patch_size"]:
        raise UserError(f"--model {args.model} cuts latents into patches of {config['patch_size']}, of which {side}, "
                        f"the latents' side at --resolution {args.resolution}, is no multiple; choose another patch.")
    weights = loss_weights(args)
    z_dims = [teacher_row(name).width for name, _ in split_teachers(args.enc_type)
              if uses(weights, "student", "features")]
    if uses(weights, "student", "latents"):
        z_dims.append(config["patch_size"] ** 2 * (channels // 2))
    return {"input_size": side, "in_channels": channels // 2, "encoder_depth": args.encoder_depth,
            "attn_layers": [student for student, _ in aligned_pairs(args)], "z_dims": z_dims,
            "projector": args.projector, "projector_kernel": args.projector_kernel,
            "qk_norm": args.qk_norm, "fused_attn": args.fused_attn, "grad_checkpointing": args.grad_checkpointing}


def align_and_train(args, accelerator, run, found, model, dataset, y_null):
    """Train from the checkpoint `found` of `open_run` on, with the losses and the teacher that args ask for."""
    if not found[1]:
        init_from(model, args)
    check_frozen(model, args)
    loss_fn = SILoss(args.path_type, args.weighting, aligned_pairs(args), args.attn_heads, tuple(loss_weights(args)),
                     args.spatial_norm)
    grid = model.input_size // model.patch_size
    teacher = functools.partial(open_teachers, args, grid) if loss_weights(args) else None
    logger.info(describe_alignment(args, {**SIT_CONFIGS, **MMDIT_CONFIGS}[args.model]))
    with memory.explained(args, accelerator, model):
        Trainer(args, accelerator, run, model, dataset, teacher, loss_fn, y_null, found).run()
