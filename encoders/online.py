"""Images encoded in the training step (--encode-online), and the data set of a class-conditional run."""
import functools
import io

import numpy as np
import torch

from data_io.latent_scale import PIXELS, from_plain
from data_io.loader import CROP
from data_io.moments import digest
from data_io.storage import Packed
from dataset import LatentImages, PixelImages
from encoders.vae import open_vae
from models.checkpoint import weights_digest
from runtime.errors import UserError
from runtime.images import IMAGE_ERRORS, open_image, unreadable

CHUNK = 32  # images that the VAE takes at a time


class EncodedImages(PixelImages):
    """ImageNet's layout without latents: samples are images as (seed, epoch, position) shows them, mirrored at random
    with `hflip`, cut out of larger ones at random with `crop`. encode() gives a batch's moments by `vae`.

    image(i) and moments(i) use the image as it is, or its centre square.
    """

    def __init__(self, data_dir, resolution, num_classes, images=True, seed=0, hflip=False, *, vae, crop=False):
        self.vae, self.crop, self.side = vae, crop, None
        super().__init__(data_dir, resolution, num_classes, True, seed, hflip)
        if resolution % vae.factor:
            raise UserError(f"--resolution {resolution} is no multiple of {vae.factor}, the factor of the VAE "
                            f"{vae.source}; choose another.")
        self.moments_shape = (2 * vae.channels, resolution // vae.factor, resolution // vae.factor)

    def __getstate__(self):
        return {**self.__dict__, "vae": None}  # loader processes do not encode

    def source_side(self):
        """Side in pixels of the images on disk."""
        if not self.crop:
            return self.resolution
        if isinstance(self.pictures, Packed):
            return self.pictures.shape[-1]
        try:
            with open_image(io.BytesIO(self.pictures.read(0))) as picture:
                return picture.width
        except IMAGE_ERRORS as error:
            raise unreadable(self.pictures.name(0), error) from error

    def cut(self, i, place):
        """The square at place(free) of image i, where `free` is by how much the image is larger: uint8 (3, R, R)."""
        self.side = self.side or self.source_side()
        top, left = place(self.side - self.resolution)
        return self.picture(i, self.side)[:, top:top + self.resolution, left:left + self.resolution]

    def image(self, i):
        """uint8 (3, R, R)."""
        return self.cut(i, lambda free: (free // 2, free // 2))

    def __getitem__(self, sample_id):
        """{position, image, y} of entry i = sample_id % n as epoch sample_id // n sees it."""
        epoch, i = divmod(int(sample_id), len(self))
        rng = np.random.default_rng((self.seed, CROP, epoch, i))
        image = self.cut(i, lambda free: rng.integers(free + 1, size=2).tolist()) if self.crop else self.image(i)
        image = image.flip(-1) if self.is_mirrored(sample_id) else image
        return {"position": i, "image": image.contiguous(), "y": self.sample_condition(i, epoch)}

    @torch.inference_mode()
    def encode(self, images):
        """uint8 (N, 3, R, R) -> moments float32 (N, 2 C, h, w), mean and std, on the VAE's device."""
        return torch.cat([self.vae.moments(part) for part in images.split(CHUNK)])

    def moments(self, i):
        """float32 (2 C, h, w): mean, std."""
        return self.encode(self.image(i)[None])[0].cpu()

    def fingerprint(self):
        """Hash of identity(), three of the images and the VAE."""
        images = [self.image(i).numpy().tobytes().hex() for i in (0, len(self) // 2, len(self) - 1)]
        return digest([*self.identity(), images, weights_digest(self.vae.vae)])


def class_layout(args, device="cpu"):
    """The data set class for the training `args` (a dict): a function with the arguments of LatentImages.

    With encode_online, sets args["latents"] to the scale of the VAE where it is None.
    """
    if not args.get("encode_online"):
        return PixelImages if args.get("vae") == PIXELS else LatentImages
    vae = open_vae(args["vae"], device, from_plain(args["latents"]) if args["latents"] else None)
    args["latents"] = vae.latent_scale.plain()
    return functools.partial(EncodedImages, vae=vae, crop=args.get("random_crop", False))
