"""Shard weights, EMA and optimizer state over processes by FSDP; gather them for checkpoints and samples.

FSDP is accelerate's (`accelerate launch --use_fsdp --fsdp_version 2`); without it these functions change nothing.
"""
import copy
import logging

import torch
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from runtime.errors import UserError
from training.checkpointing import is_dense

logger = logging.getLogger("haste")


def is_sharded(accelerator):
    """Whether the run uses FSDP 2. FSDP 1 is refused, as it hides parameters in flat ones."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise UserError("Of FSDP only version 2 is supported; set fsdp_version: 2 in accelerate's configuration, or "
                        "give accelerate launch --fsdp_version 2.")
    return True


def whole(tensor):
    """Gather a sharded tensor (all processes call this together); return any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(tensor, parameter):
    """Shard `tensor` like `parameter`. Every process has the full tensor, so nothing is sent."""
    if not isinstance(parameter, DTensor):
        return tensor
    whole_tensor, mesh = tensor.to(parameter.device), parameter.device_mesh
    return distribute_tensor(whole_tensor, mesh, parameter.placements, src_data_rank=None)


def replace_parameters(module, function):
    """Replace each parameter by function(name, parameter), frozen."""
    for name, parameter in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        tensor = function(name, parameter.data)
        module.get_submodule(owner)._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)


def set_plugin(plugin, model):
    """Set accelerate's FSDP plugin to shard by block and to compute the same numbers as DDP.

    The model does the activation checkpointing, as accelerate's renames the blocks. The user's other settings stay.
    Raises UserError if the model lacks the class to wrap.
    """
    plugin.cpu_ram_efficient_loading = False  # accelerate launch has it on; here every process has the weights already
    # accelerate's policy would cast weights and inputs to 16 bits, t among them, and sum gradients in them. This one
    # keeps all in float32, and autocast does the casts.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A policy by size would choose ModuleLists, which cannot be units
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    names = plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or list(model._no_split_modules)
    if unknown := set(names) - {type(module).__name__ for module in model.modules()}:
        raise UserError(f"FSDP is to wrap {', '.join(sorted(unknown))}, which {type(model).__name__} does not have; "
                        f"set fsdp_transformer_layer_cls_to_wrap to {', '.join(model._no_split_modules)}, or leave it "
                        "out.")
    if plugin.activation_checkpointing:
        plugin.activation_checkpointing, model.grad_checkpointing = False, True
        logger.info("fsdp_activation_checkpointing is --grad-checkpointing, without offloading")


def autocast_forward(accelerator, model):
    """Run `model` under autocast, with outputs in float32, as accelerate does for DDP but not for FSDP 2."""
    forward = model.forward

    def under_autocast(*args, **kwargs):
        with accelerator.autocast():
            return forward(*args, **kwargs)

    model.forward = convert_outputs_to_fp32(under_autocast)


def shard(accelerator, model, optimizer, ema):
    """(model, optimizer) as accelerate shards them; the EMA's parameters are sharded in the same way."""
    set_plugin(accelerator.state.fsdp_plugin, model)
    prepared = accelerator.prepare(model, optimizer)
    if accelerator.native_amp:
        autocast_forward(accelerator, model)
    parameters = dict(model.named_parameters())
    replace_parameters(ema, lambda name, average: split_as(average, parameters[name]))
    return prepared


def whole_module(module):
    """`module`, or, if its parameters are sharded, a copy with full ones."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    module = copy.deepcopy(module)
    replace_parameters(module, lambda _, parameter: whole(parameter))
    return module


def whole_state(state, keep):
    """A state dict with full tensors. All processes call it; without `keep` sharded tensors become None."""
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    full = whole(state)
    return full.cpu() if keep else None


def load_optimizer(optimizer, saved, path):
    """Load a full optimizer state dict; tensors shaped like their parameter are sharded like it.

    Options, such as fused, stay those of `optimizer`. Raises UserError, naming the checkpoint at `path`, if the state
    does not fit the parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    expected = {i: {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                for i, parameter in enumerate(parameters)}
    try:
        fits = [group["params"] for group in saved["param_groups"]] == [group["params"] for group in groups] and all(
            {name: is_dense(value) and value.shape for name, value in entry.items()} == expected[i]
            for i, entry in saved["state"].items())
    except (AttributeError, KeyError, RuntimeError, TypeError):  # not an optimizer's state
        fits = False
    if not fits:
        raise UserError(f"{path} has the optimizer's state of another model or optimizer; give the --model and options "
                        "it was trained with, or delete this checkpoint to go on from the one before.")
    state = {i: {name: value if name == "step" else split_as(value, parameters[i]) for name, value in entry.items()}
             for i, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
