"""Answer --help at once: importing torch takes three seconds, and help does not need it.

Scripts import this file before anything that imports torch. If -h or --help was typed, the libraries in HEAVY become
empty stand-ins: the tables that flags are made from (models, losses, samplers) load without them. Else it does nothing.
"""
import importlib.abc
import importlib.machinery
import itertools
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"accelerate", "diffusers", "matplotlib", "safetensors", "scipy", "timm", "torch", "torchvision",
         "transformers", "wandb"}


class Nothing:
    """Stands for any class, function, decorator or constant of a library: any operation on it returns itself."""

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        """A decorator leaves its function as it is."""
        return args[0] if len(args) == 1 and isinstance(args[0], types.FunctionType) else self

    def __bool__(self):
        return False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())

    def __mro_entries__(self, bases):  # class Block(nn.Module)
        return ()

    def __or__(self, other):  # torch.Tensor | None
        return self


class EmptyModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports every module of HEAVY as an empty one."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = Nothing().__getattr__
        return module

    def exec_module(self, module):
        pass


flags = {*itertools.takewhile(lambda word: word != "--", sys.argv[1:])}
if flags & {"-h", "--help"} and ROOT in Path(sys.argv[0]).resolve().parents:  # not in a user's own script
    sys.meta_path.insert(0, EmptyModules())
