"""The Inception network of IS, FID and sFID: Inception-v3 as TensorFlow released it on 2015-12-05.

It is torchvision's network with three differences: average pools do not count the padding, the last block (Mixed_7c)
pools by the maximum, and there are 1008 logits. Parameter names are torchvision's, as in the published weight file.
"""
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torchvision.models.inception import Inception3

SPATIAL_CHANNELS = 7      # sFID reads the first 7 channels of Mixed_6d: 17 * 17 * 7 = 2023 numbers per image
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008


class TensorFlowPools(TorchFunctionMode):
    """Inside, an average pool does not count the padding or, with `maximum`, is a max pool of the same size."""

    def __init__(self, maximum):
        super().__init__()
        self.maximum = maximum

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.avg_pool2d:
            return func(*args, **(kwargs or {}))
        return F.max_pool2d(*args, **kwargs) if self.maximum else func(*args, **kwargs, count_include_pad=False)


class Inception(Inception3):
    def __init__(self):
        super().__init__(NUM_LOGITS, aux_logits=False, init_weights=False)

    def forward(self, x):
        """x (N, 3, 299, 299) float32, about -1..1 -> pool (N, 2048) and spatial (N, 2023) features, float32.

        Spatial features are flattened row by row with the channel last, as in TensorFlow. `metrics.inception_score`
        computes the logits from `fc.weight`.
        """
        for name, layer in self.named_children():        # torchvision registers its layers in the order of the pass
            if name == "avgpool":
                break
            with TensorFlowPools(maximum=name == "Mixed_7c"):
                x = layer(x)
            if name == "Mixed_6d":                       # (N, 768, 17, 17)
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)), spatial
