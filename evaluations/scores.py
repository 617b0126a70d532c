"""Scores of one set of images against another: which features they need and where these come from.

`load_set` turns a file, folder or array into a FeatureSet; `score` compares two of them. The scripts and the training
loop call these two.
"""
import os

import torch

from evaluations import FEATURES, METRICS
from evaluations.extract import FeatureSet, extract, rank, shard
from evaluations.images import npz_keys, open_images, size_text
from evaluations.metrics import frechet_distance, inception_score, kernel_distance, precision_recall
from evaluations.statistics_file import STATISTICS, read_statistics
from runtime.errors import UserError

INCEPTION_ONLY = ("is", "sfid")
OF_BOTH = ("pr", "kid")  # need images of both sets


def default_metrics(features, preset):
    if features != "inception":
        return ("fid", "kid")
    return ("is", "fid", "sfid", "pr") if preset == "adm" else ("fid",)


def check_metrics(metrics, features):
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"There is no metric {metric}; choose from {', '.join(METRICS)}.")
        if metric in INCEPTION_ONLY and features != "inception":
            raise UserError(f"Metric {metric} is for inception features only; leave it out with {features}.")


def check_count(n, metrics, name):
    for metric in metrics:
        if n < METRICS[metric]:
            raise UserError(f"{name} has {n} image{'s' * (n != 1)}, but metric {metric} needs at least "
                           f"{METRICS[metric]}; give more images or choose other --metrics.")


def possible(metrics, both):
    """The metrics that can be computed; `both`: whether both sets have images."""
    return [metric for metric in metrics if both or metric not in OF_BOTH]


def check_pair(reference, sample, metrics, limit=None):
    """Raise UserError, before any work, for two sources with too few images or with images of two sizes."""
    opened = [open_images(source) if has_images(source) else None for source in (reference, sample)]
    for images, most in zip(opened, (None, limit), strict=True):
        if images:
            check_count(min(images.n, most or images.n), possible(metrics, both=all(opened)), images.name)
    if all(opened) and opened[0].size != opened[1].size:
        first, second = (f"{images.name} has images of {size_text(images.size)}" for images in opened)
        raise UserError(f"{first} but {second}; compare sets of one size.")


def has_images(source):
    is_npz = isinstance(source, (str, os.PathLike)) and not os.path.isdir(source)
    return not is_npz or "arr_0" in npz_keys(source)


def load_set(source, extractor, metrics, is_reference=False, limit=None, batch_size=64):
    """FeatureSet with all that `metrics` need, on process 0; None on the others. All processes must call it.

    source: whatever open_images takes, or a statistics npz (mu, sigma, optional mu_s, sigma_s and arr_0). Stored
    statistics are used instead of the images beside them, unless they are of other features or another preset, or
    `limit` (use the first `limit` images) is given. What a statistics file does not hold stays None, and its scores
    are n/a. Raises UserError.
    """
    check_metrics(metrics, extractor.features)
    images = open_images(source) if has_images(source) else None
    stored = read_statistics(source, extractor, required=images is None) if limit is None else None
    if images is None and stored is None:
        raise UserError(f"{source} holds statistics only; --num-samples needs images (arr_0).")
    need_pool = bool(set(OF_BOTH) & set(metrics)) or ("is" in metrics and not is_reference)
    need_moments = bool({"fid", "sfid"} & set(metrics)) and stored is None
    if images is None or not (need_pool or need_moments):
        known = stored or FeatureSet(str(source), extractor.features, extractor.preset, images.n)
        return None if rank() else known
    if limit is not None and limit > images.n:
        raise UserError(f"{images.name} has {images.n} images, not the {limit} asked for; lower --num-samples.")
    total = limit or images.n
    check_count(total, possible(metrics, both=False), images.name)  # `score` checks the others: it knows both sets
    start, stop = shard(total)
    found = extract(images.batches(start, stop, batch_size), stop - start, extractor, images.name, keep=need_pool)
    if found and stored:
        for key in STATISTICS:
            setattr(found, key, getattr(stored, key))
    return found


def score(sample, reference, metrics, pr_dtype=torch.float16, device="cpu"):
    """{name: float, or None for n/a} in the order of ADM's evaluator, for two FeatureSets.

    Raises UserError if the sets are of different features or have too few images.
    """
    check_metrics(metrics, sample.features)
    kinds = [(each.features, each.preset or sample.preset) for each in (sample, reference)]
    if kinds[0] != kinds[1]:
        raise UserError(f"{sample.name} was measured as {kinds[0]}, {reference.name} as {kinds[1]}; "
                       "both need the same features and preset.")
    both = sample.pool is not None and reference.pool is not None
    for each in (sample, reference):
        if each.pool is not None:
            check_count(each.n, possible(metrics, both), each.name)
    pools = [None if each.pool is None else each.pool.to(device) for each in (reference, sample)]
    names, values = FEATURES[sample.features], {}
    if "is" in metrics:
        pool = pools[1]
        values["Inception Score"] = None if pool is None else inception_score(pool, sample.classifier.to(device))
    if "fid" in metrics:
        values[names["distance"]] = distance(sample.mu, sample.sigma, reference.mu, reference.sigma)
    if "sfid" in metrics:
        values["sFID"] = distance(sample.mu_s, sample.sigma_s, reference.mu_s, reference.sigma_s)
    if "pr" in metrics:
        values["Precision"], values["Recall"] = precision_recall(*pools, pr_dtype) if both else (None, None)
    if "kid" in metrics:
        values[names["kid"]] = kernel_distance(*pools) if both else None
    return values


def distance(*statistics):
    return None if any(part is None for part in statistics) else frechet_distance(*statistics)
