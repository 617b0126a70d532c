"""Pictures in folders, tars and zips: finding, order, labels, reading and cropping."""
import io
import json
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from preprocessing import pixels, sources
from preprocessing.sources import find, open_source, read
from runtime.errors import UserError


def saved(image, kind, **more):
    out = io.BytesIO()
    image.save(out, kind, **more)
    return out.getvalue()


def tree():
    """{name: bytes} of three classes; sorted as strings, not by number and not folder by folder."""
    names = ["a/x_10.JPEG", "a/x_9.JPEG", "a-b/x_1.JPEG", "b/deep/x.jpg", "b/y.png"]
    return {name: saved(Image.new("RGB", (8, 8), (i, i, i)), "JPEG") for i, name in enumerate(names)}


ORDER = ["a-b/x_1.JPEG", "a/x_10.JPEG", "a/x_9.JPEG", "b/deep/x.jpg", "b/y.png"]
LABELS = [1, 0, 0, 2, 2]  # a is class 0 as a name, though a-b/x sorts before a/x as a path


def write_folder(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def write_tar(path, content, mode="w"):
    """A tar of {name: bytes or TarInfo}, returned as bytes too where path is None."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in content.items():
            if isinstance(data, tarfile.TarInfo):
                archive.addfile(data)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    if path is None:
        return out.getvalue()
    path.write_bytes(out.getvalue())
    return path


def class_tars(content):
    """{"a.tar": a tar of the files in a/, ...}"""
    classes = {}
    for name, data in content.items():
        top, _, rest = name.partition("/")
        classes.setdefault(top, {})[rest] = data
    return {f"{top}.tar": write_tar(None, files) for top, files in classes.items()}


@pytest.mark.parametrize("kind", ["folder", "class tars", "tar of tars", "tar", "tar ./", "zip", "deflated zip"])
def test_one_set_of_pictures_in_every_form(tmp_path, kind):
    content = tree()
    path = {
        "folder": lambda: write_folder(tmp_path / "s", content),
        "class tars": lambda: write_folder(tmp_path / "s", class_tars(content)),
        "tar of tars": lambda: write_tar(tmp_path / "s.tar", class_tars(content)),
        "tar": lambda: write_tar(tmp_path / "s.tar", content),
        "tar ./": lambda: write_tar(tmp_path / "s.tar", {f"./{name}": data for name, data in content.items()}),
        "zip": lambda: write_zip(tmp_path / "s.zip", content),
        "deflated zip": lambda: write_zip(tmp_path / "s.zip", content, zipfile.ZIP_DEFLATED),
    }[kind]()
    source = open_source(path)
    assert source.names == ORDER and source.labels == LABELS
    assert [read(piece, "x") for piece in source.pieces] == [content[name] for name in ORDER]
    few = open_source(path, 2)  # labels come from the whole source
    assert few == (ORDER[:2], source.pieces[:2], LABELS[:2], ["a", "a-b", "b"])


def test_labels(tmp_path):
    """From dataset.json if it exists, else from the folders; none for a single folder."""
    labels = [[name, 7] for name in ORDER[1:]] + [[f"./{ORDER[0]}", 3]]
    content = {**tree(), "dataset.json": json.dumps({"labels": labels}).encode()}
    for name, write in (("s", write_folder), ("s.zip", write_zip), ("s.tar", write_tar)):
        assert open_source(write(tmp_path / name, content)).labels == [3, 7, 7, 7, 7]
    for labels in ('{"labels": null}', "{}"):
        (tmp_path / "s/dataset.json").write_text(labels)
        assert open_source(tmp_path / "s").labels is None  # not the folders' labels
    assert open_source(write_folder(tmp_path / "one", {"a/1.png": b"", "a/2.png": b""})).labels is None
    assert open_source(write_folder(tmp_path / "flat", {"1.png": b"", "2.png": b""})).labels is None
    with pytest.raises(UserError, match="pictures beside its folders, such as 2.png"):
        open_source(write_folder(tmp_path / "both", {"a/1.png": b"", "2.png": b""}))


def test_what_is_passed_over(tmp_path):
    """Links in archives, devices, hidden files and files of other kinds; in a folder links are followed."""
    link = tarfile.TarInfo("a/link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo("a/hard.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a/1.png"
    device = tarfile.TarInfo("a/device.png")
    device.type = tarfile.CHRTYPE
    content = {"a/1.png": b"1", "a/._1.png": b"", "__a/.b/2.png": b"", "a/notes.txt": b"", "a/PNG": b""}
    path = write_tar(tmp_path / "s.tar", {**content, "l": link, "h": hard, "d": device})
    assert list(find(path)) == ["a/1.png"]
    with zipfile.ZipFile(write_zip(tmp_path / "s.zip", content), "a") as archive:
        info = zipfile.ZipInfo("a/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    assert list(find(tmp_path / "s.zip")) == ["a/1.png"]
    write_folder(tmp_path / "s", content)
    os.symlink(tmp_path / "s/a", tmp_path / "s/b")
    os.symlink("/nowhere", tmp_path / "s/c.png")
    for name in ("pipe.png", "pipe.tar", "dataset.json"):  # opening one would wait for a writer for ever
        os.mkfifo(tmp_path / "s" / name)
    os.symlink("/dev/zero", tmp_path / "s/zero.png")
    os.symlink(tmp_path / "s/pipe.png", tmp_path / "s/linked.png")
    assert sorted(find(tmp_path / "s")) == ["a/1.png", "b/1.png", "c.png"]
    with pytest.raises(UserError, match="c.png cannot be read .No such file"):
        read(find(tmp_path / "s")["c.png"], "c.png")


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png"])
def test_names_that_lead_out(tmp_path, name):
    labels = json.dumps({"labels": [[name, 0]]}).encode()
    for path in (write_tar(tmp_path / "s.tar", {name: b""}), write_zip(tmp_path / "s.zip", {name: b""}),
                 write_folder(tmp_path / "s", {"a.tar": write_tar(None, {name: b""})}),
                 write_folder(tmp_path / "t", {"1.png": b"", "dataset.json": labels})):
        with pytest.raises(UserError, match="lies outside its folder"):
            open_source(path)


LISTINGS = {
    "[]": "holds a list", "{": "cannot be read as JSON", '{"labels": [3]}': "not of the form",
    '{"labels": [["1.png", 0]]}': "has no label of 2.png",
    '{"labels": [["1.png", 0], ["2.png", true]]}': "the label of 2.png is True",
    '{"labels": [["1.png", 0], ["2.png", -1]]}': "the label of 2.png is -1",
    '{"labels": [["1.png", 0], ["2.png", 0], ["3.png", 0]]}': "names 3.png, which is not there",
    '{"labels": [["1.png", 0], ["2.png", 0], ["./1.png", 1]]}': "names 1.png twice; keep one",
}


@pytest.mark.parametrize("listing", LISTINGS)
def test_a_listing_that_does_not_fit(tmp_path, listing):
    content = {"1.png": b"", "2.png": b"", "dataset.json": listing.encode()}
    for path in (write_folder(tmp_path / "s", content), write_zip(tmp_path / "s.zip", content)):
        with pytest.raises(UserError, match=LISTINGS[listing]):
            open_source(path)


def test_archives_that_are_cut_or_damaged(tmp_path):
    """Damage never shortens the list: tarfile itself takes a damaged header in the middle for the end."""
    whole = write_tar(None, class_tars(tree()))
    path = tmp_path / "s.tar"
    path.write_bytes(whole)
    members = len(find(path))
    for place in range(0, len(whole), 512):
        path.write_bytes(whole[:place])
        try:
            assert len(find(path)) == members, place
        except UserError as error:
            assert "cannot be read" in str(error)
    path.write_bytes(whole.replace(b"x_9.JPEG", b"\xff_9.JPEG"))
    with pytest.raises(UserError, match=r"s.tar cannot be read \(a is damaged or cut short at byte"):
        find(path)
    path = write_zip(tmp_path / "s.zip", tree(), zipfile.ZIP_DEFLATED)
    piece, data = find(path)["b/y.png"], path.read_bytes()
    broken = bytearray(data)
    broken[piece.entry[0] + 60] ^= 255
    path.write_bytes(broken)
    with pytest.raises(UserError, match="y cannot be read"):
        read(piece, "y")
    for cut in (100, len(data) - 10):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match="s.zip cannot be read"):
            find(path)
    deeper = write_tar(tmp_path / "deep.tar", {"a.tar": write_tar(None, {"b.tar": write_tar(None, {"1.png": b""})})})
    with pytest.raises(UserError, match="holds a tar, b.tar, and lies in a folder or tar itself"):
        find(deeper)


def test_bombs(tmp_path, monkeypatch):
    """Unpacking stops at the announced size; announcing more than LARGEST is refused."""
    monkeypatch.setattr(sources, "LARGEST", 1 << 20)
    path = write_zip(tmp_path / "s.zip", {"1.png": bytes(1 << 21)}, zipfile.ZIP_DEFLATED)
    piece = find(path)["1.png"]
    with pytest.raises(UserError, match="1 has more than 1 MiB"):
        read(piece, "1", sources.LARGEST)
    tracemalloc.start()
    with pytest.raises(UserError, match="wrong checksum"):
        read(piece._replace(entry=(*piece.entry[:-1], 1000)), "1")  # the zip's directory lies
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    big = tmp_path / "big.png"
    with open(big, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(UserError, match="big has more than 256 MiB"):
        read(sources.Piece(str(big)), "big")


# ---- crops ----

def adm_crop(picture, R):
    """Dhariwal and Nichol's crop, written out."""
    while min(*picture.size) >= 2 * R:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = R / min(*picture.size)
    picture = picture.resize(tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    y, x = (pixels.shape[0] - R) // 2, (pixels.shape[1] - R) // 2
    return pixels[y:y + R, x:x + R]


def noise(rng, width, height):
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def test_a_png_holds_pixels_alone():
    """No colour profile (wrong after conversion to RGB) and no transparent colour."""
    picture = noise(np.random.default_rng(0), 8, 8)
    picture.info |= {"icc_profile": bytes(200), "transparency": (1, 2, 3)}
    written = Image.open(io.BytesIO(pixels.png_bytes(picture)))
    assert np.array_equal(np.asarray(written), np.asarray(picture)) and not written.info


def test_adm_crop_pixel_for_pixel():
    """200 sizes: wide and high, odd and even, enlarged, halved once, twice and three times."""
    rng = np.random.default_rng(0)
    halvings = set()
    for _ in range(200):
        side, image = int(rng.integers(4, 33)), noise(rng, *np.exp(rng.uniform(np.log(3), np.log(160), 2)).astype(int))
        halvings.add(max(0, int(np.log2(min(image.size) / side))))
        found = pixels.center_crop_dhariwal(image, side)
        assert found.size == (side, side)
        assert np.array_equal(np.asarray(found), adm_crop(image, side)), (image.size, side)
    assert halvings >= {0, 1, 2, 3}


def test_center_crop_wide():
    """A picture of the right shape keeps all of itself, undistorted, between black bars."""
    image = noise(np.random.default_rng(0), 48, 24)
    found = np.asarray(pixels.center_crop_wide(image, 16, 8))
    assert found.shape == (16, 16, 3) and not found[:4].any() and not found[12:].any()
    assert np.array_equal(found[4:12], np.asarray(image.resize((16, 8), Image.LANCZOS)))
    higher = np.asarray(pixels.center_crop_wide(noise(np.random.default_rng(0), 48, 48), 16, 8))
    middle = Image.fromarray(np.asarray(noise(np.random.default_rng(0), 48, 48))[12:36])
    assert np.array_equal(higher[4:12], np.asarray(middle.resize((16, 8), Image.LANCZOS)))
    with pytest.raises(ValueError, match="it is 15x24, smaller than 16x8"):
        pixels.center_crop_wide(noise(np.random.default_rng(0), 15, 24), 16, 8)


# ---- pictures of all kinds ----

def bomb(width=60_000, height=60_000):
    """A PNG of a hundred bytes that claims to be of this size."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def odd_pictures():
    """{name: (bytes, RGB at the top left after a centre crop, or words of the sentence)}."""
    red, blue = Image.new("RGB", (20, 10), (200, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 200))
    turned = Image.new("RGB", (20, 20), (200, 0, 0))
    turned.paste((0, 0, 200), (0, 10, 20, 20))  # red above; EXIF says that its top is at the right
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(np.full((10, 20), 200 * 256 + 99, np.uint16))
    clear, crowd = Image.new("RGBA", (20, 10), (200, 0, 0, 0)), noise(np.random.default_rng(0), 40, 40)
    return {
        "cmyk.jpg": (saved(Image.new("CMYK", (20, 10), (0, 255, 255, 55)), "JPEG"), (200, 0, 0)),
        "grey.png": (saved(Image.new("L", (20, 10), 90), "PNG"), (90, 90, 90)),
        "bits.png": (saved(Image.new("1", (20, 10), 1), "PNG"), (255, 255, 255)),
        "palette.png": (saved(red.convert("P"), "PNG"), (204, 0, 0)),
        "sixteen.png": (saved(sixteen, "PNG"), (200, 200, 200)),
        "sixteen.tif": (saved(sixteen, "TIFF"), (200, 200, 200)),
        "moving.gif": (saved(red, "GIF", save_all=True, append_images=[blue]), (200, 0, 0)),
        "moving.png": (saved(red, "PNG", save_all=True, append_images=[blue]), (200, 0, 0)),
        "turned.jpg": (saved(turned, "JPEG", exif=exif, quality=95), (200, 0, 0)),
        "dot.png": (saved(Image.new("RGB", (1, 1), (7, 8, 9)), "PNG"), (7, 8, 9)),
        "clear.png": (saved(clear, "PNG"), (200, 0, 0)),
        "named.jpg": (saved(red, "PNG"), (200, 0, 0)),
        "empty.png": (b"", "is no readable image (empty)"),
        "text.png": (b"no picture", "is no readable image (no known kind)"),
        "cut.jpg": (saved(crowd, "JPEG")[:-300], "is no readable image (image file is truncated"),
        "cut.png": (saved(crowd, "PNG")[:400], "is no readable image (image file is truncated"),
        "bomb.png": (bomb(), "decompression bomb"),
        "thread.png": (saved(Image.new("RGB", (2, 50_000)), "PNG"), "before the crop"),
        "depth.tif": (saved(Image.new("F", (20, 10), 0.5), "TIFF"), "more than 16 bits"),
        "program.png": (saved(red, "EPS"), "no known kind"),  # would be run by Ghostscript
    }
