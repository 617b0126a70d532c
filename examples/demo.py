"""Try a model at once: the network in assets/ draws a grid of photographs, a row per class.

    python examples/demo.py                    # all ten classes
    python examples/demo.py ship cat --seed 1
    python examples/demo.py --page             # a page in the browser, to choose there

The network is a SiT of 4 million parameters, trained on CIFAR-10: docs/study.md says how, and how good it is. --ckpt
takes any other checkpoint; for one trained on captions, type texts in place of classes.
"""
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from runtime.errors import UserError, run_script
from runtime.files import prepare_output
from runtime.flags import Parser, whole

ROOT = Path(__file__).resolve().parents[1]
CKPT, VAE = ROOT / "assets/sit-xs-cifar10.safetensors", ROOT / "assets/vae-cifar10"


class Demo:
    """A Pipeline and the names that its grids show."""

    def __init__(self, ckpt, vae, text_encoder):
        from sampling.pipeline import load_pipeline
        self.name = ckpt.stem
        self.pipe = load_pipeline(ckpt, vae=vae or (VAE if ckpt == CKPT else None),
                                  **({"text_encoder": text_encoder} if text_encoder else {}))
        self.lock = threading.Lock()  # one grid at a time
        self.cfg = 1.0 if self.pipe.args.get("cfg_prob") == 0 else 2.0
        self.names = [] if self.pipe.encode else \
            self.pipe.args["class_names"] or [str(i) for i in range(self.pipe.network.num_classes)]

    def grid(self, asked, images, seed, cfg):
        """uint8 (H, W, 3): a row of `images` pictures for each name or text in `asked`."""
        import torch
        from torchvision.transforms.functional import pil_to_tensor

        from runtime.images import image_grid
        if not asked:
            raise UserError("Nothing is asked for; give a class or, to a network of texts, a text.")
        texts = [text for text in asked for _ in range(images)]
        conditions = [self.names.index(text) if text in self.names else text for text in texts]
        with self.lock:
            pictures = self.pipe(conditions, seed, mode="dpm", num_steps=25, cfg_scale=cfg)
        return image_grid(torch.stack([pil_to_tensor(picture) for picture in pictures]), images, texts)


def main():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("classes", nargs="*", metavar="CLASS", help="names of classes, or texts (default: all classes)")
    add("--ckpt", type=Path, default=CKPT, help="checkpoint (default: the one in assets/)")
    add("--vae", help="its VAE (default: the one in assets/ for the checkpoint there, else that of the training)")
    add("--text-encoder", help="of a network of texts: hub name or folder (default: CLIP from the hub)")
    add("--images", type=whole(1, 100), default=8, help="a class (default 8)")
    add("--seed", type=whole(0), default=0)
    add("--out", type=Path, default=Path("demo.png"), help="default demo.png")
    add("--page", action="store_true", help="serve a page on this machine until Ctrl-C; --out is not written, the rest "
        "stands in its form")
    add("--port", type=whole(1, 65535), default=8000, help="of the page (default 8000)")
    args = parser.parse_args()
    if args.page:
        from examples.demo_page import server
        demo = Demo(args.ckpt, args.vae, args.text_encoder)
        first = {"asked": args.classes, "images": min(args.images, 16), "seed": args.seed, "cfg": demo.cfg}
        with server(demo, args.port, **first) as http:
            print(f"http://127.0.0.1:{args.port} (Ctrl-C ends it)", flush=True)
            try:
                return http.serve_forever()
            finally:
                demo.lock.acquire()  # a thread inside torch would abort the interpreter's end
    if args.out.suffix != ".png":
        raise UserError(f"--out {args.out} does not end in .png, which the grid is; name it so.")
    prepare_output(args.out, (".png",))
    from runtime.images import write_png
    demo = Demo(args.ckpt, args.vae, args.text_encoder)
    asked, started = args.classes or demo.names, time.perf_counter()
    write_png(args.out, demo.grid(asked, args.images, args.seed, demo.cfg))
    print(f"{args.out}: {args.images * len(asked)} images of {', '.join(asked)} in "
          f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    run_script(main)
