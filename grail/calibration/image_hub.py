"""Image data sets of the Hugging Face hub, through `datasets`; columns are found by the type of their feature."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bars import without_bars
from ..errors import GrailError
from ..hub import at_once
from .image_files import PARTS, pixel_content, pixels
from .preprocessing import imported


@dataclass
class Rows:
    """Encoded images: one column of a data set."""

    name: str
    rows: Any
    column: str

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, indices: list[int]) -> list[Tensor]:
        """uint8 [C, H, W] each; raises GrailError naming the rows when one cannot be decoded."""
        try:
            return [pixels(image) for image in self.rows[indices][self.column]]
        except Exception as error:  # PIL's decoders raise anything
            where = f"rows {indices[0]} to {indices[-1]}, column {self.column}"
            raise GrailError(
                f"{self.name}: an image of {where} cannot be decoded ({type(error).__name__}); name another data set"
            ) from error

    def called(self, index: int) -> str:
        return f"{self.name}: row {index}"

    def content(self, index: int) -> Iterator[bytes]:
        return pixel_content(self.take([index])[0])


def open_hub(name: str, split: str) -> tuple[Rows, Tensor | None, list[str] | None, bool]:
    """Images, labels, classes and whether they are a test part, of "hf:owner/name[:split]".

    Raises GrailError when the data set cannot be fetched, has no such split or no column of images.
    """
    import datasets

    repository, _, asked = name.removeprefix("hf:").partition(":")
    try:
        with without_bars(datasets), at_once(repository, dataset=True):
            offered = datasets.get_dataset_split_names(repository)
            part = next((part for part in ([asked] if asked else PARTS[split]) if part in offered), None)
            rows = datasets.load_dataset(repository, split=part) if part else None
    except Exception as error:  # datasets, httpx and OSError: which one depends on how the network is missing
        raise GrailError(
            f"{name} could not be fetched from the hub ({type(error).__name__}); connect, or give a folder or file"
        ) from error
    if rows is None:
        missing = asked or PARTS[split][0]
        raise GrailError(f"{name} has no split {missing}, only {', '.join(offered)}; name one as hf:owner/name:split")
    return *_columns(name, rows), split == "test" and not asked


def _columns(name: str, rows: Any) -> tuple[Rows, Tensor | None, list[str] | None]:
    """The first column of images; the first of classes, or one of integers that is called label or labels."""
    import datasets

    kinds = rows.features
    column = next((key for key, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise GrailError(f"{name} has no column of images, only {', '.join(kinds)}; name another data set")
    imported("PIL.Image")
    label = next((key for key, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
    classes = list(kinds[label].names) if label else None
    label = label or next((key for key in ("label", "labels") if "int" in getattr(kinds.get(key), "dtype", "")), None)
    labels = torch.tensor(rows[label][:]) if label else None
    if labels is not None and len(labels) and int(labels.min()) < 0:  # how the hub marks an unlabelled part
        labels = None
    return Rows(name, rows, column), labels, classes
