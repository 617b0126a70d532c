"""The frozen teacher: a vision transformer of timm, with taps on the attention of some of its blocks."""
import contextlib
import warnings
from textwrap import shorten
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from encoders.teacher_files import load_state, patches_of
from loss import resample_qk, resample_tokens
from models.checkpoint import weights_digest
from models.layers import Alignment, compile_blocks
from modify_dinov2.taps import take_attention, tap_attention
from runtime.errors import UserError
from runtime.files import is_file, load_tensors
from runtime.setup import AUTOCAST, cast_weights


class TeacherRow(NamedTuple):
    """Properties of a teacher that are known before its weights are loaded."""

    timm_name: str
    width: int  # of the tokens
    patch: int  # pixels
    mean: tuple = IMAGENET_DEFAULT_MEAN  # of the normalised image, per channel
    std: tuple = IMAGENET_DEFAULT_STD
    prefix_tokens: int = 1  # class and register tokens; cut off
    interpolation: str = "bicubic"  # resizes the image; a mode of F.interpolate
    antialias: bool = False
    final_norm: bool = True  # whether features are those after the last norm
    source: str = "timm's hub, or a torch.hub or timm file"  # where the weights come from
    licence: str = "Apache 2.0"
    options: tuple = ()  # (name, value) of timm.create_model
    positions: str = "timm"  # how positions are resampled; "plain": see set_input_size


def dinov2(size, width, registers=False):
    """The row of a DINOv2 model, with or without register tokens."""
    return TeacherRow(f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2", width, patch=14,
                      prefix_tokens=5 if registers else 1)


def mocov3(size, width, **options):
    return TeacherRow(f"vit_{size}_patch16_224", width, patch=16, source=f"a file: mocov3_vit{size[0]}.pth of REPA",
                      licence="CC BY-NC 4.0", options=tuple(options.items()))


def dinov3(size, width):
    return TeacherRow(f"vit_{size}_patch16_dinov3.lvd1689m", width, patch=16, prefix_tokens=5, interpolation="bilinear",
                      antialias=True, licence="DINOv3 licence")


def siglip2(size, width):
    half = (0.5, 0.5, 0.5)
    return TeacherRow(f"vit_{size}_patch16_siglip_256.v2_webli", width, patch=16, mean=half, std=half, prefix_tokens=0,
                      options=(("act_layer", "gelu_tanh"),))  # timm uses the exact GELU for b and l; 1e-3 off


def perception(name, width, patch):
    half = (0.5, 0.5, 0.5)
    return TeacherRow(f"vit_pe_{name}", width, patch=patch, mean=half, std=half, interpolation="bilinear",
                      final_norm=False, positions="plain")


