"""The frozen VAE between images and latents, and the identity for networks of pixels."""
import contextlib

import torch

from dataset import PIXEL_SCALE, PIXELS, SD_SCALE, pixel_moments
from runtime.errors import UserError, first_line
from runtime.files import is_folder
from runtime.setup import to_device

VAES = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


@contextlib.contextmanager
def loading(what, source, remedy):
    """Turn whatever a library raises while it loads `source`, a folder or hub name, into UserError."""
    is_here = is_folder(source)
    try:
        yield
    except Exception as error:  # a damaged folder may raise anything
        where = "" if is_here else "no folder here, and not to be had from the hub: "
        raise UserError(f"{what} {source} could not be loaded ({where}{first_line(error)}); give {remedy}, or a hub "
                        "name with the network up.") from error


def open_vae(source, device="cpu"):
    """The VAE `source`, a key of VAES or what VAE takes, or Pixels for PIXELS."""
    return Pixels(device) if source == PIXELS else VAE(VAES.get(source, source), device)


class Pixels:
    """Stands in for a VAE: latents are pixels in [-1, 1] x latent_scale, 3 channels of the image's own size."""

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
        x = latents.float() / self.latent_scale
        return (255 * (x + 1) / 2).round().clamp(0, 255).to(torch.uint8)


class VAE:
    """Images <-> moments <-> latents.

    `source` is a folder in diffusers' format or a hub name such as stabilityai/sd-vae-ft-mse. Raises UserError when
    neither can be loaded.
    """

    SCALE = latent_scale = SD_SCALE  # latent bias 0

    def __init__(self, source, device="cpu"):
        from diffusers import AutoencoderKL  # takes seconds, and only previews and sampling need it
        with loading("The VAE", source, "a folder in diffusers' format"):
            vae = AutoencoderKL.from_pretrained(source, use_safetensors=True)
            self.vae = vae.to(device).eval().requires_grad_(False)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # pixels per latent pixel and side
        self.channels = self.vae.config.latent_channels
        self.source, self.device = source, torch.device(device)

    def check(self, channels, side, resolution):
        """Raise UserError unless latents of `channels` x `side` x `side` are this VAE's for images of `resolution`."""
        if (channels, side * self.factor) != (self.channels, resolution):
            raise UserError(f"The VAE {self.source} makes {self.channels} channels at 1/{self.factor} "
                            f"of the image's side, but the latents have {channels} channels of {side} for --resolution "
                            f"{resolution}; give the --vae or --resolution of these.")

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

