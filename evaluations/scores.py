"""Scores of one set of images against another: which features they need and where those come from.

`load_set` turns a file, folder or array into a FeatureSet and `score` compares two of them; both scripts of
this folder and the training script are calls of these.
"""
import os

import torch

from evaluations.extract import FeatureSet, extract, rank, shard
from evaluations.features import FEATURES
from evaluations.images import npz_keys, open_images, size_text
from evaluations.metrics import NEIGHBOURS, frechet_distance, inception_score, kernel_distance, precision_recall
from evaluations.statistics_file import STATISTICS, read_statistics
from files import BadInput

# metric -> fewest images a set may have
METRICS = {"is": 1, "fid": 2, "sfid": 2, "pr": NEIGHBOURS + 1, "kid": 2}
INCEPTION_ONLY = ("is", "sfid")
OF_BOTH = ("pr", "kid")  # need images of both sets


def default_metrics(features, preset):
    """ADM's five numbers for its preset, FID for pytorch-fid's, the distance and KID on other features."""
    if features != "inception":
        return ("fid", "kid")
    return ("is", "fid", "sfid", "pr") if preset == "adm" else ("fid",)


def check_metrics(metrics, features):
    for metric in metrics:
        if metric not in METRICS:
            raise BadInput(f"There is no metric {metric}; choose from {', '.join(METRICS)}.")
        if metric in INCEPTION_ONLY and features != "inception":
            raise BadInput(f"Metric {metric} is for inception features only; leave it out with {features}.")


def check_count(n, metrics, name):
    for metric in metrics:
        if n < METRICS[metric]:
            raise BadInput(f"{name} has {n} image{'s' * (n != 1)}, but metric {metric} needs at least "
                           f"{METRICS[metric]}; give more images or choose other --metrics.")


def possible(metrics, both):
    """`metrics`, where not `both` sets have images without those that are n/a then."""
    return [metric for metric in metrics if both or metric not in OF_BOTH]


def check_pair(reference, sample, metrics, limit=None):
    """Fail before any work where two sources cannot be compared: too few images, or images of two sizes."""
    opened = [open_images(source) if has_images(source) else None for source in (reference, sample)]
    metrics = possible(metrics, both=all(opened))
    for images, images_limit in zip(opened, (None, limit), strict=True):
        if images:
            check_count(min(images.n, images_limit or images.n), metrics, images.name)
    if all(opened) and opened[0].size != opened[1].size:
        first, second = (f"{images.name} has images of {size_text(images.size)}" for images in opened)
        raise BadInput(f"{first} but {second}; compare sets of one size.")


def has_images(source):
    is_npz = isinstance(source, (str, os.PathLike)) and not os.path.isdir(source)
    return not is_npz or "arr_0" in npz_keys(source)


def load_set(source, extractor, metrics, is_reference=False, limit=None, batch_size=64):
    """FeatureSet with all that `metrics` need of `source`, on process 0; None on the others, and every process
    calls it.

    source: npz or folder of images, uint8 array (n, H, W, 3), or statistics npz (mu, sigma, optional mu_s,
    sigma_s and arr_0). Stored statistics win over the images beside them, unless they are of other features
    or preset, or `limit` (use the first `limit` images) is given. What a statistics file cannot give stays
    None, and its scores n/a. Raises BadInput.
    """
    check_metrics(metrics, extractor.features)
    images = open_images(source) if has_images(source) else None
    stored = read_statistics(source, extractor, required=images is None) if limit is None else None
    if images is None and stored is None:
        raise BadInput(f"{source} holds statistics only; --num-samples needs images (arr_0).")
    need_pool = bool(set(OF_BOTH) & set(metrics)) or ("is" in metrics and not is_reference)
    need_moments = bool({"fid", "sfid"} & set(metrics)) and stored is None
    if images is None or not (need_pool or need_moments):
        known = stored or FeatureSet(str(source), extractor.features, extractor.preset, images.n)
        return None if rank() else known
    if limit is not None and limit > images.n:
        raise BadInput(f"{images.name} has {images.n} images, not the {limit} asked for; lower --num-samples.")
    total = limit or images.n
    check_count(total, possible(metrics, both=False), images.name)  # of pairs: in `score`, which knows the other set
    start, stop = shard(total)
    batches = images.batches(start, stop, batch_size)
    found = extract(batches, stop - start, extractor, images.name, keep=need_pool)
    if found and stored:
        for key in STATISTICS:
            setattr(found, key, getattr(stored, key))
    return found


def score(sample, reference, metrics, pr_dtype=torch.float16, device="cpu"):
    """{name: float, or None for n/a} in the order of ADM's evaluator, for two FeatureSets of the same features.

    Raises BadInput where the sets are of different features or have too few images.
    """
    check_metrics(metrics, sample.features)
    kinds = [(each.features, each.preset or sample.preset) for each in (sample, reference)]
    if kinds[0] != kinds[1]:
        raise BadInput(f"{sample.name} was measured as {kinds[0]}, {reference.name} as {kinds[1]}; "
                       "both need the same features and preset.")
    both = sample.pool is not None and reference.pool is not None
    for each in (sample, reference):
        if each.pool is not None:
            check_count(each.n, possible(metrics, both), each.name)
    pools = [None if each.pool is None else each.pool.to(device) for each in (reference, sample)]
    names, values = FEATURES[sample.features], {}
    if "is" in metrics:
        values["Inception Score"] = None if pools[1] is None else inception_score(
            pools[1], sample.classifier.to(device))
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
