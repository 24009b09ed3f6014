"""Accuracy, size, arithmetic and speed of networks in memory, side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.images import ImageSet, open_images
from ..calibration.preprocessing import Preprocessing
from ..checkpoint.reader import read_json
from ..errors import GrailError, circumstance, first_line
from ..evaluation.accuracy import accuracy, dtype_of, evaluating
from ..evaluation.linear_probe import features_of, linear_probe
from ..evaluation.macs import latency, macs
from ..evaluation.zero_shot import TEMPLATES, ZeroShot, calls_of, features, is_clip, read_lines, read_templates
from ..families.network import IMAGES
from ..machine import usable_device
from ..report import SCHEMA_VERSION
from ..surroundings import undisturbed
from .answers import REFUSALS
from .architecture import Architecture, open_network
from .export import Encoder
from .folder import load
from .names import NAMED, is_module_folder
from .stream import given_to
from .towers import Tokenizer

log = logging.getLogger("grail")

BATCH = 64
ROUNDS = 20


def held_out(source: Any, asked: str | None, option: str = "--eval") -> ImageSet | None:
    """The labelled images to evaluate on: those asked for, else the test part of the calibration source, if it has one;
    None for "none". Raises GrailError for images without labels that were asked for."""
    if asked == "none" or (asked is None and isinstance(source, str) and source == "none"):
        return None
    if asked is None:
        images = open_images(source, split="test") if isinstance(source, (str, Path)) else None
        return images if images is not None and images.held_out and images.labels is not None else None
    try:
        images = open_images(asked, split="test")
    except GrailError as error:
        raise type(error)(f"{option} {error}" if str(error).startswith(str(asked)) else f"{option}: {error}") from error
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


def classifier(
    module: nn.Module,
    images: ImageSet,
    tokenizer: Tokenizer | None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] = TEMPLATES,
) -> nn.Module:
    """What gives logits of the images' classes: the module itself, or for a CLIP the zero-shot classifier of the names
    in `classes`, else of those that the images or their labels have. Raises GrailError where those do not fit."""
    if not is_clip(module):
        return module
    check_reads(tokenizer)
    count = int(images.labels.max()) + 1
    names = list(classes or images.classes or map(str, range(count)))
    if len(names) < count:
        raise GrailError(f"{images.name} has {count} classes, {len(names)} names are given; name each, one to a line")
    return ZeroShot(module, tokenizer, names, templates)


def check_reads(tokenizer: Tokenizer | None) -> None:
    """Raises GrailError where a CLIP has no tokenizer for the names of the classes."""
    if tokenizer is None:
        raise GrailError("zero-shot accuracy needs the network's tokenizer: give tokenizer=, or --eval none")


@undisturbed()
def evaluate_folders(
    model: str,
    *,
    data: str | None,
    samples: int | None,
    against: str | None,
    speed: bool,
    weights: str | None = None,
    classes: str | None = None,
    templates: str | None = None,
    probe: bool = False,
    device: str = "auto",
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Accuracy of a folder (of this kind), or of `timm/NAME` with weights, on labelled images; beside it that of
    another. Each reads the images as its own preprocessing makes them. data: default what grail.json records; classes,
    templates: files for the zero-shot accuracy of a CLIP; probe: also that of a linear classifier on the features;
    options: for the factory of what is named. Raises GrailError for bad input."""
    where = usable_device(device)
    labels = list(filter(None, (model, against)))
    if len(set(labels)) < len(labels):
        raise GrailError(f"--against {against} is the model itself; name another, or leave it out")
    for option, given in (("--weights", weights is not None), ("--model-option", bool(options))):
        if given and all(Path(label).is_dir() for label in labels):
            raise GrailError(f"{option}: {model} is a folder with weights of its own; leave out {option}")
    modules = {label: _opened(label, weights, options or {}).to(where) for label in labels}
    for option, value in (("--classes", classes), ("--templates", templates)):
        if value is not None and not any(map(is_clip, modules.values())):
            raise GrailError(f"{option} is for networks that read text; {model} is a plain classifier")
    prepared = {label: _preprocessing(label, module) for label, module in modules.items()}
    source = data or _recorded(model) or "builtin"
    images = held_out(None, source, "--data")
    if images is None:
        for option, value in (("--classes", classes), ("--templates", templates)):
            if value is not None:
                raise GrailError(f"{option} is for images: name some with --data")
        return _without_data(modules, prepared, where, speed, probe)
    names = read_lines(classes, "--classes") if classes else None
    judged = {
        label: classifier(module, images, _tokenizer(label), names, read_templates(templates))
        for label, module in modules.items()
    }
    found, examples = {}, {}
    for label, module in modules.items():
        with _about(label, labels):
            examples[label] = _example(judged[label], images, prepared[label], where)
            told = accuracies({label: judged[label]}, images, prepared[label], where, samples)
            found[label] = told["accuracy"][label] | _sizes(module, examples[label])
            if probe:
                found[label]["probe"] = _probed(module, source, images, prepared[label], where, samples)
    if speed:
        _time(found, judged, examples)
    return {"schema_version": SCHEMA_VERSION, "data": told["data"], "images": told["images"], "models": found}


