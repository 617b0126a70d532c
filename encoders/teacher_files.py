"""Load teacher weights from common sources: rename their keys for timm's own filters."""
import timm
import torch
from timm.models.eva import checkpoint_filter_fn as eva_filter
from timm.models.vision_transformer import checkpoint_filter_fn

from runtime.errors import first_line


def patches_of(state):
    """(width, pixels a side) of the patch embedding in a state dict or one nested in it; None without one."""
    if isinstance(state, dict):
        for part in (state, *(value for value in state.values() if isinstance(value, dict))):
            for value in part.values():
                if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1] == 3:
                    return value.shape[0], value.shape[3]
    return None


def moco_names(state):
    """MoCo v3's file under timm's names: drop its prefix, rename the layers that the file of L misnames."""
    state = {name.removeprefix("module.base_encoder."): value for name, value in state["state_dict"].items()
             if name.startswith("module.base_encoder.") and ".head" not in name}
    wrong = {"blocks.13.norm13": "blocks.13.norm1", "blocks.13.mlp.fc13": "blocks.13.mlp.fc1",
             "blocks.14.norm14": "blocks.14.norm2", "blocks.14.mlp.fc14": "blocks.14.mlp.fc2"}
    for old, new in wrong.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def transformers_names(state):
    """transformers' Dinov2Model under torch.hub's names."""
    renamed = {}
    for name, value in state.items():
        name = name.removeprefix("dinov2.")
        for old, new in (("embeddings.cls_token", "cls_token"), ("embeddings.position_embeddings", "pos_embed"),
                         ("embeddings.register_tokens", "register_tokens"), ("embeddings.mask_token", "mask_token"),
                         ("embeddings.patch_embeddings.projection", "patch_embed.proj"), ("encoder.layer.", "blocks."),
                         ("attention.output.dense", "attn.proj"), ("layer_scale1.lambda1", "ls1.gamma"),
                         ("layer_scale2.lambda1", "ls2.gamma"), ("mlp.weights_in", "mlp.w12"),
                         ("mlp.weights_out", "mlp.w3"), ("layernorm.", "norm.")):
            name = name.replace(old, new)
        renamed[name] = value
    for name in [name for name in renamed if ".attention.attention.query." in name]:
        parts = [renamed.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return renamed


def fit_names(state):
    """Rename the keys of a state dict for timm's own filters."""
    if not isinstance(state, dict):
        return state
    if any(name.startswith("module.base_encoder.") for name in state.get("state_dict", ())):
        return moco_names(state)
    if any("encoder.layer.0.attention.attention.query.weight" in name for name in state):
        return transformers_names(state)
    return state


def load_state(vit, state):
    """Load a state dict into timm's `vit`. Raises ValueError if names, shapes or patch sizes differ.

    On the device "meta" nothing is loaded.
    """
    fit = eva_filter if isinstance(vit, timm.models.eva.Eva) else checkpoint_filter_fn
    try:
        state = fit_names(state)
        if (patches := patches_of(state)) and patches[1] != vit.patch_embed.patch_size[0]:
            raise ValueError("patches of another size")  # timm would resample them
        vit.load_state_dict({name: value for name, value in fit(dict(state), vit).items()
                             if not name.startswith("head.")})
    except Exception as error:  # timm takes the state dict apart before it compares any shape
        raise ValueError(first_line(error)) from error
