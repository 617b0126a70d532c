"""The tensors of TorchScript archives, such as OpenAI's of CLIP, without running code from them."""
import io
import pickletools
import zipfile

import torch


class ScriptModule:
    """Stands in for every class that an archive defines: attributes, and no code."""


def tensors_in(module, prefix=""):
    """{name: tensor} of a ScriptModule and of those in it."""
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

    The data, without the code, are put into a file of torch.save's form in memory. torch.load reads it with
    weights_only: each class of the archive's own is a ScriptModule to it, and any class but those, tensors and plain
    containers is refused. Raises what torch.load and zipfile raise.
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
