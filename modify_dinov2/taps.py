"""Read queries and keys out of a timm vision transformer while it runs. README.md beside this file says how."""
import functools

from timm.layers import apply_rot_embed_cat

from models.layers import QK


class Tapped:
    """Mixed into a module's class: keeps the newest output. torch.compile passes hooks over, but not a class."""

    output = None

    def forward(self, x):
        self.output = super().forward(x)
        return self.output


@functools.cache  # one class for all modules of a kind, or each would be compiled for itself
def tapped(kind):
    return type(f"Tapped{kind.__name__}", (Tapped, kind), {})


def tap_attention(vit, blocks):
    """Tap q_norm and k_norm, an identity in most models, of `blocks` (0-based) of timm's ViT `vit`, in place."""
    for block in blocks:
        for norm in (vit.blocks[block].attn.q_norm, vit.blocks[block].attn.k_norm):
            norm.__class__ = tapped(type(norm))


def rotations(vit):
    """The rotary position embedding of `vit`'s tokens, as its forward pass makes it, or None."""
    rope = getattr(vit, "rope", None)
    return None if rope is None else rope.get_embed(shape=vit.patch_embed.grid_size)


def take_attention(vit, blocks):
    """{block: QK} of the newest forward pass of `vit`, which then keeps nothing of it.

    Of the patch tokens: (N, H, T, d), class and register tokens cut off, after q and k norm and after the rotation by
    the position where the model has them.
    """
    taken, rope = {}, rotations(vit)
    for block in blocks:
        attention, qk = vit.blocks[block].attn, []
        for norm in (attention.q_norm, attention.k_norm):
            heads, norm.output = norm.output[:, :, vit.num_prefix_tokens:], None  # (N, H, T, d)
            if rope is not None:
                heads = apply_rot_embed_cat(heads, rope, half=getattr(attention, "rotate_half", False)).to(heads.dtype)
            qk.append(heads)
        taken[block] = QK(*qk)
    return taken
