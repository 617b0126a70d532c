"""Try a model at once: a grid of photographs by the network in assets/, a row per class.

    python examples/demo.py                    # all ten classes
    python examples/demo.py ship cat --seed 1

The network is a SiT of 4 million parameters, trained on CIFAR-10: docs/study.md says how, and how good it is.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from runtime.errors import run_script
from runtime.files import prepare_output
from runtime.flags import Parser, whole

ROOT = Path(__file__).resolve().parents[1]


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("classes", nargs="*", metavar="CLASS", help="names of classes (default: all)")
    add("--ckpt", default=ROOT / "assets/sit-xs-cifar10.safetensors", help="checkpoint (default: the one in assets/)")
    add("--vae", default=ROOT / "assets/vae-cifar10", help="its VAE (default: the one in assets/)")
    add("--images", type=whole(1, 100), default=8, help="a class (default 8)")
    add("--seed", type=whole(0), default=0)
    add("--out", type=Path, default=Path("demo.png"), help="default demo.png")
    args = parser.parse_args()
    prepare_output(args.out, (".png",))
    import torch  # from here on: --help need not wait for it
    from torchvision.transforms.functional import pil_to_tensor

    from runtime.images import image_grid, write_png
    from sampling.pipeline import load_pipeline

    pipe = load_pipeline(args.ckpt, vae=args.vae)
    names = pipe.args["class_names"] or [str(i) for i in range(pipe.network.num_classes)]
    asked = [name for name in args.classes or names for _ in range(args.images)]
    started = time.perf_counter()
    images = pipe([names.index(name) if name in names else name for name in asked], args.seed, mode="dpm",
                  num_steps=25, cfg_scale=2.0)
    write_png(args.out, image_grid(torch.stack([pil_to_tensor(image) for image in images]), args.images, asked))
    print(f"{args.out}: {len(images)} images of {', '.join(args.classes or names)} in "
          f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    run_script(main)
