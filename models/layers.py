"""Building blocks of the diffusion transformers. Module names are those of the published state dicts."""
import math
from collections import namedtuple
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class QK(namedtuple("QK", ("q", "k", "scale"))):
    """Queries and keys of one attention layer, (N, H, T, d) each, and the scale of their logits (default d ** -0.5)."""

    __slots__ = ()

    def __new__(cls, q, k, scale=None):
        return super().__new__(cls, q, k, q.shape[-1] ** -0.5 if scale is None else scale)

    def logits(self):
        """(N, H, T, T) = scale * q k^T; a softmax over the last axis gives the attention map."""
        return self.scale * self.q @ self.k.transpose(-2, -1)


class Alignment(NamedTuple):
    """What alignment needs from one forward pass of a student or a teacher."""

    features: list  # (N, T, C) per projector (student) or per teacher (teacher)
    attention: dict  # {block: QK}
    tokens: torch.Tensor | None = None  # student: (N, T, D), not projected; teacher: the latent's patches


class PatchEmbed(nn.Module):
    """Image (N, C, R, R) -> tokens (N, T, D), T = (R / patch) ** 2, row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        # Without contiguous() the tokens keep the convolution's transposed layout through all blocks, which is slow.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


def unpatchify(tokens, patch_size):
    """Tokens (N, T, p * p * C) -> image (N, C, R, R), the channel running fastest inside a token."""
    n, t, _ = tokens.shape
    side = math.isqrt(t)
    x = tokens.reshape(n, side, side, patch_size, patch_size, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * patch_size, side * patch_size)


def sincos_1d(dim, position):
    """Positions (T,) -> (T, dim): sines, then cosines, of dim / 2 frequencies from 1 down to 1 / 10,000."""
    omega = 10_000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = position.double()[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(dim, side):
    """Fixed position table (1, side * side, dim), float32; the column's code comes first (MAE's convention)."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    table = torch.cat([sincos_1d(dim // 2, column.flatten()), sincos_1d(dim // 2, row.flatten())], dim=1)
    return table.float()[None]


def patchify(x, count):
    """Image (N, C, R, R) -> `count` tokens (N, T, p * p * C): the inverse of unpatchify."""
    side = math.isqrt(count)
    x = x.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # (N, C, side, p, side, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class TimestepEmbedder(nn.Module):
    """t (N,) in [0, 1] -> (N, D): a 256-wide sinusoid of t itself, cosines first, then an MLP."""

    WIDTH = 256
    MAX_PERIOD = 10_000

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.WIDTH, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        half = self.WIDTH // 2
        frequency = torch.exp(-math.log(self.MAX_PERIOD) * torch.arange(half, device=t.device).float() / half)
        angle = t.float()[:, None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Labels (N,) -> (N, D); the last row, index `num_classes`, stands for no label."""

    def __init__(self, num_classes, hidden_size, null_row=True):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, hidden_size)

    def forward(self, labels):
        return self.embedding_table(labels)


def attend(q, k, v, fused=True):
    """softmax(q k^T / sqrt(d)) v of (N, H, T, d) each, by the fused kernel or with an explicit attention map."""
    return F.scaled_dot_product_attention(q, k, v) if fused else QK(q, k).logits().softmax(dim=-1) @ v


class Attention(nn.Module):
    """The linear layers of multi-head attention. `project=False` is for tokens that give only k and v."""

    def __init__(self, hidden_size, num_heads, qk_norm=False, project=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        head_size = hidden_size // num_heads
        self.q_norm = nn.LayerNorm(head_size) if qk_norm and project else nn.Identity()
        self.k_norm = nn.LayerNorm(head_size) if qk_norm else nn.Identity()
        if project:
            self.proj = nn.Linear(hidden_size, hidden_size)

    def split(self, x):
        """(N, T, D) -> q, k, v, (N, H, T, d) each."""
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def merge(self, heads):
        """(N, H, T, d) -> (N, T, D)."""
        return self.proj(heads.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden_size, mlp_ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def layer_norm(hidden_size):
    """LayerNorm whose scale and shift come from adaLN."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def modulate(x, shift, scale):
    """adaLN: tokens (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLNBlock(nn.Module):
    """Transformer block with adaLN: attention, then MLP, each shifted, scaled and gated by the condition.

    The caller computes the attention, over the tokens of one block or of two, between `before` and `after`. `pre_only`
    drops the second half: for the last block of a stream without output.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm=False, pre_only=False):
        super().__init__()
        self.norm1 = layer_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, qk_norm, project=not pre_only)
        if not pre_only:
            self.norm2 = layer_norm(hidden_size)
            self.mlp = Mlp(hidden_size, mlp_ratio)
        self.chunks = 2 if pre_only else 6  # shift, scale, gate of the attention, then of the MLP
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, self.chunks * hidden_size))

    def before(self, x, c):
        """Tokens (N, T, D), condition (N, D) -> (q, k, v), (N, H, T, d) each, and what `after` needs from c."""
        shift, scale, *rest = self.adaLN_modulation(c).chunk(self.chunks, dim=1)
        return self.attn.split(modulate(self.norm1(x), shift, scale)), rest

    def after(self, x, attended, rest):
        """Tokens (N, T, D) and the attention's result (N, H, T, d) -> tokens, [attention, MLP], (N, T, D) each."""
        gate_a, shift_m, scale_m, gate_m = rest
        attention = self.attn.merge(attended)
        x = x + gate_a[:, None] * attention
        mlp = self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return x + gate_m[:, None] * mlp, [attention, mlp]

    def assemble(self, x, c, branches):
        """Tokens (N, T, D) for given [attention, MLP], (N, T, D) each: computes only the gates."""
        chunks = self.adaLN_modulation(c).chunk(self.chunks, dim=1)
        return x + chunks[2][:, None] * branches[0] + chunks[5][:, None] * branches[1]


