"""Read tensors from TorchScript archives, such as OpenAI's CLIP, without running code from them."""
import io
import pickletools
import zipfile

import torch


class ScriptModule:
    """Stands in for every class that an archive defines: it has attributes but no code."""


def tensors_in(module, prefix=""):
    """{name: tensor} of a ScriptModule and its submodules."""
    found = {}
    for name, value in vars(module).items():
        if isinstance(value, ScriptModule):
            found |= tensors_in(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            found[prefix + name] = value
    return found


def is_script(path):
    """Whether the zip file `path` is a TorchScript archive, which torch.load refuses with weights_only."""
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_script(path):
    """{name: tensor} of the module in an archive, named as in its state dict.

    Copies the data, without the code, to an in-memory file in torch.save's format. torch.load reads it with
    weights_only: the archive's own classes become ScriptModule; other classes, except tensors and plain containers,
    are refused. Raises what torch.load and zipfile raise.
    """
    with zipfile.ZipFile(path) as archive:
        [pickled] = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        root, plain = pickled.removesuffix("data.pkl"), io.BytesIO()
        own = {argument.replace(" ", ".") for code, argument, _ in pickletools.genops(archive.read(pickled))
               if code.name == "GLOBAL" and argument.startswith("__torch__")}
        with zipfile.ZipFile(plain, "w") as copy:
            for name in archive.namelist():
                if name in (pickled, f"{root}version", f"{root}byteorder") or name.startswith(f"{root}data/"):
                    copy.writestr(name, archive.read(name))
    plain.seek(0)
    known = [(ScriptModule, name) for name in own]
    known += [(list, f"torch.jit._pickle.build_{kind}list") for kind in ("int", "double", "bool", "tensor")]
    with torch.serialization.safe_globals(known):
        return tensors_in(torch.load(plain, map_location="cpu", weights_only=True))
