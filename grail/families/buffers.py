"""Buffers that a forward writes, such as counters, observers and caches: what it left there is nobody's result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def put_back(module: nn.Module, given: nn.Module) -> None:
    """Let a module that was copied from `given` and run hold its buffers again, but for statistics of BatchNorms: no
    forward in evaluation mode writes these."""
    there, copies = dict(given.named_modules()), {}
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) or type(there.get(name)) is not type(layer):
            continue
        for key, old in there[name]._buffers.items():
            if id(old) not in copies:
                copies[id(old)] = None if old is None else old.detach().clone()
            layer._buffers[key] = copies[id(old)]


@contextmanager
def kept_buffers(*modules: nn.Module) -> Iterator[None]:
    """After what is run within, the same tensors with the same numbers."""
    owners = [layer for module in modules for layer in module.modules()]
    before: list[tuple[nn.Module, str, Tensor | None]] = [(o, k, t) for o in owners for k, t in o._buffers.items()]
    held = {id(t): (t, t._version, t.detach().clone()) for *_, t in before if t is not None and not t.is_inference()}
    try:
        yield
    finally:
        for owner, key, tensor in before:
            owner._buffers[key] = tensor
        with torch.no_grad():
            for tensor, version, numbers in held.values():
                if tensor._version != version:
                    tensor.copy_(numbers)
