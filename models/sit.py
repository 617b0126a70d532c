"""SiT: a class-conditional diffusion transformer on image latents, with taps for alignment (arXiv 2505.16792)."""
import functools

from torch import nn

from models import layers

# Size, and the alignment recipe of the paper (Table 16, appendix B): encoder_depth is 1-based, attn_pairs are
# (student block, teacher block), 0-based. S has no published recipe and takes B's; T and XS are ours, for the
# embedded data and for CIFAR-10.
SIZES = {
    "T": {"depth": 5, "hidden_size": 160, "num_heads": 5, "projector_dim": 256, "encoder_depth": 3,
          "attn_pairs": ((1, 7), (2, 9)), "early_stop_point": 600},
    "XS": {"depth": 6, "hidden_size": 192, "num_heads": 6, "projector_dim": 384, "encoder_depth": 3,
           "attn_pairs": ((1, 6), (2, 8)), "early_stop_point": 1000},
    "S": {"depth": 12, "hidden_size": 384, "num_heads": 6, "encoder_depth": 5,
          "attn_pairs": ((2, 7), (3, 9), (4, 11)), "early_stop_point": 100_000},
    "B": {"depth": 12, "hidden_size": 768, "num_heads": 12, "encoder_depth": 5,
          "attn_pairs": ((2, 7), (3, 9), (4, 11)), "early_stop_point": 100_000},
    "L": {"depth": 24, "hidden_size": 1024, "num_heads": 16, "encoder_depth": 8,
          "attn_pairs": ((4, 8), (5, 9), (6, 10), (7, 11)), "early_stop_point": 250_000},
    "XL": {"depth": 28, "hidden_size": 1152, "num_heads": 16, "encoder_depth": 8,
           "attn_pairs": ((4, 8), (5, 9), (6, 10), (7, 11)), "early_stop_point": 250_000},
}
SIT_CONFIGS = {f"SiT-{size}/{patch}": {**config, "patch_size": patch} for size, config in SIZES.items()
               for patch in ((2,) if size == "T" else (1, 2, 4, 8))}  # 1: for VAEs that downsample by 16


class SiTBlock(layers.AdaLNBlock):
    """Self-attention on the image tokens."""

    def forward(self, x, c, fused=True, tapped=False, with_branches=False):
        """Tokens (N, T, D), condition (N, D) -> tokens (N, T, D) and, if `tapped`, the block's QK, else None.

        `with_branches` adds the outputs of attention and MLP, for `assembled`.
        """
        (q, k, v), rest = self.before(x, c)
        x, branches = self.after(x, layers.attend(q, k, v, fused), rest)
        return x, layers.QK(q, k) if tapped else None, *([branches] if with_branches else [])

    def assembled(self, x, c, branches):
        """What forward returns if attention and MLP give `branches`."""
        return self.assemble(x, c, branches), None


class SiT(nn.Module):
    """Latents in, velocity out. Sizes are in SIT_CONFIGS; labels are dropped by the training step, not in here.

    `attn_layers` (0-based) and `encoder_depth` (1-based) say where q, k and features are tapped, `z_dims` holds one
    teacher width per projector; `projector` is one of layers.PROJECTORS, `projector_kernel` a convolution's side.
    `fused_attn=False` computes explicit attention maps instead of using the fused kernel, `grad_checkpointing`
    recomputes the blocks' activations in the backward pass.
    """

    _no_split_modules = ("SiTBlock",)  # the units that FSDP shards; accelerate reads this name
    cache = None  # set by sampling/cache.py while it samples

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, encoder_depth=8, attn_layers=(4, 5, 6, 7),
                 z_dims=(768,), projector_dim=2048, qk_norm=False, fused_attn=True, grad_checkpointing=False,
                 projector="mlp", projector_kernel=3):
        super().__init__()
        layers.check_sizes(input_size, patch_size, depth, encoder_depth, attn_layers)
        self.patch_size, self.in_channels, self.input_size = patch_size, in_channels, input_size
        self.num_classes, self.encoder_depth, self.attn_layers = num_classes, encoder_depth, tuple(attn_layers)
        self.z_dims, self.fused_attn, self.grad_checkpointing = tuple(z_dims), fused_attn, grad_checkpointing
        side = input_size // patch_size
        self.x_embedder = layers.PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = layers.TimestepEmbedder(hidden_size)
        self.y_embedder = layers.LabelEmbedder(num_classes, hidden_size, null_row=class_dropout_prob > 0)
        self.pos_embed = nn.Parameter(layers.sincos_2d(hidden_size, side), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.projectors = nn.ModuleList(layers.projector(
            hidden_size, projector_dim, z_dim, projector, projector_kernel) for z_dim in z_dims)
        self.final_layer = layers.FinalLayer(hidden_size, patch_size, in_channels)
        self.init_weights()

    @property
    def latent_shape(self):
        return self.in_channels, self.input_size, self.input_size

    @property
    def null_label(self):
        """The label that stands for no condition: the last row of the table."""
        return self.num_classes

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        # The patch convolution is a linear layer on p * p * C inputs.
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        # Conditions start small, as in DiT.
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        layers.adaln_zero(self.blocks, self.final_layer)

    def compile(self):
        layers.compile_blocks(self.blocks)

    def forward(self, x, t, y, return_alignment=False):
        """x (N, C, h, w), t (N,), y (N,) int -> v (N, C, h, w), with `return_alignment` also the Alignment."""
        tokens = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y)  # (N, D)
        features, attention, projected = [], {}, None
        for i, block in enumerate(self.blocks):
            tapped = return_alignment and i in self.attn_layers
            tokens, qk = layers.run_block(i, block, tokens, c, self.fused_attn, tapped, cache=self.cache,
                                          checkpointing=self.grad_checkpointing)
            if tapped:
                attention[i] = qk
            if return_alignment and i + 1 == self.encoder_depth:
                projected, features = tokens, [project(tokens) for project in self.projectors]  # (N, T, z_dim) each
        v = layers.unpatchify(self.final_layer(tokens, c), self.patch_size)
        return (v, layers.Alignment(features, attention, projected)) if return_alignment else v


SiT_models = {name: functools.partial(layers.from_config, SiT, config) for name, config in SIT_CONFIGS.items()}
