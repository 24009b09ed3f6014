"""Options that were given and change nothing, so that who gave them may know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from ..families.network import ModuleSite
from ..recipe import STREAM, unrepaired
from ..selectors import Selector
from .recipe import ModuleRecipe
from .repair import norms_of

RATIOS = {"heads": "--attn-ratio", "channels": "--mlp-ratio"}


def idle_options(recipe: ModuleRecipe, selector: Selector, module: nn.Module) -> Iterator[str]:
    """Those of the repair where it is left out, and BatchNorms' where there are none."""
    affine = selector.bias if recipe.bias is None else recipe.bias
    used = set()
    if recipe.compensate or selector.updates_weights():
        used.add("ridge_form")
    if recipe.compensate:
        used.add("ridge")
    if recipe.compensate or (affine and recipe.target != STREAM):
        used.add("target")
    yield from unrepaired(recipe, used)
    if recipe.repair and not norms_of(module):
        yield f"--repair changes nothing: {type(module).__name__} has no BatchNorm that keeps statistics"


def idle_ratios(recipe: ModuleRecipe, module: nn.Module, sites: Iterable[ModuleSite]) -> Iterator[str]:
    """Those of kinds of which the network has no site."""
    kinds = {site.kind for site in sites}
    for kind, option in RATIOS.items():
        asked = recipe.attn_ratio if kind == "heads" else recipe.mlp_ratio
        if asked and kind not in kinds:
            yield f"{option} changes nothing: no site of {type(module).__name__} is one of {kind}"
