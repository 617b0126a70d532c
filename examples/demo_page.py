"""A browser page to sample from a network: a form and the resulting grid. See demo.py."""
import argparse
import base64
import contextlib
import html
import io
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from PIL import Image

from runtime.errors import UserError, first_line
from runtime.flags import number, whole

MAX_ROWS = 16
FIELDS = {"images": whole(1, 16), "seed": whole(0), "cfg": number(1, 10)}  # of the form, and their ranges
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


class Handler(BaseHTTPRequestHandler):
    """One page: the form and, once it was sent, its samples. server() sets `demo` and `first`, the form's start."""

    demo = first = None

    def do_GET(self):
        values, error, picture, status = dict(self.first), "", "", 200
        try:
            place = urlsplit(self.path)
            if place.path != "/":
                error, status = f"There is no {place.path} here.", 404
            elif place.query:
                read_query(place.query, values)
                picture = self.samples(values)
        except (UserError, ValueError) as problem:
            error, status = str(problem), 400
        except (RuntimeError, MemoryError) as problem:  # of the network: the page says it, and the server goes on
            error, status = f"{type(problem).__name__}: {first_line(problem)}", 500
        data = self.page(values, error, picture).encode()
        with contextlib.suppress(ConnectionError):  # the browser has gone on
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def samples(self, values):
        """The grid as an <img> that holds its PNG."""
        file = io.BytesIO()
        Image.fromarray(self.demo.grid(**values)).save(file, "PNG")
        return f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="samples">'

    def page(self, values, error, picture):
        if self.demo.names:
            legend, choices = "classes", "".join(
                f'<label><input type="checkbox" name="class" value="{html.escape(name)}"'
                f'{" checked" * (name in values["asked"])}> {html.escape(name)}</label>' for name in self.demo.names)
        else:
            text = html.escape("\n".join(values["asked"]))
            legend, choices = "texts, a line each", f'<textarea name="class" rows="4" cols="40">{text}</textarea>'
        return PAGE.format(name=html.escape(self.demo.name), legend=legend, choices=choices, picture=picture,
                           error=html.escape(error), **{name: values[name] for name in FIELDS})

    def log_message(self, *args):
        """Say nothing: the page shows what goes wrong."""


def read_query(query, values):
    """Put what the form has sent into `values`, arguments of demo.grid. Raises UserError."""
    fields = parse_qs(query)
    values["asked"] = [text.strip() for one in fields.get("class", []) for text in one.splitlines() if text.strip()]
    if len(values["asked"]) > MAX_ROWS:
        raise UserError(f"{len(values['asked'])} rows are too many; ask for {MAX_ROWS} at most.")
    for name in FIELDS.keys() & fields.keys():
        try:
            values[name] = FIELDS[name](fields[name][-1])
        except argparse.ArgumentTypeError as error:  # typed into the address: the form checks its numbers
            raise UserError(f"{name}: {error}") from error


def server(demo, port, **first):
    """The HTTP server of the page, for this machine alone. Raises UserError where the port is taken.

    `demo` has a `name`, `names` of classes ([] for texts) and grid(asked, images, seed, cfg) -> uint8 (H, W, 3).
    `first` has these arguments as the form shows them at the start.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (Handler,), {"demo": demo, "first": first}))
    except OSError as error:
        raise UserError(f"--port {port} cannot be used ({error.strerror}); give another one.") from error
