"""Read queries and keys out of a timm vision transformer while it runs. README.md beside this file says how."""
from torch import nn

from models.layers import QK


class TappedLinear(nn.Linear):
    """A linear layer that keeps its newest output. torch.compile passes hooks over, but not a class of its own."""

    output = None

    def forward(self, x):
        self.output = super().forward(x)
        return self.output


def tap_attention(vit, blocks):
    """Tap the qkv layers of `blocks` (0-based) of timm's VisionTransformer `vit`, in place; its state dict stays."""
    for block in blocks:
        attention, layer = vit.blocks[block].attn, vit.blocks[block].attn.qkv
        attention.qkv = TappedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        attention.qkv.weight, attention.qkv.bias = layer.weight, layer.bias


def take_attention(vit, blocks):
    """{block: QK} of the newest forward pass of `vit`, which then keeps nothing of it.

    Of the patch tokens: (N, H, T, d), class and register tokens cut off, after q and k norm where the model has them.
    """
    taken = {}
    for block in blocks:
        attention = vit.blocks[block].attn
        qkv, attention.qkv.output = attention.qkv.output[:, vit.num_prefix_tokens:], None  # (N, T, 3 D)
        q, k, _ = qkv.unflatten(2, (3, attention.num_heads, -1)).unbind(2)
        taken[block] = QK(attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2))
    return taken
