"""CPU time to decode a PNG of 256 px, for every decoder that is installed: why storage.py reads by the one it does.

    python benchmarks/decoders.py [--resolution 256]

Each is timed in turn on 16 pictures, as often as --rounds says, and its lowest CPU milliseconds a picture are printed:
to (H, W, 3), where it gives that, and to (3, H, W), which training needs. `plain` is benchmarks/synthetic.py's PNG,
`stored` the same without compression, as the published preprocessing writes it.
"""
import argparse
import importlib.metadata
import io
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees benchmarks/ only
from benchmarks.measure import machine, table
from benchmarks.synthetic import make_png
from runtime.images import open_image

PICTURES = 16


def pillow():
    return lambda data: np.asarray(open_image(io.BytesIO(data)).convert("RGB"))


def opencv():
    import cv2
    return lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]


def imagecodecs():
    import imagecodecs
    return imagecodecs.png_decode


def torchvision():
    from torchvision.io import ImageReadMode, decode_png
    return lambda data: decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)


def torchcodec():
    from torchcodec.decoders import decode_png
    return lambda data: decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))


DECODERS = {"pillow": pillow, "opencv-python-headless": opencv, "imagecodecs": imagecodecs, "torchvision": torchvision,
            "torchcodec": torchcodec}


def installed():
    """{package and version: decoder}."""
    found = {}
    for package, make in DECODERS.items():
        try:
            found[f"{package} {importlib.metadata.version(package)}"] = make()
        except ImportError:
            print(f"{package} is not installed", file=sys.stderr)
    return found


def channels_first(decode):
    """The same to a contiguous (3, H, W), by the fastest copy that there is."""
    def decoded(data):
        pixels = decode(data)
        return pixels if torch.is_tensor(pixels) else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return decoded


def main():
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256, help="default 256")
    parser.add_argument("--rounds", type=int, default=30, help="default 30")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    plain = [make_png(args.resolution, rng) for _ in range(PICTURES)]
    stored = []
    for data in plain:
        file = io.BytesIO()
        open_image(io.BytesIO(data)).save(file, "PNG", compress_level=0)
        stored.append(file.getvalue())
    decoders = installed()
    ways = {(name, "(H, W, 3)"): decode for name, decode in decoders.items() if not torch.is_tensor(decode(plain[0]))}
    ways |= {(name, "(3, H, W)"): channels_first(decode) for name, decode in decoders.items()}
    expected = np.asarray(open_image(io.BytesIO(plain[0]))).transpose(2, 0, 1)
    assert all(np.array_equal(channels_first(decode)(plain[0]), expected) for decode in decoders.values())
    lowest = {}
    for _ in range(args.rounds):
        for way, decode in ways.items():
            for kind, pictures in (("plain", plain), ("stored", stored)):
                begin = time.process_time()
                for data in pictures:
                    decode(data)
                milliseconds = 1000 * (time.process_time() - begin) / PICTURES
                lowest[way, kind] = min(lowest.get((way, kind), 1e9), milliseconds)
    print(machine())
    sizes = [f"{sum(map(len, pictures)) / PICTURES / 1000:.0f} kB" for pictures in (plain, stored)]
    print(table(["decoder", "to", f"plain, {sizes[0]}", f"stored, {sizes[1]}"],
                [[*way, *(f"{lowest[way, kind]:.2f}" for kind in ("plain", "stored"))] for way in ways]))


if __name__ == "__main__":
    main()
