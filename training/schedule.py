"""The learning rate as a function of the step."""
import math


def constant(progress):
    return 1.0


def cosine(progress):
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress):
    return 1 - progress


# --lr-schedule: fraction of the steps after warm-up that is done, 0 to 1 -> factor on --learning-rate
SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear}


def learning_rate(args, step, last):
    """Rate of the step after `step` steps, in a run of `last` steps: a linear warm-up, then the schedule down to 0.

    A pure function of the step: a resume needs no saved state.
    """
    if step < args.lr_warmup_steps:
        return args.learning_rate * (step + 1) / args.lr_warmup_steps
    progress = (step - args.lr_warmup_steps) / max(1, last - args.lr_warmup_steps)
    return args.learning_rate * SCHEDULES[args.lr_schedule](progress)
