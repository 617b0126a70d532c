"""Weights, their average and optimizer state split over processes by FSDP, and whole again for a file or for samples.

FSDP is accelerate's own (`accelerate launch --use_fsdp --fsdp_version 2`); without it these functions pass things on.
"""
import copy

import torch
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, distribute_tensor

from files import BadInput


def is_sharded(accelerator):
    """Whether the run is under FSDP; its first version, which hides parameters in flat ones, is refused."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise BadInput("Of FSDP only version 2 is supported; set fsdp_version: 2 in accelerate's configuration, or give "
                       "accelerate launch --fsdp_version 2.")
    return True


def whole(tensor):
    """The whole of a split tensor, which all processes ask for together; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_as(tensor, parameter):
    """`tensor` split as `parameter` is; every process has the whole, so nothing is sent."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def replace_parameters(module, function):
    """Put function(name, parameter) in the place of each frozen parameter."""
    for name, parameter in list(module.named_parameters()):
        owner, _, last = name.rpartition(".")
        tensor = function(name, parameter.data)
        module.get_submodule(owner)._parameters[last] = torch.nn.Parameter(tensor, requires_grad=False)


def shard(accelerator, model, optimizer, ema):
    """accelerate's (model, optimizer), now split; the EMA's parameters are split in the same way."""
    # accelerate launch's default has the first process hand out the weights; here every process has them already.
    accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    prepared = accelerator.prepare(model, optimizer)
    parameters = dict(model.named_parameters())
    replace_parameters(ema, lambda name, average: split_as(average, parameters[name]))
    return prepared


def whole_module(module):
    """`module`, or, where its parameters are split, a copy of it with whole ones."""
    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return module
    module = copy.deepcopy(module)
    replace_parameters(module, lambda _, parameter: whole(parameter))
    return module


def whole_state(state, keep):
    """A state dict with whole tensors. All processes call it; those without `keep` get none of the split ones."""
    if isinstance(state, dict):
        return {name: whole_state(value, keep) for name, value in state.items()}
    if not isinstance(state, DTensor):
        return state
    full = whole(state)
    return full.cpu() if keep else None


def load_optimizer(optimizer, saved, path):
    """Load a whole optimizer state dict; what is shaped like its parameter is split as the parameter is.

    Of the saved groups only which parameters they hold counts: options, such as fused, are those of `optimizer`. Raises
    BadInput, naming the checkpoint at `path`, for the state of other parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    counts, theirs = ([len(group["params"]) for group in each] for each in (optimizer.param_groups, saved["param_groups"]))
    shapes = {i: value.shape for i, entry in saved["state"].items() for value in entry.values() if torch.is_tensor(value)
              and value.dim()}
    if counts != theirs or any(i >= len(parameters) or parameters[i].shape != shape for i, shape in shapes.items()):
        raise BadInput(f"{path} has the optimizer's state of another model or optimizer, for {theirs} parameters instead "
                       f"of {counts} or of other shapes; give the --model and options it was trained with.")
    groups = [{**theirs, **{name: value for name, value in ours.items() if name != "params"}}
              for theirs, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True)]
    state = {i: {name: split_as(value, parameters[i]) if value.shape == parameters[i].shape else value
                 for name, value in entry.items()} for i, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
