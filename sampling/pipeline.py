"""Sample images from Python, with SiT or MMDiT: from a checkpoint of training, an export of it, or a published .pt.

    from pipeline import load_pipeline

    pipe = load_pipeline("exps/sitxl_haste/checkpoints/0400000.pt")
    for i, image in enumerate(pipe([207, 360, 88], cfg_scale=4.0, num_steps=50)):
        image.save(f"{i}.png")

Image i is the same as from generate.py --labels balanced or generate_t2i.py --prompt with this seed and condition.
"""
import numbers

import numpy as np
import torch
from PIL import Image

from encoders.text import CLIP, TextEncoder
from runtime.errors import MAX_SEED, UserError
from sampling.images import CFG_SCALE, check_guidance, open_network, sample


class Pipeline:
    """A network, its VAE and, for text, its text encoder: conditions -> PIL images. Made by load_pipeline."""

    def __init__(self, network, vae, args, path, encode=None):
        self.network, self.vae, self.args, self.path, self.encode = network, vae, args, path, encode

    @torch.no_grad()
    def __call__(self, conditions, seed=0, batch_size=32, **sampling):
        """One image per class (its number, or its name if the checkpoint has names) or, for text, per string.

        Image i depends on (seed, i) and its condition only. `sampling` are options of samplers.sample and of
        sampling.cache.sample_latents, with their names and defaults. Raises UserError for an unknown class.
        """
        if isinstance(conditions, (str, int)):
            raise UserError(f"{conditions!r} is one condition; give a list, such as [{conditions!r}].")
        if type(seed) is not int or not 0 <= seed <= MAX_SEED or type(batch_size) is not int or batch_size < 1:
            # NumPy would give larger seeds the noise of smaller ones
            raise UserError(f"seed is {seed!r}, batch_size {batch_size!r}; give whole numbers, from 0 to "
                            f"{MAX_SEED} and from 1 on.")
        check_guidance(self.path, sampling.get("cfg_scale", CFG_SCALE), self.args)
        pictures = []
        for start in range(0, len(conditions), batch_size):
            batch = conditions[start:start + batch_size]
            streams = [np.random.default_rng((seed, start + i)) for i in range(len(batch))]
            y, y_null = (c.to(self.vae.device) for c in self.conditions(batch))
            images = sample(self.network, self.vae, streams, y, y_null, path_type=self.args["path_type"],
                            **sampling)
            pictures += [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        return pictures

    def conditions(self, batch):
        """(y, y_null) of a list of classes or of strings; each string is encoded alone: padding must not matter."""
        if self.encode:
            y, y_null = torch.cat([self.encode([text]) for text in batch]), self.encode([""])
            return y, y_null.expand_as(y)
        names, classes = self.args["class_names"] or [], range(self.network.num_classes)
        found = [names.index(one) if one in names else one for one in batch]
        if wrong := [one for one in found if not (isinstance(one, numbers.Integral) and one in classes)]:
            known = f" or names out of {', '.join(names)}" if names else ""
            raise UserError(f"{wrong[0]!r} is no class of this network; give whole numbers from 0 to {classes[-1]}"
                            f"{known}.")
        y = torch.tensor(found)
        return y, torch.full_like(y, self.network.null_label)


def load_pipeline(path, vae=None, text_encoder=CLIP, device=None, weights="ema", latents_stats=None):
    """The Pipeline of a checkpoint of training, of an export (file or folder) or of a published .pt.

    vae: ema, mse, a hub name, a folder in diffusers' format, or "none" for a network of pixels (default: the
    checkpoint's; ema for Stable Diffusion's). text_encoder, for MMDiT: hub name or folder of the one it was trained
    with. device: default the GPU if there is one. weights: "ema" or "model". latents_stats: a file, default the
    checkpoint's scale and shift. Raises UserError.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network, vae, _, args = open_network(path, vae, device, source=weights, latents_stats=latents_stats)
    encode = None
    if hasattr(network, "context_embedder"):
        encode = TextEncoder(text_encoder, device, length=(args.get("context_shape") or [None])[0])
        if encode.width != network.context_embedder.in_features:
            raise UserError(f"{path} takes text of width {network.context_embedder.in_features}, {text_encoder} gives "
                            f"{encode.width}; give the text encoder that it was trained with.")
    return Pipeline(network.to(device), vae, args, path, encode)
