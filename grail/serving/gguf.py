"""`grail export --to gguf`: a checkpoint of uniform widths as one file for llama.cpp, a tensor in memory at a time.

It is read again with the gguf package and compared with the checkpoint, tensor by tensor, before it takes its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from ..checkpoint.gguf import STATED
from ..checkpoint.locate import locate
from ..errors import Circumstance, GrailError, first_line
from ..families import open_family
from ..families.gguf import ARCHITECTURE, Entry, described
from ..page.source_card import source_card
from ..replacing import refuse_part_of, replacing
from ..surroundings import undisturbed
from .vocabulary import Vocabulary, vocabulary

BLOCK = 32
"""Numbers that share a scale in Q8_0."""


@dataclass(frozen=True)
class Encoding:
    """kind: of matrices; vectors are always float32, as llama.cpp wants them. numpy: dtype of the raw numbers, None
    where they come in blocks. file_type: llama.cpp's name for the whole. tolerance: the largest error of one number,
    relative to the largest of those that it shares a scale with (else of its row); floor: one that is always allowed,
    since neither small numbers of float16 nor small scales have more digits."""

    kind: Kind
    numpy: Any
    file_type: int
    tolerance: float
    floor: float = 0.0

    def allowed(self, wanted: Tensor) -> Tensor:
        """The largest error of each number."""
        blocks = wanted.unflatten(-1, (-1, BLOCK)) if self.kind == Kind.Q8_0 else wanted[..., None, :]
        largest = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).reshape(wanted.shape)
        return (largest * max(self.tolerance, 2**-24)).clamp_min(self.floor)


ENCODINGS = {
    "float32": Encoding(Kind.F32, np.float32, 0, 0.0),
    "float16": Encoding(Kind.F16, np.float16, 1, 2**-11, 2**-25),
    "bfloat16": Encoding(Kind.BF16, np.uint16, 32, 2**-8, 2**-126),
    "q8_0": Encoding(Kind.Q8_0, None, 7, 1 / 127, 2**-18),
}
STORED = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@undisturbed()
def export_gguf(path: str | Path, output: str | Path, *, dtype: str | None = None, overwrite: bool = False) -> dict:
    """Write the checkpoint `path` as the file `output`. dtype: one of ENCODINGS, None for that in which it is stored.

    Returns {file, to, dtype, bytes, tensors, difference}: difference is the largest error of a number relative to the
    largest of its tensor. Raises GrailError for what llama.cpp's `llama` cannot hold, and where the file does not hold
    what the checkpoint does.
    """
    file = Path(output)
    if dtype is not None and dtype not in ENCODINGS:
        raise GrailError(f"--dtype {dtype}: choose one of {', '.join(ENCODINGS)}")
    if file.is_dir():
        raise GrailError(f"--output {file} is a folder; name a file, such as {file / 'model.gguf'}")
    if file.exists() and not overwrite:
        raise GrailError(f"--output {file} exists; choose another, or add --overwrite")
    folder = locate(str(path)).folder
    refuse_part_of(folder, file, ".gguf")
    model = open_family(folder)
    fields, entries = described(model)
    dtype = dtype or STORED.get(model.source.info(entries[0].source).dtype)
    if dtype is None:
        raise GrailError(f"{folder} is stored in a dtype that GGUF does not know; choose one with --dtype")
    words = vocabulary(folder, model.config.vocab_size)
    with replacing(file) as temporary:
        _write(temporary, _general(folder, dtype), fields, words, [Stored.of(entry, dtype) for entry in entries])
        difference = _compared(temporary, entries, model.source.get, dtype)
    told = {"file": str(file), "to": "gguf", "dtype": dtype, "bytes": file.stat().st_size}
    return told | {"tensors": len(entries), "difference": difference}


@dataclass(frozen=True)
class Stored:
    """An entry and how it is written: matrices as asked (whole blocks only, else float16), vectors as float32."""

    entry: Entry
    encoding: Encoding

    @classmethod
    def of(cls, entry: Entry, dtype: str) -> Stored:
        if len(entry.shape) < 2:
            dtype = "float32"
        elif dtype == "q8_0" and entry.shape[-1] % BLOCK:
            dtype = "float16"
        return cls(entry, ENCODINGS[dtype])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the raw numbers, bytes where they come in blocks."""
        if self.encoding.numpy is not None:
            return self.entry.shape
        return gguf.quant_shape_to_byte_shape(self.entry.shape, self.encoding.kind)

    @property
    def raw(self) -> np.dtype:
        """Of the raw numbers."""
        return np.dtype(self.encoding.numpy or np.uint8)

    def data(self) -> np.ndarray:
        """What goes into the file. Raises GrailError where a number is none, or too large for the dtype."""
        dtype = {Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}.get(self.encoding.kind, torch.float32)
        found = self.entry.read().contiguous().to(dtype)
        if not torch.isfinite(found).all():
            raise GrailError(f"{self.entry.source}: a number is not finite as {found.dtype}; choose another --dtype")
        if self.encoding.kind == Kind.BF16:
            return found.view(torch.int16).numpy().view(np.uint16)
        if self.encoding.kind != Kind.Q8_0:
            return found.numpy()
        with np.errstate(all="ignore"):  # what is written is compared
            return gguf.quants.quantize(found.numpy(), Kind.Q8_0)


