"""Deterministic weights and inputs behind the golden files (legacy NumPy stream: frozen for ever)."""
import zlib

import numpy as np


def fill_value(name, shape):
    """Value of parameter `name`: N(0, .5/sqrt(fan_in)) for matrices, N(0, .1) for vectors, four times that for qkv."""
    stream = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 0
    std = 0.5 / np.sqrt(fan_in) if fan_in else 0.1
    if '.qkv.' in name:
        std *= 4
    return (stream.standard_normal(shape) * std).astype(np.float32)


def arr(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def inception_state(shapes, seed=2015):
    """Weights for the FID Inception: `shapes` maps each state-dict key to its shape (num_batches_tracked left out)."""
    stream, state = np.random.RandomState(seed), {}
    for key in sorted(shapes):
        shape = shapes[key]
        if key.endswith('num_batches_tracked'):
            continue
        if key.endswith('conv.weight'):
            value = stream.standard_normal(shape) * np.sqrt(2.0 / np.prod(shape[1:]))
        elif key.endswith('bn.weight'):
            value = 1.0 + 0.1 * stream.standard_normal(shape)
        elif key.endswith(('bn.bias', 'running_mean')):
            value = 0.1 * stream.standard_normal(shape)
        elif key.endswith('running_var'):
            value = 0.5 + stream.random_sample(shape)
        elif key in ('fc.weight', 'fc.bias'):
            value = 0.1 * stream.standard_normal(shape)
        state[key] = value.astype(np.float32)
    return state
