"""Networks of transformers' own classes: from a folder or a module to what builds them anew, weights, tokenizer.

A config.json is data from anywhere. The class is one of CLASSES, and of the configuration only those fields are kept
that its class defines, so that nothing in it can name code, a file or a repository.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bars import without_bars
from ..checkpoint.reader import SafetensorsFolder, read_json
from ..documents import check_counts, check_writable
from ..errors import GrailError, first_line

LIBRARY = "transformers"
POOLED = ("ViTModel", "DeiTModel")
"""Classes whose pooler may be left out (add_pooling_layer)."""
CLASSES = (
    *POOLED, "ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher",
    "Dinov2Model", "Dinov2ForImageClassification", "CLIPModel", "CLIPForImageClassification", "CLIPVisionModel",
    "CLIPVisionModelWithProjection", "CLIPTextModel", "CLIPTextModelWithProjection",
)  # fmt: skip
OPTIONS = {"config": dict, "attention": str, "add_pooling_layer": bool}
ATTENTION = "eager"
"""The one implementation of attention that is recorded: other names may be those of repositories."""
LABELS = {"id2label", "label2id", "num_labels"}
BEYOND = {"head_dim": int, "output_hidden_states": bool}
"""What a forward reads though no vision configuration declares it."""
PARTS = {"text_config": "CLIPTextConfig", "vision_config": "CLIPVisionConfig"}
SIZES = {
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "num_channels", "max_position_embeddings", "vocab_size", "projection_dim",
}  # fmt: skip
DROPPED = "drop"
"""In the name of every share of activations or blocks that training leaves out."""
MOST_LAYERS = 10**4
UNREAD = (".position_ids", "mask_token", "pooler.dense.weight", "pooler.dense.bias")
"""Endings of tensors that older or larger classes store and these do not read."""
VOCABULARIES = ("tokenizer.json", "vocab.json")


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises GrailError for a class or an option that is not known."""
    class_of(name)
    for key, value in options.items():
        if key not in OPTIONS or not isinstance(value, OPTIONS[key]) or (key == "attention" and value != ATTENTION):
            raise GrailError(f"{LIBRARY}/{name}: option {key} is not one of {', '.join(OPTIONS)}, or no such value")
    if "config" not in options:
        raise GrailError(f"{LIBRARY}/{name}: the configuration is missing")


def class_of(name: object) -> type:
    """The class; raises GrailError for one that is not of CLASSES."""
    if name not in CLASSES:
        raise GrailError(f"architecture {name} is not supported; supported: {', '.join(CLASSES)}")
    import transformers

    return getattr(transformers, str(name))


def named_in(folder: Path) -> tuple[str, dict[str, Any]]:
    """(class, options) of a folder's config.json. Raises GrailError naming the file and a class that is not known."""
    file = folder / "config.json"
    found = read_json(file)
    architectures = found.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    try:
        kind = class_of(name).config_class.model_type
        if found.get("model_type") != kind:
            raise GrailError(f"{name} has the model type {kind}, not {found.get('model_type')}")
        return name, {"config": plain_config(_config(name, found))}
    except GrailError as error:
        raise GrailError(f"{file}: {error}") from error


def options_of(module: nn.Module) -> dict[str, Any] | None:
    """What builds a module's class with its widths anew; None for a class of the user's own, and for a module whose
    tensors are not those of its configuration."""
    name = type(module).__name__
    if name not in CLASSES or type(module) is not class_of(name):
        return None
    options: dict[str, Any] = {"config": plain_config(module.config)}
    if getattr(module.config, "_attn_implementation", None) == ATTENTION:
        options["attention"] = ATTENTION
    if name in POOLED and module.pooler is None:
        options["add_pooling_layer"] = False
    with torch.device("meta"):
        made = build(name, options)
    return options if _shapes(made) == _shapes(module) else None


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def plain_config(config: Any) -> dict[str, Any]:
    """The fields of a configuration object that its class defines, as plain JSON. Raises GrailError for a value that
    none can hold."""
    kind = type(config)
    try:
        told = json.loads(json.dumps(config.to_dict()))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise GrailError(f"{kind.__name__} does not hold together ({first_line(error)}); correct it") from error
    kept = _kept(kind, told)
    check_writable(kept, kind.__name__)
    return kept


def _kept(kind: type, found: dict[str, Any]) -> dict[str, Any]:
    import transformers

    common = {field.name for field in fields(transformers.PreTrainedConfig)}
    own = ({field.name for field in fields(kind)} - common) | LABELS | set(BEYOND)
    kept = {key: value for key, value in found.items() if key in own and not key.startswith("_")}
    for part, name in PARTS.items():
        for key in (part, f"{part}_dict") if part in own else ():
            if isinstance(found.get(key), dict):
                kept[key] = _kept(getattr(transformers, name), found[key])
    return kept


