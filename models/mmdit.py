"""MMDiT: a text-conditional diffusion transformer with a separate text stream, and taps for alignment.

The joint blocks of Stable Diffusion 3 (arXiv 2403.03206) without its pooled text vector, as in arXiv 2505.16792.
"""
import functools

import torch
from torch import nn

from models import layers

# Depth and recipe, as in models/sit.py. MMDiT is the paper's, with the release's early-stop point (the paper's run on
# COCO stops at 200,000 of 250,000 steps); T is ours, for the embedded data.
MMDIT_CONFIGS = {
    "MMDiT": {"depth": 24, "patch_size": 2, "encoder_depth": 8, "attn_pairs": ((4, 8), (5, 9), (6, 10), (7, 11)),
              "early_stop_point": 150_000},
    "MMDiT-T": {"depth": 4, "patch_size": 2, "projector_dim": 256, "encoder_depth": 3, "attn_pairs": ((1, 7), (2, 9)),
                "early_stop_point": 700},
}


class JointBlock(nn.Module):
    """One block per stream, text and image, around one attention over the tokens of both."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm, last):
        super().__init__()
        self.context_block = layers.AdaLNBlock(hidden_size, num_heads, mlp_ratio, qk_norm, pre_only=last)
        self.x_block = layers.AdaLNBlock(hidden_size, num_heads, mlp_ratio, qk_norm)

    def forward(self, context, x, c, fused=True, tapped=False, with_branches=False):
        """Text (N, L, D), image (N, T, D), condition (N, D) -> text, image and, if `tapped`, the image tokens' QK.

        The last block returns None as text, as it uses only the text's keys and values. `with_branches` adds the
        outputs of attention and MLP, first the image's, then the text's, for `assembled`.
        """
        text_qkv, text_rest = self.context_block.before(context, c)
        image_qkv, image_rest = self.x_block.before(x, c)

        # Text first; every token sees every token, and padding is text like any other.
        joint = (torch.cat(pair, dim=2) for pair in zip(text_qkv, image_qkv, strict=True))  # (N, H, L + T, d)
        text, image = layers.attend(*joint, fused).split([context.shape[1], x.shape[1]], dim=2)

        x, branches = self.x_block.after(x, image, image_rest)
        context, of_text = self.context_block.after(context, text, text_rest) if text_rest else (None, [])
        return (context, x, layers.QK(*image_qkv[:2]) if tapped else None,
                *([branches + of_text] if with_branches else []))

    def assembled(self, context, x, c, branches):
        """What forward returns if attention and MLP give `branches`."""
        context = self.context_block.assemble(context, c, branches[2:]) if branches[2:] else None
        return context, self.x_block.assemble(x, c, branches), None


class MMDiT(nn.Module):
    """Latents in, velocity out. Captions are dropped by the training step, not in here.

    The width is 32 x `depth` with `depth` heads, as published. `attn_layers` (0-based) and `encoder_depth`
    (1-based) say where q, k and features of the image stream are tapped, `z_dims` holds one teacher width per
    projector; `projector` and `projector_kernel` are as in SiT. `fused_attn=False` computes explicit attention maps
    instead of using the fused kernel, `grad_checkpointing` recomputes the blocks' activations in the backward pass.
    Weights have PyTorch's default init, as in the published runs; `zero_init` adds adaLN-zero.
    """

    _no_split_modules = ("JointBlock",)  # the units that FSDP shards; accelerate reads this name
    cache = None  # set by sampling/cache.py while it samples

    def __init__(self, input_size=32, patch_size=2, in_channels=4, depth=24, mlp_ratio=4.0, context_dim=768,
                 encoder_depth=8, attn_layers=(4, 5, 6, 7), z_dims=(768,), projector_dim=2048, qk_norm=False,
                 fused_attn=True, grad_checkpointing=False, zero_init=False, projector="mlp", projector_kernel=3):
        super().__init__()
        layers.check_sizes(input_size, patch_size, depth, encoder_depth, attn_layers)
        hidden_size, num_heads = 32 * depth, depth
        self.patch_size, self.in_channels, self.input_size = patch_size, in_channels, input_size
        self.encoder_depth, self.attn_layers = encoder_depth, tuple(attn_layers)
        self.z_dims, self.fused_attn, self.grad_checkpointing = tuple(z_dims), fused_attn, grad_checkpointing
        self.register_buffer("pos_embed", layers.sincos_2d(hidden_size, input_size // patch_size))
        self.x_embedder = layers.PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.context_embedder = nn.Linear(context_dim, hidden_size)
        self.joint_blocks = nn.ModuleList(
            JointBlock(hidden_size, num_heads, mlp_ratio, qk_norm, last=i == depth - 1) for i in range(depth))
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, in_channels)
        self.projectors = nn.ModuleList(layers.projector(
            hidden_size, projector_dim, z_dim, projector, projector_kernel) for z_dim in z_dims)
        if zero_init:
            layers.adaln_zero([half for block in self.joint_blocks for half in block.children()], self.final_layer)

    @property
    def latent_shape(self):
        return self.in_channels, self.input_size, self.input_size

    def compile(self):
        layers.compile_blocks(self.joint_blocks)

    def forward(self, x, t, y, return_alignment=False):
        """x (N, C, h, w), t (N,), text y (N, L, context_dim), any L -> v (N, C, h, w), and the Alignment if asked."""
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        context = self.context_embedder(y)  # (N, L, D)
        c = self.t_embedder(t)  # (N, D)
        features, attention, projected = [], {}, None
        for i, block in enumerate(self.joint_blocks):
            tapped = return_alignment and i in self.attn_layers
            context, tokens, qk = layers.run_block(i, block, context, tokens, c, self.fused_attn, tapped,
                                                   cache=self.cache, checkpointing=self.grad_checkpointing)
            if tapped:
                attention[i] = qk
            if return_alignment and i + 1 == self.encoder_depth:
                projected, features = tokens, [project(tokens) for project in self.projectors]  # (N, T, z_dim) each
        v = layers.unpatchify(self.final_layer(tokens, c), self.patch_size)
        return (v, layers.Alignment(features, attention, projected)) if return_alignment else v


MMDiT_models = {name: functools.partial(layers.from_config, MMDiT, config) for name, config in MMDIT_CONFIGS.items()}
