"""Look into a trained network: its images, its teacher, its tokens on noised latents. For report.py and probe.py."""
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

from data_io.latent_scale import scale_of
from dataset import CaptionedImages
from encoders.online import class_layout
from encoders.teachers import Teacher, load_vit, split_teachers
from evaluations.extract import gather_rows, rank, shard
from loss import attention_loss, feature_loss, interpolant
from models.checkpoint import load_network
from models.layers import QK
from runtime.errors import UserError
from sampling.cache import blocks_of

NOISE = 5  # random stream; data_io/loader.py lists all streams
MAP_SIDE = 16  # attention maps are averaged down to this many tokens a side
HELD_OUT = 5  # without held-out data, one image in this many is held out


class Split(NamedTuple):
    """The images of `dataset` at `positions`."""
    dataset: Dataset | None
    positions: list


def is_text(network):
    return hasattr(network, "context_embedder")


def open_dataset(network, args, data_dir, split="train"):
    """The data folder of a SiT, or one split of an MMDiT's. Raises UserError if its shapes do not fit the network."""
    resolution, (channels, side, _) = args.get("resolution") or 256, network.latent_shape
    if is_text(network):
        dataset = CaptionedImages(data_dir, split, resolution)
        shapes = {"text of width": (dataset.context_shape[1], network.context_embedder.in_features)}
    else:
        dataset, shapes = class_layout(args)(data_dir, resolution, network.num_classes), {}
    shapes["moments of shape"] = dataset.moments_shape, (2 * channels, side, side)
    for what, (there, expected) in shapes.items():
        if there != expected:
            raise UserError(f"{data_dir} has {what} {there}, the network takes {expected}; give the data that it was "
                            "trained on.")
    return dataset


def open_split(network, args, data, val_data, count, seed):
    """(training Split, held-out Split) of at most `count` images each, chosen by the seed.

    A text network has no labels for a probe: its training set is None, its held-out images are in val/.
    """
    def shuffled(dataset, part=slice(None)):
        return Split(dataset, np.random.default_rng(seed).permutation(len(dataset)).tolist()[part][:count])

    if is_text(network):
        if val_data:
            raise UserError("--val-data is for classes; for captioned images, --data has its own split val.")
        return Split(None, []), shuffled(open_dataset(network, args, data, "val"))
    dataset = open_dataset(network, args, data)
    if val_data:
        return shuffled(dataset), shuffled(open_dataset(network, args, val_data))
    share = len(dataset) // HELD_OUT
    return shuffled(dataset, slice(share, None)), shuffled(dataset, slice(share))


def number_of_teacher(args):
    """Index, from 0, of the teacher whose attention is aligned."""
    return (args.get("attn_teacher") or 1) - 1


def open_teacher(network, args, attn_blocks=()):
    """The Teacher whose attention a training with `args` aligns, with the tokens of `network`. Raises UserError."""
    enc_type = args.get("enc_type") or "none"
    if enc_type == "none":
        raise UserError("The run had no teacher, so there is none to compare with; name one, or a run that has one.")
    teachers, number = split_teachers(enc_type, args.get("enc_weights")), number_of_teacher(args)
    vit = load_vit(*teachers[number])
    return Teacher(vit, network.input_size // network.patch_size, attn_blocks, args.get("enc_blocks"),
                   input_size=args.get("enc_size"), resample="teacher")  # maps are shown side by side


def noised(dataset, positions, t, args, seed=0):
    """x_t (N, C, h, w) of the images at `positions`: the posterior's mean, with noise drawn from (seed, position).

    `args` (of the training run) give the latent scale and the path.
    """
    x = scale_of(args).latents(torch.stack([dataset.moments(i) for i in positions]), torch.zeros(()))
    noise = np.stack([np.random.default_rng((seed, NOISE, i)).standard_normal(x.shape[1:], dtype=np.float32)
                      for i in positions])
    alpha, sigma, _, _ = interpolant(torch.tensor(float(t)), args.get("path_type") or "linear")
    return alpha * x + sigma * torch.from_numpy(noise)


@torch.no_grad()
def block_tokens(network, x, t, y, blocks):
    """{block: image tokens (N, T, D) after it} for 1-based `blocks`, in one pass at time `t`, a number."""
    found, place = {}, 1 if is_text(network) else 0  # SiT's blocks return (tokens, QK), MMDiT's (text, tokens, QK)
    handles = [blocks_of(network)[block - 1].register_forward_hook(
        lambda _, __, output, block=block: found.update({block: output[place]})) for block in blocks]
    network(x, torch.full((len(x),), float(t), device=x.device), y)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def mean_tokens(network, teacher, part, times, blocks, seed, args, batch_size):
    """{"teacher" or (block, t): tokens averaged over each image, (n, D)} of a Split; only process 0 has the values."""
    if part.dataset is None:
        return {}
    device, positions = network.pos_embed.device, part.positions[slice(*shard(len(part.positions)))]
    widths = {"teacher": teacher.vit.embed_dim} | {(b, t): network.pos_embed.shape[2] for t in times for b in blocks}
    rows = {name: [torch.zeros(0, width)] for name, width in widths.items()}
    null = part.dataset.empty_context if is_text(network) else torch.tensor(network.null_label)  # no condition
    for first in tqdm(range(0, len(positions), batch_size), desc="features", unit="batch",
                      disable=True if rank() else None):
        batch = positions[first:first + batch_size]
        found = {"teacher": teacher(torch.stack([part.dataset.image(i) for i in batch])).features[0]}
        y = torch.stack([null] * len(batch)).to(device)
        for t in times:
            x = noised(part.dataset, batch, t, args, seed).to(device)
            found |= {(block, t): tokens for block, tokens in block_tokens(network, x, t, y, blocks).items()}
        for name, tokens in found.items():
            rows[name].append(tokens.mean(dim=1).cpu())
    gathered = {name: gather_rows(torch.cat(parts)) for name, parts in rows.items()}
    return {name: None if found is None else found.to(device) for name, found in gathered.items()}


