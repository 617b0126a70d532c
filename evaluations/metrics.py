"""The scores, as functions of features: Fréchet distance, Inception Score, KID, precision and recall.

Features are float32 tensors (n, D); sums are float64. Everything runs on the device of its inputs. No files,
no networks.
"""
import torch

NEIGHBOURS = 3        # precision and recall: radius = distance to the 3rd neighbour besides itself
BLOCK = 10_000        # rows and columns of a block of distances; ADM's, whose float16 fallback is per block
EIGENVALUE_FLOOR = 1e-12      # relative to the largest: below it an eigenvalue of a covariance is rounding


class Moments:
    """Mean and covariance of features that come in batches; float64 sums, memory D * D whatever the count."""

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """features (b, D), any float type."""
        features = features.to(self.sum)
        self.n += len(features)
        self.sum += features.sum(0)
        self.outer.addmm_(features.T, features)

    def result(self):
        """mu (D,) and sigma (D, D) with n - 1, float64 on the CPU. Raises ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 images, this set has {self.n}")
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return mu.cpu(), sigma.cpu()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) -> float. mu (D,), sigma (D, D): tensors or arrays.

    With S1 = F F^T the last trace is the sum of square roots of the eigenvalues of F^T S2 F, which is
    symmetric: no complex numbers, and covariances of fewer images than features are fine (Heusel et al. 2017,
    arXiv 1706.08500, eq. 6; the published scripts take a matrix square root, equal to 1e-9 at full rank).
    Raises ValueError on sizes that differ and on numbers that are not finite.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(a).double() for a in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape or sigma1.shape != sigma2.shape:
        raise ValueError(f"the statistics are of {tuple(mu1.shape)} and {tuple(mu2.shape)} features: both "
                         "sets must be measured with the same network")
    if not all(torch.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("the statistics hold nan or infinite numbers: compute them again")
    w, v = torch.linalg.eigh(sigma1)
    keep = w > EIGENVALUE_FLOOR * w[-1].clamp(min=0)
    factor = v[:, keep] * w[keep].sqrt()
    root = torch.linalg.eigvalsh(factor.T @ sigma2 @ factor).clamp(min=0).sqrt().sum()
    return ((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * root).item()


def inception_score(pool, classifier, split_size=5000):
    """Mean over consecutive splits of exp(mean KL(p(y|x) || p(y))) -> float (Salimans et al., arXiv 1606.03498).

    pool (n, 2048) in file order, classifier (1008, 2048) = `fc.weight`: the bias is left out, as in ADM's
    evaluator. A short last split counts like the others. Logits and the rest are float64: ADM's float32 gives
    nan on underflow.
    """
    scores = []
    for split in pool.split(split_size):
        log_p = torch.log_softmax(split.double() @ classifier.double().T, dim=1)
        log_mean = torch.logsumexp(log_p, dim=0, keepdim=True) - torch.tensor(len(split)).double().log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(x, y):
    """KID: unbiased squared MMD with the kernel (u . v / D + 1)^3 -> float, may be negative (arXiv 1801.01401).

    x (n, D), y (m, D). Over all pairs rather than 100 random subsets of 1,000: same expectation, no
    randomness. Raises ValueError for fewer than two rows.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"KID needs at least 2 images on each side, it was given {len(x)} and {len(y)}")

    def kernel_sum(u, v, without_diagonal=False):
        total = torch.zeros((), dtype=torch.float64, device=u.device)
        for rows in u.split(1000):
            for columns in v.split(1000):
                total += (rows.double() @ columns.double().T / u.shape[1] + 1).pow_(3).sum()
        if without_diagonal:
            total -= (u.double().square().sum(1) / u.shape[1] + 1).pow(3).sum()
        return total

    n, m = len(x), len(y)
    return (kernel_sum(x, x, True) / (n * (n - 1)) + kernel_sum(y, y, True) / (m * (m - 1))
            - 2 * kernel_sum(x, y) / (n * m)).item()


def squared_distances(u, v, dtype=torch.float16):
    """Squared distances (n, m) float32 of rows u (n, D) and v (m, D), as ADM's evaluator has them.

    float16: every product, sum and norm is rounded to half precision (sums themselves run in float32), which
    moves precision and recall a little; a block with an overflow is done in float32. float32: nothing is
    rounded.
    """
    if dtype == torch.float16:
        d = distances_rounded_by(round_to_half, u.half().float(), v.half().float())
        if torch.isfinite(d).all():
            return d
    return distances_rounded_by(lambda x: x, u.float(), v.float())


def distances_rounded_by(h, u, v):
    norm_u, norm_v = (h(h(x * x).sum(1)) for x in (u, v))
    d = h(u @ v.T)                                  # in place from here on: 10,000 x 10,000 are 400 MB
    d = h(d.mul_(-2).add_(norm_u[:, None]))
    return h(d.add_(norm_v[None])).clamp_(min=0)


def round_to_half(x):
    return x.copy_(x.half())                            # in place: x is always a temporary


def manifold_radii(features, dtype=torch.float16):
    """(n,) float32: squared distance of each row of features (n, D) to its 3rd neighbour besides itself."""
    radii = []
    for rows in features.split(BLOCK):
        nearest = torch.empty(len(rows), 0, device=rows.device)
        for columns in features.split(BLOCK):
            block = squared_distances(rows, columns, dtype)
            count = min(NEIGHBOURS + 1, block.shape[1])
            nearest = torch.cat([nearest, block.topk(count, largest=False).values], dim=1)
            nearest = nearest.sort(dim=1).values[:, :NEIGHBOURS + 1]
        radii.append(nearest[:, -1])
    return torch.cat(radii)


def precision_recall(reference, sample, dtype=torch.float16):
    """(precision, recall): the part of each set within the other's manifold (Kynkäänniemi et al., arXiv 1904.06991).

    reference (n, D), sample (m, D); a point is inside where it is within the radius of any point of the other
    set, on the border included. Raises ValueError where a set has fewer than 4 rows, as it then has no 3rd
    neighbour.
    """
    if min(len(reference), len(sample)) <= NEIGHBOURS:
        raise ValueError(f"precision and recall need at least {NEIGHBOURS + 1} images on each side, "
                         f"they were given {len(reference)} and {len(sample)}")
    reference_radii, sample_radii = manifold_radii(reference, dtype), manifold_radii(sample, dtype)
    reference_in = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    sample_in = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    for i in range(0, len(reference), BLOCK):
        for j in range(0, len(sample), BLOCK):
            d = squared_distances(reference[i:i + BLOCK], sample[j:j + BLOCK], dtype)
            sample_in[j:j + BLOCK] |= (d <= reference_radii[i:i + BLOCK, None]).any(0)
            reference_in[i:i + BLOCK] |= (d <= sample_radii[None, j:j + BLOCK]).any(1)
    return sample_in.double().mean().item(), reference_in.double().mean().item()
