"""Versions of packages, for the notes on how something was made."""
from importlib import metadata


def version(package):
    """The installed version, or "not installed": a note must not end a run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
