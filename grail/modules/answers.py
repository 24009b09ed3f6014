"""What a network answers, and whether two answers are the same but for rounding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import GrailError, circumstance
from ..families.network import Network

TOLERANCE = 1e-3
TOLERANCE_OF_ENTRY = 1e-2
"""Of each entry of an output's last axis by its own norm, which may be one of few and small numbers."""
ULP, ROUNDING = 2**-22, 10
"""Relative change of weights that rounding could make, and how many times what it does to an output is no difference:
all of an output that is nothing in exact arithmetic."""
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What torch raises where shapes do not fit."""


class NotTaken(GrailError):
    """The network cannot run on the inputs that it is calibrated with, of this shape."""

    def __init__(self, shape: torch.Size, why: str):
        super().__init__(f"the network does not take calibration inputs {list(shape)}: {why}")
        self.shape, self.why = shape, why


def answer(run: Callable[[Tensor], Any], example: Tensor) -> Tensor:
    """All of `answers` in one."""
    return torch.cat([tensor.flatten() for tensor in answers(run, example)])


def answers(run: Callable[[Tensor], Any], example: Tensor) -> list[Tensor]:
    """The tensors of a network's output in float64. Raises NotTaken where it cannot run on the input, and GrailError
    where there are none, or one that is not dense."""
    try:
        found = run(example.clone())
    except REFUSALS as error:
        if circumstance(error):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotTaken(example.shape, what) from error
    tensors = [_numbers(t) for t in tree_leaves(found) if isinstance(t, Tensor)]
    if not tensors:
        raise GrailError(
            f"the network's output holds no tensor that can be seen (it is a {type(found).__name__}); let its forward "
            f"return tensors, or a list, tuple or dict of them"
        )
    return tensors


def _numbers(tensor: Tensor) -> Tensor:
    """In float64; of complex ones the real and imaginary parts along the last axis."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else "sparse"
        raise GrailError(
            f"the network's output holds a {kind} tensor, whose numbers cannot be compared; return dense ones"
        )
    if tensor.is_complex():
        parts = torch.view_as_real(tensor.resolve_conj())
        tensor = parts.flatten(-2) if parts.dim() > 1 else parts
    return tensor.double()


def of_floats(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers that are rounded, and neither indices nor flags."""
    return tensor.is_floating_point() or tensor.is_complex()


def rounding_of(network: Network, example: Tensor, found: Sequence[Tensor]) -> list[float]:
    """Measured with weights that are scaled by next to nothing, each by its own factor."""
    other = network.clone()
    for number, parameter in enumerate(filter(of_floats, other.module.parameters())):
        parameter.mul_(1 + ULP * (-1) ** number)
    changed = answers(other.run, example)
    if [tensor.shape for tensor in changed] != [tensor.shape for tensor in found]:
        return [0.0] * len(found)
    differences = ((a - b).masked_fill(a.isneginf() | b.isneginf(), 0) for a, b in zip(changed, found, strict=True))
    sizes = (torch.linalg.vector_norm(d).item() / max(d.numel(), 1) ** 0.5 for d in differences)
    return [ROUNDING * size if math.isfinite(size) else 0.0 for size in sizes]


def are_different(expected: Sequence[Tensor], found: Sequence[Tensor], rounding: Sequence[float]) -> bool:
    """Whether two lists of a network's `answers` are."""
    if not len(expected) == len(found) == len(rounding):
        return True
    return any(map(_is_different, expected, found, rounding))


def _is_different(expected: Tensor, found: Tensor, least: float) -> bool:
    """least: what a number of an output may be off by rounding."""
    if found.shape != expected.shape:
        return True
    masked = expected.isneginf()
    if not torch.equal(masked, found.isneginf()):
        return True
    if masked.any():
        expected, found = expected.masked_fill(masked, 0), found.masked_fill(masked, 0)
    change = found - expected
    if _exceeds(change.flatten(), expected.flatten(), TOLERANCE, least):
        return True
    several = expected.dim() > 1 and expected.numel() > expected.shape[-1]  # one number by itself may be next to zero
    return several and _exceeds(change.flatten(0, -2), expected.flatten(0, -2), TOLERANCE_OF_ENTRY, least)


def _exceeds(change: Tensor, expected: Tensor, tolerance: float, least: float) -> bool:
    """Whether a change does, along the first axis, anywhere on the others."""
    change, size = (torch.linalg.vector_norm(tensor, dim=0) for tensor in (change, expected))
    return not bool((change <= tolerance * size + least * len(expected) ** 0.5).all())
