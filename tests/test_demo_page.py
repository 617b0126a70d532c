"""The page of examples/demo.py over HTTP: it samples what the form asks for; no request ends the server."""
import io
import threading
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from examples.demo_page import server
from runtime.errors import UserError


class Grids:
    """Stands for Demo: a grid whose pixels are the guidance; `asked` keeps what it was asked for."""

    name, names = "net", ["ship", "<b>"]

    def grid(self, texts, **values):
        self.asked = texts, values
        if not {*texts} <= {*self.names}:
            raise UserError(f"{texts[0]!r} is no class.")
        return np.full((4, 6, 3), int(values["cfg"]), np.uint8)


@pytest.fixture
def demo():
    demo = Grids()
    with server(demo, 0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        demo.address = f"http://127.0.0.1:{http.server_address[1]}"
        demo.port = http.server_address[1]
        yield demo
        http.shutdown()


def get(demo, place):
    """(status, body)."""
    try:
        with urllib.request.urlopen(demo.address + place) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_form_asks_for_a_grid(demo):
    status, page = get(demo, "/?class=%3Cb%3E&images=3&seed=5&cfg=4")
    assert status == 200 and b'src="/grid.png?class=%3Cb%3E&amp;images=3&amp;seed=5&amp;cfg=4.0"' in page
    assert b"<b>" not in page and b'value="&lt;b&gt;" checked' in page and b'value="ship">' in page
    status, picture = get(demo, "/grid.png?class=%3Cb%3E&class=ship&images=3&seed=5&cfg=4.0")
    assert status == 200 and np.asarray(Image.open(io.BytesIO(picture))).tolist() == np.full((4, 6, 3), 4).tolist()
    assert demo.asked == (["<b>", "ship"], {"images": 3, "seed": 5, "cfg": 4.0})
    demo.names = []  # a text network
    get(demo, "/grid.png?class=a+red%0D%0Abus%0A")
    assert demo.asked == (["a red", "bus"], {"images": 8, "seed": 0, "cfg": 2.0})
    assert b'<textarea name="class" rows="4" cols="40">a red\nbus</textarea>' in get(demo, "/?class=a+red%0Abus")[1]


@pytest.mark.parametrize("place, status, words", [
    ("/grid.png?class=zebra", 400, "&#x27;zebra&#x27; is no class."),
    ("/?images=x", 400, "A number cannot be used: &#x27;x&#x27; is no whole number."),
    ("/grid.png?class=ship&cfg=nan", 400, "must be from 1 to 10"), ("/etc/passwd", 404, "There is no /etc/passwd")])
def test_what_cannot_be_is_said(demo, place, status, words):
    found, page = get(demo, place)
    assert found == status and words in page.decode() and get(demo, "/")[0] == 200


def test_a_port_in_use(demo):
    with pytest.raises(UserError, match=f"--port {demo.port} cannot be used .*; give another one"):
        server(demo, demo.port)
