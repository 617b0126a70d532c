"""A student of 50,000 and a teacher of 400,000 parameters under names of their own: whole runs take a second."""
import functools

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from encoders.teachers import TEACHERS
from evaluations import features
from models.layers import from_config
from models.sit import SIT_CONFIGS, SiT, SiT_models

for patch in (1, 2, 8):
    SIT_CONFIGS[f"SiT-N/{patch}"] = {
        "depth": 3, "hidden_size": 32, "num_heads": 2, "projector_dim": 32, "encoder_depth": 2,
        "attn_pairs": ((0, 7), (1, 9)), "early_stop_point": 700, "patch_size": patch}
    SiT_models[f"SiT-N/{patch}"] = functools.partial(from_config, SiT, SIT_CONFIGS[f"SiT-N/{patch}"])
TEACHERS["dinov2-vit-n"] = TEACHERS["dinov2-vit-s"]._replace(timm_name="vit_nano_patch14_dinov2", width=48)


@register_model
def vit_nano_patch14_dinov2(pretrained=False, num_classes=0, embed_dim=48, **_):
    """Every part of timm's DINOv2 models, small; no hub has its weights."""
    if pretrained:
        raise RuntimeError("there are no published weights")
    return VisionTransformer(img_size=112, patch_size=14, embed_dim=embed_dim, depth=12, num_heads=2, init_values=1e-5,
                             num_classes=num_classes)


def teacher_state():
    """A state dict for --enc-type dinov2-vit-n --enc-weights."""
    return timm.create_model("vit_nano_patch14_dinov2").state_dict()


def take_any_scorer():
    """For a script's process: accept any file as EfficientNet-Lite0's weights; in tests they are random."""
    features.EFFICIENTNET_SHA256 = ""
