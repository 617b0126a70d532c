"""Turn a checkpoint into safetensors with its config, or back: the EMA, without the optimizer.

    python export.py exps/sitxl_haste/checkpoints/0400000.pt sitxl_haste.safetensors    # one file
    python export.py exps/sitxl_haste/checkpoints/0400000.pt sitxl_haste                # model.safetensors, config.json
    python export.py sitxl_haste.safetensors sitxl_haste.pt                # for tools that expect ckpt["ema"]

Takes checkpoints of the HASTE and REPA releases too. generate.py, generate_t2i.py and load_pipeline take all three
forms; weights and args are the same in each, bit for bit, unless --release asks for a file to publish.
"""
import os
from pathlib import Path

import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from data_io.moments import read_names
from encoders.vae import VAES
from models.checkpoint import load_checkpoint, load_network, modern_names, save_export
from runtime.errors import UserError, run_script
from runtime.files import prepare_output
from runtime.flags import Parser


def released(state):
    """`state` of load_checkpoint with a float16 EMA, without projectors and without args that hold absolute paths.

    Of the VAE's path the name stays, on the hub if it has that name there: without one, sampling would take Stable
    Diffusion's VAE.
    """
    def has_path(value):
        parts = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else ()
        return any(isinstance(part, str) and os.path.isabs(part) for part in parts)

    args = {name: value for name, value in state["args"].items() if not has_path(value)}
    if vae := state["args"].get("vae"):
        name = Path(vae).name if os.path.isabs(vae) else vae
        args["vae"] = next((hub for hub in VAES.values() if hub.endswith(f"/{name}")), name)
    ema = {name: value.half() for name, value in state["ema"].items() if not name.startswith("projectors.")}
    return {**state, "ema": ema, "args": args}


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("ckpt", metavar="CKPT", help="checkpoint (.pt), .safetensors or folder of an earlier export")
    parser.add_argument("out", metavar="OUT", type=Path, help="NAME.safetensors, NAME.pt, or NAME of a folder")
    parser.add_argument("--release", action="store_true", help="to publish: weights in float16, half the size, "
                        "without the projectors, which only alignment uses; a config without paths of this machine")
    parser.add_argument("--class-names", metavar="FILE", help="JSON list of the classes' names, for the config "
                        "(default: as the checkpoint has them)")
    args = parser.parse_args()
    prepare_output(args.out)
    network, settings = load_network(args.ckpt)  # only what can be loaded again is worth exporting
    state = load_checkpoint(args.ckpt)
    if args.class_names:
        if "num_classes" not in settings:
            raise UserError(f"--class-names is for a network of classes, and {args.ckpt} was trained on texts; leave "
                            "it out.")
        state["args"]["class_names"] = read_names(args.class_names, settings["num_classes"], exactly=True)
    state = released(state) if args.release else state
    save_export(args.out, state)
    saved = modern_names(state["ema"])
    count = sum(value.numel() for name, value in network.named_parameters() if name in saved)
    print(f"{args.out}: {settings.get('model', 'EMA')}, {count:,} parameters")


if __name__ == "__main__":
    run_script(main)
