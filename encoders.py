"""What is frozen: the teacher that sees images, the encoder of captions, the VAE between images and latents."""
import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import checkpoint_filter_fn
from tqdm import tqdm

from dataset import PIXEL_SCALE, PIXELS, SD_SCALE, pixel_moments
from files import (
    ARRAY_ERRORS,
    BadInput,
    atomic_write,
    first_line,
    is_file,
    is_folder,
    load_array,
    load_tensors,
    locked,
    writing,
)
from loss import resample_qk, resample_tokens
from models.layers import QK, Alignment, compile_blocks
from modify_dinov2.taps import take_attention, tap_attention
from speed import AUTOCAST, cast_weights

FLUSH_SECONDS = 60  # of a teacher cache in the making: what a kill costs at most
logger = logging.getLogger("haste")

# --enc-type -> (timm's name, width of its tokens)
TEACHERS = {f"dinov2{reg}-vit-{size[0]}": (f"vit_{size}_patch14{'_reg4' if reg else ''}_dinov2", width)
            for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)) for reg in ("", "reg")}


def to_device(tensor, device):
    """CPU tensor -> `device` without waiting for it: only from pinned memory does a copy to a GPU not block."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextlib.contextmanager
def loading(what, source, remedy):
    """Turn whatever a library raises while it loads `source`, a folder or hub name, into BadInput."""
    is_here = is_folder(source)
    try:
        yield
    except Exception as error:  # of any kind for a damaged folder: from the files' own parsers, from arithmetic on sizes
        where = "" if is_here else "no folder here, and not to be had from the hub: "
        raise BadInput(f"{what} {source} could not be loaded ({where}{first_line(error)}); give {remedy}, or a hub name "
                       "with the network up.") from error


def open_vae(source, device="cpu"):
    """The VAE `source`, or Pixels for PIXELS."""
    return Pixels(device) if source == PIXELS else VAE(source, device)


class Pixels:
    """In the place of a VAE: latents are pixels in [-1, 1] x latent_scale, 3 channels of the image's own size."""

    latent_scale = PIXEL_SCALE
    factor, channels, source = 1, 3, PIXELS

    def __init__(self, device="cpu"):
        self.device = device

    def check(self, channels, side, resolution):
        """Raise BadInput unless latents of `channels` x `side` x `side` are pixels of images of `resolution`."""
        if (channels, side) != (self.channels, resolution):
            raise BadInput(f"--vae none is for pixels, 3 channels of {resolution} for --resolution {resolution}, but "
                           f"the latents have {channels} channels of {side}; give the --vae or --resolution of these.")

    @staticmethod
    def encode(images):
        """uint8 (N, 3, R, R) -> moments float32 (N, 6, R, R)."""
        return pixel_moments(images).cpu()

    def decode(self, latents, _chunk=None):
        """Latents (N, 3, R, R) -> uint8 images (N, 3, R, R). Rounded, so that encoded images come back equal."""
        x = latents.float() / self.latent_scale
        return (255 * (x + 1) / 2).round().clamp(0, 255).to(torch.uint8)


class VAE:
    """Images <-> moments <-> latents.

    `source` is a folder in diffusers' format or a hub name such as stabilityai/sd-vae-ft-mse. Raises BadInput when
    neither can be loaded.
    """

    SCALE = latent_scale = SD_SCALE  # latent bias 0

    def __init__(self, source, device="cpu"):
        from diffusers import AutoencoderKL  # seconds to import, and only previews and sampling need it
        with loading("The VAE", source, "a folder in diffusers' format"):
            vae = AutoencoderKL.from_pretrained(source, use_safetensors=True)
            self.vae = vae.to(device).eval().requires_grad_(False)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent pixel and side
        self.channels = self.vae.config.latent_channels
        self.source, self.device = source, torch.device(device)

    def check(self, channels, side, resolution):
        """Raise BadInput unless latents of `channels` x `side` x `side` are this VAE's for images of `resolution`."""
        if (channels, side * self.factor) != (self.channels, resolution):
            raise BadInput(f"The VAE {self.source} makes {self.channels} channels at 1/{self.factor} "
                           f"of the image's side, but the latents have {channels} channels of {side} for --resolution "
                           f"{resolution}; give the --vae that made them.")

    @torch.no_grad()
    def encode(self, images, spread="std"):
        """uint8 (N, 3, R, R) on the CPU -> moments float32 (N, 2 C, R / factor, R / factor): mean, `spread` by channel.

        The ImageNet layout stores the "std", the text-to-image layout the "logvar", clamped to [-30, 20].
        """
        x = to_device(images, self.device).float() / 127.5 - 1  # on the device: a quarter of the bytes to send
        posterior = self.vae.encode(x).latent_dist
        return torch.cat([posterior.mean, getattr(posterior, spread)], dim=1).cpu()

    @staticmethod
    def latents(moments, noise, scale=SCALE):
        """Posterior sample (mean + std noise) * scale: moments (N, 2 C, h, w), noise (N, C, h, w) -> (N, C, h, w).

        `scale` is the latent_scale of the data set: Pixels' differs.
        """
        mean, std = moments.chunk(2, dim=1)
        return (mean + std * noise) * scale

    @torch.no_grad()
    def decode(self, latents, chunk=32):
        """Latents (N, C, h, w) of any float dtype -> uint8 images (N, 3, R, R), `chunk` at a time; truncated."""
        out = []
        for z in latents.split(chunk):
            x = self.vae.decode(z.to(self.device, torch.float32) / self.SCALE).sample
            out.append((255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8))
        return torch.cat(out)


