"""Scores of generated images. README.md says which number compares with which papers.

This file imports nothing slow: the tables are what the scripts' flags need.
"""
# Names are part of a number's meaning: a distance on other features is never called FID.
FEATURES = {
    "inception": {"distance": "FID", "kid": "KID", "retrieval": "Retrieval", "dim": 2048},
    "dinov2-vit-l": {"distance": "FD-DINOv2", "kid": "KID-DINOv2", "retrieval": "Retrieval-DINOv2", "dim": 1024},
    "efficientnet-lite0": {"distance": "FD-EffLite0", "kid": "KID-EffLite0", "retrieval": "Retrieval-EffLite0",
                           "dim": 1280},
}
PRESETS = ("adm", "pytorch-fid")  # two ways to preprocess images for Inception; the other networks have one
METRICS = {"is": 1, "fid": 2, "sfid": 2, "pr": 4, "kid": 2}  # metric -> fewest images a set may have
EFFICIENTNET_PATH = "data/emoji/efficientnet-lite0.pth"  # written by examples/emoji/prepare.py


def start(parse_args, main):
    """Run a script's `main`. --help and wrong flags are answered first, before imports that take seconds."""
    parse_args()
    from runtime.errors import run_script
    run_script(main)
