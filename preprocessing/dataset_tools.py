"""ImageNet, or any other pictures in classes, to the layout that training reads: pictures of one size, then latents.

    python preprocessing/dataset_tools.py convert --source=IMAGENET_DIR --dest=DATA/images \\
        --resolution=256x256 --transform=center-crop-dhariwal
    python preprocessing/dataset_tools.py encode --source=DATA/images --dest=DATA/vae-sd
    torchrun --nproc_per_node=8 preprocessing/dataset_tools.py encode --source=DATA/images --dest=DATA/vae-sd
    python preprocessing/dataset_tools.py pack --source=DATA --dest=PACKED
    python preprocessing/dataset_tools.py stats --data=DATA

Each command can be stopped at any moment; run it again to continue, with the same bytes. See also COMMAND --help.
"""
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script: the project's modules lie one up
import runtime.quick_help  # noqa: F401  # isort: skip (before what imports torch)
from preprocessing import convert, encode, pack, stats
from runtime.errors import run_script
from runtime.flags import Parser

# modules: docstring, add_arguments(add), run(args)
COMMANDS = {"convert": convert, "encode": encode, "pack": pack, "stats": stats}


def main():
    parser = Parser(config=False, description=__doc__)  # its commands take --config
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0], description=module.__doc__)
        module.add_arguments(command.add_argument)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("haste").setLevel(logging.INFO)  # progress in the log if there is no terminal
    COMMANDS[args.command].run(args)


if __name__ == "__main__":
    run_script(main, continues=True)