@contextmanager
def _about(label: str, labels: Sequence[str]) -> Iterator[None]:
    """Let what is refused say of which of several networks."""
    try:
        yield
    except GrailError as error:
        if len(labels) == 1 or label in str(error):
            raise
        raise type(error)(f"{label}: {error}") from error


def _example(module: nn.Module, images: ImageSet, preprocessing: Preprocessing | None, where: torch.device) -> Tensor:
    """[1, C, H, W], the first image. Raises GrailError where the module does not take it, as may be with floats, which
    are taken as preprocessed already."""
    example = next(images.batches(preprocessing, 1)).to(where, dtype_of(module))
    try:
        with evaluating(module):
            module(example)
    except REFUSALS as error:
        if circumstance(error):
            raise
        raise GrailError(
            f"{images.name}: the network does not take images {list(example.shape[1:])} ({first_line(error)}); give "
            f"those that it was made for"
        ) from error
    return example


def _without_data(
    modules: dict[str, nn.Module],
    prepared: dict[str, Preprocessing | None],
    where: torch.device,
    speed: bool,
    probe: bool,
) -> dict[str, Any]:
    """What of evaluate_folders needs no images but one, of which only the size counts. Without preprocessing that size
    is not known, and parameters are all there is."""
    if probe:
        raise GrailError("--probe measures on images: name them with --data, or leave out --data none")
    found, examples = {}, {}
    for label, module in modules.items():
        preprocessing = prepared[label]
        if preprocessing is not None:
            shape = (1, preprocessing.channels, *preprocessing.size)
            examples[label] = torch.zeros(shape, device=where, dtype=dtype_of(module))
        elif speed:
            raise GrailError(f"--speed: of which size the images of {label} are is not recorded: name some with --data")
        found[label] = _sizes(module, examples.get(label))
    if speed:
        timed = {label: Encoder(module, IMAGES) if is_clip(module) else module for label, module in modules.items()}
        _time(found, timed, examples)
    return {"schema_version": SCHEMA_VERSION, "models": found}


def _sizes(module: nn.Module, example: Tensor | None) -> dict[str, Any]:
    found = {"parameters": sum(p.numel() for p in module.parameters())}
    if example is None:
        return found
    try:
        return found | {"macs": macs(module, example.to(dtype_of(module)), (calls_of(module) or ("",))[0])}
    except Exception as error:  # whatever a forward raises under torch's counter
        if circumstance(error):
            raise
        log.warning("multiply-accumulates are not counted: %s", first_line(error))
        return found


def _time(found: dict[str, dict[str, Any]], modules: dict[str, nn.Module], examples: dict[str, Tensor]) -> None:
    """Milliseconds, into what was found of each."""
    for label, seconds in latency(modules, examples, ROUNDS).items():
        found[label]["milliseconds"] = {name: round(1e3 * value, 3) for name, value in seconds.items()}


def _probed(
    module: nn.Module,
    source: Any,
    test: ImageSet,
    preprocessing: Preprocessing | None,
    where: torch.device,
    samples: int | None = None,
) -> dict:
    """A linear probe on at most `samples` images of either part."""
    train = open_images(source)
    if not test.held_out or train.labels is None:
        raise GrailError(
            "--probe: the data needs a labelled part to train on beside the test part (folders train, test)"
        )
    run = partial(_penultimate, module)
    parts = []
    for images in (train, test):
        chosen = torch.arange(images.count) if samples is None else images.choose(samples, seed=0)
        batches = (batch.to(dtype_of(module)) for batch in images.batches(preprocessing, BATCH, chosen))
        parts.append((features_of(run, batches, where), images.labels[chosen]))
    return linear_probe(*parts)


def _penultimate(module: nn.Module, x: Tensor) -> Tensor:
    """A CLIP's image features, else what the last linear layer reads."""
    if is_clip(module):
        return features(getattr(module, calls_of(module)[0])(x))
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise GrailError("--probe: the network has no linear layer whose input would be its features")
    name, layer = layers[-1]
    return given_to(layer, name, module, x)[0]


def _tokenizer(model: str) -> Tokenizer | None:
    if is_module_folder(Path(model)):
        found = read_json(Path(model) / "config.json").get("architecture")
        known = found and Architecture.from_json(found, Path(model))
    else:
        known = Architecture.parse(model)
    return known and known.tokenizer()


def _opened(model: str, weights: str | None, options: dict[str, Any]) -> nn.Module:
    if is_module_folder(Path(model)):
        return load(model)
    if Architecture.parse(model) is None:
        raise GrailError(f"{model} is no folder of a compressed network, and not {NAMED}")
    return open_network(model, *((None, {}) if Path(model).is_dir() else (weights, options)))[0]


def _preprocessing(model: str, module: nn.Module) -> Preprocessing | None:
    if is_module_folder(Path(model)):
        recorded = read_json(Path(model) / "config.json").get("preprocessing")
        return recorded and Preprocessing.from_json(recorded)
    return Architecture.parse(model).preprocessing(module)


def _recorded(model: str) -> str | None:
    file = Path(model) / "grail.json"
    evaluation = read_json(file).get("evaluation") if file.is_file() else None
    return evaluation.get("data") if isinstance(evaluation, dict) else None
