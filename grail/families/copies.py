"""Copies of modules that are given in Python, whatever lies in their attributes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrailError, circumstance, first_line


def copied(module: nn.Module) -> nn.Module:
    """A copy. What a forward has left in an attribute is copied without its graph, which deepcopy refuses. Raises
    GrailError naming an attribute that cannot be copied."""
    try:
        return copy.deepcopy(module, _without_graphs(module))
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        if circumstance(error):
            raise  # no memory is no fault of the network
        name, value = _culprit(module)
        raise GrailError(
            f"the network cannot be copied: {name}, a {type(value).__name__}, refuses it ({first_line(error)}); take "
            f"it off the network"
        ) from error


def _without_graphs(module: nn.Module) -> dict[int, Any]:
    """What deepcopy is to put in the place of tensors that it refuses, computed or sparse ones, by their identity."""
    seen: set[int] = set()
    tensors = [tensor for inner in module.modules() for tensor in _tensors(vars(inner), seen)]
    refused = (tensor for tensor in tensors if not tensor.is_leaf or tensor.layout != torch.strided)
    return {id(tensor): tensor.detach().clone() for tensor in refused}


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """Those in a value and the containers in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
        seen.add(id(value))
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner, seen)


def _culprit(module: nn.Module) -> tuple[str, Any]:
    """The name and the value of the first attribute that cannot be copied by itself; the module where there is none."""
    for name, inner in module.named_modules():
        given = {**vars(inner), **inner._buffers, **inner._parameters}
        for attribute, value in given.items():
            if isinstance(value, nn.Module) or attribute in ("_modules", "_buffers", "_parameters"):
                continue
            try:
                copy.deepcopy(value, _without_graphs(module))
            except (TypeError, RuntimeError, ValueError, AttributeError):
                return f"its attribute {f'{name}.{attribute}'.removeprefix('.')}", value
    return "it", module
