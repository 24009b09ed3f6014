"""What a shard is made of, and its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .reader import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Piece:
    """One tensor to write: its name, dtype, shape and a source of raw uint8 chunks in order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Iterable[Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Piece:
        flat = tensor.detach().cpu().contiguous()
        raw = flat.reshape(-1).view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        return cls(name, tensor.dtype, tuple(tensor.shape), (raw,))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def serialised(pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    """The safetensors format: header length, header padded to 8 bytes, data without gaps."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for piece in pieces:
        end = offset + piece.nbytes
        entry = {"dtype": DTYPE_NAMES[piece.dtype], "shape": list(piece.shape), "data_offsets": [offset, end]}
        header[piece.name] = entry
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for piece in pieces:
        for chunk in piece.chunks:
            yield memoryview(chunk.numpy())
