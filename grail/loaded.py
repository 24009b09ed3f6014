"""A loaded language model as the folder that a run reads, and what is wrong with it by the name of its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .bars import without_warnings
from .errors import GrailError
from .modules.given import check_module

SAID = 300
"""Characters of what transformers says at most."""


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model, and its tokenizer or None, as safetensors. Raises GrailError for a model without a language
    model's head, without data, or that transformers does not save."""
    name = type(model).__name__
    if isinstance(model, nn.Module):
        check_module(model)
        if getattr(model, "get_output_embeddings", lambda: model)() is None:
            raise GrailError(
                f"{name} predicts no tokens; give the model with its head, as AutoModelForCausalLM loads it"
            )
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise GrailError(f"tokenizer must be one of transformers; got {type(tokenizer).__name__}")
    try:
        with without_warnings(), _any_generation(model, folder):
            model.save_pretrained(folder)
    except (ValueError, RuntimeError, TypeError, NotImplementedError, LookupError) as error:
        said = " ".join(str(error).split())
        said = said if len(said) <= SAID else f"{said[:SAID]} ..."
        raise GrailError(f"{name} cannot be saved by transformers: {said}") from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextmanager
def _any_generation(model: Any, folder: Path) -> Iterator[None]:
    """Also what transformers would not save of a generation config, such as a temperature without do_sample: in a
    folder it is taken as it is."""
    own = getattr(model, "generation_config", None)
    if not isinstance(own, GenerationConfig) or _is_valid(own):
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
    own.to_json_file(folder / GENERATION_CONFIG_NAME, use_diff=True)


def _is_valid(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True


def trained_like(narrower: nn.Module, model: nn.Module) -> None:
    """Parameters that were frozen stay so, in place; a new bias is as the weight beside it."""
    trained = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in narrower.named_parameters():
        weight = f"{name.rpartition('.')[0]}.weight"
        parameter.requires_grad_(trained.get(name, trained.get(weight, True)))


@contextmanager
def told_as(name: str, folder: Path) -> Iterator[None]:
    """What is wrong with a folder that nobody gave is told of what was given."""
    try:
        yield
    except GrailError as error:
        if str(folder) not in str(error):
            raise
        said = str(error).replace(str(folder / "config.json"), f"{name}'s config")
        raise type(error)(said.replace(str(folder), name)) from error
