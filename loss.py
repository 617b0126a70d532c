"""The losses of HASTE (arXiv 2505.16792): velocity matching, feature alignment and attention alignment."""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from models.layers import QK, Alignment, patchify


def interpolant(t, path_type="linear"):
    """x_t = alpha x + sigma eps; t = 1 is noise. -> alpha, sigma and their derivatives w.r.t. t, each shaped like t."""
    if path_type == "linear":
        return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
    if path_type == "cosine":
        angle = math.pi / 2 * t
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()
    raise ValueError(f"path_type is {path_type!r}; use 'linear' or 'cosine'")


def shift_time(t, shift):
    """Move t towards 1 if `shift` > 1, keeping 0 and 1 in place: shift t / (1 + (shift - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(u, weighting="uniform", path_type="linear", shift=1.0):
    """Map u (N,), uniform in [0, 1), to training times t (N,) in [0, 1], which shift_time then moves.

    lognormal: with n = Phi^-1(u) a standard normal and s = exp(n) = sigma / alpha, t = s / (1 + s) on the linear path
    and 2 / pi atan(s) on the cosine path.
    """
    if weighting not in ("uniform", "lognormal"):
        raise ValueError(f"weighting is {weighting!r}; use 'uniform' or 'lognormal'")
    t = u
    if weighting == "lognormal":
        s = torch.special.ndtri(u.double()).exp()
        t = s / (1 + s) if path_type == "linear" else 2 / math.pi * s.atan()
    return (t if shift == 1 else shift_time(t, shift)).to(u.dtype)


def resample_tokens(tokens, count):
    """Bilinear resampling on the square 2-D map: (..., T, C) -> (..., count, C)."""
    if (had := tokens.shape[-2]) == count:
        return tokens
    side, new = math.isqrt(had), math.isqrt(count)
    if side * side != had or new * new != count:
        raise ValueError(f"cannot resample {had} tokens to {count}: both must fill a square")
    grid = tokens.flatten(0, -3).transpose(1, 2).unflatten(2, (side, side))
    grid = F.interpolate(grid, size=(new, new), mode="bilinear", align_corners=False)
    return grid.flatten(2).transpose(1, 2).unflatten(0, tokens.shape[:-2])


def feature_loss(projected, target):
    """L_feat = -mean cos(target, projected) over batch and tokens: (N, T, C) and (N, T', C) -> scalar.

    Normalised in float32: float16 here turns into NaN after some 70K steps. If the token grids differ, the student's
    tokens are resampled to the target's grid (arXiv 2505.16792, A.3).
    """
    projected = resample_tokens(projected.float(), target.shape[1])
    return -F.cosine_similarity(projected, target.float(), dim=-1).mean()


def spatial_normalize(tokens, alpha, eps=1e-6):
    """iREPA's normalisation of a teacher's tokens (N, T, C), over T: (y - alpha mean) / (unbiased std + eps), float32.

    arXiv 2512.10794, which uses alpha = 0.6. It weakens what all tokens share, so their differences count more.
    """
    tokens = tokens.float()
    return (tokens - alpha * tokens.mean(dim=1, keepdim=True)) / (tokens.std(dim=1, keepdim=True) + eps)


def relational_loss(tokens, target):
    """Mean squared difference of the Gram matrices (cosines between all tokens of an image) -> float32 scalar.

    (N, T, D) and (N, T', C): the widths may differ, so no projector is needed. The student's tokens are resampled to
    the target's grid.
    """
    def gram(x):
        x = F.normalize(x.float(), dim=-1)
        return x @ x.mT

    tokens = resample_tokens(tokens.float(), target.shape[1])
    with torch.autocast(tokens.device.type, enabled=False):
        return F.mse_loss(gram(tokens), gram(target))


def dispersive_loss(tokens):
    """log mean_ij exp(-|z_i - z_j|^2 / dim z), over all pairs of images, i = j included: (N, T, D) -> float32 scalar.

    z holds all tokens of an image, flattened: dim z = T D. This is the InfoNCE loss of arXiv 2506.09027 with squared L2
    distance, as in its release: 0 if all images are equal, lower the further they are apart. Pairs are formed within
    one micro-batch of one process, so the value depends on how a batch is split.
    """
    z = tokens.flatten(1).double()  # products would cancel in float32, more so in TF32 or under autocast
    z = z - z.mean(dim=0)
    gram = z @ z.mT  # not F.pdist: on a GPU its gradient takes N copies of z
    distances = (gram.diagonal()[:, None] + gram.diagonal() - 2 * gram).clamp(min=0)
    return ((-distances / z.shape[1]).logsumexp(dim=(0, 1)) - 2 * math.log(len(z))).float()


def resample_qk(qk, count):
    """QK on a grid of `count` tokens: its logits are those of `qk`, resampled over keys, then over queries.

    Bilinear resampling is linear, and the logits are linear in q and in k: resampling q and k needs no T x T map. The
    softmax comes afterwards, so rows sum to 1; rows of resampled maps would not.
    """
    return QK(resample_tokens(qk.q, count), resample_tokens(qk.k, count), qk.scale)


def tile_size(device):
    """Number of logits computed at a time. benchmarks/README.md measures the gain, so far on CPUs only.

    On a GPU each tile costs some twenty kernels, so tiles are large, but they must fit into its cache: 2^22 logits of
    student and teacher in float32 take 32 MiB of an H100's 50 MB.
    """
    return 2 ** 20 if device.type == "cpu" else 2 ** 22


def product(scale, a, b):
    """scale * a b, batched, float32 (M, R, d) and (M, d, T) -> (M, R, T).

    Scales the result, not a or b: values that come from 16 bits then stay exact in a TF32 product.
    """
    return torch.baddbmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def attention_tile(q, k, scale, teacher_q, teacher_k, teacher_scale):
    """A tile of R rows of M maps, one per image and head; any float dtype.

    q (M, R, d), k (M, T, d), the teacher's (M, R, e) and (M, T, e)
    -> sum of the cross-entropies, and their gradients w.r.t. q and k; float32.
    """
    q, k, teacher_q, teacher_k = q.float(), k.float(), teacher_q.float(), teacher_k.float()
    teacher_map = product(teacher_scale, teacher_q, teacher_k.mT).softmax(dim=-1)
    log_student_map = product(scale, q, k.mT).log_softmax(dim=-1)
    total = -torch.dot(teacher_map.flatten(), log_student_map.flatten())
    difference = log_student_map.exp_().sub_(teacher_map)
    return total, product(scale, difference, k), product(scale, difference.mT, q)


class AttentionCrossEntropy(torch.autograd.Function):
    """sum_i [ logsumexp_j S_ij - sum_j P_ij S_ij ] over all rows i, with S the student's logits and P the teacher's
    map.

    The derivative w.r.t. S is the student's map minus P. The forward pass also computes the gradients w.r.t. q and k,
    tile by tile: as many products as autograd needs, and no T x T map is kept, so memory is linear in T.
    """

    @staticmethod
    def forward(ctx, q, k, scale, teacher_q, teacher_k, teacher_scale, tile):
        """q, k (M, T, d) of the student, (M, T, e) of the teacher -> float32 scalar; `tile` as in attention_loss."""
        maps, t, _ = q.shape
        size = tile_size(q.device)
        step, rows = max(1, size // t ** 2), min(t, max(1, size // t))  # whole maps a tile, or rows of one map
        total, dq, dk = q.new_zeros((), dtype=torch.float32), torch.empty_like(q), torch.empty_like(k)
        with torch.autocast(q.device.type, enabled=False):
            for m in range(0, maps, step):
                of_maps, keys_gradient = slice(m, m + step), 0
                for i in range(0, t, rows):
                    of_rows = of_maps, slice(i, i + rows)
                    value, dq[of_rows], of_keys = tile(q[of_rows], k[of_maps], scale, teacher_q[of_rows],
                                                       teacher_k[of_maps], teacher_scale)
                    total += value
                    keys_gradient = keys_gradient + of_keys
                dk[of_maps] = keys_gradient
        ctx.save_for_backward(dq, dk)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        dq, dk = ctx.saved_tensors
        return gradient * dq, gradient * dk, None, None, None, None, None


def attention_loss(student, teacher, num_heads=12, tile=attention_tile):
    """L_attn: cross-entropy of the student's attention maps against the teacher's, mean over all rows and pairs.

    `student`, `teacher`: one QK per pair, (N, H, T, d) each -> scalar. The first `num_heads` heads are compared, or as
    many as both sides have. The student's maps are resampled to the teacher's grid. Computed in float32, whatever q and
    k are; the teacher gets no gradient. `tile` is attention_tile, compiled or not.
    """
    losses = []
    for s, t in zip(student, teacher, strict=True):
        s = resample_qk(s, t.q.shape[2])
        heads = min(num_heads, s.q.shape[1], t.q.shape[1])
        q, k, teacher_q, teacher_k = (x[:, :heads].flatten(0, 1) for x in (s.q, s.k, t.q, t.k))
        total = AttentionCrossEntropy.apply(q, k, s.scale, teacher_q, teacher_k, t.scale, tile)
        losses.append(total / (q.shape[0] * q.shape[1]))
    return torch.stack(losses).mean()


def feature_term(loss_fn, student, teacher):
    """feature_loss of each teacher, averaged. student.features begins with the teachers' projectors."""
    pairs = zip(student.features[:len(teacher.features)], teacher.features, strict=True)
    return torch.stack([feature_loss(projected, target) for projected, target in pairs]).mean()


def attention_term(loss_fn, student, teacher):
    """attention_loss over the pairs of blocks."""
    ours = [student.attention[block] for block, _ in loss_fn.attn_pairs]
    theirs = [teacher.attention[block] for _, block in loss_fn.attn_pairs]
    return attention_loss(ours, theirs, loss_fn.num_heads, loss_fn.tile)


def relational_term(loss_fn, student, teacher):
    """relational_loss of the student's tokens with each teacher's, averaged."""
    return torch.stack([relational_loss(student.tokens, target) for target in teacher.features]).mean()


def dispersive_term(loss_fn, student, teacher):
    """dispersive_loss of the student's tokens."""
    return dispersive_loss(student.tokens)


def latent_term(loss_fn, student, teacher):
    """feature_loss between the last projector's output and the patches of the clean latents.

    The target is from SRA 2 (arXiv 2601.17830), whose code is not published; the cosine distance is ours.
    """
    return feature_loss(student.features[-1], teacher.tokens)


class AlignmentLoss(NamedTuple):
    """A row of ALIGNMENT_LOSSES."""
    flag: str            # name of its weight in the total loss: "proj_coeff" is --proj-coeff
    default: float       # default weight
    student: str         # input: "features" projected to teachers, to "latents", "tokens" or "attention"
    teacher: str | None  # input: "features" or "attention"; None: it needs no teacher
    function: Callable   # (SILoss, student's Alignment, teacher's Alignment) -> float32 scalar
    title: str           # title of its curve


# The one table of alignment losses. Flags, training step, metrics.csv, trigger, curves and report read it.
ALIGNMENT_LOSSES = {
    "feature": AlignmentLoss("proj_coeff", 0.5, "features", "features", feature_term, "feature loss (-cosine)"),
    "attention": AlignmentLoss("attn_coeff", 0.5, "attention", "attention", attention_term, "attention loss (nats)"),
    "relational": AlignmentLoss("relational_coeff", 0.0, "tokens", "features", relational_term,
                                "relational loss (squared difference of cosines)"),
    "dispersive": AlignmentLoss("dispersive_coeff", 0.0, "tokens", None, dispersive_term,
                                "dispersive loss (log mean exp(-distance))"),
    "latent": AlignmentLoss("latent_coeff", 0.0, "latents", None, latent_term, "latent loss (-cosine)"),
}


def uses(weights, side, taps):
    """Whether a loss in `weights`, {name: weight}, needs `taps` from `side`, "student" or "teacher"."""
    return any(weight > 0 and getattr(ALIGNMENT_LOSSES[name], side) == taps for name, weight in weights.items())


def weighted_sum(terms, weights, factor=1.0, start=0.0):
    """start + the sum of factor * weight * term over `weights`, {name: weight}.

    With start = the denoising loss this is the total loss.
    """
    return sum((factor * weight * terms[name] for name, weight in weights.items()), start)


class SILoss:
    """All losses of one batch.

    attn_pairs: (student block, teacher block), 0-based; () leaves attention out. `num_heads`: as in attention_loss.
    `terms` names the rows of ALIGNMENT_LOSSES that are computed. `spatial_norm` is the alpha of spatial_normalize for
    the teachers' features; None leaves them unchanged.
    """

    def __init__(self, path_type="linear", weighting="uniform", attn_pairs=((4, 8), (5, 9), (6, 10), (7, 11)),
                 num_heads=12, terms=("feature", "attention"), spatial_norm=None):
        self.path_type, self.weighting, self.terms, self.spatial_norm = path_type, weighting, terms, spatial_norm
        self.attn_pairs, self.num_heads, self.tile = tuple(attn_pairs), num_heads, attention_tile

    def compile(self):
        """Compile the attention loss of one tile, in place."""
        self.tile = torch.compile(attention_tile, dynamic=False)

    def __call__(self, model, x, y, teacher=None, t=None, noise=None):
        """Latents x (N, C, h, w), condition y -> dict(denoise (N,), and a scalar per name of `terms`), float32.

        `teacher` is an Alignment of the same images (empty if no loss needs a teacher), or None in Phase II: then the
        model returns no alignment, and only `denoise` is computed. A loss whose taps are empty in the student is 0.
        `t` (N,) and `noise`, shaped like x, are drawn if not given.
        """
        if t is None:
            t = sample_t(torch.rand(len(x), device=x.device), self.weighting, self.path_type)
        if noise is None:
            noise = torch.randn_like(x)
        alpha, sigma, d_alpha, d_sigma = (a[:, None, None, None] for a in interpolant(t, self.path_type))
        x_t, target = alpha * x + sigma * noise, d_alpha * x + d_sigma * noise
        if teacher is None:
            return {"denoise": mean_flat((model(x_t, t, y).float() - target) ** 2)}
        v, student = model(x_t, t, y, return_alignment=True)
        losses = {"denoise": mean_flat((v.float() - target) ** 2)}
        if self.spatial_norm is not None:
            teacher = Alignment([spatial_normalize(z, self.spatial_norm) for z in teacher.features], teacher.attention)
        if any(ALIGNMENT_LOSSES[name].student == "latents" for name in self.terms):
            teacher = Alignment(teacher.features, teacher.attention, patchify(x, student.tokens.shape[1]))
        empty = {"features": not student.features, "attention": not self.attn_pairs}
        for name in self.terms:
            row = ALIGNMENT_LOSSES[name]
            losses[name] = x.new_zeros(()) if empty.get(row.student) else row.function(self, student, teacher)
        return losses


def mean_flat(x):
    """Mean over all axes but the batch: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)
