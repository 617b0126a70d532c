"""A trained network looked into: its images, its teacher, and its tokens on noised latents; for report.py and probe.py."""
import math

import numpy as np
import torch
import torch.nn.functional as F

from dataset import PIXELS, CaptionedImages, LatentImages, PixelImages
from encoders import TEACHERS, VAE, Teacher, load_vit
from files import BadInput
from loss import attention_loss, feature_loss, interpolant
from models.layers import QK
from pipeline import load_network

NOISE = 5  # a stream of randomness of its own, beside those of dataset.py and during_training.py
MAP_SIDE = 16  # attention maps are averaged down to at most so many tokens a side


def open_dataset(network, args, data_dir, split="train"):
    """The images of a SiT's data folder, or of one split of an MMDiT's, with the latents that `network` takes."""
    resolution = args.get("resolution") or 256
    if hasattr(network, "context_embedder"):
        dataset = CaptionedImages(data_dir, split, resolution)
        width = network.context_embedder.in_features
        if dataset.context_shape[1] != width:
            raise BadInput(f"{data_dir} has text of width {dataset.context_shape[1]}, the network takes {width}; give the "
                           "data that it was trained on.")
    else:
        kind = PixelImages if args.get("vae") == PIXELS else LatentImages
        dataset = kind(data_dir, resolution, network.num_classes)
    channels, side, _ = network.latent_shape
    if dataset.moments_shape != (2 * channels, side, side):
        raise BadInput(f"{data_dir} has moments of shape {dataset.moments_shape}, the network takes {(2 * channels, side, side)}; "
                       "give the data that it was trained on.")
    return dataset


def open_teacher(network, args, attn_blocks=()):
    """The Teacher that `args` of a training name, on as many tokens as `network` has. Raises BadInput where there is none."""
    enc_type = args.get("enc_type") or "none"
    if enc_type == "none":
        raise BadInput("The run had no teacher, so there is none to compare with; name one, or a run that has one.")
    if enc_type not in TEACHERS:
        raise BadInput(f"The teacher {enc_type} is not known; use one of {', '.join(TEACHERS)}.")
    vit = load_vit(enc_type, args.get("enc_weights"))
    return Teacher(vit, network.input_size // network.patch_size, attn_blocks, args.get("enc_blocks"),
                   input_size=args.get("enc_size"))


def null_condition(network, dataset):
    """The condition of no condition, shaped like one y."""
    return dataset.empty_context if hasattr(network, "context_embedder") else torch.tensor(network.null_label)


def noised(dataset, positions, t, seed=0, path_type="linear"):
    """x_t (N, C, h, w) of the images at `positions`: the posterior's mean, with noise drawn from (seed, position)."""
    x = VAE.latents(torch.stack([dataset.moments(i) for i in positions]), torch.zeros(()), dataset.latent_scale)
    noise = np.stack([np.random.default_rng((seed, NOISE, i)).standard_normal(x.shape[1:], dtype=np.float32)
                      for i in positions])
    alpha, sigma, _, _ = interpolant(torch.tensor(float(t)), path_type)
    return alpha * x + sigma * torch.from_numpy(noise)


@torch.no_grad()
def block_tokens(network, x, t, y, blocks):
    """{block: image tokens (N, T, D) after it} for 1-based `blocks`, of one pass at time `t`, a number."""
    found, is_text = {}, hasattr(network, "joint_blocks")
    layers = network.joint_blocks if is_text else network.blocks

    def keep(block):
        def hook(_, __, output):  # SiT's blocks give (tokens, QK), MMDiT's (text, tokens, QK)
            found[block] = output[1 if is_text else 0]
        return hook

    handles = [layers[block - 1].register_forward_hook(keep(block)) for block in blocks]
    try:
        network(x, torch.full((len(x),), float(t), device=x.device), y)
    finally:
        for handle in handles:
            handle.remove()
    return found


def mean_map(qk, heads):
    """uint8 (N, s * s, s * s): attention averaged over the first `heads` heads, each row scaled by its largest value.

    Maps of more than MAP_SIDE tokens a side are averaged over squares of tokens.
    """
    maps = QK(qk.q[:, :heads].float(), qk.k[:, :heads].float(), qk.scale).logits().softmax(dim=-1).mean(dim=1)  # (N, T, T)
    side = math.isqrt(maps.shape[1])
    if side > MAP_SIDE:
        for _ in range(2):  # the keys, then the queries
            maps = resample_mean(maps, side).transpose(1, 2)
    return (255 * maps / maps.amax(dim=2, keepdim=True)).round().to(torch.uint8)