def mean_map(qk, heads):
    """uint8 (N, s * s, s * s): attention averaged over the first `heads` heads, each row scaled by its largest value.

    Maps of more than MAP_SIDE tokens a side are averaged over squares of tokens.
    """
    logits = QK(qk.q[:, :heads].float(), qk.k[:, :heads].float(), qk.scale).logits()
    maps = logits.softmax(dim=-1).mean(dim=1)  # (N, T, T)
    side = math.isqrt(maps.shape[1])
    if side > MAP_SIDE:
        for _ in range(2):  # the keys, then the queries
            maps = F.adaptive_avg_pool2d(maps.unflatten(2, (side, side)), MAP_SIDE).flatten(2).transpose(1, 2)
    return (255 * maps / maps.amax(dim=2, keepdim=True)).round().to(torch.uint8)


def colours(teacher, student):
    """Tokens (N, T, C) of both -> two uint8 (N, s, s, 3), the teacher's three principal components as red, green, blue.

    A colour means the same feature on both sides. Tokens are normalized: the feature loss sees directions only.
    """
    teacher, student = (F.normalize(tokens.double(), dim=2) for tokens in (teacher, student))
    flat = teacher.flatten(0, 1)
    mean = flat.mean(dim=0)
    _, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean))  # in ascending order
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # else the sign varies by library
    limits = torch.tensor([0.01, 0.99], dtype=torch.float64, device=flat.device)
    low, high = torch.quantile((flat - mean) @ axes, limits, dim=0)
    side = math.isqrt(teacher.shape[1])
    return [(255 * (((tokens - mean) @ axes - low) / (high - low)).clamp(0, 1)).round().to(torch.uint8).cpu()
            .unflatten(1, (side, side)).numpy() for tokens in (teacher, student)]


@torch.no_grad()
def look_inside(path, count, t, teacher=None):
    """Attention and features of the checkpoint `path` (EMA) and its teacher, for `count` images of the training data.

    {images, teacher_colours, student_colours: lists of uint8 (h, w, 3), cosine of projected and teacher's features,
    side: tokens a side of a map, pairs: [{student, teacher: blocks, loss, entropy in nats, student_maps, teacher_maps:
    uint8 (count, side^2, side^2)}]}. Without projected features there are no colours and no cosine. The student sees
    noise of time `t` and the images' conditions. A run without a teacher is compared with the teacher in `teacher`,
    the settings of another run. Raises UserError if data or teacher are missing.
    """
    network, args = load_network(path)
    if teacher and args.get("enc_type") == "none":
        names = ("enc_type", "enc_weights", "enc_blocks", "enc_size", "attn_heads", "attn_teacher")
        args |= {name: teacher.get(name) for name in names}
    if not args.get("data_dir"):
        raise UserError(f"{path} does not say what it was trained on; nothing is shown of its inside.")
    vit = open_teacher(network, args, [block for _, block in args["attn_layers"]])
    dataset = open_dataset(network, args, args["data_dir"])
    positions = np.random.default_rng(0).permutation(len(dataset))[:count].tolist()
    images = torch.stack([dataset.image(i) for i in positions])
    target = vit(images)
    x = noised(dataset, positions, t, args)
    y = torch.stack([torch.as_tensor(dataset.condition(i)) for i in positions])
    _, student = network(x, torch.full((len(x),), float(t)), y, return_alignment=True)
    found = {"images": list(images.permute(0, 2, 3, 1).numpy()), "pairs": [],
             "teacher_colours": [], "student_colours": []}
    features, number = target.features[0], number_of_teacher(args)
    if network.z_dims[number:number + 1] == (features.shape[2],):  # else no projector for it
        projected = student.features[number]  # on equal grids, see open_teacher
        found["teacher_colours"], found["student_colours"] = map(list, colours(features, projected))
        found["cosine"] = -feature_loss(projected, features).item()
    for ours, theirs in args["attn_layers"]:
        s, e = student.attention[ours], target.attention[theirs]
        heads = min(args.get("attn_heads") or 12, s.q.shape[1], e.q.shape[1])
        found["pairs"].append({
            "student": ours, "teacher": theirs, "heads": heads, "loss": attention_loss([s], [e], heads).item(),
            "entropy": attention_loss([e], [e], heads).item(), "student_maps": mean_map(s, heads).numpy(),
            "teacher_maps": mean_map(e, heads).numpy()})
    found["side"] = math.isqrt(found["pairs"][0]["student_maps"].shape[1])
    return found
