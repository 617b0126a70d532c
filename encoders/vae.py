"""The frozen VAE between images and latents, and its stand-in for networks that train on pixels."""
import contextlib
import logging

import torch

from data_io.latent_scale import PIXEL_SCALE, PIXELS, SD_SCALE, LatentScale, from_statistics, is_scale
from dataset import pixel_moments
from runtime.errors import UserError, first_line
from runtime.files import is_folder
from runtime.setup import to_device

VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}

logger = logging.getLogger("haste")


@contextlib.contextmanager
def loading(what, source, remedy):
    """Turn any library error while loading `source` (a folder or hub name) into UserError."""
    is_here = is_folder(source)
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} {source} needs another package ({first_line(error)}); install it.") from error
    except Exception as error:  # a damaged folder may raise anything
        where = "" if is_here else "no folder here, and not to be had from the hub: "
        raise UserError(f"{what} {source} could not be loaded ({where}{first_line(error)}); give {remedy}, or a hub "
                        "name with the network up.") from error


def open_vae(source, device="cpu", latent_scale=None):
    """The VAE `source`, a key of VAES or what VAE takes, or Pixels for PIXELS."""
    return Pixels(device) if source == PIXELS else VAE(VAES.get(source, source), device, latent_scale)


class Pixels:
    """Stands in for a VAE: latents are pixels in [-1, 1] x PIXEL_SCALE, 3 channels of the image's own size."""

    latent_scale = PIXEL_SCALE
    factor, channels, source, vae = 1, 3, PIXELS, None

    def __init__(self, device="cpu"):
        self.device = device

    def check(self, channels, side, resolution):
        """Raise UserError unless latents of `channels` x `side` x `side` are pixels of images of `resolution`."""
        if (channels, side) != (self.channels, resolution):
            raise UserError(f"--vae none is for pixels, 3 channels of {resolution} for --resolution {resolution}, but "
                            f"the latents have {channels} channels of {side}; give the --vae or --resolution of these.")

    @staticmethod
    def encode(images):
        """uint8 (N, 3, R, R) -> moments float32 (N, 6, R, R)."""
        return pixel_moments(images).cpu()

    def decode(self, latents, _chunk=None):
        """Latents (N, 3, R, R) -> uint8 images (N, 3, R, R). Rounded, so that encoded images come back equal."""
        x = self.latent_scale.undone(latents.float())
        return (255 * (x + 1) / 2).round().clamp(0, 255).to(torch.uint8)


def scale_in(config):
    """The LatentScale in a VAE's config, by diffusers' formula: (latent - shift_factor) x scaling_factor or, where the
    config has a mean and std of each channel, (latent - mean) / std x scaling_factor.

    AutoencoderKL writes its default factor (Stable Diffusion's) even into configs with mean and std, which need none.
    """
    factor = config.get("scaling_factor") or 1.0
    if config.get("latents_mean") and config.get("latents_std"):
        return from_statistics(config["latents_mean"], config["latents_std"],
                               1.0 if factor == SD_SCALE.scale else factor)
    return LatentScale(factor, config.get("shift_factor") or 0.0)


class VAE:
    """Images <-> moments <-> latents.

    `source` is a folder in diffusers' format or a hub name such as stabilityai/sd-vae-ft-mse: an AutoencoderKL, or an
    AutoencoderDC, whose latents have no spread. `latent_scale` overrides the scale in the config. Raises
    UserError if the VAE cannot be loaded.
    """

    def __init__(self, source, device="cpu", latent_scale=None):
        with loading("The VAE", source, "a folder in diffusers' format"):
            from diffusers import AutoencoderDC, AutoencoderKL  # takes seconds; only previews and sampling need it
            self.has_spread = AutoencoderKL.load_config(source).get("_class_name") != "AutoencoderDC"
            vae = (AutoencoderKL.from_pretrained(source, use_safetensors=True) if self.has_spread
                   else AutoencoderDC.from_pretrained(source, use_safetensors=True))
            self.vae, config = vae.to(device).eval().requires_grad_(False), vae.config
            self.own_scale = scale_in(config)
            if not is_scale(self.own_scale.plain()):
                raise ValueError(f"its config says {self.own_scale}")
        widths = config.block_out_channels if self.has_spread else config.encoder_block_out_channels
        self.factor = 2 ** (len(widths) - 1)  # pixels per latent pixel and side
        self.channels, self.source, self.device = config.latent_channels, source, torch.device(device)
        self.latent_scale = latent_scale or self.own_scale
        self.latent_scale.check(self.channels, f"The VAE {source}" if latent_scale is None else "What scales latents")
        if not any(isinstance(x, tuple) for x in self.latent_scale) and self.latent_scale != self.own_scale:
            logger.warning(f"The config of the VAE {source} says {self.own_scale}, the data or the checkpoint say "
                           f"{self.latent_scale}: the latter is used; images are wrong if latents and VAE do not "
                           "belong together.")

    def check(self, channels, side, resolution):
        """Raise UserError unless latents of `channels` x `side` x `side` are this VAE's for images of `resolution`."""
        if (channels, side * self.factor) != (self.channels, resolution):
            raise UserError(f"The VAE {self.source} makes {self.channels} channels at 1/{self.factor} "
                            f"of the image's side, but the latents have {channels} channels of {side} for --resolution "
                            f"{resolution}; give the --vae or --resolution of these.")

    def encode(self, images, spread="std"):
        """`moments`, on the CPU."""
        return self.moments(images, spread).cpu()

    @torch.no_grad()
    def moments(self, images, spread="std"):
        """uint8 (N, 3, R, R) -> moments float32 (N, 2 C, R / factor, R / factor): mean, `spread` by channel.

        The ImageNet layout stores the "std", the text-to-image layout the "logvar", clamped to [-30, 20].
        """
        x = to_device(images, self.device).float() / 127.5 - 1  # on the device: uint8 sends a quarter of the bytes
        if not self.has_spread:
            mean = self.vae.encode(x).latent
            return torch.cat([mean, torch.full_like(mean, 0.0 if spread == "std" else -30.0)], dim=1)
        posterior = self.vae.encode(x).latent_dist
        return torch.cat([posterior.mean, getattr(posterior, spread)], dim=1)

    @torch.no_grad()
    def decode(self, latents, chunk=32):
        """Latents (N, C, h, w) of any float dtype -> uint8 images (N, 3, R, R), `chunk` at a time; truncated."""
        out = []
        for z in latents.split(chunk):
            x = self.vae.decode(self.latent_scale.undone(z.to(self.device, torch.float32))).sample
            out.append((255 * (x + 1) / 2).clamp(0, 255).to(torch.uint8))
        return torch.cat(out)
