"""The arithmetic of a soup, in chunks, so that neither a network nor a large tensor is ever whole in memory.

Each chunk is x0 + (Σ (xi − x0)) / n in float64, xi in the order of the ingredients, then in x0's dtype. About x0 rather
than about zero, equal inputs give themselves to the last bit whatever their dtype, zeros' signs included.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grail_kernels.inputs import all_finite

from ..checkpoint.pieces import Piece
from ..errors import GrailError
from .inputs import Ingredient

ELEMENTS = 2**20
COUNTER = "num_batches_tracked"


def averaged(ingredients: list[Ingredient], name: str) -> Piece:
    """One tensor of the soup, in the shape and dtype that the first ingredient has. Reading its chunks raises
    GrailError for NaN or infinity and for whole numbers that differ; of BatchNorm's counters the largest counts."""
    info = ingredients[0].info(name)
    if info.dtype.is_floating_point:
        found = _means(ingredients, name)
    elif name.rpartition(".")[2] == COUNTER:
        found = _largest(ingredients, name)
    else:
        found = _common(ingredients, name)
    return Piece(name, info.dtype, info.shape, (chunk.view(torch.uint8) for chunk in found))


def check_finite(ingredient: Ingredient) -> None:
    """Raises GrailError naming the first tensor with NaN or infinity."""
    for name in ingredient.tensors.names():
        if ingredient.info(name).dtype.is_floating_point:
            for _ in _parts(ingredient, name):
                pass


def _parts(ingredient: Ingredient, name: str) -> Iterator[Tensor]:
    """The tensor's numbers, flat, at most ELEMENTS at a time, in the stored dtype."""
    dtype = ingredient.info(name).dtype
    for raw in ingredient.tensors.chunks(name, ELEMENTS * dtype.itemsize):
        part = raw.view(dtype)
        if dtype.is_floating_point and not all_finite(part):
            raise GrailError(f"{ingredient.path}: {name} holds NaN or infinity; leave this checkpoint out")
        yield part


def _means(ingredients: list[Ingredient], name: str) -> Iterator[Tensor]:
    first, *others = (_parts(one, name) for one in ingredients)
    for part in first:
        start = part.double()
        total = torch.zeros_like(start)
        for other in others:
            total += next(other).double() - start
        mean = torch.where(total == 0, start, start + total / len(ingredients)).to(part.dtype)
        if not all_finite(mean):
            raise GrailError(
                f"{name}: the average is too large for {part.dtype}, the dtype in {ingredients[0].path}; convert that "
                f"checkpoint to a wider one"
            )
        yield mean


def _largest(ingredients: list[Ingredient], name: str) -> Iterator[Tensor]:
    first, *others = (_parts(one, name) for one in ingredients)
    for part in first:
        for other in others:
            part = torch.maximum(part, next(other))
        yield part


def _common(ingredients: list[Ingredient], name: str) -> Iterator[Tensor]:
    first, *others = (_parts(one, name) for one in ingredients)
    for part in first:
        for one, other in zip(ingredients[1:], others, strict=True):
            if not torch.equal(part, next(other)):
                raise GrailError(
                    f"{name} holds whole numbers that differ between {ingredients[0].path} and {one.path}; they cannot "
                    f"be averaged: leave one of the two out"
                )
        yield part