def resample_mean(maps, side):
    """(N, R, side * side) -> (N, R, MAP_SIDE * MAP_SIDE): means over squares of the last axis."""
    return F.adaptive_avg_pool2d(maps.unflatten(2, (side, side)), MAP_SIDE).flatten(2)


def colours(teacher, student):
    """Tokens (N, T, C) of both -> two uint8 (N, s, s, 3): the teacher's three principal components as red, green and blue.

    The student's are its coordinates along the teacher's components, so that one colour is one feature on both sides. All
    tokens have length 1 first, since the feature loss sees directions only.
    """
    teacher, student = (F.normalize(tokens.double(), dim=2) for tokens in (teacher, student))
    flat = teacher.flatten(0, 1)
    mean = flat.mean(dim=0)
    _, axes = torch.linalg.eigh((flat - mean).T @ (flat - mean))  # in ascending order
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()  # else the sign is the library's choice
    low, high = torch.quantile((flat - mean) @ axes, torch.tensor([0.01, 0.99], dtype=torch.float64, device=flat.device), dim=0)
    side = math.isqrt(teacher.shape[1])
    return [(255 * (((tokens - mean) @ axes - low) / (high - low)).clamp(0, 1)).round().to(torch.uint8).cpu()
            .unflatten(1, (side, side)).numpy() for tokens in (teacher, student)]


@torch.no_grad()
def look_inside(path, count, t, teacher=None):
    """Attention and features of the checkpoint `path` and of its teacher, for `count` images of the training data.

    {images, teacher_colours, student_colours: lists of uint8 (h, w, 3), cosine of the projected features with the teacher's,
    side: tokens of a map, pairs: [{student, teacher: blocks, loss, entropy in nats, student_maps, teacher_maps: uint8
    (count, side^2, side^2)}]}; colours and cosine only where there are projected features. The student (EMA) sees the images
    with their own conditions and noise at time `t`. A run without teacher is compared with that of the settings `teacher`,
    another run's. Raises BadInput where data or teacher are not there.
    """
    network, args = load_network(path)
    if teacher and args.get("enc_type") == "none":
        names = ("enc_type", "enc_weights", "enc_blocks", "enc_size", "attn_heads")
        args |= {name: teacher.get(name) for name in names}
    if not args.get("data_dir"):
        raise BadInput(f"{path} does not say what it was trained on; nothing is shown of its inside.")
    pairs = args["attn_layers"]
    vit = open_teacher(network, args, [block for _, block in pairs])
    dataset = open_dataset(network, args, args["data_dir"])
    positions = np.random.default_rng(0).permutation(len(dataset))[:count].tolist()
    images = torch.stack([dataset.image(i) for i in positions])
    target = vit(images)
    x = noised(dataset, positions, t, path_type=args.get("path_type") or "linear")
    y = torch.stack([torch.as_tensor(dataset.condition(i)) for i in positions])
    _, student = network(x, torch.full((len(x),), float(t)), y, return_alignment=True)
    found = {"images": list(images.permute(0, 2, 3, 1).numpy()), "teacher_colours": [], "student_colours": [], "pairs": []}
    if student.features:
        features, projected = target.features[0], student.features[0]  # on equal grids, by open_teacher
        found["teacher_colours"], found["student_colours"] = map(list, colours(features, projected))
        found["cosine"] = -feature_loss(projected, features).item()
    for ours, theirs in pairs:
        s, e = student.attention[ours], target.attention[theirs]
        heads = min(args.get("attn_heads") or 12, s.q.shape[1], e.q.shape[1])
        found["pairs"].append({
            "student": ours, "teacher": theirs, "heads": heads, "loss": attention_loss([s], [e], heads).item(),
            "entropy": attention_loss([e], [e], heads).item(), "student_maps": mean_map(s, heads).numpy(),
            "teacher_maps": mean_map(e, heads).numpy()})
    found["side"] = math.isqrt(found["pairs"][0]["student_maps"].shape[1])
    return found
