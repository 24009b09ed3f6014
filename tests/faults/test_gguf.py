"""GGUF files: refused naming the file, or the numbers that the `gguf` package reads."""

from __future__ import annotations

import struct
from functools import partial
from pathlib import Path
from random import Random

import gguf
import numpy as np
import pytest

from grail.checkpoint.gguf import converted
from grail.checkpoint.reader import SafetensorsFolder
from grail.serving.gguf import export_gguf
from tests.faults.mutators import damaged
from tests.faults.series import Series
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_checkpoint

SEQUENCE = [0, 1, 2**16, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1]
EMBEDDING = "token_embd.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("gguf")
    sizes = {"num_hidden_layers": 1, "num_key_value_heads": 6, "vocab_size": VOCABULARY}
    source = with_tokenizer(tiny_checkpoint(home / "dense", **sizes), byte_level())
    (home / "sound").mkdir()
    export_gguf(source, home / "sound" / "m.gguf", dtype="float16")
    return home / "sound"


def fields(file: Path) -> dict[str, tuple[int, int]]:
    """Where the value of each field begins, and its length; lengths of arrays and of texts lie in front of them."""
    reader = gguf.GGUFReader(file)
    return {name: (field.offset, sum(part.nbytes for part in field.parts)) for name, field in reader.fields.items()}


def changed(file: Path, chance: Random) -> tuple[str, bytes]:
    """One thing in the header of a GGUF file, or among its tensors."""
    content = bytearray(file.read_bytes())
    found = fields(file)
    how = chance.choice(("bytes", "bytes", "early", "count", "field", "field", "number", "name", "tail", "data"))
    first = min(int(t.data_offset) for t in gguf.GGUFReader(file).tensors)
    if how == "early":
        what, data = damaged(bytes(content), chance, 64)
    elif how == "bytes":
        what, data = damaged(bytes(content), chance, first)
    elif how == "count":
        at = chance.choice((4, 8, 16))
        content[at : at + 4] = struct.pack("<Q", chance.choice(SEQUENCE))[:4] if at == 4 else b""
        if at != 4:
            content[at : at + 4] = struct.pack("<Q", chance.choice(SEQUENCE))
        what, data = f"at {at}", bytes(content)
    elif how in ("field", "number"):
        wanted = [name for name in found if how == "field" or name.startswith("llama.")]
        name = chance.choice(sorted(wanted))
        at, length = found[name]
        spot = at + chance.randrange(max(length, 1)) if how == "field" else at + length - 4
        content[spot : spot + 4] = struct.pack("<Q", chance.choice(SEQUENCE))[:4]
        what, data = f"{name} at {spot}", bytes(content)
    elif how == "name":
        at = content.find(chance.choice((b"blk.0", b"llama", b"token_embd", b"output_norm", b"general.architecture")))
        content[at] ^= 1 << chance.randrange(8)
        what, data = f"at {at}", bytes(content)
    elif how == "tail":
        cut = chance.randrange(first, len(content))
        what, data = f"cut at {cut}", bytes(content[:cut])
    else:
        at = chance.randrange(first, len(content))
        content[at] ^= 1 << chance.randrange(8)
        what, data = f"at {at}", bytes(content)
    return f"{how} {what}", data


def stored(file: Path) -> np.ndarray:
    tensor = next((t for t in gguf.GGUFReader(file).tensors if t.name == EMBEDDING), None)
    if tensor is None:
        return np.zeros(0)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def read(file: Path) -> np.ndarray:
    return SafetensorsFolder(converted(file)).get("model.embed_tokens.weight").numpy()


def test_gguf(sound, tmp_path, monkeypatch):
    with Series("gguf", tmp_path, sound) as series:
        for chance in series.seeds(70):
            case = series.folder()
            (case / "cache").mkdir()
            monkeypatch.setenv("GRAIL_CACHE", str(case / "cache"))
            how, content = changed(case / "m.gguf", chance)
            (case / "m.gguf").write_bytes(content)
            ending = series.case(how, partial(read, case / "m.gguf"), case, names=["m.gguf"], output=case / "cache")
            if (
                ending
                and ending.refused is None
                and not np.array_equal(ending.value, stored(case / "m.gguf"), equal_nan=True)
            ):
                series.wrong.append(f"{how}: other numbers than the gguf package reads")
