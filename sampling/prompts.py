"""Own texts of generate_t2i.py."""
import hashlib
import json
from pathlib import Path

from data_io.captions import HALF
from runtime.errors import UserError


def read_prompts(args):
    """(texts of --prompt and --prompts, name of the set): the file's name or, with --prompt, a hash of the texts."""
    if args.prompts is None:
        lines = []
    else:
        try:  # lines end at \n or \r\n, as in an editor; splitlines() splits at eight more characters
            lines = Path(args.prompts).read_bytes().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {args.prompts} cannot be read ({error}); give a text file, a line per "
                            "image.") from error
    prompts = [" ".join(text.split()) for text in [*args.prompt, *(line for line in lines if line.strip())]]
    for text in prompts:
        if HALF.search(text):
            raise UserError(f"--prompt {text!r} is not text in UTF-8; type it again.")
    if args.prompts and not prompts:
        raise UserError(f"--prompts {args.prompts} holds no text; give a line per image.")
    if args.prompts and not args.prompt:
        return prompts, Path(args.prompts).stem
    return prompts, f"prompts-{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:8]}"