def _general(folder: Path, dtype: str) -> dict[str, Any]:
    """What the file says of itself."""
    card = source_card(folder)
    name = folder.resolve().name.encode(errors="replace").decode()
    if name == "mistral":  # transformers takes a file of just this name for one of another architecture
        name = name.capitalize()
    found: dict[str, Any] = {"type": "model", "name": name, "file_type": ENCODINGS[dtype].file_type}
    for called, key in STATED.items():
        value = card.language if key == "language" else card.licence.get(key)
        if value:
            found[called] = value
    return found | {"quantization_version": gguf.GGML_QUANT_VERSION}


def _write(file: Path, general: dict, fields: dict, words: Vocabulary, entries: list[Stored]) -> None:
    writer = gguf.GGUFWriter(None, ARCHITECTURE)
    for prefix, found in (("general", general), (ARCHITECTURE, fields)):
        for key, value in found.items():
            _add(writer, f"{prefix}.{key}", value)
    _add_vocabulary(writer, words)
    for stored in entries:
        count = int(np.prod(stored.shape)) * stored.raw.itemsize
        writer.add_tensor_info(stored.entry.name, stored.shape, stored.raw, count, stored.encoding.kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for stored in entries:
            writer.write_tensor_data(stored.data())
    finally:
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A field of the type that llama.cpp expects: counts are uint32."""
    add: dict[type, Callable] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _add_vocabulary(writer: gguf.GGUFWriter, words: Vocabulary) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.scores:
        writer.add_token_scores(words.scores)
    if words.merges:
        writer.add_token_merges(words.merges)
    for role, number in words.special.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", number)
    for role, adds in words.adds.items():
        writer.add_bool(f"tokenizer.ggml.add_{role}_token", adds)
    writer.add_add_space_prefix(words.space_prefix)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _compared(file: Path, entries: list[Entry], get: Callable[[str], Tensor], dtype: str) -> float:
    """Read the file with the gguf package and compare each tensor with the checkpoint's."""
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError) as error:  # numpy's writes may end early without a word
        raise Circumstance(f"{file} cannot be read again ({first_line(error)}); the disk may be full") from error
    found = {tensor.name: tensor for tensor in reader.tensors}
    if len(reader.tensors) != len(entries) or set(found) != {entry.name for entry in entries}:
        raise GrailError(f"{file}: the tensors that were written are not those that are read")
    largest = 0.0
    for entry in entries:
        encoding = Stored.of(entry, dtype).encoding
        read = gguf.quants.dequantize(found[entry.name].data, found[entry.name].tensor_type)
        tensor = entry.back(torch.from_numpy(np.array(read, dtype=np.float32)).view(entry.shape))
        wanted = (get(entry.source) if entry.source else entry.read()).float()
        errors = (tensor - wanted).abs()
        error = errors.max().item() / max(wanted.abs().max().item(), torch.finfo(torch.float32).tiny)
        if not (errors <= encoding.allowed(wanted)).all():
            raise GrailError(
                f"as written, {entry.source or entry.name} is not what it was (relative error {error:.1e})"
            )
        largest = max(largest, error)
    return largest
