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

from ..calibration.given import readable
from ..calibration.images import open_images
from ..calibration.preprocessing import Preprocessing
from ..errors import GrailError, first_line
from ..recipe import FEWEST_TRIALS
from .recipe import ModuleRecipe

FEWEST_INPUTS, ENOUGH_INPUTS = 2 * FEWEST_TRIALS, 16
"""Of fewer none can be spared to choose by; and from so many on the stream is aimed at unasked (docs/results.md)."""
NOTHING = object()
"""What comes from a loader that is at its end."""


def calibration_inputs(
    recipe: ModuleRecipe, preprocessing: Preprocessing | None
) -> tuple[list[Tensor], dict, list[str] | None]:
    """`samples` inputs drawn with the seed, in batches; what they are; names of classes where images have some. Raises
    GrailError naming what cannot be read."""
    given = recipe.calibration
    if isinstance(given, (list, tuple)) and given and all(map(_is_ready, given)):
        given = _joined([readable(t, "calibration") for t in given])
    if hasattr(given, "__iter__") and not isinstance(given, (str, Path, list, tuple, dict, Tensor)):
        given = _loaded(given, recipe.samples)
    if _is_ready(given):
        return _tensors(given, recipe)
    images = open_images(given, limit=recipe.samples)
    chosen = images.choose(recipe.samples, recipe.seed)
    batches = list(images.batches(preprocessing or _not_prepared, recipe.batch, chosen))
    told = {"source": images.name, "sha256": images.sha256(chosen), "images": len(chosen)}
    return batches, told | {"size": list(batches[0].shape[1:])}, images.classes


def _is_ready(given: Any) -> bool:
    """Whether it goes into a network as it is: floats, and whole numbers [N, L], which are no images but tokens."""
    if not isinstance(given, Tensor) or given.dtype == torch.bool:
        return False
    return given.is_floating_point() or given.dim() == 2


def _loaded(batches: Iterable[Any], samples: int) -> Any:
    """Of a loader whose batches are no images, with targets or without: so many inputs in one tensor."""
    items = iter(batches)
    first = next(items, NOTHING)
    if first is NOTHING:
        raise GrailError("calibration: what was given in Python gives no batch; give at least one")
    rows = _inputs_of(first)
    if not _is_ready(rows) or rows.dim() in (0, 1, 3, 4):
        return itertools.chain([first], items)
    found, count = [], 0
    for number, item in enumerate(itertools.chain([first], items)):
        found.append(_rows(_inputs_of(item), number))
        count += len(found[-1])
        if count >= samples:
            break
    return _joined(found)[:samples]


def _rows(batch: Any, number: int) -> Tensor:
    if not isinstance(batch, Tensor) or not batch.dim():
        raise GrailError(f"calibration: batch {number} is no tensor of inputs; give floats in all batches")
    if not len(batch):  # a loader of nothing else would never end
        raise GrailError(f"calibration: batch {number} is empty; leave it out")
    return readable(batch, "calibration")


def _joined(parts: list[Tensor]) -> Tensor:
    """Single images [C, H, W] stacked, batches one after another. Raises GrailError for rows without a first axis."""
    if all(t.dim() == 1 for t in parts):
        shape = list(parts[0].shape)
        raise GrailError(f"calibration: a list of single inputs of {shape}; stack them along a first axis: torch.stack")
    try:
        return torch.stack(parts) if all(t.dim() == 3 for t in parts) else torch.cat(parts)
    except (RuntimeError, IndexError, TypeError) as error:
        shapes = " and ".join(list(dict.fromkeys(str(list(t.shape)) for t in parts))[:3])
        raise GrailError(
            f"calibration: tensors of {shapes} cannot be joined ({first_line(error)}); give images of one size, or "
            f"batches of them (labels, where there are any, as whole numbers)"
        ) from error


def _inputs_of(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) and item else item


def _tensors(given: Tensor, recipe: ModuleRecipe) -> tuple[list[Tensor], dict, None]:
    given = readable(given, "calibration")
    if given.dim() < 2 or not given.numel():
        raise GrailError(f"calibration: inputs are stacked along the first axis, got a tensor of {list(given.shape)}")
    order = torch.randperm(len(given), generator=torch.Generator().manual_seed(recipe.seed))
    chosen = given[order[: recipe.samples].sort().values.to(given.device)]
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