def quiet_transformers():
    """transformers without its bars and its report of weights left out, such as CLIP's image tower."""
    import transformers  # seconds to import, and only captions need it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class TextEncoder:
    """Captions -> the last hidden states of a frozen CLIP text model or of a BERT-like sentence encoder.

    `source` is a local folder or a hub name, its weights safetensors; `length` the tokens per caption (default: the
    tokenizer's maximum, 77 for CLIP), to which every caption is padded or cut. CLIP is run as published, without an
    attention mask: its padding repeats the end token, and causal attention keeps it out of the words. A BERT-like
    model sees words in both directions: padding is masked, and its positions hold zeros. Raises BadInput when `source`
    cannot be loaded.
    """

    def __init__(self, source, device="cpu", length=None):
        transformers = quiet_transformers()
        with loading("The text encoder", source, "a folder with config.json, model.safetensors and the tokenizer"):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            self.is_clip = config.model_type in ("clip", "clip_text_model")
            kind = transformers.CLIPTextModel if self.is_clip else transformers.AutoModel
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, info = kind.from_pretrained(source, trust_remote_code=False, use_safetensors=True,
                                               output_loading_info=True)
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)  # transformers makes them up
        if missing:
            raise BadInput(f"The weights in {source} are not those of its config.json, {missing[0]} being missing; get "
                           "them again.")
        most = min(self.tokenizer.model_max_length, model.config.max_position_embeddings)
        self.length = length or most
        if self.length > most:
            raise BadInput(f"The text encoder {source} takes at most {most} tokens a caption, not {length}; ask for fewer.")
        self.model, self.device = model.to(device, torch.float32).eval().requires_grad_(False), device
        self.width = model.config.hidden_size

    @torch.no_grad()
    def __call__(self, captions):
        """N strings -> float32 (N, L, C) on the CPU."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.device)
        if self.is_clip:
            return self.model(input_ids=tokens.input_ids).last_hidden_state.cpu()
        states = self.model(**tokens).last_hidden_state
        return (states * tokens.attention_mask[..., None]).cpu()


def load_vit(enc_type, weights=None):
    """timm's frozen DINOv2 called `enc_type` (a key of TEACHERS), with weights from the hub or from the file `weights`.

    A file holds timm's or torch.hub's state dict. Raises BadInput for weights of another model.
    """
    name = TEACHERS[enc_type][0]
    if weights is None:
        try:
            vit = timm.create_model(name, pretrained=True, num_classes=0)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"The weights of {enc_type} could not be fetched from the hub "
                           f"({first_line(error)}); give a local file with --enc-weights.") from error
    else:
        vit = timm.create_model(name, pretrained=False, num_classes=0)
        state = load_tensors(weights)
        try:
            vit.load_state_dict(checkpoint_filter_fn(state, vit))
        except Exception as error:  # timm takes the state dict apart before it compares any shape
            raise BadInput(f"{weights} does not hold the weights of {enc_type} ({name}); give its timm or "
                           "torch.hub file, or the matching --enc-type.") from error
    return vit.eval().requires_grad_(False)


class Teacher:
    """A frozen timm ViT: images uint8 (N, 3, R, R) -> Alignment of their patch tokens.

    Images are resized to patch * `grid` pixels, so that the teacher has `grid` x `grid` tokens as the student does.
    With `input_size` they are resized to that, and the outputs are resampled to the student's grid.
    `attn_blocks` (0-based) are the blocks whose q and k are handed out. `num_blocks` keeps only the first blocks; the
    features are the final norm of the last one kept. Without `features` no block after the last tapped one runs.
    `precision` is that of its products, "no" (float32), "fp16" or "bf16"; None: that of the autocast around it.
    """

    def __init__(self, vit, grid, attn_blocks=(), num_blocks=None, features=True, precision=None, input_size=None):
        num_blocks = num_blocks or len(vit.blocks)
        if num_blocks > len(vit.blocks) or any(not 0 <= block < num_blocks for block in attn_blocks):
            raise BadInput(f"The teacher has {len(vit.blocks)} blocks, of which {num_blocks} are to be used and "
                           f"{list(attn_blocks)} aligned to; choose --enc-blocks and --attn-layers inside.")
        if not features:
            num_blocks = max(attn_blocks) + 1
        vit.blocks = vit.blocks[:num_blocks]
        patch = vit.patch_embed.patch_size[0]
        if input_size and input_size % patch:
            raise BadInput(f"--enc-size {input_size} is no multiple of {patch}, the teacher's patch; change it or "
                           "leave it out.")
        self.grid, self.input_size = grid, input_size or grid * patch
        vit.set_input_size((self.input_size, self.input_size))  # resamples the position table, bicubic, antialiased
        self.vit, self.features, self.num_blocks, self.precision = vit, features, num_blocks, precision
        self.attn_blocks = sorted(set(attn_blocks))
        tap_attention(vit, self.attn_blocks)
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(1, 3, 1, 1)
        self.std = torch.tensor(IMAGENET_DEFAULT_STD).view(1, 3, 1, 1)

    def to(self, device):
        self.vit, self.mean, self.std = self.vit.to(device), self.mean.to(device), self.std.to(device)
        return self

    def compile(self):
        """In place, block by block."""
        compile_blocks(self.vit.blocks)

    def cast(self, around):
        """Cast weights once instead of in each call; `around` is the precision of the autocast around the calls."""
        cast_weights(self.vit, self.precision or around)

    def autocast(self, device_type):
        """What the blocks run under."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, AUTOCAST.get(self.precision), enabled=self.precision != "no")

    @torch.no_grad()  # not inference_mode, whose results no loss could keep for its backward pass
    def __call__(self, images):
        x = (images.to(self.mean.device, non_blocking=True).float() / 255 - self.mean) / self.std
        x = F.interpolate(x, size=self.input_size, mode="bicubic", align_corners=False)
        with self.autocast(x.device.type):
            tokens = self.vit.forward_features(x)[:, self.vit.num_prefix_tokens:]  # (N, T, C), after the final norm
            attention = take_attention(self.vit, self.attn_blocks)
        attention = {block: resample_qk(qk, self.grid ** 2) for block, qk in attention.items()}
        if tokens.shape[1] != self.grid ** 2:
            tokens = resample_tokens(tokens.float(), self.grid ** 2)
        return Alignment([tokens] if self.features else [], attention)

    def key(self):
        """Text that changes with the weights and with everything else that shapes an output."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vit.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy())
        return f"{digest.hexdigest()} {self.input_size} {self.num_blocks} {self.grid}"

    def outputs(self, alignment):
        """{name: (N, ...)} of an Alignment of this teacher: the features, and q beside k per block."""
        flat = {f"features{i}": value for i, value in enumerate(alignment.features)}
        return flat | {f"block{block}": torch.stack([qk.q, qk.k], dim=1) for block, qk in alignment.attention.items()}

    def names(self):
        """Names of the outputs."""
        return ["features0"] * self.features + [f"block{block}" for block in self.attn_blocks]


class CachedTeacher:
    """The teacher's outputs for a whole data set, float16, memory-mapped: dataset positions (N,) -> Alignment.

    The outputs of an image never change while images are not augmented, so they are computed once, by all processes
    together, into `folder`/{key}, where the key is made of the teacher's weights and precision and of the data's fingerprint.
    There each output is a file of its own, so that a run with fewer outputs computes nothing. A run that finds another one at
    it waits for what that makes.
    """

    def __init__(self, folder, teacher, dataset, accelerator, batch_size=32):
        self.device, names = accelerator.device, teacher.names()
        parts = (teacher.key(), teacher.precision or accelerator.mixed_precision, dataset.fingerprint(files=True))
        key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]
        self.folder = Path(folder) / key
        if self._missing(names):
            with writing(self.folder), locked(self.folder.with_suffix(".lock"), accelerator.is_main_process):
                if missing := self._missing(names):  # else another run has made them meanwhile
                    self._build(missing, teacher, dataset, accelerator, batch_size)
        try:
            self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
            if any(len(array) != len(dataset) for array in self.arrays.values()):
                raise ValueError(f"it is not of {len(dataset)} images")
        except ARRAY_ERRORS as error:
            raise BadInput(f"The teacher cache {self.folder} is damaged ({first_line(error)}); delete it, and it is computed "
                           "again.") from error

    def _missing(self, names):
        """Those of `names` that are not complete; the same on all processes."""
        return broadcast_object_list([[name for name in names if not is_file(self.folder / f"{name}.complete")]])[0]

    def _build(self, names, teacher, dataset, accelerator, batch_size):
        """Compute the batches that the record, a byte for each, does not have as written: a stopped build goes on.

        A batch holds the same images whatever was there before and however many processes there are.
        """
        teacher.cast(accelerator.mixed_precision)  # not before: the key is made of the weights
        record, count = self.folder / f"{'-'.join(names)}.done.npy", math.ceil(len(dataset) / batch_size)
        if accelerator.is_main_process and not (is_file(record) and load_array(record).shape == (count,)):
            self.folder.mkdir(parents=True, exist_ok=True)
            with accelerator.autocast():
                first = teacher.outputs(teacher(dataset.image(0)[None]))
            size, free = len(dataset) * sum(2 * first[name].numel() for name in names), shutil.disk_usage(self.folder).free
            if size > free:
                raise BadInput(f"--teacher-cache needs {size / 1e9:.1f} GB in {self.folder}, which has {free / 1e9:.1f} GB "
                               "free; name another folder or run without it.")
            for name in names:
                path = self.folder / f"{name}.npy"
                np.lib.format.open_memmap(path, "w+", np.float16, (len(dataset), *first[name].shape[1:]))
                with open(path, "r+b") as file:  # a full disk must be found here: writing to the mapped file would crash
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            with atomic_write(record) as file:
                np.save(file, np.zeros(count, np.uint8))
        accelerator.wait_for_everyone()
        arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False) for name in names}
        done = np.load(record, mmap_mode="r+", allow_pickle=False)
        todo = np.flatnonzero(done == 0)[accelerator.process_index::accelerator.num_processes].tolist()
        accelerator.wait_for_everyone()  # all have read it
        written, flushed = [], time.monotonic()
        is_shown = None if accelerator.is_main_process else True  # on a terminal; a log has a line a minute instead
        for batch in tqdm(todo, desc="teacher outputs", unit="batch", disable=is_shown):
            rows = slice(batch * batch_size, min((batch + 1) * batch_size, len(dataset)))
            with accelerator.autocast():
                outputs = teacher.outputs(teacher(torch.stack([dataset.image(i) for i in range(rows.start, rows.stop)])))
            for name in names:
                arrays[name][rows] = outputs[name].half().cpu().numpy()
                if not np.isfinite(arrays[name][rows]).all():
                    raise BadInput(f"The teacher's {name} does not fit float16; run without --teacher-cache.")
            written.append(batch)
            if batch == todo[-1] or time.monotonic() - flushed > FLUSH_SECONDS:
                for array in arrays.values():
                    array.flush()
                done[written] = 1  # only now: what the record says must be true after a crash of the machine
                done.flush()
                written, flushed = [], time.monotonic()
                images = min(int(done.sum()) * batch_size, len(dataset))
                logger.info(f"teacher outputs: {images:,} of {len(dataset):,} images")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name in names:
                with atomic_write(self.folder / f"{name}.complete", "w") as file:
                    json.dump({"images": len(dataset)}, file)
            record.unlink()
        accelerator.wait_for_everyone()

    def __call__(self, positions):
        rows = {name: to_device(torch.from_numpy(array[positions.numpy()]), self.device)
                for name, array in self.arrays.items()}
        return Alignment([value for name, value in rows.items() if name.startswith("features")],
                         {int(name.removeprefix("block")): QK(value[:, 0], value[:, 1])
                          for name, value in rows.items() if name.startswith("block")})
