"""A loaded language model as the folder that a run reads, and what is wrong with it by the name of its class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .bars import without_warnings
from .errors import GrailError, first_line
from .evaluation.perplexity import logits
from .families import open_family
from .modules.given import check_module

SAID = 300
"""Characters of what transformers says at most."""
KNOWN = ("torch", "transformers", "transformers_modules", "grail")
"""Packages whose modules compute what their weights say."""
PROBED = 16
"""Tokens that are run through a model with modules of another kind."""
OFF, OFF_HALF = 1e-3, 0.05
"""How far, relatively, its logits may be from those of its weights; in 16 bits as well."""


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


@torch.no_grad()
def check_function(model: nn.Module, folder: Path) -> None:
    """Raises GrailError naming a module where a model, saved in `folder`, computes something else than the weights
    there say: hooks, adapters and forwards of somebody's own are not saved with it."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile was given, which computes the same without waiting
    odd = next((f"{name or type(module).__name__} {what}" for name, module in model.named_modules()
                if (what := _own(module))), None)  # fmt: skip
    if odd is None:
        return
    family = open_family(folder)
    length = min(PROBED, family.config.max_position_embeddings)
    ids_BL = torch.randint(family.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        inputs = {"input_ids": ids_BL.to(next(model.parameters()).device), "use_cache": False, "return_dict": True}
        given_BLV = model(**inputs).logits.float().cpu()
    except Exception as error:
        raise GrailError(f"{folder}: {odd}, and cannot be run to see what that does ({first_line(error)})") from error
    finally:
        for module in trained:
            module.training = True
    if (off := _off(given_BLV, logits(family, ids_BL))) > (OFF if _is_wide(model) else OFF_HALF):
        raise GrailError(
            f"{folder}: {odd}, and its weights alone compute something else (logits {off:.1%} off), which is all that "
            f"can be saved; merge adapters into the weights and take hooks away, or compress a folder of the weights"
        )


def _own(module: nn.Module) -> str | None:
    """What a module has that a saved one has not."""
    if module._forward_hooks or module._forward_pre_hooks:
        return "has a hook"
    if "forward" in vars(module):
        return "has a forward of its own"
    package = type(module).__module__.partition(".")[0]
    return None if package in KNOWN else f"has a class of its own ({type(module).__name__})"


def _is_wide(model: nn.Module) -> bool:
    return all(parameter.itemsize >= 4 for parameter in model.parameters())


def _off(given: Tensor, wanted: Tensor) -> float:
    """Relative distance; infinite where that is no number."""
    off = ((given - wanted).norm() / wanted.norm()).item()
    return off if off == off else float("inf")


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
