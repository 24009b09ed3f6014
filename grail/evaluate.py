"""`grail eval`: perplexity of any folder of a supported family, on what grail.json records or on other data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from .calibration import Windows, evaluation_windows
from .calibration.text import default_length
from .calibration.tokenizer import load_tokenizer
from .checkpoint.locate import locate
from .checkpoint.reader import SafetensorsFolder, read_json
from .errors import GrailError
from .evaluation.perplexity import perplexity
from .families import open_family
from .progress import Progress


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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, size and (asked for) speed of `model`, and of a second one beside it.

    Without `data` the evaluation that grail.json records is repeated: same source, windows and compute dtype; a
    folder without that record is evaluated on the built-in text. Raises GrailError for bad input.
    """
    progress = progress or Progress()
    for option, value, least in (("--samples", samples, 1), ("--seq-len", seq_len, 2)):
        if value is not None and value < least:
            raise GrailError(f"{option} must be at least {least}; got {value}")
    folders = {model: locate(model).folder}
    if against:
        folders[against] = locate(against).folder
    recorded = _recorded(folders[model]) if data is None else {}
    data = data or recorded.get("data", "builtin")
    samples = samples or recorded.get("windows")
    seq_len = seq_len or recorded.get("seq_len") or default_length(data)
    dtype = dtype or recorded.get("dtype")
    windows = _windows(folders[model], data, samples, seq_len)
    if data == recorded.get("data") and recorded["windows"] == samples and recorded["seq_len"] == seq_len:
        _same_text(windows, recorded, folders[model])
    compute = getattr(torch, dtype) if dtype else None
    models = {}
    for label, folder in folders.items():
        opened = open_family(folder, dtype=compute)
        size = _size(opened.source)
        models[label] = {
            "perplexity": perplexity(opened, windows.ids, track=progress.layers(f"evaluating {label}")),
            **size,
        }
    if speed or prompt:
        from .evaluation.speed import speed as measure

        for label, measured in measure(folders, prompt, compute or torch.float32).items():
            models[label] |= measured if speed else {"sample": measured["sample"]}
    count, length = windows.ids.shape
    return {"schema_version": 1, "data": data, "windows": count, "seq_len": length, "models": models}


def _recorded(folder: Path) -> dict:
    if not (folder / "grail.json").exists():
        return {}
    document = read_json(folder / "grail.json")
    evaluation, recipe = document.get("evaluation"), document.get("recipe")
    if evaluation is None:
        return {}
    sound = isinstance(evaluation, dict) and isinstance(recipe, dict)
    if not sound or not {"data", "sha256", "windows", "seq_len"} <= set(evaluation):
        raise GrailError(f"{folder / 'grail.json'} records an evaluation that grail cannot read; name --data yourself")
    return evaluation | {"dtype": recipe.get("dtype")}


def _windows(folder: Path, data: str, samples: int | None, seq_len: int) -> Windows:
    vocabulary = read_json(folder / "config.json").get("vocab_size", 0)
    found = evaluation_windows(
        data, lambda: load_tokenizer(folder), vocabulary, seq_len=seq_len, samples=samples, option="--data"
    )
    if found is None:
        raise GrailError(f"--data {data} holds less than one window of {seq_len} tokens; choose a smaller --seq-len")
    return found


def _same_text(windows: Windows, recorded: dict, folder: Path) -> None:
    if windows.sha256 != recorded.get("sha256"):
        raise GrailError(
            f"{folder / 'grail.json'} records other text under the name {windows.source} (another Python version, or a "
            f"changed file): its perplexity cannot be repeated here; name the data with --data"
        )


def _size(source: SafetensorsFolder) -> dict:
    infos = [source.info(name) for name in source.names()]
    return {"parameters": sum(math.prod(i.shape) for i in infos), "bytes": sum(i.nbytes for i in infos)}
