"""A browser page to sample from a network: a form and the resulting grid. See demo.py."""
import argparse
import html
import io
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlsplit

from PIL import Image

from runtime.errors import UserError
from runtime.flags import number, whole

MOST_ROWS = 16
FIELDS = {"images": (whole(1, 16), 8), "seed": (whole(0), 0), "cfg": (number(1, 10), 2.0)}  # range, default
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>HASTE: samples</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem }}
fieldset {{ border: 1px solid #ccc; border-radius: 6px; margin: 0 0 .8rem }}
label {{ display: inline-block; margin-right: 1rem }}
input, button {{ font: inherit }} input[type=number] {{ width: 4.5rem }} img {{ max-width: 100% }}
#error {{ color: #b00 }}
</style>
<h1>Samples of {name}</h1>
<form><fieldset><legend>{legend}</legend>{choices}</fieldset>
<label>images each <input type="number" name="images" min="1" max="16" value="{images}"></label>
<label>seed <input type="number" name="seed" min="0" value="{seed}"></label>
<label>guidance <input type="number" name="cfg" min="1" max="10" step="any" value="{cfg}"></label>
<button>Sample</button></form>
<p id="error">{error}</p>{picture}</html>
"""


def read_query(query):
    """What the form of the page sends -> (texts, {name of FIELDS: value}). Raises UserError."""
    fields = parse_qs(query)
    asked = [text.strip() for one in fields.get("class", []) for text in one.splitlines() if text.strip()]
    try:
        return asked[:MOST_ROWS], {name: parse(fields[name][-1]) if name in fields else default
                                   for name, (parse, default) in FIELDS.items()}
    except argparse.ArgumentTypeError as error:  # from a typed address: the form itself checks its numbers
        raise UserError(f"A number cannot be used: {error}") from error


class Handler(BaseHTTPRequestHandler):
    """/ is the page, /grid.png the grid for its form. serve() sets `demo`."""

    demo = None

    def do_GET(self):
        place, asked, values, status = urlsplit(self.path), [], {name: row[1] for name, row in FIELDS.items()}, 200
        try:
            asked, values = read_query(place.query)
            if place.path == "/grid.png":
                file = io.BytesIO()
                Image.fromarray(self.demo.grid(asked, **values)).save(file, "PNG")
                return self.answer(200, "image/png", file.getvalue())
            error = "" if place.path == "/" else f"There is no {place.path} here."
            status = 404 if error else 200
        except UserError as problem:
            error, status = str(problem), 400
        return self.answer(status, "text/html; charset=utf-8", self.page(asked, values, error).encode())

    def page(self, asked, values, error):
        asked = asked or self.demo.names[:1]
        if self.demo.names:
            legend, choices = "classes", "".join(
                f'<label><input type="checkbox" name="class" value="{html.escape(name)}"'
                f'{" checked" * (name in asked)}> {html.escape(name)}</label>' for name in self.demo.names)
        else:
            text = html.escape("\n".join(asked))
            legend, choices = "texts, a line each", f'<textarea name="class" rows="4" cols="40">{text}</textarea>'
        query = html.escape(urlencode({"class": asked, **values}, doseq=True))
        picture = f'<img src="/grid.png?{query}" alt="samples">' if asked and not error else ""
        return PAGE.format(name=html.escape(self.demo.name), legend=legend, choices=choices, picture=picture,
                           error=html.escape(error), **values)

    def answer(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Say nothing: the page shows what goes wrong."""


def server(demo, port):
    """The HTTP server of the page, for this machine alone. Raises UserError if the port is taken.

    `demo` has a `name`, `names` of classes ([] for texts) and grid(texts, images, seed, cfg) -> uint8 (H, W, 3).
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"demo": demo}))
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error.strerror}); give another one.") from error