class FinalLayer(nn.Module):
    """Tokens (N, T, D), condition (N, D) -> (N, T, p * p * C)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class ConvProjector(nn.Conv2d):
    """iREPA's projection head (arXiv 2512.10794): a convolution on the grid of tokens, (N, T, D) -> (N, T, z_dim)."""

    def forward(self, tokens):
        side = math.isqrt(tokens.shape[1])
        return super().forward(tokens.mT.unflatten(2, (side, side))).flatten(2).mT


PROJECTORS = ("mlp", "linear", "conv")


def projector(hidden_size, projector_dim, z_dim, kind="mlp", kernel=3):
    """Projection head, student width -> teacher width: REPA's MLP, or one layer, linear or ConvProjector."""
    if kind == "conv":
        return ConvProjector(hidden_size, z_dim, kernel, padding=kernel // 2)
    if kind == "linear":
        return nn.Linear(hidden_size, z_dim)
    return nn.Sequential(nn.Linear(hidden_size, projector_dim), nn.SiLU(), nn.Linear(projector_dim, projector_dim),
                         nn.SiLU(), nn.Linear(projector_dim, z_dim))


def adaln_zero(blocks, final_layer):
    """adaLN-zero: every block starts as the identity, the network as v = 0."""
    for linear in (final_layer.linear, *(block.adaLN_modulation[1] for block in [*blocks, final_layer])):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def run_block(index, block, *arguments, checkpointing=False, cache=None):
    """block(*arguments), run through `cache` (sampling/cache.py) if there is one.

    `checkpointing` recomputes the block's activations in the backward pass instead of keeping them.
    """
    if cache is not None:
        return cache.run(index, block, *arguments)
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)  # blocks are not random
    return block(*arguments)


def compile_blocks(blocks):
    """torch.compile in place, block by block.

    All blocks share one or two graphs: compiling takes seconds, for the whole network it takes minutes. The change
    from Phase I to Phase II recompiles nothing.
    """
    for block in blocks:
        block.compile(dynamic=False)


def check_sizes(input_size, patch_size, depth, encoder_depth, attn_layers):
    """Raise ValueError for sizes that do not fit together."""
    if input_size % patch_size:
        raise ValueError(f"input_size {input_size} is no multiple of patch_size {patch_size}")
    if not 1 <= encoder_depth <= depth or any(not 0 <= layer < depth for layer in attn_layers):
        raise ValueError(f"encoder_depth {encoder_depth} or attn_layers {attn_layers} outside a depth of {depth}")


def from_config(network, config, **kwargs):
    """Build `network` from `config`, its row in a table of sizes and recipes; `kwargs` override the row."""
    sizes = {name: value for name, value in config.items() if name not in ("attn_pairs", "early_stop_point")}
    return network(**{**sizes, "attn_layers": tuple(student for student, _ in config["attn_pairs"]), **kwargs})
