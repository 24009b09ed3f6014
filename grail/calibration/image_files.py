"""Pixels from local files: folders of images (decoded one at a time), idx files as MNIST has them, npz archives.

Nothing is ever unpickled. Images come as uint8 [C, H, W] with 1 or 3 channels; npz may hold floats instead.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..documents import about, check_regular
from ..errors import GrailError, sentence_of
from .preprocessing import MOST_PIXELS, imported

log = logging.getLogger("grail")

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""All that PIL may take a file for: it goes by the content, and would have a PostScript file run by Ghostscript."""
WHITE = 65535
"""Of images with 16 bits, to which those with 32 bits are held."""
BLOCK = 2**20
MOST_NAMES = 16
"""Of one folder, by links: those of a part or a class to another are few; n that hold each other have about e * n!."""
PARTS = {"calibration": ("train", "training"), "test": ("test", "t10k", "val", "valid", "validation")}
"""What the parts of a data set are called, the best name first."""
IDX = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801
NPZ = {
    "calibration": (("images", "x", "x_train", "train_images"), ("labels", "y", "y_train", "train_labels")),
    "test": (("x_test", "test_images"), ("y_test", "test_labels")),
}


class Folder:
    """Image files by sorted relative name; `labels` and `classes` when each lies in a sub-folder. trained: the classes
    of the part to train on, whose numbers these have; more are counted on, and where none is shared they are others."""

    def __init__(self, path: Path, files: list[str], trained: set[str] | None = None):
        self.path, self.files = path, files
        self.labels: Tensor | None = None
        self.classes: list[str] | None = None
        if all("/" in file for file in files):
            tops = [file.partition("/")[0] for file in files]
            first = trained if trained and not trained.isdisjoint(tops) else set()
            self.classes = sorted(first) + sorted({*tops} - first)
            number = {name: index for index, name in enumerate(self.classes)}
            self.labels = torch.tensor([number[top] for top in tops])

    def __len__(self) -> int:
        return len(self.files)

    def take(self, indices: list[int]) -> list[Tensor]:
        return [decode(self.path / self.files[index]) for index in indices]

    def called(self, index: int) -> str:
        return str(self.path / self.files[index])

    def content(self, index: int) -> Iterator[bytes]:
        """The relative name and the bytes of one file, for hashing."""
        try:
            check_regular(self.path / self.files[index])
            data = (self.path / self.files[index]).read_bytes()
        except OSError as error:
            raise GrailError(f"{sentence_of(error)}; it was there when the folder was listed") from error
        yield f"{self.files[index]}\0{len(data)}\0".encode("utf-8", "surrogateescape")
        yield data


def open_folder(path: Path, split: str) -> tuple[Folder, bool]:
    """The images of a folder, and whether calibration never sees them: a folder whose sub-folders are called train,
    test, val, ... (in small letters or capitals) gives the one that the split asks for. One of such a name that lies
    beside others, all of them of images alone, is a class like these (trains beside buses). Raises GrailError when the
    part is not there, and where else images lie beside parts, of which test images could be some."""
    files = _image_files(path)
    if not files:
        raise GrailError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))}), idx files or sub-folders of images")
    tops = {file.partition("/")[0] if "/" in file else "" for file in files}
    parts = _parts(path, tops)
    odd = sorted(tops - set(parts.values()))
    if len(parts) == 1 and odd and all(file.count("/") == 1 for file in files):
        log.warning("%s: %s is taken for a class, as %s is", path, *parts.values(), odd[0])
        parts = {}
    if not parts:
        return Folder(path, files), False
    if odd:
        beside = f"the folder {odd[0]}" if odd[0] else f"the image {next(file for file in files if '/' not in file)}"
        first = min(parts.values())
        raise GrailError(
            f"{path} holds {beside} beside {first}, the name of a part of a data set: take it out or name the "
            f"sub-folder to use; where {first} is a class, rename its folder"
        )
    part = next((parts[name] for name in PARTS[split] if name in parts), None)
    if part is None:
        held = ", ".join(sorted(tops))
        raise GrailError(f"{path} holds only {held}, no {PARTS[split][0]}; name the sub-folder to use")
    prefix = f"{part}/"
    inside = [file.removeprefix(prefix) for file in files if file.startswith(prefix)]
    known = next((parts[name] for name in PARTS["calibration"] if name in parts), part)
    trained = {file.split("/")[1] for file in files if file.startswith(f"{known}/") and file.count("/") > 1}
    return Folder(path / part, inside, trained), split == "test"


