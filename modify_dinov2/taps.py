"""Read queries and keys out of a timm vision transformer while it runs. README.md beside this file says why hooks."""
from models.layers import QK


def tap_attention(vit, blocks):
    """Hook the qkv layers of `blocks` (0-based) of timm's VisionTransformer `vit`.

    Returns a dict that each forward pass of `vit` fills with {block: QK} of the patch tokens: (N, H, T, d), class and
    register tokens cut off, after q and k norm where the model has them.
    """
    taps = {}

    def hook(block, attention):
        def read(_, __, qkv):  # qkv (N, prefix + T, 3 D)
            q, k, _ = qkv[:, vit.num_prefix_tokens:].unflatten(2, (3, attention.num_heads, -1)).unbind(2)
            taps[block] = QK(attention.q_norm(q).transpose(1, 2), attention.k_norm(k).transpose(1, 2))
        return read

    for block in blocks:
        attention = vit.blocks[block].attn
        attention.qkv.register_forward_hook(hook(block, attention))
    return taps
