"""Calibration inputs of a network in memory: images from anywhere, or a tensor of any shape as the network reads it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grail_kernels.inputs import all_finite

from ..calibration.images import open_images
from ..calibration.preprocessing import Preprocessing
from ..errors import GrailError, first_line
from ..recipe import FEWEST_TRIALS
from .recipe import ModuleRecipe

FEWEST_INPUTS, ENOUGH_INPUTS = 2 * FEWEST_TRIALS, 16
"""Of fewer none can be spared to choose by; and from so many on the stream is aimed at unasked (docs/results.md)."""


def calibration_inputs(
    recipe: ModuleRecipe, preprocessing: Preprocessing | None
) -> tuple[list[Tensor], dict, list[str] | None]:
    """`samples` inputs drawn with the seed, in batches; what they are; names of classes where images have some. Raises
    GrailError naming what cannot be read."""
    given = recipe.calibration
    if (
        isinstance(given, (list, tuple))
        and given
        and all(isinstance(t, Tensor) and t.is_floating_point() for t in given)
    ):
        join = torch.stack if all(t.dim() == 3 for t in given) else torch.cat  # single images [C, H, W], or batches
        given = join(list(given))
    if hasattr(given, "__iter__") and not isinstance(given, (str, Path, list, tuple, dict, Tensor)):
        given = _loaded(given, recipe.samples)
    if isinstance(given, Tensor) and given.is_floating_point():
        return _tensors(given, recipe)
    images = open_images(given, limit=recipe.samples)
    chosen = images.choose(recipe.samples, recipe.seed)
    batches = list(images.batches(preprocessing or _not_prepared, recipe.batch, chosen))
    told = {"source": images.name, "sha256": images.sha256(chosen), "images": len(chosen)}
    return batches, told | {"size": list(batches[0].shape[1:])}, images.classes


def _loaded(batches: Iterable[Any], samples: int) -> Any:
    """Of a loader whose batches are no images, with targets or without: so many inputs in one tensor."""
    items = iter(batches)
    first = next(items, None)
    rows = _inputs_of(first)
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or rows.dim() in (0, 1, 3, 4):
        return itertools.chain([first], items)
    found = [rows]
    while sum(map(len, found)) < samples and (item := next(items, None)) is not None:
        found.append(_inputs_of(item))
    try:
        return torch.cat(found)[:samples]
    except (RuntimeError, TypeError) as error:
        raise GrailError(f"calibration: batches that cannot be joined ({first_line(error)})") from error


def _inputs_of(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and item else item


def _tensors(given: Tensor, recipe: ModuleRecipe) -> tuple[list[Tensor], dict, None]:
    if given.dim() < 2 or not len(given):
        raise GrailError(f"calibration: inputs are stacked along the first axis, got a tensor of {list(given.shape)}")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(recipe.seed))
    chosen = given.detach()[order[: recipe.samples].sort().values.to(given.device)]
    if not all_finite(chosen):
        raise GrailError("calibration: the inputs given in Python hold NaN or infinity")
    content = chosen.cpu().contiguous().flatten().view(torch.uint8).numpy()
    told = {"source": "given in Python", "sha256": hashlib.sha256(content).hexdigest(), "images": len(chosen)}
    return list(chosen.split(recipe.batch)), told | {"size": list(chosen.shape[1:])}, None


def parted(batches: list[Tensor], recipe: ModuleRecipe) -> tuple[list[Tensor], list[Tensor]]:
    """(inputs that enter the statistics, inputs that only decide between candidates), in batches: of those drawn, which
    are FEWEST_INPUTS or more, some at random, since files often lie in order of their classes."""
    total = sum(map(len, batches))
    count = min(recipe.trial_windows, max(total // recipe.TRIALS_EVERY, FEWEST_TRIALS))
    if not count:
        return batches, []
    everything = torch.cat(batches)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(recipe.seed)).to(everything.device)
    parts = (everything[some.sort().values] for some in (order[:-count], order[-count:]))
    return tuple(list(part.split(recipe.batch)) for part in parts)


def _not_prepared(_: Tensor) -> Tensor:
    raise GrailError(
        "calibration images of whole numbers need preprocessing=grail.Preprocessing(...); or give calibration= as "
        "floats, as the network reads them (in a folder of transformers, preprocessor_config.json says it)"
    )
