"""`grail eval`: perplexity of a folder, on what grail.json records or on other data; tasks, speed, memory."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .calibration import Windows, evaluation_windows
from .calibration.lengths import beyond_positions, longest_of
from .calibration.mixture import parts_of
from .calibration.tokenizer import has_tokenizer, load_tokenizer
from .checkpoint.locate import locate
from .checkpoint.reader import SafetensorsFolder
from .documents import read_json
from .errors import GrailError
from .evaluation.perplexity import perplexity
from .evaluation.speed import PREFILL_SHAPE
from .evaluation.tasks import Tasks
from .evaluation.whole import WholeModel, load_whole
from .families import open_family, supports
from .families.decoder import Decoder
from .machine import usable_device
from .progress import Progress
from .recipe import DTYPES
from .store import DiskStore
from .surroundings import undisturbed
from .workspace import Workspace, chunk_tokens

IN_MEMORY = 2**28
NO_DATA = "none"
COMPARED = 2**12
"""Tokens of which two tokenizers have to think alike."""
MOST = 2**31
"""Windows, and tokens of one."""


@undisturbed()
def evaluate(
    model: str,
    *,
    data: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    against: str | None = None,
    tasks: str | None = None,
    tasks_folder: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    speed: bool = False,
    prompt: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, size and (asked for) zero-shot tasks, speed and memory of `model`, and of a second one beside it:
    folders of GRAIL, or any causal language model of transformers in safetensors.

    Without `data` the evaluation that grail.json records is repeated: same source, windows and compute dtype; a
    folder without that record is evaluated on the built-in text; "none": no perplexity. A local text file named as
    `data` is read whole. tasks: names of lm-eval, with commas; limit, shots: evaluation.tasks. Tasks, speed and samples
    load the whole models. Raises GrailError for bad input.
    """
    progress = progress or Progress()
    for option, count, least in (("--samples", samples, 1), ("--seq-len", seq_len, 2)):
        if count is not None and not least <= count < MOST:
            raise GrailError(f"{option} must be at least {least} and less than {MOST}; got {count}")
    for option, value in (("--tasks-folder", tasks_folder), ("--limit", limit), ("--shots", shots)):
        if tasks is None and value is not None:
            raise GrailError(f"{option} goes with --tasks")
    if against == model:
        raise GrailError(f"--against {against} is the model itself; name another, or leave it out")
    asked = None if tasks is None else Tasks(tasks, folder=tasks_folder, limit=limit, shots=shots)
    folders = {model: locate(model).folder}
    if against:
        folders[against] = locate(against).folder
    recorded = _recorded(folders[model]) if data is None else {}
    dtype = dtype or recorded.get("dtype")
    if dtype not in (None, *DTYPES):
        raise GrailError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}")
    precision: dict[str, Any] = {"device": usable_device(device), "dtype": dtype and getattr(torch, dtype)}
    opened = {label: _open(folder, precision) for label, folder in folders.items()}
    models: dict[str, dict[str, Any]] = {label: _size(network.source) for label, network in opened.items()}
    found: dict[str, Any] = {"schema_version": 1}
    if asked or prompt:
        _check_tokenizers(folders, "--tasks" if asked else "--prompt")
    if asked:
        asked.fetch()
    if speed:
        _check_positions(opened)
    if data != NO_DATA:
        windows = _windows(opened[model], data, samples, seq_len, recorded)
        _check_same_tokens(opened, windows)
        number, length = windows.ids.shape
        for label, network in opened.items():
            if beyond := beyond_positions(length, network.config):
                progress.warn(f"{label}: {beyond}")
        found |= {"data": windows.source, "windows": number, "seq_len": length}
        for label, network in opened.items():
            models[label] = {"perplexity": _perplexity(network, windows, label, progress)} | models[label]
    opened.clear()
    if asked or speed or prompt:
        if precision["device"].type == "cpu":
            precision["dtype"] = precision["dtype"] or torch.float32
        for label, measured in _whole_models(folders, precision, asked, speed, prompt, progress).items():
            models[label] |= measured
    return found | {"models": models}


def _open(folder: Path, precision: dict[str, Any]) -> Decoder | WholeModel:
    """Layer by layer where a family knows the type, else whole."""
    return open_family(folder, **precision) if supports(folder) else WholeModel(folder, **precision)


def _perplexity(network: Decoder | WholeModel, windows: Windows, label: str, progress: Progress) -> float:
    if isinstance(network, WholeModel):
        progress.say(f"{label}: not of a family that is opened layer by layer; it is loaded whole")
        return network.perplexity(windows.ids, windows.weights)
    track = progress.layers(f"evaluating {label}")
    with _workspace(network, windows) as work:
        return perplexity(network, windows.ids, work, weights_NL=windows.weights, track=track)


