"""model.safetensors and shards with an index: refused naming the file, or read as the `safetensors` library does."""

from __future__ import annotations

import json
import struct
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grail.checkpoint.reader import INDEX, SINGLE, SafetensorsFolder
from tests.faults.mutators import HOSTILE, damaged, mangled
from tests.faults.series import Series
from tests.tiny import tiny_checkpoint

SIZES = (0, 1, 7, 2**20, 100 * 2**20, 100 * 2**20 + 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)
SHAPES = ([2**62, 2**62, 0], [10**30, 0], [2**63, 0], [0] * 200, [1] * 200, [-1, -4], [2**32, 2**32], [True, 4])


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("sound") / "model", num_hidden_layers=1, dtype=torch.bfloat16)
    for file in folder.iterdir():
        if file.name != SINGLE:
            file.unlink()
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("sharded") / "model", num_hidden_layers=1, shard="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def raw(tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def by_library(file: Path) -> dict[str, tuple]:
    """What the library reads. Raises SafetensorError where it refuses."""
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in load_file(file).items()}


def by_grail(path: Path) -> dict[str, tuple]:
    source = SafetensorsFolder(path)
    whole = {name: source.get(name) for name in source.names()}
    for name, tensor in whole.items():
        assert b"".join(map(raw, source.chunks(name, 1000))) == raw(tensor)
        if tensor.dim() and len(tensor):
            last = torch.tensor([len(tensor) - 1, 0])
            assert raw(source.rows(name, last)) == raw(tensor[last])
    return {name: (t.dtype, tuple(t.shape), raw(t)) for name, t in whole.items()}


def check(series: Series, how: str, folder: Path) -> None:
    ending = series.case(how, partial(by_grail, folder), folder, names=[SINGLE], seconds=10)
    if ending is None or ending.refused is not None:
        return
    try:
        expected = by_library(folder / SINGLE)
    except (SafetensorError, KeyError, OverflowError, ValueError, RuntimeError) as error:
        series.wrong.append(f"{how}: read, and the library refuses it: {error}")
        return
    if ending.value != expected:
        series.wrong.append(f"{how}: read otherwise than the library does")


def parts(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def test_bytes_of_the_header(sound, tmp_path):
    with Series("safetensors header bytes", tmp_path, sound) as series:
        for chance in series.seeds(250):
            folder = series.folder()
            file = folder / SINGLE
            content = file.read_bytes()
            how, changed = damaged(content, chance, 8 + struct.unpack("<Q", content[:8])[0])
            file.write_bytes(changed)
            check(series, how, folder)


def test_bytes_of_the_data_arrive_as_they_are(sound, tmp_path):
    with Series("safetensors data bytes", tmp_path, sound) as series:
        for chance in series.seeds(150):
            folder = series.folder()
            header, data = parts(folder / SINGLE)
            how, changed = damaged(data, chance)
            (folder / SINGLE).write_bytes(joined(json.dumps(header).encode(), changed))
            check(series, how, folder)


def test_entries_of_the_header(sound, tmp_path):
    shapes = (*HOSTILE, *(dtype for dtype in ("F32", "I8", "F8_E4M3", "F4", "C64", "U64", "f32")), *SHAPES)
    with Series("safetensors header entries", tmp_path, sound) as series:
        for chance in series.seeds(400):
            folder = series.folder()
            header, data = parts(folder / SINGLE)
            how, text = mangled(header, chance, shapes)
            (folder / SINGLE).write_bytes(joined(text, data))
            check(series, how, folder)


def moved(header: dict, data: bytes, chance: Random) -> tuple[str, bytes]:
    """A header whose entries are sound each by itself, and not together."""
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.sample(names, 2)
    how = chance.choice(("overlap", "hole", "tail", "shift", "utf-16", "spaces", "length", "empty", "metadata", "same"))
    text = None
    if how == "overlap":
        header[one] = header[other]
    elif how == "hole":
        del header[one]
    elif how == "tail":
        data += bytes(chance.choice((1, 8, 1000)))
    elif how == "shift":
        start, end = header[one]["data_offsets"]
        header[one]["data_offsets"] = [max(start - 2, 0), max(end - 2, end - start)]
    elif how == "utf-16":
        text = json.dumps(header).encode(chance.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))
    elif how == "spaces":
        text = b" " * chance.choice((1, 7, 8)) + json.dumps(header).encode() + b" " * chance.choice((0, 1, 8))
    elif how == "length":
        return how, joined(json.dumps(header).encode(), data, chance.choice(SIZES))
    elif how == "empty":
        header["empty"] = {"dtype": "F32", "shape": chance.choice(SHAPES), "data_offsets": [0, 0]}
    elif how == "metadata":
        header["__metadata__"] = chance.choice((None, [], 1, "x", {"x": 1}, {"x": None}, {"x": ["y"]}, {"x": "y"}))
    return f"{how} {one}", joined(json.dumps(header).encode() if text is None else text, data)


def test_entries_that_do_not_go_together(sound, tmp_path):
    with Series("safetensors layout", tmp_path, sound) as series:
        for chance in series.seeds(150):
            folder = series.folder()
            how, content = moved(*parts(folder / SINGLE), chance)
            (folder / SINGLE).write_bytes(content)
            check(series, how, folder)


def test_an_index(sharded, tmp_path):
    names = ("..", ".", "../model.safetensors", "/etc/passwd", INDEX, "config.json", "no-such", "a/b", "x" * 5000, "\0")
    with Series("safetensors index", tmp_path, sharded) as series:
        expected = by_grail(sharded)
        for chance in series.seeds(200):
            folder = series.folder()
            how, text = mangled(json.loads((folder / INDEX).read_text()), chance, (*HOSTILE, *names))
            (folder / INDEX).write_bytes(text)
            ending = series.case(how, partial(by_grail, folder), folder, names=_names(folder), seconds=10)
            if ending is not None and ending.refused is None:
                strange = [name for name, found in ending.value.items() if found != expected.get(name)]
                if strange:
                    series.wrong.append(f"{how}: {strange[0]} is read otherwise")


def _names(folder: Path) -> list[str]:
    return [file.name for file in folder.iterdir()]


def _shards(folder: Path) -> list[str]:
    return [file.name for file in folder.glob("*.safetensors")]


def test_a_shard(sharded, tmp_path):
    with Series("safetensors shard", tmp_path, sharded) as series:
        for chance in series.seeds(100):
            folder = series.folder()
            file = folder / chance.choice(sorted(_shards(folder)))
            other = folder / chance.choice(sorted(_shards(folder)))
            how = chance.choice(("empty", "swap", "bytes", "missing", "folder", "endless", "twice"))
            content = file.read_bytes()
            file.unlink()
            if how == "folder":
                file.mkdir()
            elif how == "endless":
                file.symlink_to("/dev/zero")
            elif how != "missing":
                swapped = other.read_bytes() if other.exists() else b""
                file.write_bytes(
                    {"empty": b"", "swap": swapped, "bytes": damaged(content, chance, 400)[1], "twice": content * 2}[
                        how
                    ]
                )
            names = [INDEX, file.name]
            ending = series.case(f"{how} {file.name}", partial(by_grail, folder), folder, names=names, seconds=10)
            if ending is not None and ending.refused is None:
                weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
                stored = {shard: by_library(folder / shard) for shard in set(weight_map.values())}
                if any(found != stored[weight_map[name]].get(name) for name, found in ending.value.items()):
                    series.wrong.append(f"{how} {file.name}: a tensor that the library does not read")
