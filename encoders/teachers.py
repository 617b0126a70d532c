"""The frozen teacher: a vision transformer of timm, with taps on the attention of some of its blocks."""
import contextlib
import hashlib
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn

from loss import resample_qk, resample_tokens
from models.layers import Alignment, compile_blocks
from modify_dinov2.taps import take_attention, tap_attention
from runtime.errors import UserError, first_line
from runtime.files import load_tensors
from runtime.setup import AUTOCAST, cast_weights


class TeacherRow(NamedTuple):
    """What there is to know of a teacher before its weights are loaded."""

    timm_name: str
    width: int  # of its tokens
    patch: int  # pixels
    mean: tuple  # of the normalised image, per channel
    std: tuple
    prefix_tokens: int  # class and register tokens, which are cut off
    interpolation: str  # resizes the image; a mode of F.interpolate


def dinov2(size, width, registers=False):
    """The row of a DINOv2 model, with or without register tokens."""
    return TeacherRow(f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2", width, patch=14,
                      mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, prefix_tokens=5 if registers else 1,
                      interpolation="bicubic")


# --enc-type -> TeacherRow
TEACHERS = {
    "dinov2-vit-s": dinov2("small", 384),
    "dinov2-vit-b": dinov2("base", 768),
    "dinov2-vit-l": dinov2("large", 1024),
    "dinov2-vit-g": dinov2("giant", 1536),
    "dinov2reg-vit-s": dinov2("small", 384, registers=True),
    "dinov2reg-vit-b": dinov2("base", 768, registers=True),
    "dinov2reg-vit-l": dinov2("large", 1024, registers=True),
    "dinov2reg-vit-g": dinov2("giant", 1536, registers=True),
}
DINOV2 = TEACHERS["dinov2-vit-b"]


def load_vit(enc_type, weights=None):
    """timm's frozen ViT called `enc_type` (a key of TEACHERS), with weights from the hub or from the file `weights`.

    A file holds timm's or torch.hub's state dict. Its row is the attribute `row`. Raises UserError for weights of
    another model.
    """
    row = TEACHERS[enc_type]
    try:
        vit = timm.create_model(row.timm_name, pretrained=weights is None, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise UserError(f"The weights of {enc_type} could not be fetched from the hub ({first_line(error)}); give a "
                        "local file with --enc-weights.") from error
    if weights is not None:
        state = load_tensors(weights)
        try:
            vit.load_state_dict(checkpoint_filter_fn(state, vit))
        except Exception as error:  # timm takes the state dict apart before it compares any shape
            raise UserError(f"{weights} does not hold the weights of {enc_type} ({row.timm_name}); give its timm or "
                            "torch.hub file, or the matching --enc-type.") from error
    vit.row, found = row, (vit.embed_dim, vit.patch_embed.patch_size[0], vit.num_prefix_tokens)
    if found != (row.width, row.patch, row.prefix_tokens):
        raise ValueError(f"timm's {row.timm_name} has (width, patch, prefix tokens) {found}, not as in {row}")
    return vit.eval().requires_grad_(False)


class Teacher:
    """A frozen timm ViT: images uint8 (N, 3, R, R) -> Alignment of their patch tokens.

    `vit` is load_vit's; one without a row is treated as DINOv2. Images are normalised, then resized to patch * `grid`
    pixels, so that the teacher has `grid` x `grid` tokens as the student does. With `input_size` they are resized to
    that, and the outputs are resampled to the student's grid. `attn_blocks` (0-based) are the blocks whose q and k are
    returned. `num_blocks` keeps only the first blocks; the features are the final norm of the last one kept. Without
    `features` no block after the last tapped one runs. `precision` is "no" (float32), "fp16" or "bf16"; None: that of
    the autocast around it.
    """

    def __init__(self, vit, grid, attn_blocks=(), num_blocks=None, features=True, precision=None, input_size=None):
        num_blocks = num_blocks or len(vit.blocks)
        if num_blocks > len(vit.blocks) or any(not 0 <= block < num_blocks for block in attn_blocks):
            raise UserError(f"The teacher has {len(vit.blocks)} blocks, of which {num_blocks} are to be used and "
                            f"{list(attn_blocks)} aligned to; choose --enc-blocks and --attn-layers inside.")
        if not features:
            num_blocks = max(attn_blocks) + 1
        vit.blocks = vit.blocks[:num_blocks]
        self.row = getattr(vit, "row", DINOV2)
        patch = vit.patch_embed.patch_size[0]
        if input_size and input_size % patch:
            raise UserError(f"--enc-size {input_size} is no multiple of {patch}, the teacher's patch; change it or "
                            "leave it out.")
        self.grid, self.input_size = grid, input_size or grid * patch
        vit.set_input_size((self.input_size, self.input_size))  # resamples the position table, bicubic, antialiased
        self.vit, self.features, self.num_blocks, self.precision = vit, features, num_blocks, precision
        self.attn_blocks = sorted(set(attn_blocks))
        tap_attention(vit, self.attn_blocks)
        self.mean = torch.tensor(self.row.mean).view(1, 3, 1, 1)
        self.std = torch.tensor(self.row.std).view(1, 3, 1, 1)

    def to(self, device):
        self.vit, self.mean, self.std = self.vit.to(device), self.mean.to(device), self.std.to(device)
        return self

    def compile(self):
        """Compile in place, block by block."""
        compile_blocks(self.vit.blocks)

    def cast(self, around):
        """Cast the weights once, not in each call; `around` is the precision of the autocast around the calls."""
        cast_weights(self.vit, self.precision or around)

    def autocast(self, device_type):
        """The context in which the blocks run."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, AUTOCAST.get(self.precision), enabled=self.precision != "no")

    @torch.no_grad()  # not inference_mode: a loss keeps the results for its backward pass
    def __call__(self, images):
        x = (images.to(self.mean.device, non_blocking=True).float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=self.input_size, mode=self.row.interpolation, align_corners=False)
        with self.autocast(x.device.type):
            tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens:]  # (N, T, C), after the final norm
            attention = take_attention(self.vit, self.attn_blocks)
        attention = {block: resample_qk(qk, self.grid ** 2) for block, qk in attention.items()}
        if tokens.shape[1] != self.grid ** 2:
            tokens = resample_tokens(tokens.float(), self.grid ** 2)
        return Alignment([tokens] if self.features else [], attention)

    def key(self):
        """Text that changes with the weights and with everything else that changes an output."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
        images = self.row.mean, self.row.std, self.row.interpolation
        other = "" if images == (DINOV2.mean, DINOV2.std, DINOV2.interpolation) else f" {images}"  # keeps older caches
        return f"{digest.hexdigest()} {self.input_size} {self.num_blocks} {self.grid}{other}"

    def outputs(self, alignment):
        """{name: (N, ...)} of this teacher's Alignment: the features, and for each block q and k stacked."""
        flat = {f"features{i}": value for i, value in enumerate(alignment.features)}
        return flat | {f"block{block}": torch.stack([qk.q, qk.k], dim=1) for block, qk in alignment.attention.items()}

    def names(self):
        """The names in outputs()."""
        return ["features0"] * self.features + [f"block{block}" for block in self.attn_blocks]