def _config(name: str, found: dict[str, Any]) -> Any:
    """The configuration object. Raises GrailError where transformers refuses a value."""
    kind = class_of(name).config_class
    from huggingface_hub.errors import StrictDataclassError

    check_counts(found, f"{LIBRARY}/{name}", MOST_LAYERS)
    _check_sizes(name, found)
    check_writable(_kept(kind, found), f"{LIBRARY}/{name}")
    try:
        return kind(**_kept(kind, found))
    except (StrictDataclassError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        said = " ".join(str(error).split())
        raise GrailError(f"{LIBRARY}/{name}: its configuration does not hold together ({said})") from error


def _check_sizes(name: str, found: dict[str, Any]) -> None:
    """Raises GrailError for a size below 1, a share of what is dropped above it, and what is no number: of which some
    show only when the network runs."""
    for key, value in found.items():
        if isinstance(value, dict) and key in PARTS:
            _check_sizes(name, value)
        if key in BEYOND and value is not None and type(value) is not BEYOND[key]:
            raise GrailError(f"{LIBRARY}/{name}: {key} is {value!r}, which is no {BEYOND[key].__name__}")
        wrong = isinstance(value, float) and not math.isfinite(value)
        if DROPPED in key and isinstance(value, (int, float)):
            wrong = not 0 <= value <= 1
        if wrong or (key in SIZES and type(value) is int and value < 1):
            raise GrailError(f"{LIBRARY}/{name}: its configuration makes no network ({key} is {value})")


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """The network with random weights, in evaluation mode. Raises GrailError for a configuration that makes none."""
    config = _config(name, options["config"])
    if "attention" in options:
        config._attn_implementation = options["attention"]
    with _making(name):
        return class_of(name)(config, **_pooling(options)).eval()


@contextmanager
def _making(name: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
        raise GrailError(f"{LIBRARY}/{name}: its configuration makes no network ({first_line(error)})") from error


def _pooling(options: dict[str, Any]) -> dict[str, bool]:
    return {key: options[key] for key in ("add_pooling_layer",) if key in options}


def opened(source: SafetensorsFolder, name: str, options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], str]:
    """(the network with a folder's weights, its options, their sha256): safetensors only, names as any version of
    transformers wrote them. Raises GrailError naming what is missing or does not fit."""
    tensors = {tensor: source.get(tensor) for tensor in source.names()}
    if name in POOLED and not any(tensor.startswith(("pooler.", "vit.pooler.", "deit.pooler.")) for tensor in tensors):
        options = options | {"add_pooling_layer": False}
    config = _config(name, options["config"])
    with _quiet(), _making(name):
        module, info = class_of(name).from_pretrained(
            None, config=config, state_dict=tensors, output_loading_info=True,
            ignore_mismatched_sizes=True, **_pooling(options),
        )  # fmt: skip
    unread = {tensor for tensor in info["unexpected_keys"] if not tensor.endswith(UNREAD)}
    mismatched = {tensor[0] if isinstance(tensor, tuple) else tensor for tensor in info["mismatched_keys"]}
    for what, names in (("lacks", info["missing_keys"]), ("holds another", mismatched | unread)):
        if names:
            few = f"{min(names)} ({len(names)} such tensors)"
            raise GrailError(f"{source.path} {what} {few}: these are not weights of {name} as config.json describes it")
    return module.eval(), options, source.sha256()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and load reports: what they tell is judged here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with without_bars(logging):
            yield
    finally:
        logging.set_verbosity(before)


def images_of(config: dict[str, Any]) -> tuple[int | None, Any]:
    """(channels, image_size) of the images that a network reads; None where it reads none."""
    found = config.get("vision_config", config)
    return found.get("num_channels"), found.get("image_size")


def text_length(config: dict[str, Any]) -> int | None:
    """Tokens of the longest text that a network reads; None where it reads none."""
    return config.get("text_config", config).get("max_position_embeddings")


@dataclass(frozen=True)
class Tokenizer:
    """Texts -> token ids int64 [N, length], by a tokenizer of transformers: cut and filled up to the length."""

    tokenizer: Any
    length: int

    def __call__(self, texts: list[str]) -> Tensor:
        """The ids of texts."""
        return self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).input_ids

    def save_pretrained(self, folder: Path) -> None:
        """Write its files."""
        with _quiet():
            self.tokenizer.save_pretrained(folder)


def as_tokenizer(tokenizer: Any, module: nn.Module) -> Any:
    """For a module that reads text: a tokenizer object of transformers as Texts -> ids; anything else as it is."""
    length = text_length(plain_config(module.config))
    return Tokenizer(tokenizer, length) if length and hasattr(tokenizer, "save_pretrained") else tokenizer


def tokenizer_of(folder: Path, length: int) -> Tokenizer | None:
    """The CLIP tokenizer in a folder; None without one. Raises GrailError naming the folder where it does not work."""
    if not any((folder / file).is_file() for file in VOCABULARIES):
        return None
    from transformers import CLIPTokenizer

    try:
        with _quiet():
            found = Tokenizer(CLIPTokenizer.from_pretrained(folder, local_files_only=True), length)
            found([""])  # one that cannot fill up a text says so only now
            return found
    except Exception as error:  # tokenizers raises bare Exceptions
        raise GrailError(f"{folder} has no usable tokenizer ({first_line(error)})") from error
