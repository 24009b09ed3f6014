"""`grail eval`: perplexity of any folder of a supported family, on what grail.json records or on other data."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .calibration import Windows, evaluation_windows
from .calibration.tokenizer import load_tokenizer
from .checkpoint.locate import locate
from .checkpoint.reader import SafetensorsFolder, read_json
from .errors import GrailError
from .evaluation.perplexity import perplexity
from .families import open_family
from .families.decoder import Decoder
from .machine import usable_device
from .progress import Progress
from .recipe import DTYPES
from .store import DiskStore
from .workspace import Workspace, chunk_tokens

IN_MEMORY = 2**28


def evaluate(
    model: str,
    *,
    data: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    against: str | None = None,
    speed: bool = False,
    prompt: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, size and (asked for) speed of `model`, and of a second one beside it.

    Without `data` the evaluation that grail.json records is repeated: same source, windows and compute dtype; a
    folder without that record is evaluated on the built-in text. A local text file named as `data` is read whole.
    Speed and samples load the whole models, on the CPU. Raises GrailError for bad input.
    """
    progress = progress or Progress()
    for option, value, least in (("--samples", samples, 1), ("--seq-len", seq_len, 2)):
        if value is not None and value < least:
            raise GrailError(f"{option} must be at least {least}; got {value}")
    folders = {model: locate(model).folder}
    if against:
        folders[against] = locate(against).folder
    recorded = _recorded(folders[model]) if data is None else {}
    dtype = dtype or recorded.get("dtype")
    if dtype not in (None, *DTYPES):
        raise GrailError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    precision = {"device": usable_device(device), "dtype": dtype and getattr(torch, dtype)}
    opened = {label: open_family(folder, **precision) for label, folder in folders.items()}
    windows = _windows(opened[model], data, samples, seq_len, recorded)
    models = {}
    for label, family in opened.items():
        with _workspace(family, windows) as work:
            found = perplexity(family, windows.ids, work, track=progress.layers(f"evaluating {label}"))
        models[label] = {"perplexity": found, **_size(family.source)}
    if speed or prompt:
        _add_speed(models, folders, speed, prompt, precision["dtype"] or torch.float32)
    count, length = windows.ids.shape
    return {"schema_version": 1, "data": windows.source, "windows": count, "seq_len": length, "models": models}


@contextmanager
def _workspace(model: Decoder, windows: Windows) -> Iterator[Workspace]:
    """Hidden states in memory while they are small (or on a GPU), else on disk: memory must not grow with the text."""
    tokens = chunk_tokens(max(site.units.width for site in model.sites()), model.dtype.itemsize)
    held = windows.tokens * model.config.hidden_size * model.dtype.itemsize
    if held <= IN_MEMORY or model.device.type != "cpu":
        yield Workspace(chunk_tokens=tokens)
        return
    with tempfile.TemporaryDirectory(prefix="grail-eval-") as folder:
        yield Workspace(DiskStore(Path(folder)), chunk_tokens=tokens)


def _recorded(folder: Path) -> dict:
    """The evaluation that grail.json records, {} where there is none."""
    file = folder / "grail.json"
    if not file.exists():
        return {}
    evaluation = read_json(file).get("evaluation")
    if evaluation is None:
        return {}
    kinds = {"data": str, "sha256": str, "windows": int, "seq_len": int, "held_out": bool, "dtype": str}
    if not isinstance(evaluation, dict) or not all(isinstance(evaluation.get(k), t) for k, t in kinds.items()):
        raise GrailError(f"{file} records an evaluation that grail cannot read; name --data yourself")
    return evaluation


def _windows(model: Decoder, data: str | None, samples: int | None, seq_len: int | None, recorded: dict) -> Windows:
    """The recorded windows, unless something else is asked for; a new length takes all the windows there are."""
    repeats = bool(recorded) and seq_len in (None, recorded["seq_len"])
    wanted = samples or (recorded["windows"] if repeats else None)
    source = data or recorded.get("data", "builtin")
    found = evaluation_windows(
        source,
        lambda: load_tokenizer(model.source.path),
        model.config.vocab_size,
        seq_len=seq_len or recorded.get("seq_len"),
        samples=wanted,
        held_out=recorded.get("held_out", False),
        option="--data",
    )
    if found is None:
        raise GrailError(f"--data {source} holds less than one window; choose a smaller --seq-len")
    if repeats and wanted == recorded["windows"] and found.sha256 != recorded["sha256"]:
        raise GrailError(
            f"{model.source.path / 'grail.json'} records other text under the name {source} (another Python version, "
            f"or a changed file): its perplexity cannot be repeated here; name the data with --data"
        )
    return found


def _add_speed(models: dict, folders: dict[str, Path], speed: bool, prompt: str | None, dtype: torch.dtype) -> None:
    from .evaluation import speed as plain

    loaded = plain.load_plain(folders, dtype)
    if speed:
        for label, measured in plain.speed(loaded).items():
            models[label] |= measured
    if prompt:
        for label, folder in folders.items():
            models[label]["sample"] = plain.sample(loaded[label], folder, prompt)


def _size(source: SafetensorsFolder) -> dict:
    infos = [source.info(name) for name in source.names()]
    return {"parameters": sum(math.prod(i.shape) for i in infos), "bytes": sum(i.nbytes for i in infos)}
