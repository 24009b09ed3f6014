"""Where activations live between passes: chunks of tensors by series name and number, in memory or on disk.

On disk each chunk is a file of its own, written and read with plain calls: a memory map would count as resident, and
resident memory must not grow with the number of tokens. Every chunk carries a checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from .errors import Circumstance, naming

MAGIC = b"GRAILCHK"
START = len(MAGIC) + 8
"""Before the header: the magic, the CRC-32 of all that follows it, and the header's length, 4 bytes each."""


class ChunkStore(ABC):
    """Tensors by (series, number). What was put comes back equal to the last bit, on the device it is asked for."""

    @abstractmethod
    def put(self, series: str, number: int, tensor: Tensor, *, lasting: bool = False) -> None:
        """Keep a tensor, in place of the one that was there; lasting: another process may have to go on with it."""

    @abstractmethod
    def get(self, series: str, number: int, device: torch.device | str = "cpu") -> Tensor:
        """The tensor that was put. Raises KeyError where there is none, Circumstance when it was damaged."""

    @abstractmethod
    def drop(self, series: str, numbers: Iterable[int]) -> None:
        """Give up chunks of a series (another process may hold others of it); those that are not there are passed
        over."""

    @abstractmethod
    def spare(self, series: str, numbers: Iterable[int]) -> None:
        """These chunks will not be read again, unless another process has to go on from them."""

    @abstractmethod
    def holds(self, series: str, numbers: Iterable[int]) -> bool:
        """Whether all these chunks are there and sound."""

    @property
    @abstractmethod
    def outlives_process(self) -> bool:
        """Whether another process can go on with what is stored."""


class MemoryStore(ChunkStore):
    """Chunks stay where they were computed."""

    outlives_process = False

    def __init__(self):
        self._held: dict[tuple[str, int], Tensor] = {}

    def put(self, series: str, number: int, tensor: Tensor, *, lasting: bool = False) -> None:
        self._held[series, number] = tensor

    def get(self, series: str, number: int, device: torch.device | str = "cpu") -> Tensor:
        return self._held[series, number].to(device)

    def drop(self, series: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._held.pop((series, number), None)

    spare = drop

    def holds(self, series: str, numbers: Iterable[int]) -> bool:
        return all((series, number) in self._held for number in numbers)


class DiskStore(ChunkStore):
    """Chunks as files `folder/series/number`, each with its dtype and shape in a header, under one CRC-32."""

    outlives_process = True

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, series: str, number: int, tensor: Tensor, *, lasting: bool = False) -> None:
        path = self._path(series, number)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        text = json.dumps({"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}).encode()
        header = len(text).to_bytes(4, "little") + text
        start = MAGIC + zlib.crc32(raw, zlib.crc32(header)).to_bytes(4, "little") + header
        try:
            with naming(path):
                path.parent.mkdir(exist_ok=True)
                with open(path, "wb", buffering=0) as file:
                    for part in (start, raw):
                        _write_all(file, memoryview(part))
        except FileNotFoundError as error:
            raise Circumstance(self._gone) from error

    def get(self, series: str, number: int, device: torch.device | str = "cpu") -> Tensor:
        path = self._path(series, number)
        if not self.folder.exists():
            raise Circumstance(self._gone)
        if not path.exists():
            raise KeyError((series, number))
        found = _read(path)
        if found is None:
            raise Circumstance(f"{path} was damaged while it lay there; check the disk")
        return found.to(device)

    def drop(self, series: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._path(series, number).unlink(missing_ok=True)

    def spare(self, series: str, numbers: Iterable[int]) -> None:
        """A file is in nobody's way until it is dropped."""

    def holds(self, series: str, numbers: Iterable[int]) -> bool:
        paths = [self._path(series, number) for number in numbers]
        return all(path.exists() for path in paths) and all(_read(path) is not None for path in paths)

    @property
    def _gone(self) -> str:
        return f"{self.folder} is gone: it was removed, or another process of this run ended"

    def _path(self, series: str, number: int) -> Path:
        return self.folder / series / f"{number:06d}"


class CachedStore(ChunkStore):
    """All chunks in memory, and those that another process may need on disk too."""

    outlives_process = True

    def __init__(self, folder: Path):
        self._memory, self._disk = MemoryStore(), DiskStore(folder)

    def put(self, series: str, number: int, tensor: Tensor, *, lasting: bool = False) -> None:
        self._memory.put(series, number, tensor)
        if lasting:
            self._disk.put(series, number, tensor)

    def get(self, series: str, number: int, device: torch.device | str = "cpu") -> Tensor:
        there = self._memory if self._memory.holds(series, [number]) else self._disk
        return there.get(series, number, device)

    def drop(self, series: str, numbers: Iterable[int]) -> None:
        numbers = list(numbers)
        self._memory.drop(series, numbers)
        self._disk.drop(series, numbers)

    def spare(self, series: str, numbers: Iterable[int]) -> None:
        self._memory.drop(series, numbers)

    def holds(self, series: str, numbers: Iterable[int]) -> bool:
        return self._disk.holds(series, numbers)


def _write_all(file, view: memoryview) -> None:
    while view:
        view = view[file.write(view[: 2**30]) :]


def _read(path: Path) -> Tensor | None:
    """A chunk's tensor, or None when the file is not sound."""
    with open(path, "rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - START
        start = file.read(START)
        checksum, length = (int.from_bytes(start[i : i + 4], "little") for i in (len(MAGIC), len(MAGIC) + 4))
        if not start.startswith(MAGIC) or length > left:
            return None
        text, raw = (torch.empty(count, dtype=torch.uint8) for count in (length, left - length))
        if not (_read_all(file, text) and _read_all(file, raw)):
            return None
    if zlib.crc32(raw.numpy(), zlib.crc32(text.numpy(), zlib.crc32(start[-4:]))) != checksum:
        return None
    header = json.loads(text.numpy().tobytes())
    return raw.view(getattr(torch, header["dtype"])).view(header["shape"])


def _read_all(file, target: Tensor) -> bool:
    view = memoryview(target.numpy())
    while view:
        got = file.readinto(view[: 2**30])
        if not got:
            return False
        view = view[got:]
    return True
