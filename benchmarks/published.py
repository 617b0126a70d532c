"""The published code's training step and sampler call, rewritten as a baseline for benchmarks; not for use.

q k^T is formed in every block of student and teacher, in both phases and when sampling; the projector always runs; the
maps' softmax is kept for the backward pass; tokens keep the transposed layout of the patch convolution's result; the
average of the weights is a loop over parameters; the optimizer is not fused; four numbers a step are read back from the
device.
"""
import torch
from torch import nn

from data_io.latent_scale import SD_SCALE
from loss import feature_loss, interpolant, mean_flat
from models.layers import QK, modulate, unpatchify


def qkv_heads(attention, x):
    """Tokens (N, T, D) -> q, k, v, (N, H, T, d) each, without qk_norm."""
    n, t, _ = x.shape
    return attention.qkv(x).reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)


class PlainAttention(nn.Module):
    """Attention of torch.hub's DINOv2 without xFormers, as on a CPU; keeps `logits` (N, H, T, T)."""

    def __init__(self, attention):
        super().__init__()
        self.attention, self.logits = attention, None

    def forward(self, x, **_):
        q, k, v = qkv_heads(self.attention, x)
        self.logits = QK(q, k).logits()
        return self.attention.proj((self.logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def teacher_maps(teacher, target):
    """{block: logits (N, H, T, T) of the patch tokens} of all blocks, after a forward pass."""
    if target.attention:
        return {block: qk.logits() for block, qk in target.attention.items()}
    skip, maps = teacher.vit.num_prefix_tokens, {}
    for i, block in enumerate(teacher.vit.blocks):
        maps[i], block.attn.logits = block.attn.logits[:, :, skip:, skip:], None
    return maps


def forward(model, x, t, y):
    """(v, projected features, logits (N, H, T, T) of every block) of a SiT."""
    tokens = model.x_embedder.proj(x).flatten(2).transpose(1, 2) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y)
    logits, features = [], []
    for i, block in enumerate(model.blocks):
        shift, scale, *rest = block.adaLN_modulation(c).chunk(6, dim=1)
        q, k, v = qkv_heads(block.attn, modulate(block.norm1(tokens), shift, scale))
        logits.append(QK(q, k).logits())
        tokens, _ = block.after(tokens, torch.nn.functional.scaled_dot_product_attention(q, k, v), rest)
        if i + 1 == model.encoder_depth:
            features = [project(tokens) for project in model.projectors]
    return unpatchify(model.final_layer(tokens, c), model.patch_size), features, logits


def attention_loss(student, teacher, heads=12):
    """Cross-entropy of whole maps, by autograd."""
    losses = [-(t[:, :heads].float().softmax(dim=-1) * s[:, :heads].float().log_softmax(dim=-1)).sum(dim=-1).mean()
              for s, t in zip(student, teacher, strict=True)]
    return torch.stack(losses).mean()


def training_step(args, accelerator, model, ema, optimizer, teacher, pairs, batch, draws, y_null, aligned):
    """One step on `batch`; `teacher` taps all its blocks, or has PlainAttention in them.

    Phase II (not `aligned`) does everything except the two losses.
    """
    with torch.no_grad():
        x = SD_SCALE.latents(batch["moments"], draws["posterior"])
        y = torch.where(draws["drop"] < args.cfg_prob, y_null, batch["y"])
        with accelerator.autocast():
            target = teacher(batch["image"])
            maps = teacher_maps(teacher, target)
    alpha, sigma, d_alpha, d_sigma = (a[:, None, None, None] for a in interpolant(draws["u"], args.path_type))
    with accelerator.autocast():
        v, features, logits = forward(model, alpha * x + sigma * draws["noise"], draws["u"], y)
    denoise = mean_flat((v.float() - (d_alpha * x + d_sigma * draws["noise"])) ** 2).mean()
    feature = torch.stack([feature_loss(p, z) for p, z in zip(features, target.features, strict=True)]).mean()
    loss, attention = denoise, denoise.new_zeros(())
    if aligned:
        attention = attention_loss([logits[s] for s, _ in pairs], [maps[t] for _, t in pairs])
        loss = denoise + args.proj_coeff * feature + args.attn_coeff * attention
    accelerator.backward(loss)
    accelerator.unscale_gradients(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
            average.mul_(args.ema_decay).add_(parameter.data, alpha=1 - args.ema_decay)
    return [value.item() for value in (denoise, feature, attention, norm)]
