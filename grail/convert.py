"""`grail convert`: write a compressed folder in another format, one layer in memory at a time.

First the units that do nothing are found: heads and channels whose columns of the consumer are all zero, which is what
the format `padded` fills up with. Without them the network is as narrow as it can be; the new format's zeros and
biases are then added. The result must give the source's logits in a fresh process before it is put in its place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .calibration.tokenizer import has_tokenizer, load_tokenizer
from .checkpoint import reopen
from .checkpoint.carried import check_carried
from .checkpoint.locate import locate
from .checkpoint.pieces import Piece
from .checkpoint.reader import read_json
from .checkpoint.writer import OutputFolder
from .documents import check_writable
from .errors import GrailError
from .evaluation.perplexity import logits
from .families import open_family
from .families.base import OutputFormat
from .families.convertible import described, original_widths, useful_units, written_format
from .families.formats import PADDED
from .families.llama import LlamaFamily
from .machine import available_memory
from .page import write_told
from .surroundings import undisturbed

FORMATS = ("uniform", "grail", "padded")
PROBE_LENGTH = 64


@undisturbed()
def convert(path: str | Path, output: str | Path, *, to: str, overwrite: bool = False) -> dict:
    """Write the folder `path` in the format `to` ("uniform", "grail" or "padded") as the folder `output`.

    Returns what grail.json says of formats (format, loads_with, class_changed, tensor_parallel, original_widths), the
    output, its parameters and bytes, and the largest difference of logits over the largest logit. Raises GrailError
    where the network cannot be written in that format.

    grail.json comes along with those fields, `parameters`, `bytes`, `sites[].after` and `ratio.*.reached` brought up to
    date. They describe the layers as written, zeros that fill up `uniform` included; in `padded`, `after` and `reached`
    count the units that do something, as they do after `grail compress --format padded`.
    """
    if to not in FORMATS:
        raise GrailError(f"--to {to}: choose one of {', '.join(FORMATS)}")
    out = OutputFolder(output, overwrite=overwrite)
    out.check()
    folder = locate(str(path)).folder
    out.check(folder)
    check_carried(folder)
    model: LlamaFamily = open_family(folder)
    record = read_json(folder / "grail.json") if (folder / "grail.json").exists() else {}
    current = "grail" if model.in_grail_format else record.get("format")
    check_writable(record, folder / "grail.json")
    if to == current:
        raise GrailError(f"{folder} is in the format {to} already")
    model.original = original_widths(model, record, to)
    units = [useful_units(model, layer) for layer in range(model.layer_count)]
    useful = [u.widths for u in units]
    form = written_format(model, useful, to)
    record |= described(model, record, useful if to == PADDED else list(form.widths))
    with out:
        for layer, found in enumerate(units):
            tensors = form.widened(layer, found.take(model.linear_tensors(layer)), found.widths)
            _write_layer(model, out, layer, form.with_biases(layer, tensors))
        rest = [name for name in model.source.names() if model.layer_of(name) is None]
        out.write_shard(_shard_name(model, model.layer_count), [_copied(model, name) for name in rest])
        out.write_json("config.json", form.config)
        for name, text in form.files.items():
            out.write_text(name, text)
        out.carry_over(folder)
        out.write_index()
        difference = _reopen(model, out, form)
        told = {
            "format": form.name,
            "tensor_parallel": form.tensor_parallel,
            "original_widths": form.original_widths,
            "loads_with": form.loads_with,
            "class_changed": form.class_changed,
        }
        if record:
            write_told(out, record | told | _sizes(record, out), None, folder)
        written = out.finish()
    return {
        "schema_version": 1,
        "output": str(written),
        **told,
        "parameters": out.total_parameters,
        "bytes": out.total_bytes,
        "logit_difference": difference,
    }


def _write_layer(model: LlamaFamily, out: OutputFolder, layer: int, changed: dict[str, Tensor]) -> None:
    """One shard: the layer's tensors in the source's order, new ones at the end."""
    names = [name for name in model.source.names() if model.layer_of(name) == layer]
    added = [name for name in changed if name not in model.source]
    pieces = [Piece.of(name, changed[name]) if name in changed else _copied(model, name) for name in names + added]
    out.write_shard(_shard_name(model, layer), pieces)


def _copied(model: LlamaFamily, name: str) -> Piece:
    info = model.source.info(name)
    return Piece(name, info.dtype, info.shape, model.source.chunks(name))


def _shard_name(model: LlamaFamily, number: int) -> str:
    return f"model-{number + 1:05d}-of-{model.layer_count + 1:05d}.safetensors"


def _reopen(model: LlamaFamily, out: OutputFolder, form: OutputFormat) -> float:
    """Compare the source's logits, streamed, with those of a fresh process that opens what was written."""
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_LENGTH, model.config.max_position_embeddings)
    probe_1L = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    folder = model.source.path
    tokens = load_tokenizer(folder)(reopen.SAMPLE).input_ids if has_tokenizer(folder) else None
    needed = out.total_parameters * model.dtype.itemsize
    found = reopen.verify(
        out.partial,
        probe_1L,
        logits(model, probe_1L).cpu(),
        str(model.dtype).removeprefix("torch."),
        tokens,
        out.written,
        layerwise=needed > 0.7 * available_memory(),
        loads=form.loads,
    )
    return found["logit_difference"]


def _sizes(record: dict, out: OutputFolder) -> dict:
    """The sizes after conversion beside those before compression, where grail.json has them."""
    after = {"parameters": out.total_parameters, "bytes": out.total_bytes}
    return {key: record[key] | {"after": value} for key, value in after.items() if isinstance(record.get(key), dict)}
