"""The scores as functions of features (n, D): no files, no networks. Sums are float64, on the device of the inputs."""
import torch
import torch.nn.functional as F

NEIGHBOURS = 3        # precision and recall: the radius is the distance to the 3rd neighbour
BLOCK = 10_000        # rows and columns of a block of distances; ADM's, which falls back to float32 block by block
EIGENVALUE_FLOOR = 1e-12      # relative to the largest; a smaller eigenvalue of a covariance is rounding error
ROWS = 1024           # rows of a kernel at a time
TOP = (1, 5)          # retrieval: top-1 and top-5
SHUFFLES = 100        # retrieval: how often the captions are shuffled


class Moments:
    """Mean and covariance of features that come in batches. Memory is D * D float64."""

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
        """mu (D,) and sigma (D, D) with n - 1, float64 on the CPU; needs two rows."""
        mu = self.sum / self.n
        sigma = (self.outer - self.n * torch.outer(mu, mu)) / (self.n - 1)
        return mu.cpu(), sigma.cpu()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)) -> float. mu (D,), sigma (D, D): tensors or arrays.

    Heusel et al. 2017, arXiv 1706.08500, eq. 6. With S1 = F F^T the last trace is the sum of the square roots of the
    eigenvalues of the symmetric F^T S2 F, so rank-deficient covariances work. The published scripts take a matrix
    square root, which agrees to 1e-9 at full rank. Raises ValueError for different sizes and for nan or infinity.
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

    pool (n, 2048) in file order, classifier (1008, 2048) = `fc.weight`, without the bias, as in ADM's evaluator. A
    short last split counts like the others. float64: ADM's float32 gives nan on underflow.
    """
    scores = []
    for split in pool.split(split_size):
        log_p = torch.log_softmax(split.double() @ classifier.double().T, dim=1)
        log_mean = torch.logsumexp(log_p, dim=0, keepdim=True) - torch.tensor(len(split)).double().log()
        scores.append((log_p.exp() * (log_p - log_mean)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def kernel_distance(x, y):
    """KID: unbiased squared MMD with the kernel (u . v / D + 1)^3 -> float, may be negative (arXiv 1801.01401).

    x (n, D), y (m, D), at least two rows each. All pairs instead of 100 random subsets of 1,000: the same expectation
    without randomness.
    """
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
    """Squared distances (n, m) float32 of rows u (n, D) and v (m, D), as in ADM's evaluator.

    float16 rounds every product, sum and norm to half precision, but sums in float32; this changes precision and
    recall a little. A block that overflows is computed in float32.
    """
    if dtype == torch.float16:
        d = distances_rounded_by(round_to_half, u.half().float(), v.half().float())
        if torch.isfinite(d).all():
            return d
    return distances_rounded_by(lambda x: x, u.float(), v.float())


def distances_rounded_by(h, u, v):
    norm_u, norm_v = (h(h(x * x).sum(1)) for x in (u, v))
    d = h(u @ v.T)                                  # in place from here on: a block takes 400 MB
    d = h(d.mul_(-2).add_(norm_u[:, None]))
    return h(d.add_(norm_v[None])).clamp_(min=0)


def round_to_half(x):
    return x.copy_(x.half())                            # in place: x is always a temporary


def manifold_radii(features, dtype=torch.float16):
    """(n,) float32: squared distance of each row of features (n, D) to its 3rd neighbour, itself not counted."""
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
    """(precision, recall): the share of each set inside the other's manifold (Kynkäänniemi et al., arXiv 1904.06991).

    reference (n, D), sample (m, D), at least 4 rows each. A point is inside if it is within the radius of any point of
    the other set, border included.
    """
    reference_radii, sample_radii = manifold_radii(reference, dtype), manifold_radii(sample, dtype)
    reference_in = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    sample_in = torch.zeros(len(sample), dtype=torch.bool, device=sample.device)
    for i in range(0, len(reference), BLOCK):
        for j in range(0, len(sample), BLOCK):
            d = squared_distances(reference[i:i + BLOCK], sample[j:j + BLOCK], dtype)
            sample_in[j:j + BLOCK] |= (d <= reference_radii[i:i + BLOCK, None]).any(0)
            reference_in[i:i + BLOCK] |= (d <= sample_radii[None, j:j + BLOCK]).any(1)
    return sample_in.double().mean().item(), reference_in.double().mean().item()


def nearest(samples, candidates, k):
    """(n, k) int64: rows of candidates (m, D) nearest to each of samples (n, D), by cosine about the former's mean."""
    centre = candidates.mean(0)
    candidates = F.normalize(candidates - centre, dim=1)
    parts = (F.normalize(rows - centre, dim=1) @ candidates.T for rows in samples.split(4096))
    return torch.cat([part.topk(k).indices for part in parts])


def hits(found, truth):
    """Share of the rows of found (n, k) that hold truth (n,)."""
    return (found == truth[:, None]).any(1).double().mean().item()


def retrieval(samples, candidates, truth, seed=0):
    """{k: (top-k accuracy, chance, mean and highest accuracy with shuffled `truth`)} for the k in TOP up to m.

    samples (n, D), candidates (m, D) of pairwise different pictures, truth (n,) rows of candidates.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffles = [truth[torch.randperm(len(truth), generator=generator)] for _ in range(SHUFFLES)]
    scores = {}
    for k in (k for k in TOP if k <= len(candidates)):
        found = nearest(samples, candidates, k)
        by_chance = [hits(found, shuffled) for shuffled in shuffles]
        scores[k] = hits(found, truth), k / len(candidates), sum(by_chance) / SHUFFLES, max(by_chance)
    return scores


def cknna(a, b, k=10):
    """CKNNA of features a (n, D) and b (n, E), by the formula in probe.py; float64. k is at most n - 1."""
    a, b = (F.normalize(features.double(), dim=1) for features in (a, b))
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for start in range(0, len(a), ROWS):
        centred, near = [], []
        for features in (a, b):
            kernel = features[start:start + ROWS] @ features.T  # (rows, n)
            centred.append(kernel - kernel.mean(dim=1, keepdim=True))
            own = torch.arange(len(kernel), device=kernel.device)
            kernel[own, start + own] = -torch.inf  # an image is not its own neighbour
            near.append(torch.zeros_like(kernel).scatter_(1, kernel.topk(k, dim=1).indices, 1))
        (x, y), (near_x, near_y) = centred, near
        sums += torch.stack([(near_x * near_y * x * y).sum(), (near_x * x * x).sum(), (near_y * y * y).sum()])
    both, first, second = sums.tolist()
    return both / (first * second) ** 0.5


def linear_probe(train, train_labels, val, val_labels, classes, l2=1e-2):
    """Accuracy on `val` (m, D) of the logistic regression fitted to `train` (n, D); labels int64 (n,) and (m,)."""
    train, val = train.double(), val.double()
    mean, std = train.mean(dim=0), train.std(dim=0).clamp(min=1e-12)
    train, val = (train - mean) / std, (val - mean) / std
    weight = train.new_zeros(train.shape[1], classes, requires_grad=True)
    bias = train.new_zeros(classes, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-6, tolerance_change=0,
                               line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        value = F.cross_entropy(train @ weight + bias, train_labels) + l2 / 2 * (weight ** 2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return ((val @ weight + bias).argmax(dim=1) == val_labels).double().mean().item()
