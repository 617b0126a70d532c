"""What is frozen. `from encoders import Teacher, VAE, TextEncoder` loads the file that has it, and no other."""
import importlib

HOMES = {"Teacher": "teachers", "TEACHERS": "teachers", "VAE": "vae", "TextEncoder": "text"}


def __getattr__(name):
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
