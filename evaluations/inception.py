"""The Inception network of IS, FID and sFID: Inception-v3 as TensorFlow released it on 2015-12-05.

It is torchvision's network with three differences: average pools do not count the padding, the last block (Mixed_7c)
pools by the maximum, and there are 1008 logits. Parameter names are torchvision's, as in the published weight file.
"""
import torch.nn.functional as F
from torchvision.models.inception import Inception3

SPATIAL_CHANNELS = 7      # sFID reads the first 7 channels of Mixed_6d: 17 * 17 * 7 = 2023 numbers per image
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008


def average_pool(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def replace_pool(block, pool):
    """Give the layer after the pool of a torchvision block `pool(x)` instead, where x is the block's input."""
    inputs = []
    block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    block.branch_pool.register_forward_pre_hook(lambda _, args: pool(inputs.pop()))


class Inception(Inception3):
    def __init__(self):
        super().__init__(NUM_LOGITS, aux_logits=False, init_weights=False)
        for name, block in self.named_children():
            if hasattr(block, "branch_pool"):
                replace_pool(block, max_pool if name == "Mixed_7c" else average_pool)

    def forward(self, x):
        """x (N, 3, 299, 299) float32, about -1..1 -> pool (N, 2048) and spatial (N, 2023) features, float32.

        Spatial features are flattened row by row with the channel last, as in TensorFlow. `metrics.inception_score`
        computes the logits from `fc.weight`.
        """
        for name, layer in self.named_children():        # torchvision registers its layers in the order of the pass
            if name == "avgpool":
                break
            x = layer(x)
            if name == "Mixed_6d":                       # (N, 768, 17, 17)
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)), spatial
