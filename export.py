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
from models.checkpoint import load_checkpoint, load_network, save_export
from runtime.errors import run_script
from runtime.files import prepare_output
from runtime.flags import Parser


def released(state):
    """`state` of load_checkpoint with a float16 EMA, without projectors and without args that are absolute paths."""
    def is_path(value):
        return isinstance(value, str) and os.path.isabs(value)

    ema = {name: value.half() for name, value in state["ema"].items() if not name.startswith("projectors.")}
    return {**state, "ema": ema,
            "args": {name: value for name, value in state["args"].items() if not is_path(value)}}


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
        state["args"]["class_names"] = read_names(args.class_names, settings["num_classes"], exactly=True)
    save_export(args.out, released(state) if args.release else state)
    print(f"{args.out}: {settings.get('model', 'EMA')}, {sum(p.numel() for p in network.parameters()):,} parameters")


if __name__ == "__main__":
    run_script(main)
