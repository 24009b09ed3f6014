"""Read safetensors tensor by tensor with plain reads, so that resident memory stays at what is in use.

Format: https://huggingface.co/docs/safetensors; 8 bytes little-endian header length, a JSON header, the data.
Everything read is checked against the file's size before a byte is allocated. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..documents import check_regular, read_json
from ..errors import Circumstance, GrailError, naming
from .disk import stamp

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
MAX_HEADER = 100 * 2**20
MAX_NAME, MAX_SIDE = 255, 2**63
"""Bytes of a file's name; what a side of a tensor is below."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: shape, dtype and byte range within its file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class SafetensorsFolder:
    """The tensors of a checkpoint folder (one file, or shards with an index), or of a single file.

    Raises GrailError, naming the file, for anything that is missing, truncated, inconsistent or pickled.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._info: dict[str, TensorInfo] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for file, wanted in _shards(self.path):
            held, self._stamps[file] = read_header(file), stamp(file)
            for name in held if wanted is None else wanted:
                if name not in held:
                    raise GrailError(f"{self.path / INDEX} says that {name} is in {file.name}, but it is not there")
                self._info[name] = held[name]

    def names(self) -> list[str]:
        return list(self._info)

    def leave_out(self, names: Iterable[str]) -> None:
        """From now on these tensors are not there; they still count for the hash."""
        for name in names:
            del self._info[name]

    def add_prefix(self, prefix: str) -> None:
        """From now on every name begins with it."""
        self._info = {prefix + name: info for name, info in self._info.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._info

    def info(self, name: str) -> TensorInfo:
        if name not in self._info:
            if (self.path / INDEX).exists():
                raise GrailError(f"{self.path / INDEX} does not list {name}: is a shard missing from the index?")
            raise GrailError(f"{self.path} holds no tensor {name}, which its config.json asks for")
        return self._info[name]

    def get(self, name: str) -> Tensor:
        """The whole tensor, in its stored dtype."""
        info = self.info(name)
        return self._read(info, info.start, info.nbytes).view(info.dtype).view(info.shape)

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows `index` (int64 [R]) of a matrix, read row by row; raises GrailError for a row that is not there."""
        info = self.info(name)
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= info.shape[0]):
            outside = int(index.max()) if int(index.min()) >= 0 else int(index.min())
            raise GrailError(f"{info.file}: {name} has {info.shape[0]} rows, there is no row {outside}")
        width = info.nbytes // info.shape[0]
        out = torch.empty(len(index), width, dtype=torch.uint8)
        with self._opened(info.file) as file:
            for target, row in zip(out, index.tolist(), strict=True):
                file.seek(info.start + row * width)
                _fill(file, target, info.file)
        return out.view(info.dtype).view(len(index), *info.shape[1:])

    def chunks(self, name: str, size: int = 16 * 2**20) -> Iterator[Tensor]:
        """The tensor's raw bytes, uint8, at most `size` at a time."""
        info = self.info(name)
        for start in range(info.start, info.end, size):
            yield self._read(info, start, min(size, info.end - start))

    def _read(self, info: TensorInfo, start: int, count: int) -> Tensor:
        out = torch.empty(count, dtype=torch.uint8)
        with self._opened(info.file) as file:
            file.seek(start)
            _fill(file, out, info.file)
        return out

    @contextmanager
    def _opened(self, file: Path) -> Iterator[IO[bytes]]:
        """For reading. Raises Circumstance where it is not what it was when its header was read."""
        with naming(file):
            if stamp(file) != self._stamps[file]:
                raise Circumstance(f"{file} was changed or touched while it was in use; put back what it was")
            with open(file, "rb", buffering=0) as opened:
                yield opened

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of each file, as they were when it was opened."""
        return sorted((file.name, *found) for file, found in self._stamps.items())

    def sha256(self) -> str:
        """Hash over the names, sizes and bytes of all shards."""
        digest = hashlib.sha256()
        for file in sorted(self._stamps):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as handle:
                while block := handle.read(16 * 2**20):
                    digest.update(block)
        return digest.hexdigest()


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor infos of one safetensors file; raises GrailError naming the file when it is not a sound one."""
    try:
        size = check_regular(file)
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise GrailError(
                    f"{file} is truncated or no safetensors file ({size} bytes, its header would be {length}); "
                    f"fetch it again"
                )
            text = handle.read(length).decode("utf-8")
            header = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except OSError as error:
        raise GrailError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, GrailError):
            raise
        raise GrailError(f"{file} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict) or not text.startswith("{"):
        raise GrailError(f"{file} is not a safetensors file: its header is not a table of tensors")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise GrailError(f"{file}: the __metadata__ of its header must be names with texts; save it again")
    found = {name: _tensor_info(file, name, entry, 8 + length, size) for name, entry in header.items()}
    _check_covered(file, found, 8 + length, size)
    return found


def _finite(number: str) -> float:
    """A number that other readers of JSON take too."""
    if not math.isfinite(value := float(number)):
        raise ValueError(f"{number} is beyond all numbers")
    return value


def _check_covered(file: Path, found: dict[str, TensorInfo], base: int, size: int) -> None:
    """As the format has it, the tensors lie one after another: no byte is in two of them or in none."""
    end = base
    for name, info in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != end:
            raise GrailError(f"{file}: {name} does not begin where the tensor before it ends; fetch it again")
        end = info.end
    if end != size:
        raise GrailError(f"{file} has {size - end} bytes behind its last tensor; fetch it again")


def _tensor_info(file: Path, name: str, entry: object, base: int, size: int) -> TensorInfo:
    try:
        stored, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        sound = isinstance(stored, str) and all(type(n) is int and 0 <= n < MAX_SIDE for n in (*shape, start, end))
        sound = sound and math.prod(side or 1 for side in shape) < MAX_SIDE
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise GrailError(f"{file}: the header entry of {name} lacks a sound dtype, shape or data_offsets")
    if stored not in DTYPES:
        raise GrailError(f"{file}: {name} has the dtype {stored}, which GRAIL does not read")
    dtype = DTYPES[stored]
    if end - start != math.prod(shape) * dtype.itemsize:
        raise GrailError(f"{file}: the byte range of {name} does not fit its shape {list(shape)} of {stored}")
    if base + end > size:
        raise GrailError(f"{file} is truncated: {name} ends at byte {base + end}, the file has {size}; fetch it again")
    return TensorInfo(file, dtype, shape, base + start, base + end)


def _shards(path: Path) -> list[tuple[Path, list[str] | None]]:
    """(file, names wanted from it; None for all). Like transformers, a single file wins over an index."""
    if path.is_file():
        return [(path, None)]
    if (path / SINGLE).exists():
        return [(path / SINGLE, None)]
    if not (path / INDEX).exists():
        pickled = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
        if pickled:
            raise GrailError(
                f"{path} holds only pickled weights ({pickled[0]}), which GRAIL never opens; "
                f"save the model with safetensors first (save_pretrained)"
            )
        raise GrailError(f"{path} holds no {SINGLE} and no {INDEX}")
    index = path / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise GrailError(f"{index} has no weight_map")
    wanted: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and shard not in {"", ".", ".."} and not set(shard) & set("/\\\0")
        plain = plain and len(shard.encode(errors="surrogatepass")) <= MAX_NAME
        if not plain:
            raise GrailError(f"{index}: {name} points at {shard!r}, which is not a plain file name")
        wanted.setdefault(shard, []).append(name)
    for shard in wanted:
        if not (path / shard).is_file():
            raise GrailError(f"{index} names the shard {shard}, which is missing from {path}; fetch it again")
    return [(path / shard, names) for shard, names in sorted(wanted.items())]


def _fill(file, target: Tensor, path: Path) -> None:
    view = memoryview(target.numpy())
    while view:
        got = file.readinto(view[: 2**30])
        if not got:
            raise Circumstance(f"{path} ended early while it was read ({os.path.getsize(path)} bytes)")
        view = view[got:]
