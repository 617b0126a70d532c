"""Read queries and keys out of a timm vision transformer while it runs. README.md in this folder explains how."""
import functools

from timm.layers import apply_rot_embed_cat

from models.layers import QK


class Tapped:
    """Mixin that keeps a module's newest output. torch.compile skips forward hooks, but not a class."""

    output = None

    def forward(self, x):
        self.output = super().forward(x)
        return self.output


@functools.cache  # one class for all modules of a type, or each would be compiled separately
def tapped(kind):
    return type(f"Tapped{kind.__name__}", (Tapped, kind), {})


def tap_attention(vit, blocks):
    """Tap q_norm and k_norm, an identity in most models, of `blocks` (0-based) of timm's ViT `vit`, in place."""
    for block in blocks:
        for norm in (vit.blocks[block].attn.q_norm, vit.blocks[block].attn.k_norm):
            norm.__class__ = tapped(type(norm))


def rotations(vit):
    """The rotary position embedding of `vit`'s tokens, computed as in its forward pass, or None."""
    rope = getattr(vit, "rope", None)
    return None if rope is None else rope.get_embed(shape=vit.patch_embed.grid_size)


def take_attention(vit, blocks):
    """Return {block: QK} of the newest forward pass of `vit`, and free the outputs kept in `vit`.

    Patch tokens only, (N, H, T, d), without class and register tokens; after q and k norm and after the rotary
    position embedding, if the model has them.
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
