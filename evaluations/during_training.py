"""Score the EMA's samples during training (--eval-steps of the training scripts)."""
import logging

import numpy as np
import torch

from evaluations import score_names
from evaluations.extract import extract, shard
from evaluations.features import load_extractor
from evaluations.images import Planned
from evaluations.scores import check_metrics, check_pair, load_set, score
from samplers import guided
from sampling.cache import sample_latents

CONDITIONS = 3  # random stream; loader.py lists all streams

logger = logging.getLogger("haste")


class Evaluation:
    """`evaluation(ema)` -> {name: score} of args.eval_samples images against args.eval_ref, on the main process.

    Samples take args.eval_num_steps Euler steps without guidance: scores compare between steps and runs, not with
    papers. Every process calls it and makes its part of the images. (args.seed, i) alone sets the noise of image i and
    the training entry that gives its condition, at every step and for any number of processes; no other random stream
    is used. The reference's features are extracted once. Raises UserError if samples and reference do not compare.
    """

    def __init__(self, args, accelerator, dataset, vae, y_null, latent_shape):
        self.accelerator, self.dataset, self.vae, self.seed = accelerator, dataset, vae, args.seed
        self.y_null, self.latent_shape, self.count = y_null.to(accelerator.device), latent_shape, args.eval_samples
        self.batch_size = args.batch_size // (accelerator.num_processes * args.gradient_accumulation_steps)
        self.metrics, self.num_steps = args.eval_metrics, args.eval_num_steps
        self.cache = args.eval_cache, args.eval_cache_interval
        check_metrics(self.metrics, args.eval_features)
        samples = Planned("--eval-samples", self.count, (args.resolution, args.resolution))
        check_pair(args.eval_ref, samples, self.metrics)
        self.extractor = load_extractor(args.eval_features, args.eval_weights, accelerator.device, args.eval_preset)
        self.reference = load_set(args.eval_ref, self.extractor, self.metrics, is_reference=True,
                                  batch_size=self.batch_size)
        if self.reference is not None:
            names = ", ".join(score_names(args.eval_features, self.metrics))
            logger.info(f"scores: {names} ({args.eval_features}, preset {args.eval_preset}), of n = {self.count} "
                        f"samples against {args.eval_ref}, n = {self.reference.n or 'unknown'}")

    def __call__(self, ema):
        start, stop = shard(self.count)
        samples = extract(self.images(ema, start, stop), stop - start, self.extractor)
        if samples is None:
            return {}
        scores = score(samples, self.reference, self.metrics, device=self.accelerator.device)
        return {name: value for name, value in scores.items() if value is not None}

    def images(self, ema, start, stop):
        """Batches uint8 (b, R, R, 3) of images start .. stop - 1."""
        for first in range(start, stop, self.batch_size):
            streams = [np.random.default_rng((self.seed, CONDITIONS, i))
                       for i in range(first, min(first + self.batch_size, stop))]
            y = torch.stack([torch.as_tensor(self.dataset.condition(int(rng.integers(len(self.dataset)))))
                             for rng in streams]).to(self.accelerator.device)
            noise = np.stack([rng.standard_normal(self.latent_shape, dtype=np.float32) for rng in streams])
            noise = torch.from_numpy(noise).to(self.accelerator.device)
            with self.accelerator.autocast():
                latents, _ = sample_latents(ema, guided(ema, y, self.y_null.expand_as(y)), noise, "ode",
                                            self.num_steps, *self.cache)
            if not latents.isfinite().all():
                logger.warning("Some samples are not finite; the scores count them as black images.")
            yield self.vae.decode(latents).permute(0, 2, 3, 1).cpu()