# --enc-type -> TeacherRow. Names are those of REPA and iREPA; the input is patch x (tokens a side) pixels.
TEACHERS = {
    **{f"dinov2{registers}-vit-{size[0]}": dinov2(size, width, bool(registers)) for registers in ("", "reg")
       for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536))},
    "dinov1-vit-b": TeacherRow("vit_base_patch16_224.dino", 768, patch=16),
    "mocov3-vit-s": mocov3("small", 384, num_heads=12),
    "mocov3-vit-b": mocov3("base", 768),
    "mocov3-vit-l": mocov3("large", 1024),
    "mae-vit-l": TeacherRow("vit_large_patch16_224.mae", 1024, patch=16, final_norm=False, licence="CC BY-NC 4.0"),
    "clip-vit-L": TeacherRow("vit_large_patch14_clip_quickgelu_224.openai", 1024, patch=14, mean=OPENAI_CLIP_MEAN,
                             std=OPENAI_CLIP_STD, final_norm=False, licence="MIT"),
    "clip-vit-B": TeacherRow("vit_base_patch16_clip_quickgelu_224.openai", 768, patch=16, mean=OPENAI_CLIP_MEAN,
                             std=OPENAI_CLIP_STD, final_norm=False, licence="MIT"),
    "jepa-vit-h": TeacherRow("vit_huge_patch14_gap_224.in1k_ijepa", 1280, patch=14, prefix_tokens=0,
                             licence="CC BY-NC 4.0"),
    "dinov3-vit-s16": dinov3("small", 384),
    "dinov3-vit-b16": dinov3("base", 768),
    "dinov3-vit-l16": dinov3("large", 1024),
    "dinov3-vit-h16plus": dinov3("huge_plus", 1280),
    "siglip2-vit-b": siglip2("base", 768),
    "siglip2-vit-l": siglip2("large", 1024),
    "siglip2-vit-so400m": siglip2("so400m", 1152),
    "pe-vit-b": perception("core_base_patch16_224.fb", 768, 16),
    "pe-vit-l": perception("core_large_patch14_336.fb", 1024, 14),
    "spatialpe-vit-b": perception("spatial_base_patch16_512.fb", 768, 16),
    "spatialpe-vit-l": perception("spatial_large_patch14_448.fb", 1024, 14),
}
ALIASES = {"dino-vit-b": "dinov1-vit-b", "clip-vit-l": "clip-vit-L", "clip-vit-b": "clip-vit-B"}
DINOV2 = TEACHERS["dinov2-vit-b"]
TIMM = "timm:"  # prefix for any other ViT of timm
# Where REPA's users keep these weights, relative to the folder they train in; tried before timm's hub.
PLACES = {f"mocov3-vit-{size}": f"ckpts/mocov3_vit{size}.pth" for size in "sbl"} | {
    "mae-vit-l": "ckpts/mae_vitl.pth", "jepa-vit-h": "ckpts/ijepa_vith.pth", "dinov1-vit-b": "ckpts/dinov1_vitb.pth"}


def teacher_row(enc_type):
    """The TeacherRow of a key of TEACHERS or ALIASES, or of "timm:NAME". Raises UserError for any other name."""
    name = ALIASES.get(enc_type, enc_type)
    if name in TEACHERS:
        return TEACHERS[name]
    if not name.startswith(TIMM):
        raise UserError(f"--enc-type {enc_type} is not known; use none, timm:NAME for another ViT of timm, or one of "
                        f"{', '.join(TEACHERS)}.")
    name = name.removeprefix(TIMM)
    if not timm.is_model(name):
        raise UserError(f"--enc-type {enc_type}: timm has no model {name}; timm.list_models('*vit*') lists them.")
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    attention = isinstance(vit, (VisionTransformer, Eva)) and getattr(vit.blocks[0], "attn", None)
    if not hasattr(attention, "q_norm") or type(attention).__name__ == "DiffAttention" \
            or not isinstance(vit.patch_embed, PatchEmbed) or getattr(vit, "rope_mixed", False):
        raise UserError(f"--enc-type {enc_type}: {name} is no plain ViT (timm's VisionTransformer or Eva, with "
                        "patches of pixels, ordinary attention and no mixed rotations); give another.")
    return TeacherRow(name, vit.embed_dim, vit.patch_embed.patch_size[0], vit.pretrained_cfg["mean"],
                      vit.pretrained_cfg["std"], vit.num_prefix_tokens)


def teacher_list():
    """The table as text: name, width, source and licence of the weights."""
    rows = [("name", "width", "weights", "licence")]
    rows += [(name, str(row.width), row.source, row.licence) for name, row in TEACHERS.items()]
    return "\n".join([f"{name:20} {width:>5}  {source:42} {licence}" for name, width, source, licence in rows]
                     + ["timm:NAME            any other ViT of timm, with its own numbers"])


def split_teachers(enc_type, weights=None):
    """[(name, its file or None)] of the comma lists --enc-type ("none": empty) and --enc-weights. Raises UserError."""
    names = [] if enc_type == "none" else enc_type.split(",")
    files = weights.split(",") if weights and len(names) > 1 else [weights] * len(names)
    if len(files) != len(names):
        raise UserError(f"--enc-weights {weights} names {len(files)} files for {len(names)} teachers, --enc-type "
                        f"{enc_type}; give one for each, nothing between two commas for weights of the hub.")
    return [(name, file or None) for name, file in zip(names, files, strict=True)]


