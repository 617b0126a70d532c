"""Scores of one set of images against another: which features they need and where these come from.

`load_set` turns a file, folder or array into a FeatureSet; `score` compares two of them.
"""
import torch

from evaluations import FEATURES, METRICS
from evaluations.extract import FeatureSet, extract, rank, shard
from evaluations.images import check_equal_sizes, open_images
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


def check_pair(reference, sample, metrics, limit=None):
    """Raise UserError, before any work, for two sources with too few images or with images of two sizes.

    `limit` is --num-samples: only so many images of `sample` are used.
    """
    opened = [open_images(source, required=False) for source in (reference, sample)]
    known = [images for images in opened if images]
    if limit and opened[1] is None:
        raise UserError(f"{sample} holds statistics only; --num-samples needs images (arr_0).")
    if limit and limit > opened[1].n:
        raise UserError(f"{sample} has {opened[1].n} images, not the {limit} asked for; lower --num-samples.")
    for images in known:
        n = limit if limit and images is opened[1] else images.n
        check_count(n, [metric for metric in metrics if len(known) == 2 or metric not in OF_BOTH], images.name)
    if len(known) == 2:
        check_equal_sizes(*known)


def load_set(source, extractor, metrics, is_reference=False, limit=None, batch_size=64):
    """FeatureSet with everything `metrics` need on process 0; None on the others. All processes must call it.

    source: whatever open_images takes, or a statistics npz (mu, sigma, optional mu_s, sigma_s and arr_0). Stored
    statistics replace the images beside them, unless they have other features or another preset, or `limit` (use the
    first `limit` images) is given. Fields missing from a statistics file stay None; scores that need them are n/a.
    Raises UserError.
    """
    images = open_images(source, required=False)
    stored = None if limit else read_statistics(source, extractor, required=images is None)
    need_pool = bool(set(OF_BOTH) & set(metrics)) or ("is" in metrics and not is_reference)
    need_moments = bool({"fid", "sfid"} & set(metrics)) and stored is None
    if images is None or not (need_pool or need_moments):
        known = stored or FeatureSet(str(source), extractor.features, extractor.preset, images.n)
        return None if rank() else known
    start, stop = shard(limit or images.n)
    found = extract(images.batches(start, stop, batch_size), stop - start, extractor, images.name, keep=need_pool)
    if found and stored:
        for key in (*STATISTICS, "made_of"):
            setattr(found, key, getattr(stored, key))
        found.n = stored.n or found.n  # of the statistics; the pool is of the images beside them
    return found


def score(sample, reference, metrics, pr_dtype=torch.float16, device="cpu"):
    """{name: float, or None for n/a} in the order of ADM's evaluator, for two FeatureSets of the same features."""
    reference_pool, pool = (None if each.pool is None else each.pool.to(device) for each in (reference, sample))
    both, names, values = pool is not None and reference_pool is not None, FEATURES[sample.features], {}
    if "is" in metrics:
        values["Inception Score"] = None if pool is None else inception_score(pool, sample.classifier.to(device))
    if "fid" in metrics:
        values[names["distance"]] = distance(sample.mu, sample.sigma, reference.mu, reference.sigma)
    if "sfid" in metrics:
        values["sFID"] = distance(sample.mu_s, sample.sigma_s, reference.mu_s, reference.sigma_s)
    if "pr" in metrics:
        values["Precision"], values["Recall"] = (
            precision_recall(reference_pool, pool, pr_dtype) if both else (None, None))
    if "kid" in metrics:
        values[names["kid"]] = kernel_distance(reference_pool, pool) if both else None
    return values


def distance(*statistics):
    return None if any(part is None for part in statistics) else frechet_distance(*statistics)
