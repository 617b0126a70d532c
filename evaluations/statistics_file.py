"""Statistics files: mean and covariance of a set's features in an npz, and optionally some of its images.

Published files hold mu, sigma (and mu_s, sigma_s, arr_0). Ours add n, features and preset, which are checked, and
made_of: name and sha256 of the images.
"""
import logging
import os
import zipfile
from textwrap import shorten

import numpy as np
import torch

from evaluations.extract import FeatureSet, rank
from evaluations.images import npz_keys
from evaluations.inception import SPATIAL_DIM
from runtime.errors import UserError, first_line
from runtime.files import ARRAY_ERRORS, atomic_write

STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
LARGEST = 1 << 29     # bytes of one array: a covariance of 8,192 features in float64
ROUNDING = 1e-5       # of a float32 covariance, relative to its largest entry or its trace

logger = logging.getLogger(__name__)


def read_statistics(source, extractor, required):
    """FeatureSet of the statistics in an npz, or None if it has none for this extractor.

    With `required` that is an error. Raises UserError for missing keys and wrong shapes.
    """
    if not isinstance(source, (str, os.PathLike)) or os.path.isdir(source):
        return None
    keys = npz_keys(source)
    if not {"mu", "sigma"} & set(keys):
        if required:
            raise UserError(f"{source} has the keys {', '.join(keys) or '(none)'}; expected arr_0 (images), "
                            "or mu and sigma (statistics).")
        return None
    try:
        with np.load(source, allow_pickle=False) as file:
            for key in (keys := [key for key in (*STATISTICS, "n", "features", "preset", "made_of") if key in keys]):
                if (size := file.zip.getinfo(f"{key}.npy").file_size) > LARGEST:  # before reading it
                    raise UserError(f"{key} of {source} has {size} bytes, far more than statistics have; make it "
                                    "again.")
            stored = {key: file[key] for key in keys}
    except ARRAY_ERRORS as error:
        raise UserError(f"The statistics in {source} cannot be read ({first_line(error)}); make them again.") from error
    features, n = str(stored.pop("features", "inception")), stored.pop("n", None)
    preset, made_of = (str(stored.pop(key)) if key in stored else None for key in ("preset", "made_of"))
    if features != extractor.features or preset not in (None, extractor.preset):
        message = f"The statistics in {source} are of {features} with preset {preset}"
        if required:
            raise UserError(f"{message}, not of {extractor.features} with preset {extractor.preset}; choose the same "
                            "with --preset (train.py: --eval-preset), or make them again with evaluations/stats.py.")
        logger.warning("%s: they are ignored, and the images beside them are used", message)
        return None
    if preset is None and features == "inception" and rank() == 0:
        logger.warning("%s does not name its preprocessing for Inception; it is taken to be preset %s. ADM's "
                       "reference files need adm, U-ViT's for COCO pytorch-fid", source, extractor.preset)
    if why := flaw(stored, n, extractor.dim):
        raise UserError(f"{source} holds no statistics of {features} features ({why}); make it again with "
                        "evaluations/stats.py.")
    if made_of and rank() == 0:
        logger.info("%s: statistics of %s", source, made_of)
    tensors = {key: torch.from_numpy(value.astype(np.float64)) for key, value in stored.items()}
    return FeatureSet(str(source), features, preset, None if n is None else int(n), **tensors, made_of=made_of)


def flaw(stored, n, dim):
    """Say why {key: array} and n are no valid statistics of `dim` features; None if they are."""
    if n is not None and (n.size != 1 or n.dtype.kind not in "iu" or n < 2):
        return f"n is {shorten(str(n), 40)}, expected the number of images, at least 2"
    for mu, sigma, size in (("mu", "sigma", dim), ("mu_s", "sigma_s", SPATIAL_DIM)):
        if (mu in stored) != (sigma in stored):
            return f"it has only one of {mu} and {sigma}"
        if mu not in stored:
            continue
        for key, shape in ((mu, (size,)), (sigma, (size, size))):
            array = stored[key]
            if array.shape != shape or array.dtype.kind != "f":
                return f"{key} is {array.dtype} {array.shape}, expected floats of {shape}"
            if not np.isfinite(array).all():
                return f"{key} holds nan or infinite numbers"
        covariance = torch.from_numpy(stored[sigma].astype(np.float64))
        if (covariance - covariance.T).abs().max() > ROUNDING * covariance.abs().max():
            return f"{sigma} is no covariance: it is not symmetric"
        raised = covariance + ROUNDING * covariance.trace().abs() * torch.eye(size, dtype=torch.float64)
        if covariance.any() and torch.linalg.cholesky_ex(raised).info:  # much faster than the eigenvalues
            return f"{sigma} is no covariance: it has negative eigenvalues"
    return None


def made_of(images):
    return f"{images.name}, sha256 {images.digest()}"


def is_made_of(path, images):
    """Whether the statistics file `path` exists and was made from these images."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file["made_of"]) == made_of(images)
    except (*ARRAY_ERRORS, KeyError):  # missing, damaged, or older than made_of
        return False


def write_statistics(path, found, images, chosen=(), batch_size=64):
    """Write a FeatureSet's statistics and, as arr_0, the images with the numbers `chosen`, in file order."""
    arrays = {key: getattr(found, key).numpy() for key in STATISTICS if getattr(found, key) is not None}
    with atomic_write(path, "w+b") as whole:
        np.savez(whole, **arrays, n=found.n, features=found.features, preset=found.preset, made_of=made_of(images))
        if len(chosen):  # a batch at a time: they may not fit into memory
            with zipfile.ZipFile(whole, "a") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(chosen), *images.size, 3)}
                np.lib.format.write_array_header_1_0(file, header)
                wanted = np.isin(np.arange(images.n), chosen)
                for i, batch in enumerate(images.batches(0, images.n, batch_size)):
                    file.write(batch[wanted[i * batch_size:(i + 1) * batch_size]].tobytes())