def _parts(path: Path, tops: set[str]) -> dict[str, str]:
    """Sub-folders that are called like parts of a data set, by the name in PARTS. Raises GrailError for two of one."""
    known = {name for names in PARTS.values() for name in names}
    found: dict[str, str] = {}
    for top in sorted(tops):
        if (name := top.lower()) in known and found.setdefault(name, top) != top:
            raise GrailError(f"{path} holds both {found[name]} and {top}; name the sub-folder to use")
    return found


def _image_files(path: Path) -> list[str]:
    """Relative names, sorted, with "/". Links are followed, but not back up; dot files are left out. Raises GrailError
    where folders are linked to one another so that there is no end of names."""
    found: list[str] = []
    names_of: Counter[str] = Counter()

    def unreadable(error: OSError) -> None:
        raise GrailError(f"{sentence_of(error)}; make the folder readable") from error

    for folder, inner, names in os.walk(path, followlinks=True, onerror=unreadable):
        above = (parent for parent in Path(folder).parents if parent.is_relative_to(path))
        if (real := os.path.realpath(folder)) in map(os.path.realpath, above):
            inner.clear()
            continue
        names_of[real] += 1
        if names_of[real] > MOST_NAMES:
            raise GrailError(f"{path} holds {real} under more than {MOST_NAMES} names; take out links between folders")
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        chosen = (name for name in names if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        found += [(Path(folder) / name).relative_to(path).as_posix() for name in chosen]
    return sorted(found)


def decode(path: Path) -> Tensor:
    """One image file as uint8 [C, H, W]; raises GrailError naming the file when it is not a sound image."""
    image_module = imported("PIL.Image")
    try:
        with about(path):
            check_regular(path)
            with image_module.open(path, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise GrailError(f"it would have {image.width} x {image.height} pixels; make it smaller")
                return pixels(image)
    except GrailError:
        raise
    except image_module.DecompressionBombError as error:
        raise GrailError(f"{path} has more than {MOST_PIXELS:,} pixels; make it smaller") from error
    except Exception as error:  # PIL's decoders raise anything, from SyntaxError to struct.error
        reason = getattr(error, "strerror", None) or f"damaged or no image, {type(error).__name__}"
        raise GrailError(f"{path} cannot be read ({reason}); replace it or take it out of the folder") from error


def pixels(image: Any) -> Tensor:
    """uint8 [C, H, W] of a PIL image: 1 channel where it is grey, else 3; transparency is dropped."""
    if image.mode == "F":
        raise GrailError("the pixels are 32-bit floats; save them with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; PIL's own conversion clips them to 255
        values = np.asarray(image).astype(np.int64)
        least, most = int(values.min()), int(values.max())
        if least < 0 or most > WHITE:
            raise GrailError(f"its pixels run from {least} to {most}, {WHITE} being white; save them with 8 or 16 bits")
        return torch.from_numpy(((values + 128) // 257).astype(np.uint8))[None]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("1", "L", "LA", "La"):
        return torch.from_numpy(np.array(image.convert("L")))[None]
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def is_idx(path: Path) -> bool:
    return IDX.search(path.name) is not None


def idx_in(path: Path, split: str) -> Path | None:
    """The idx file of a split in a folder, None where the folder holds no idx files at all."""
    try:
        files = sorted(file for file in path.iterdir() if is_idx(file))
    except OSError as error:
        raise GrailError(f"{sentence_of(error)}; make the folder readable") from error
    named = {IDX.sub("", file.name): file for file in files}  # a packed copy is the same file
    found = [file for name, file in named.items() if any(part in re.split(r"[-_.]", name) for part in PARTS[split])]
    if not files or len(found) == 1:
        return found[0] if found else None
    what = "holds several" if found else "holds no"
    start = "train" if split == "calibration" else "t10k"
    raise GrailError(f"{path} {what} {start}-images-idx3-ubyte for the {split} split; name one file")


def read_idx(path: Path) -> tuple[Tensor, Tensor | None]:
    """uint8 [N, 1, H, W] and the labels [N] of the sibling file, if it is there, of an idx file (.gz or plain)."""
    images = _idx_array(path, IDX_IMAGES, 3)
    if not images.numel():
        raise GrailError(f"{path} holds no images (its sizes are {list(images.shape)}); give another file")
    before, _, after = path.name.removesuffix(".gz").rpartition("images")
    stem = f"{before}labels{after.replace('idx3', 'idx1')}"
    beside = (path.with_name(stem + end) for end in ("", ".gz"))
    labels = next((_idx_array(file, IDX_LABELS, 1) for file in beside if file.is_file()), None)
    return images[:, None], labels


def _idx_array(path: Path, magic: int, dims: int) -> Tensor:
    """http://yann.lecun.com/exdb/mnist: big-endian magic and sizes, then unsigned bytes."""
    data = bytearray()
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            head = file.read(4 + 4 * dims)
            sizes = _idx_sizes(path, head, magic, dims)
            # not all at once and no more than one byte too many: sizes may say anything, a packed file hold anything
            while len(data) <= math.prod(sizes) and (block := file.read(BLOCK)):
                data += block
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise GrailError(f"{path} cannot be read ({reason}); fetch it again") from error
    wanted = math.prod(sizes)
    if len(data) != wanted:
        held = f"{len(data)} bytes" if len(data) < wanted else "more bytes"
        raise GrailError(f"{path} holds {held} where its sizes {sizes} ask for {wanted}; fetch it again")
    return torch.frombuffer(data, dtype=torch.uint8).view(sizes) if wanted else torch.empty(sizes, dtype=torch.uint8)


def _idx_sizes(path: Path, head: bytes, magic: int, dims: int) -> list[int]:
    found = int.from_bytes(head[:4], "big")
    if len(head) < 4 + 4 * dims:
        raise GrailError(f"{path} is truncated within its header ({len(head)} bytes); fetch it again")
    if found != magic:
        difference = f"magic {found:#010x}, expected {magic:#010x}"
        raise GrailError(f"{path} is no idx file of {dims}-dimensional bytes ({difference}); fetch it again")
    return np.frombuffer(head, dtype=">u4")[1:].tolist()


def read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray | None, bool]:
    """Images, labels and whether they are a test part, as stored; split "test" without one gives the other arrays."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for part in dict.fromkeys((split, "calibration")):
                key, label = (next((k for k in keys if k in archive), None) for keys in NPZ[part])
                if key is not None:
                    return _array(archive, key), _array(archive, label) if label else None, part == "test"
            names = ", ".join(archive.files)
    except Exception as error:  # a damaged archive can raise anything, from zipfile's errors to tokenize's
        if str(error).startswith("Object arrays"):  # numpy takes whatever is no archive for pickled, too
            raise GrailError(
                f"{path} holds pickled objects (images of different sizes?), which GRAIL never opens; "
                f"save one array of one size"
            ) from error
        raise GrailError(f"{path} is damaged or no .npz archive ({type(error).__name__}); write it again") from error
    raise GrailError(f"{path} holds no array images, x or x_train (only {names or 'nothing'}); rename one")


def _array(archive: Any, name: str) -> np.ndarray:
    found = archive[name]
    if not isinstance(found, np.ndarray):  # numpy hands out other members of the archive as they are
        raise ValueError(name)
    return found


def pixel_content(image: Tensor) -> Iterator[bytes]:
    """Dtype, shape and bytes of an image, for hashing."""
    yield f"{image.dtype}{list(image.shape)}\0".encode()
    yield image.contiguous().numpy().tobytes()
