"""Scores of generated images. README.md says which number compares with which papers.

This file imports nothing slow: the flags of the scripts need its tables.
"""
# A distance on other features is never called FID.
FEATURES = {
    "inception": {"distance": "FID", "kid": "KID", "retrieval": "Retrieval", "dim": 2048},
    "dinov2-vit-l": {"distance": "FD-DINOv2", "kid": "KID-DINOv2", "retrieval": "Retrieval-DINOv2", "dim": 1024},
    "efficientnet-lite0": {"distance": "FD-EffLite0", "kid": "KID-EffLite0", "retrieval": "Retrieval-EffLite0",
                           "dim": 1280},
}
PRESETS = ("adm", "pytorch-fid")  # two ways to feed Inception; the other networks have one
METRICS = {"is": 1, "fid": 2, "sfid": 2, "pr": 4, "kid": 2}  # metric -> fewest images a set may have
EFFICIENTNET_PATH = "data/emoji/efficientnet-lite0.pth"  # written by examples/emoji/prepare.py


def score_names(features, metrics):
    """Names of the scores that these metrics give."""
    names = {"is": ["Inception Score"], "fid": [FEATURES[features]["distance"]], "sfid": ["sFID"],
             "pr": ["Precision", "Recall"], "kid": [FEATURES[features]["kid"]]}
    return [name for metric in metrics for name in names[metric]]