def _whole_models(
    folders: dict[str, Path],
    precision: dict[str, Any],
    tasks: Tasks | None,
    speed: bool,
    prompt: str | None,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """By label: "tasks" (evaluation.tasks), rates and memory, "sample"."""
    from .evaluation import speed as plain
    from .evaluation.footprint import footprint

    found: dict[str, dict[str, Any]] = {label: {} for label in folders}
    if speed:  # before the models are in this process's memory
        for label, folder in folders.items():
            progress.say(f"measuring the memory of {label}")
            found[label] |= footprint(folder, **precision)
    loaded = {label: load_whole(folder, **precision) for label, folder in folders.items()}
    if speed:
        progress.say("measuring the speed")
        for label, measured in plain.speed(loaded).items():
            found[label] |= measured
    for label, folder in folders.items():
        if tasks:
            progress.say(f"{label}: {', '.join(tasks.names)}")
            found[label]["tasks"] = tasks.measure(loaded[label], load_tokenizer(folder), label)
        if prompt:
            found[label]["sample"] = plain.sample(loaded[label], folder, prompt)
    return found


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


def _recorded(folder: Path) -> dict[str, Any]:
    """The evaluation that grail.json records, {} where there is none."""
    file = folder / "grail.json"
    if not file.exists():
        return {}
    evaluation = read_json(file).get("evaluation")
    if evaluation is None:
        return {}
    kinds = {"data": str, "sha256": str, "windows": int, "seq_len": int, "held_out": bool, "dtype": str}
    known = isinstance(evaluation, dict) and all(type(evaluation.get(k)) is t for k, t in kinds.items())
    if not known or not (1 <= evaluation["windows"] < MOST and 2 <= evaluation["seq_len"] < MOST):
        raise GrailError(f"{file} records an evaluation that grail cannot read; name --data yourself")
    return evaluation


def _windows(
    model: Decoder | WholeModel, data: str | None, samples: int | None, seq_len: int | None, recorded: dict[str, Any]
) -> Windows:
    """The recorded windows, unless something else is asked for; a new length takes all the windows there are."""
    repeats = bool(recorded) and seq_len in (None, recorded["seq_len"])
    wanted = samples or (recorded["windows"] if repeats else None)
    source = data or recorded.get("data", "builtin")
    found = evaluation_windows(
        source,
        lambda: load_tokenizer(model.source.path),
        _vocabulary(model),
        seq_len=seq_len or recorded.get("seq_len"),
        samples=wanted,
        held_out=recorded.get("held_out", False),
        option="--data",
        longest=longest_of(model.config),
    )
    if found is None:
        raise GrailError(f"--data {source} holds less than one window; choose a smaller --seq-len")
    if repeats and wanted == recorded["windows"] and found.sha256 != recorded["sha256"]:
        raise GrailError(
            f"{model.source.path / 'grail.json'} records other text under the name {source} (another Python version, "
            f"or a changed file): its perplexity cannot be repeated here; name the data with --data"
        )
    return found


def _vocabulary(network: Decoder | WholeModel) -> int:
    return network.vocabulary if isinstance(network, WholeModel) else network.config.vocab_size


def _check_tokenizers(folders: dict[str, Path], option: str) -> None:
    """Raises GrailError where one lacks what the option needs, before anything is measured."""
    for label, folder in folders.items():
        if not has_tokenizer(folder):
            raise GrailError(f"{option}: {label} has no tokenizer files (tokenizer.json and others); put them there")


def _check_positions(networks: dict[str, Decoder | WholeModel]) -> None:
    """Raises GrailError where a network has fewer positions than --speed takes."""
    for label, network in networks.items():
        most = network.positions if isinstance(network, WholeModel) else None
        if most is not None and most < PREFILL_SHAPE[1]:
            raise GrailError(f"--speed reads texts of {PREFILL_SHAPE[1]} tokens, and {label} knows {most} positions")


def _check_same_tokens(networks: dict[str, Decoder | WholeModel], windows: Windows) -> None:
    """A perplexity is one by token: raises GrailError where a network does not have the tokens, or the second one
    others for the text."""
    for label, network in networks.items():
        if (most := int(windows.ids.max())) >= (size := _vocabulary(network)):
            raise GrailError(
                f"{label} has {size} tokens and the text has token id {most}; it was made for another model"
            )
    if len(networks) < 2 or all(part.endswith(".safetensors") for part in parts_of(windows.source)):
        return
    (first, one), (second, other) = networks.items()
    if not has_tokenizer(other.source.path):
        if _vocabulary(one) != _vocabulary(other):
            raise GrailError(
                f"{second} has no tokenizer, and a vocabulary of {_vocabulary(other)} where {first} has one of "
                f"{_vocabulary(one)}: put its tokenizer's files there"
            )
        return
    ours, theirs = (load_tokenizer(network.source.path) for network in (one, other))
    text = ours.decode(windows.ids.flatten()[:COMPARED], skip_special_tokens=True)
    if ours(text, add_special_tokens=False).input_ids != theirs(text, add_special_tokens=False).input_ids:
        raise GrailError(
            f"{second} has other tokens than {first}, so that their perplexities cannot be compared; measure each by "
            f"itself, or both with --data none --tasks"
        )


def _size(source: SafetensorsFolder) -> dict[str, Any]:
    infos = [source.info(name) for name in source.names()]
    return {"parameters": sum(math.prod(i.shape) for i in infos), "bytes": sum(i.nbytes for i in infos)}