def find_weights(enc_type, weights):
    """The file `weights` or REPA's default file; None: from the hub. Raises UserError if no hub has them."""
    place = PLACES.get(ALIASES.get(enc_type, enc_type), "")
    if weights is not None or is_file(place):
        return weights or place
    if (source := teacher_row(enc_type).source).startswith("a file"):
        raise UserError(f"--enc-type {enc_type}: no hub has its weights; give --enc-weights ({source}).")
    return None


def has_shapes_of(enc_type, state):
    """Whether this state dict could be that of a teacher."""
    row = teacher_row(enc_type)
    if patches_of(state) != (row.width, row.patch):
        return False  # avoids building every model of the table
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # "copying to meta does nothing"
            load_state(timm.create_model(row.timm_name, num_classes=0, **dict(row.options)), state)
    except ValueError:
        return False
    return True


def load_vit(enc_type, weights=None):
    """timm's frozen ViT called `enc_type`, as teacher_row takes it, with weights from the hub or the file `weights`.

    A file holds a state dict from timm, torch.hub, transformers' DINOv2 or the authors, or is OpenAI's CLIP archive.
    The attribute `row` is the TeacherRow. Raises UserError for weights of another model.
    """
    row, weights = teacher_row(enc_type), find_weights(enc_type, weights)
    try:
        vit = timm.create_model(row.timm_name, pretrained=weights is None, num_classes=0, **dict(row.options))
    except (OSError, RuntimeError) as error:
        raise UserError(f"The weights of {enc_type} could not be fetched from the hub ({shorten(str(error), 100)}); "
                        "give a local file with --enc-weights, or --enc-type none for no teacher.") from error
    if weights is not None:
        state = load_tensors(weights)
        try:
            load_state(vit, state)
        except ValueError as error:
            others = [name for name in TEACHERS if has_shapes_of(name, state)]
            held = f", but those of {' or '.join(others)}" if others else ""
            raise UserError(f"{weights} does not hold the weights of {enc_type} ({row.timm_name}){held}; give its timm "
                            "or torch.hub file, or the matching --enc-type.") from error
    if not row.final_norm:
        vit.norm = torch.nn.Identity()
    vit.row, found = row, (vit.embed_dim, vit.patch_embed.patch_size[0], vit.num_prefix_tokens)
    if found != (row.width, row.patch, row.prefix_tokens):
        raise ValueError(f"timm's {row.timm_name} has (width, patch, prefix tokens) {found}, not as in {row}")
    return vit.eval().requires_grad_(False)


def set_input_size(vit, size, positions="timm"):
    """Set timm's `vit` to images of `size` pixels a side.

    timm resamples the position table bicubically with antialiasing, and may scale rotations to the training grid.
    With `positions` "plain", as in Perception Encoder's own code, the table is resampled bilinearly without
    antialiasing and rotations count patches.
    """
    table = vit.pos_embed
    if positions == "plain":
        vit.rope.ref_feat_shape = None
    vit.set_input_size((size, size))
    if positions == "plain":
        vit.pos_embed = torch.nn.Parameter(resample_abs_pos_embed(
            table, vit.patch_embed.grid_size, num_prefix_tokens=0 if vit.no_embed_class else vit.num_prefix_tokens,
            interpolation="bilinear", antialias=False), requires_grad=False)


