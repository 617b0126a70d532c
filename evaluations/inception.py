"""The Inception network behind IS, FID and sFID: Inception-v3 as TensorFlow shipped it on 2015-12-05.

It differs from torchvision's `inception_v3` in four places: the average pools do not count their zero
padding, the pool of the last block (Mixed_7c) is a max pool, there are 1008 logits, and no auxiliary head.
Parameter names are torchvision's, so that the published weight file (566 keys) loads strictly.
"""
import torch
import torch.nn.functional as F
from torch import nn

POOL_DIM = 2048
SPATIAL_CHANNELS = 7      # sFID reads the first 7 channels of Mixed_6d: 17 * 17 * 7 = 2023 numbers per image
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS
NUM_LOGITS = 1008

# One line per path of a block: (name, out channels, kernel height x width, stride). Stride 1 keeps the size,
# stride 2 has no padding. A path that begins with a string begins with that pool; a pair of names is a fork:
# both read the same input.
A = (
    (("branch1x1", 64, (1, 1), 1),),
    (("branch5x5_1", 48, (1, 1), 1), ("branch5x5_2", 64, (5, 5), 1)),
    (("branch3x3dbl_1", 64, (1, 1), 1), ("branch3x3dbl_2", 96, (3, 3), 1), ("branch3x3dbl_3", 96, (3, 3), 1)),
    ("avg", ("branch_pool", "pool width", (1, 1), 1)),
)
B = (
    (("branch3x3", 384, (3, 3), 2),),
    (("branch3x3dbl_1", 64, (1, 1), 1), ("branch3x3dbl_2", 96, (3, 3), 1), ("branch3x3dbl_3", 96, (3, 3), 2)),
    ("max stride 2",),
)
C = (
    (("branch1x1", 192, (1, 1), 1),),
    (("branch7x7_1", "width", (1, 1), 1), ("branch7x7_2", "width", (1, 7), 1),
     ("branch7x7_3", 192, (7, 1), 1)),
    (("branch7x7dbl_1", "width", (1, 1), 1), ("branch7x7dbl_2", "width", (7, 1), 1),
     ("branch7x7dbl_3", "width", (1, 7), 1), ("branch7x7dbl_4", "width", (7, 1), 1),
     ("branch7x7dbl_5", 192, (1, 7), 1)),
    ("avg", ("branch_pool", 192, (1, 1), 1)),
)
D = (
    (("branch3x3_1", 192, (1, 1), 1), ("branch3x3_2", 320, (3, 3), 2)),
    (("branch7x7x3_1", 192, (1, 1), 1), ("branch7x7x3_2", 192, (1, 7), 1), ("branch7x7x3_3", 192, (7, 1), 1),
     ("branch7x7x3_4", 192, (3, 3), 2)),
    ("max stride 2",),
)
E = (
    (("branch1x1", 320, (1, 1), 1),),
    (("branch3x3_1", 384, (1, 1), 1), (("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1))),
    (("branch3x3dbl_1", 448, (1, 1), 1), ("branch3x3dbl_2", 384, (3, 3), 1),
     (("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1))),
    ("last pool", ("branch_pool", 192, (1, 1), 1)),
)
# (name, paths, input channels, what the words in `paths` stand for)
BLOCKS = (
    ("Mixed_5b", A, 192, {"pool width": 32}),
    ("Mixed_5c", A, 256, {"pool width": 64}),
    ("Mixed_5d", A, 288, {"pool width": 64}),
    ("Mixed_6a", B, 288, {}),
    ("Mixed_6b", C, 768, {"width": 128}),
    ("Mixed_6c", C, 768, {"width": 160}),
    ("Mixed_6d", C, 768, {"width": 160}),
    ("Mixed_6e", C, 768, {"width": 192}),
    ("Mixed_7a", D, 768, {}),
    ("Mixed_7b", E, 1280, {"last pool": "avg"}),
    ("Mixed_7c", E, 2048, {"last pool": "max"}),
)
POOLS = {
    "avg": lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, stride=1, padding=1),
    "max stride 2": lambda x: F.max_pool2d(x, 3, stride=2),
}


class ConvBNReLU(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Block(nn.Module):
    """Parallel paths over one input, concatenated by channel; `paths` and `words` are explained above."""

    def __init__(self, paths, in_channels, words):
        super().__init__()
        self.paths = []                     # names only: the layers are submodules under torchvision's names
        for path in paths:
            channels, steps = in_channels, []
            for step in path:
                if isinstance(step, str):
                    steps.append(words.get(step, step))
                    continue
                fork = step if isinstance(step[0], tuple) else (step,)
                for name, width, (kh, kw), stride in fork:
                    padding = (kh // 2, kw // 2) if stride == 1 else 0
                    layer = ConvBNReLU(channels, words.get(width, width), (kh, kw), stride, padding)
                    setattr(self, name, layer)
                channels = words.get(fork[0][1], fork[0][1])
                steps.append(tuple(name for name, *_ in fork))
            self.paths.append(steps)

    def forward(self, x):
        outputs = []
        for path in self.paths:
            h = [x]
            for step in path:
                if isinstance(step, str):
                    h = [POOLS[step](h[0])]
                else:
                    h = [getattr(self, name)(h[0]) for name in step]
            outputs += h
        return torch.cat(outputs, dim=1)


class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBNReLU(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBNReLU(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBNReLU(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBNReLU(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBNReLU(80, 192, 3)
        for name, paths, in_channels, words in BLOCKS:
            setattr(self, name, Block(paths, in_channels, words))
        self.fc = nn.Linear(POOL_DIM, NUM_LOGITS)

    def forward(self, x):
        """x (N, 3, 299, 299) float32, about -1..1 -> pool (N, 2048) and spatial (N, 2023) features, float32.

        Spatial features are flattened row by row with the channel last, as TensorFlow stores them. Mixed_6d's
        first channels are those of its 1x1 branch. The logits are left to `metrics.inception_score`, which
        needs `fc.weight`.
        """
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))       # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))                           # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        for name, *_ in BLOCKS:
            x = getattr(self, name)(x)                                          # 35x35, 17x17, 8x8
            if name == "Mixed_6d":
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)), spatial
