"""The page of examples/demo.py over HTTP: it samples what the form asks for; no request ends the server."""
import base64
import io
import re
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

    name, names, asked = "net", ["ship", "<b>"], None

    def grid(self, asked, **values):
        self.asked = asked, values
        if not asked:
            raise RuntimeError("no rows")
        if not {*asked} <= {*self.names}:
            raise UserError(f"{asked[0]!r} is no class.")
        return np.full((4, 6, 3), int(values["cfg"]), np.uint8)


@pytest.fixture
def demo():
    demo = Grids()
    with server(demo, 0, asked=["ship"], images=8, seed=0, cfg=2.0) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        demo.port = http.server_address[1]
        yield demo
        http.shutdown()


def get(demo, place):
    """(status, page)."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{demo.port}{place}") as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_form_asks_for_a_grid(demo):
    status, page = get(demo, "/")
    assert status == 200 and 'value="ship" checked' in page and "<img" not in page and demo.asked is None
    status, page = get(demo, "/?class=%3Cb%3E&class=ship&images=3&seed=5&cfg=4")
    assert status == 200 and demo.asked == (["<b>", "ship"], {"images": 3, "seed": 5, "cfg": 4.0})
    assert "<b>" not in page and 'value="&lt;b&gt;" checked' in page and 'name="seed" min="0" value="5"' in page
    picture = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', page)[1])
    assert np.asarray(Image.open(io.BytesIO(picture))).tolist() == np.full((4, 6, 3), 4).tolist()
    demo.names = []  # a network of texts
    status, page = get(demo, "/?class=a+red%0D%0Abus%0A")
    assert demo.asked == (["a red", "bus"], {"images": 8, "seed": 0, "cfg": 2.0}) and status == 400
    assert '<textarea name="class" rows="4" cols="40">a red\nbus</textarea>' in page


@pytest.mark.parametrize("place, status, words", [
    ("/?class=zebra", 400, "&#x27;zebra&#x27; is no class."), ("/?seed=-1", 400, "seed: is -1; it must be at least 0"),
    ("/?images=x&class=ship", 400, "images: &#x27;x&#x27; is no whole number."), ("/?images=2", 500, "no rows"),
    ("/?class=ship&cfg=nan", 400, "must be from 1 to 10"), ("/etc/passwd", 404, "There is no /etc/passwd"),
    ("/?" + "class=ship&" * 17, 400, "17 rows are too many")])
def test_what_cannot_be_is_said(demo, place, status, words):
    found, page = get(demo, place)
    assert found == status and words in page and get(demo, "/")[0] == 200


def test_a_port_in_use(demo):
    with pytest.raises(UserError, match=f"--port {demo.port} cannot be used .*; give another one"):
        server(demo, demo.port)
