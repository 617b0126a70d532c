"""Skip work between the steps of a sampler: TaylorSeer (arXiv 2503.06923) and Delta-DiT (arXiv 2406.01125).

The network runs in full at the first calls, at the last one and at every `interval`-th in between. At the other calls,
Taylor predicts the outputs of attention and MLP of each block, by a polynomial in t through the newest full calls.
Delta reuses what a range of blocks added at the newest full call, and computes the other blocks.

Diffusers' hooks do not fit: they count calls, not times; they wrap the forward of a whole module, but the attention of
these blocks is not one; they cannot handle batches that are doubled for guidance at some calls only.
"""
import contextlib
import itertools
import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from samplers import SAMPLERS

CACHES = ("none", "taylor", "delta")
FIRST = 3  # so many calls run in full at the start
SKIPPED = 0.75  # of the blocks, by Delta: 21 of XL's 28, as published


def taylor_weights(t, times):
    """Weights w with f(t) = sum_j w_j f(times[j]), exact where f is a polynomial of a degree below len(times).

    This is Lagrange's form. TaylorSeer's finite differences, with factors (t - times[0])^i / i!, give the same up to
    first order; these are exact above, and as close to the full network (docs/sampling.md).
    """
    return [math.prod((t - other) / (own - other) for other in times if other != own) for own in times]


class Cache:
    """State of one batch: `begin` before each call of the network, `run` for each block. This class only counts.

    A batch holds the images with their condition and, in a guided call, then the same images without. State of the
    first rows serves both kinds of call, state of the others only guided calls.
    """

    depth = 0  # full calls whose results are kept

    def __init__(self, calls=0, interval=1):
        self.calls, self.interval, self.call, self.newest, self.nodes = calls, interval, -1, 0, []
        self.computed = self.rows = 0  # blocks x rows, calls x rows

    def begin(self, t):
        self.call, self.t = self.call + 1, t  # dopri5's t is a tensor (N,), but it takes no cache

    def run(self, index, block, *arguments):
        """What the block returns: (streams..., None)."""
        rows = len(arguments[-3])
        if index == 0:
            self.decide(rows)
        result, computed = self.full(index, block, *arguments) if self.is_full else self.skip(index, block, *arguments)
        self.computed += computed * rows
        return result

    def full(self, index, block, *arguments):
        return block(*arguments), 1

    def decide(self, rows):
        """Decide whether this call of `rows` rows runs in full; if not, it uses the nodes in `self.usable`."""
        self.rows += rows
        self.usable = [*itertools.takewhile(lambda node: node["rows"] >= rows, self.nodes)]  # the newest first
        self.is_full = (self.call < FIRST or self.call == self.calls - 1 or not self.usable
                        or self.call - self.newest >= self.interval)
        if self.is_full:
            self.newest = self.call
            kept = self.nodes[1:] if self.nodes and self.nodes[0]["t"] == self.t else self.nodes  # Heun: a time twice
            self.nodes = [{"t": self.t, "rows": rows}, *kept][:self.depth]


class Taylor(Cache):
    """Predicts attention and MLP of every block by a polynomial of degree `order` in t."""

    def __init__(self, calls, interval, order):
        super().__init__(calls, interval)
        self.depth = order + 1

    def full(self, index, block, *arguments):
        *result, branches = block(*arguments, with_branches=True)
        self.nodes[0][index] = branches
        return result, 1

    def skip(self, index, block, *arguments):
        *streams, c, _, _ = arguments
        if index == 0:
            self.weights = taylor_weights(self.t, [node["t"] for node in self.usable])
        rows = len(c)
        branches = [sum(w * old[:rows] for w, old in zip(self.weights, olds, strict=True))
                    for olds in zip(*(node[index] for node in self.usable), strict=True)]
        return block.assembled(*streams, c, branches), 0


class Delta(Cache):
    """Reuses what the rear blocks added if t is above `boundary`, else what the front blocks added."""

    depth = 1

    def __init__(self, calls, interval, boundary, blocks):
        super().__init__(calls, interval)
        count = round(SKIPPED * blocks)
        self.boundary, self.runs = boundary, {"front": (0, count - 1), "rear": (blocks - count, blocks - 1)}

    def full(self, index, block, *arguments):
        node, result = self.nodes[0], block(*arguments)
        for name, (first, last) in self.runs.items():
            if index == first:
                node[name] = arguments[:-3]
            if index == last:
                node[name] = [after if after is None else after - before
                              for before, after in zip(node[name], result[:-1], strict=True)]
        return result, 1

    def skip(self, index, block, *arguments):
        name = "rear" if self.t > self.boundary else "front"
        first, last = self.runs[name]
        if not first <= index <= last:
            return block(*arguments), 1
        *streams, c, _, _ = arguments
        if index == first:
            streams = [None if added is None else stream + added[:len(c)]
                       for stream, added in zip(streams, self.usable[0][name], strict=True)]
        return (*streams, None), 0


def count_calls(sampler, num_steps, options):
    """How often `sampler` asks for a velocity."""
    calls = []
    sampler(lambda x, t: calls.append(t) or torch.zeros_like(x), torch.zeros(1, 1), num_steps,
            **{**options, "noise": torch.zeros_like})
    return len(calls)


def blocks_of(network):
    return getattr(network, "blocks", None) or network.joint_blocks


@contextlib.contextmanager
def caching(network, kind, calls, interval, order, boundary):
    """Attach the Cache of one batch to `network` and yield it; it is freed at the end."""
    blocks = len(blocks_of(network))
    network.cache = (Taylor(calls, interval, order) if kind == "taylor"
                     else Delta(calls, interval, boundary, blocks) if kind == "delta" else Cache())
    try:
        yield network.cache
    finally:
        network.cache = None


def sample_latents(network, velocity, latents, mode="ode", num_steps=50, cache="none", cache_interval=3, cache_order=2,
                   cache_boundary=0.5, **options):
    """(latents that SAMPLERS[mode] makes from the noise `latents`, the Cache with its counts).

    `velocity` calls `network`; `options` go to the sampler.
    """
    calls = count_calls(SAMPLERS[mode], num_steps, options) if cache != "none" else 0
    with caching(network, cache, calls, cache_interval, cache_order, cache_boundary) as state:
        def counted(x, t):
            state.begin(t)
            return velocity(x, t)

        return SAMPLERS[mode](counted, latents, num_steps, **options), state


def flops_of_call(network, y):
    """FLOPs of a full network call for one image with the condition `y`, as PyTorch counts them."""
    weights = {name: torch.empty(value.shape, device="meta")  # no memory, and float32 whatever the network's dtype
               for name, value in [*network.named_parameters(), *network.named_buffers()]}
    x, t, y = (value.to("meta") for value in (torch.zeros(1, *network.latent_shape), torch.zeros(1), y[:1]))
    with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
        torch.func.functional_call(network, weights, (x, t, y))
    return counter.get_total_flops()
