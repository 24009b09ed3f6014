"""Accuracy, size, arithmetic and speed of networks in memory, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibration.images import ImageSet, open_images
from ..calibration.preprocessing import Preprocessing
from ..checkpoint.reader import read_json
from ..errors import GrailError
from ..evaluation.accuracy import accuracy
from ..evaluation.macs import latency, macs
from ..machine import usable_device
from ..report import SCHEMA_VERSION
from .architecture import Architecture, open_network
from .folder import load
from .names import NAMED, is_module_folder

BATCH = 64
ROUNDS = 20


def held_out(source: Any, asked: str | None, option: str = "--eval") -> ImageSet | None:
    """The labelled images to evaluate on: those asked for, else the test part of the calibration source, if it has one;
    None for "none". Raises GrailError for images without labels that were asked for."""
    if asked == "none":
        return None
    if asked is None:
        images = open_images(source, split="test") if isinstance(source, (str, Path)) else None
        return images if images is not None and images.held_out and images.labels is not None else None
    images = open_images(asked, split="test")
    if images.labels is None:
        raise GrailError(
            f"{option} {asked} has no labels: name a folder with one sub-folder for each class, or idx files"
        )
    return images


def accuracies(
    modules: dict[str, nn.Module],
    images: ImageSet,
    preprocessing: Preprocessing | None,
    device: torch.device,
    samples: int | None = None,
) -> dict:
    """{data, images, accuracy: {label: {top1, ...}}}, on at most `samples` images."""
    chosen = torch.arange(images.count) if samples is None else images.choose(samples, seed=0)
    found = {}
    for label, module in modules.items():
        batches = images.batches(preprocessing, BATCH, chosen)
        found[label] = accuracy(module, batches, images.labels[chosen], device)
    return {"data": images.name, "images": len(chosen), "accuracy": found}


def evaluate_folders(
    model: str,
    *,
    data: str | None,
    samples: int | None,
    against: str | None,
    speed: bool,
    weights: str | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Accuracy of a folder (of this kind), or of `timm/NAME` with weights, on labelled images; beside it that of
    another. data: default what grail.json records. Raises GrailError for bad input."""
    where = usable_device(device)
    modules = {}
    for label in filter(None, (model, against)):
        modules[label] = _opened(label, weights).to(where)
    preprocessing = _preprocessing(model, modules[model])
    source = data or _recorded(model) or "builtin"
    images = held_out(None, source, "--data")
    example = next(images.batches(preprocessing, 1)).to(where)
    told = accuracies(modules, images, preprocessing, where, samples)
    found = {}
    for label, module in modules.items():
        found[label] = told["accuracy"][label] | {
            "parameters": sum(p.numel() for p in module.parameters()),
            "macs": macs(module, example),
        }
    if speed:
        for label, seconds in latency(modules, example, ROUNDS).items():
            found[label]["milliseconds"] = {name: round(1e3 * value, 3) for name, value in seconds.items()}
    return {"schema_version": SCHEMA_VERSION, "data": told["data"], "images": told["images"], "models": found}


def _opened(model: str, weights: str | None) -> nn.Module:
    if is_module_folder(Path(model)):
        return load(model)
    if Architecture.parse(model) is None:
        raise GrailError(f"{model} is no folder of a compressed network, and not {NAMED}")
    return open_network(model, weights, {})[0]


def _preprocessing(model: str, module: nn.Module) -> Preprocessing | None:
    if is_module_folder(Path(model)):
        recorded = read_json(Path(model) / "config.json").get("preprocessing")
        return recorded and Preprocessing.from_json(recorded)
    return Architecture.parse(model).preprocessing(module)


def _recorded(model: str) -> str | None:
    file = Path(model) / "grail.json"
    evaluation = read_json(file).get("evaluation") if file.is_file() else None
    return evaluation.get("data") if isinstance(evaluation, dict) else None
