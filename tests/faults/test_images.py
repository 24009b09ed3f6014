"""Folders of images and archives: refused naming the file, or the pixels that PIL and numpy read."""

from __future__ import annotations

import gzip
import io
import os
import struct
import zlib
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from grail.calibration.image_files import decode
from grail.calibration.images import open_images
from grail.calibration.preprocessing import Preprocessing
from tests.faults.mutators import damaged
from tests.faults.series import Series

READ = Preprocessing((8, 8), 3, (0.5,) * 3, (0.5,) * 3)
FORMATS = ("png", "jpeg", "gif", "bmp", "tiff", "webp")


def picture(kind: str, mode: str = "RGB", size: int = 8) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, kind)
    return content.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b"", more: bytes = b"") -> bytes:
    """A PNG that says that it is so large."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + more + body + chunk(b"IEND", b"")


def read(folder: Path) -> torch.Tensor:
    images = open_images(folder)
    images.sha256()
    return torch.cat(list(images.batches(READ, 2)))


@pytest.fixture
def sound(tmp_path) -> Path:
    folder = tmp_path / "sound"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        (folder / name / "1.png").write_bytes(picture("png"))
    return folder


def by_pil(file: Path) -> torch.Tensor | None:
    try:
        with Image.open(file) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except Exception:
        return None


def test_bytes_of_images(sound, tmp_path):
    with Series("images", tmp_path, sound) as series:
        for chance in series.seeds(200):
            case = series.folder()
            kind = chance.choice(FORMATS)
            file = case / "b" / f"2.{kind}"
            how, content = damaged(picture(kind), chance, chance.choice((40, None)))
            file.write_bytes(content)

            def pixels(case: Path = case, file: Path = file) -> torch.Tensor:
                assert read(case).shape == (3, 3, 8, 8)
                return decode(file)

            ending = series.case(f"{kind} {how}", pixels, case, names=[file.name], memory=2**30)
            if ending and ending.refused is None and kind in ("png", "bmp"):
                expected = by_pil(file)
                if expected is None or not torch.equal(ending.value.expand(3, -1, -1), expected):
                    series.wrong.append(f"{kind} {how}: other pixels than PIL reads")


STRANGE = {
    "huge.png": png(2**31 - 1, 2**31 - 1),
    "wide.png": png(2**31 - 1, 1),
    "large.png": png(60_000, 60_000, data=bytes(10)),
    "bomb.png": png(12_000, 12_000, data=bytes(12_000 * 4)),
    "none.png": png(0, 0),
    "deep.png": png(8, 8, 16, 0, bytes(17 * 8)),
    "text.png": b"hello, I am no image\n",
    "empty.png": b"",
    "page.jpg": b"<!doctype html><html></html>",
    "vector.gif": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "script.webp": b"#!/bin/sh\ntouch /tmp/mark\n",
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n",
    "zipped.png": png(8, 8, data=bytes(25 * 8), more=chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2**26)))),
    "profile.png": png(8, 8, data=bytes(25 * 8), more=chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26)))),
    "xpm.bmp": b'/* XPM */\nstatic char *x[] = {"999999 999999 1 1",};\n',
    "netpbm.png": b"P6\n2000000000 2000000000\n255\n",
    "frames.gif": picture("gif") * 50,
}


@pytest.mark.parametrize("where", ["a/x", "x"])
def test_files_that_are_no_images_or_say_that_they_are_huge(sound, tmp_path, where):
    with Series("images that are none", tmp_path, sound) as series:
        for name, content in STRANGE.items():
            case = series.folder()
            file = (case / where).with_name(name)
            file.write_bytes(content)
            series.case(name, partial(read, case), case, names=[name], seconds=10, memory=2**30)


def linked(case: Path, chance: Random) -> str:
    """Something in the folder that is no file of its own."""
    how = chance.choice(
        ("pipe", "device", "endless", "loop", "up", "dangling", "outside", "hidden", "folder", "socket")
    )
    file = case / "b" / "2.png"
    if how == "pipe":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "hidden":
        (case / "b" / ".2.png").write_bytes(b"x")
    elif how == "up":
        (case / "b" / "up").symlink_to("..")
    elif how == "socket":
        import socket

        here = os.getcwd()
        os.chdir(file.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
        os.chdir(here)
    else:
        to = {
            "device": "/dev/null",
            "endless": "/dev/zero",
            "loop": "2.png",
            "dangling": "no",
            "outside": "/etc/passwd",
        }
        file.symlink_to(to[how])
    return how


def test_links_and_pipes(sound, tmp_path):
    with Series("images that are links", tmp_path, sound) as series:
        for chance in series.seeds(40):
            case = series.folder()
            how = linked(case, chance)
            series.case(how, partial(read, case), case, names=["2.png"], seconds=5)


def archives(case: Path, chance: Random) -> tuple[str, Path]:
    """An idx file or an npz that is unsound."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    idx = struct.pack(">IIII", 0x0803, 4, 8, 8) + pixels.tobytes()
    how = chance.choice(("idx", "gz", "npz", "objects", "sizes", "bomb"))
    if how in ("npz", "objects"):
        file, content = case / "x.npz", io.BytesIO()
        images = pixels if how == "npz" else np.array([{"x": 1}], dtype=object)
        np.savez(content, images=images, labels=np.arange(4))
        what, data = damaged(content.getvalue(), chance) if how == "npz" else (how, content.getvalue())
    elif how == "sizes":
        file = case / "train-images-idx3-ubyte"
        sizes = [chance.choice((0, 1, 2**16, 2**31, 2**32 - 1)) for _ in range(3)]
        what, data = str(sizes), struct.pack(">IIII", 0x0803, *sizes) + pixels.tobytes()
    elif how == "bomb":
        file = case / "train-images-idx3-ubyte.gz"
        what, data = how, gzip.compress(struct.pack(">IIII", 0x0803, 4, 8, 8)) + gzip.compress(bytes(2**24)) * 64
    else:
        file = case / ("train-images-idx3-ubyte" + (".gz" if how == "gz" else ""))
        what, data = damaged(idx if how == "idx" else gzip.compress(idx, mtime=0), chance)
    file.write_bytes(data)
    return f"{how} {what}", file


def test_archives(tmp_path):
    with Series("images in archives", tmp_path) as series:
        for chance in series.seeds(120):
            case = series.folder()
            how, file = archives(case, chance)
            series.case(how, partial(read, file), case, names=[file.name, "x.npz"], seconds=10)