class Teacher:
    """A frozen timm ViT: images uint8 (N, 3, R, R) -> Alignment of their patch tokens.

    `vit` is load_vit's; one without a row is treated as DINOv2. Images are normalised, then resized to patch * `grid`
    pixels, so that the teacher has `grid` x `grid` tokens as the student does, or to `input_size`. Then the losses
    resample the student's side; with `resample` "teacher" the outputs are resampled to `grid` here.
    Outputs, in autocast's dtype: features [(N, T, width)] and attention {0-based block: QK of (N, H, T, d)}.
    `attn_blocks` (0-based): blocks whose q and k are returned. `num_blocks` keeps only the first blocks; features are
    the final norm of the last one kept. Without `features` no block after the last tapped one runs. `precision`: "no"
    (float32), "fp16", "bf16", or None for the precision of the surrounding autocast.
    """

    sees_images = True

    def __init__(self, vit, grid, attn_blocks=(), num_blocks=None, features=True, precision=None, input_size=None,
                 resample="student"):
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
        self.input_size = input_size or grid * patch
        self.grid = grid if resample == "teacher" else self.input_size // patch  # of the outputs
        set_input_size(vit, self.input_size, self.row.positions)
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
        """Cast the weights once, not in each call; `around` is the precision of the surrounding autocast."""
        cast_weights(self.vit, self.precision or around)

    def autocast(self, device_type):
        """The context in which the blocks run."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, AUTOCAST.get(self.precision), enabled=self.precision != "no")

    @torch.no_grad()  # not inference_mode: a loss keeps the results for its backward pass
    def __call__(self, images):
        x = (images.to(self.mean.device, non_blocking=True).float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=self.input_size, mode=self.row.interpolation, align_corners=False,
                          antialias=self.row.antialias)
        with self.autocast(x.device.type):
            tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens:]  # (N, T, C), after the final norm
            attention = take_attention(self.vit, self.attn_blocks)
        attention = {block: resample_qk(qk, self.grid ** 2) for block, qk in attention.items()}
        if tokens.shape[1] != self.grid ** 2:
            tokens = resample_tokens(tokens.float(), self.grid ** 2)
        return Alignment([tokens] if self.features else [], attention)

    def key(self):
        """String that changes with the weights and with everything else that changes an output."""
        images = self.row[3:5] + self.row[6:9]  # mean, std, interpolation, antialias, final_norm
        others = [value for value in (self.row.options, self.row.positions) if value not in ((), "timm")]
        parts = (weights_digest(self.vit), self.input_size, self.num_blocks, self.grid, images, *others)
        return " ".join(map(str, parts))

    def outputs(self, alignment):
        """This teacher's Alignment as {name: (N, ...)}: the features, and q and k stacked for each block."""
        flat = {f"features{i}": value for i, value in enumerate(alignment.features)}
        return flat | {f"block{block}": torch.stack([qk.q, qk.k], dim=1) for block, qk in alignment.attention.items()}

    def names(self):
        """The names in outputs()."""
        return ["features0"] * self.features + [f"block{block}" for block in self.attn_blocks]


def load_teachers(enc_type, weights, grid, attn_blocks=(), attn_teacher=1, **options):
    """Teachers for these comma lists; number `attn_teacher` gives the attention. `options` go to every Teacher."""
    return Teachers([Teacher(load_vit(name, file), grid, attn_blocks if i == attn_teacher else (), **options)
                     for i, (name, file) in enumerate(split_teachers(enc_type, weights), 1)])


class Teachers:
    """Several teachers as one: images uint8 (N, 3, R, R) -> an Alignment with all outputs.

    `parts` are Teachers, or CachedTeachers (which take positions instead of images); may be empty.
    """

    def __init__(self, parts):
        self.parts = parts
        self.sees_images = any(part.sees_images for part in parts)

    def to(self, device):
        for part in self.parts:
            part.to(device)
        return self

    def compile(self):
        for part in self.parts:
            part.compile()

    def cast(self, around):
        for part in self.parts:
            part.cast(around)

    def __call__(self, images):
        outputs = [part(images) for part in self.parts]
        return Alignment([tokens for output in outputs for tokens in output.features],
                         {block: qk for output in outputs for block, qk in output.attention.items()})
