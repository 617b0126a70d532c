"""One optimizer step: gradients, clipping, update, EMA."""
import torch
from torch.nn.utils import get_total_norm

from training.fsdp import whole


def ema_decay(args, step):
    """The EMA's decay in the step after `step` steps; with --ema-warmup it grows with the steps."""
    return min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema <- decay ema + (1 - decay) model, all parameters in one call."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def backward_and_step(args, accelerator, loss, model, optimizer, ddp_optimizer):
    """Backward pass of one micro-batch; after the last one of a step, clip the gradients and update the weights.

    Returns the gradients' norm after the last micro-batch, else None.
    """
    accelerator.backward(loss)
    norm = None
    if accelerator.sync_gradients:
        accelerator.unscale_gradients()
        norm = whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        # The fused step divides gradients by grad_scale, so clipping takes no pass of its own. The scaler's step keeps
        # this grad_scale, as gradients are unscaled already, and sets its own found_inf.
        optimizer.grad_scale = ((norm + 1e-6) / args.max_grad_norm).clamp(min=1)
        if accelerator.scaler is None:  # do the same without a scaler: the device decides, nothing waits for it
            optimizer.found_inf = (~norm.isfinite()).float()  # 1: the fused step changes nothing
    ddp_optimizer.step()
    ddp_optimizer.zero_grad(set_to_none=True)
    return norm
