"""Sample grids along a run."""
import logging

import numpy as np
import torch

from runtime.images import image_grid, write_png
from samplers import SAMPLERS, guided

PREVIEW_IMAGES, PREVIEW_STEPS, PREVIEW_CFG = 16, 50, 4.0

logger = logging.getLogger("haste")


class Previews:
    """Sample grids of the EMA from the noise and conditions of 16 fixed entries, with the entries' own images."""

    def __init__(self, args, accelerator, folder, dataset, vae, y_null):
        self.accelerator, self.folder, self.vae, self.cfg_scale = accelerator, folder, vae, PREVIEW_CFG
        if not args.cfg_prob or getattr(args, "num_classes", None) == 1:
            self.cfg_scale = 1.0
            logger.info("previews are without guidance: --cfg-prob 0 trains no empty condition, one class needs none")
        rng = np.random.default_rng(args.seed)
        entries = [int(i) for i in rng.permutation(len(dataset))[:PREVIEW_IMAGES]]
        self.y = torch.stack([torch.as_tensor(dataset.condition(i)) for i in entries]).to(accelerator.device)
        self.y_null = y_null.to(accelerator.device).expand_as(self.y)
        self.texts = [dataset.text(i) for i in entries] if dataset.texts else None
        moments = torch.stack([dataset.moments(i) for i in entries])
        self.noise = torch.from_numpy(rng.standard_normal(moments.chunk(2, dim=1)[0].shape, dtype=np.float32))
        self.truth = vae.latent_scale.latents(moments, torch.zeros_like(self.noise))

    def save(self, name, latents, step=None):
        images = self.vae.decode(latents)
        grid = image_grid(images, texts=self.texts)
        write_png(self.folder / f"{name}.png", grid)
        pictures = {"truth" if step is None else "samples": grid[None]}
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images(pictures, step=step, dataformats="NHWC")
            else:  # at the newest "step" that was logged
                tracker.log_images(pictures)

    def make(self, ema, step):
        velocity = guided(ema, self.y, self.y_null, self.cfg_scale)
        with self.accelerator.autocast():
            latents = SAMPLERS["ode"](velocity, self.noise.to(self.accelerator.device), PREVIEW_STEPS)
        if not latents.isfinite().all():
            logger.warning(f"Some previews of step {step} are not finite, which makes them black.")
        self.save(f"{step:07d}", latents, step)

