"""Frozen networks: teachers, VAE, text encoder."""
from encoders.text import TextEncoder  # noqa: F401
from encoders.vae import VAE  # noqa: F401


def __getattr__(name):
    if name != "Teacher":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from encoders.teachers import Teacher  # only when asked for: it imports timm
    return Teacher
