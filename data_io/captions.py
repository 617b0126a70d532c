"""The COCO layout: scan its files and read its captions."""
import json
import os
import re

from runtime.errors import UserError
from runtime.files import is_file, read_json, reading

NUMBERED = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.(png|npy)")
HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair: it cannot be encoded


def scan_numbered(folder):
    """({i} of {i}.png, {i: bytes} of {i}.npy, {i: {k: bytes}} of {i}_{k}.npy); other files are ignored."""
    pictures, moments, captions = set(), {}, {}
    with reading(folder):
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist; --data-dir must hold train/, val/ and empty_context.npy.")
        with os.scandir(folder) as entries:
            for entry in entries:
                match = NUMBERED.fullmatch(entry.name)
                if match and not entry.is_file() and os.path.exists(entry.path):
                    continue  # a pipe or device would block a reader; broken links fail below
                if match and match[3] == "npy":  # picture sizes tell nothing
                    i, size = int(match[1]), entry.stat().st_size
                    if match[2]:
                        captions.setdefault(i, {})[int(match[2])] = size
                    else:
                        moments[i] = size
                elif match and not match[2]:
                    pictures.add(int(match[1]))
    return pictures, moments, captions


def clean(text, where):
    """A caption with one space between words and no byte-order mark. Raises UserError if it is not text."""
    if not isinstance(text, str):
        raise UserError(f"{where} is {json.dumps(text)[:40]}, not text; correct it.")
    if HALF.search(text):
        raise UserError(f"{where}, {text!a:.60}, holds half a character (a lone surrogate); correct it.")
    return " ".join(text.replace("\ufeff", " ").split())


def read_texts(path, counts):
    """{index: [caption, ...]} from captions.json; None without that file. `counts`: {index: number of captions}."""
    if not is_file(path):
        return None
    try:
        texts = {int(i): [clean(text, f"{path}: caption {k} of image {i}") for k, text in enumerate(captions)]
                 for i, captions in read_json(path).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f'{path} is not of the form {{"0": ["caption", ...], ...}}; make it again or remove '
                        "it.") from error
    for i, count in counts.items():
        if len(texts.get(i, ())) != count:
            raise UserError(f"{path} has {len(texts.get(i, ()))} captions of image {i}, beside it are {count} "
                            f"({i}_0.npy, ...); encode them again.")
    return texts
