"""What is proven by example before any work: that descriptions fit, and that consumers are what their repair takes them
for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GrailError, circumstance
from ..families.network import ModuleSite, Network
from ..progress import Progress
from ..selectors import Selector
from .addition import unproven
from .answers import REFUSALS, TOLERANCE, answer
from .recipe import ModuleRecipe
from .towers import Tower
from .verify import for_proofs, verify

FACTORS = 0.5, -0.5, 1.0, -1.0, 2.0, -2.0
"""Powers of two, so that a weight divided by them times an input multiplied by them is the same to the last bit."""
LOOSE = 0.05
"""How much of its output a consumer may change by when it reads its units in another scale: it may round them."""
CONVOLUTIONS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def prove(
    towers: Sequence[Tower],
    kept: dict[str, int],
    recipe: ModuleRecipe,
    selector: Selector,
    progress: Progress,
    *,
    by_hand: bool,
) -> ModuleRecipe:
    """That of all sites which are to change everything is as described. Returns the recipe, which aims at the stream no
    longer where a family guessed all of them wrong. Raises GrailError naming the first site that is otherwise."""
    affine, forgotten = selector.bias if recipe.bias is None else recipe.bias, False
    for tower in filter(lambda tower: tower.batches, towers):
        network, example = tower.dense, tower.batches[0][:2]
        changed = [site for site in tower.sites if kept[site.name] < site.units.count]
        verify(network, changed, example, [site for site in changed if _is_folded(site, selector)], by_hand=by_hand)
        seen = {}
        if recipe.compensate or affine or selector.updates_weights():
            seen = _seen(network, changed, example)
            _check_reading(changed, seen, exact=affine)
        if recipe.streams:
            forgotten |= _forget(network, changed, example, seen, recipe, progress, by_hand=by_hand)
    left = (site for tower in towers for site in tower.sites if kept[site.name] < site.units.count)
    return recipe.site_by_site() if forgotten and all(site.stream is None for site in left) else recipe


def _is_folded(site: ModuleSite, selector: Selector) -> bool:
    """Others that a folding method meets are refused (compress.py)."""
    return selector.folds(site.role) and site.units.size == 1 and not site.reader_norms


def _forget(
    network: Network,
    changed: list[ModuleSite],
    example: Tensor,
    seen: dict[str, _Calls],
    recipe: ModuleRecipe,
    progress: Progress,
    *,
    by_hand: bool,
) -> bool:
    """Prove where the sites that change add to a residual stream, let the network forget a family's guesses that are
    wrong, if there are any, and say of which sites it is not known. Raises GrailError where that is all of them, though
    the target was asked for, and for a stream that is wrong and no guess."""
    known = [site for site in changed if site.stream is not None]
    wrong = unproven(network, known, example)
    for site in (site for site in known if site.name not in wrong):
        try:
            _check_product(site, seen, "so that it cannot be repaired towards a stream", "choose another --target")
        except GrailError as error:
            wrong[site.name] = error
    if wrong:
        first = next(iter(wrong.values()))
        if by_hand or recipe.wants_target:
            raise first
        network.sites[:] = [replace(s, stream=None, scales=()) if s.name in wrong else s for s in network.sites]
        progress.warn(f"{first}: taking --target dense for {len(wrong)} of {len(changed)} sites")
    if changed and not known and recipe.wants_target:
        raise GrailError(
            f"--target stream: of no site that is to change ({changed[0].name}, ...) is it known where it adds to a "
            f"residual stream; say so (stream=...), or choose another --target"
        )
    others = [site.name for site in changed if site.stream is None or site.name in wrong]
    if others:
        progress.say(f"repaired as with --target dense, their streams not being known: {', '.join(others)}")
    return bool(wrong)


@dataclass
class _Calls:
    """How often a consumer is called in a forward; of its first call, in float32, whether it made W x + b, and read its
    units linearly."""

    number: int = 0
    is_product: bool = True
    reads_linearly: bool = True


@torch.no_grad()
def _seen(network: Network, sites: Iterable[ModuleSite], example: Tensor) -> dict[str, _Calls]:
    """Of all consumers of the sites, by name."""
    network, example = for_proofs(network, example)
    found = {name: _Calls() for site in sites for name in site.consumers}

    def note(name: str) -> Callable:
        def hook(layer: nn.Module, arguments: tuple, options: dict, output: Any) -> None:
            calls = found[name]
            calls.number += 1
            if calls.number == 1:  # judged here, so that nothing of a large network is kept
                x, rest = _first(arguments, options)
                calls.is_product = _is_product(layer, x, output)
                calls.reads_linearly = _reads_linearly(layer, x, *rest)

        return hook

    handles = [network.layer(name).register_forward_hook(note(name), with_kwargs=True) for name in found]
    try:
        answer(network.run, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(arguments: tuple, options: dict) -> tuple[Tensor, tuple[tuple, dict]]:
    if arguments:
        return arguments[0], (arguments[1:], options)
    name, *others = options
    return options[name], ((), {key: options[key] for key in others})


def _check_reading(sites: Sequence[ModuleSite], seen: dict[str, _Calls], *, exact: bool) -> None:
    """Each consumer must be called once and read its units linearly; exact: make nothing else than W x + b, of which a
    bias is fitted to the mean."""
    for site in sites:
        for name in site.consumers:
            calls = seen[name]
            if calls.number > 1:
                raise GrailError(
                    f"{site.name}: {name} is called {calls.number} times in a forward, and only layers that are called "
                    f"once can be repaired; leave the site out of sites=, or take --no-compensate"
                )
            if not calls.reads_linearly:
                raise GrailError(
                    f"{site.name}: {name} changes what it reads before its weight is applied, so that the site cannot "
                    f"be repaired; leave it out of sites="
                )
        if exact:
            _check_product(site, seen, "to which no bias can be fitted", "do without a bias")


def _check_product(site: ModuleSite, seen: dict[str, _Calls], so: str, way: str) -> None:
    for name in site.consumers:
        if not seen[name].is_product:
            raise GrailError(
                f"{site.name}: the output of {name} is not its weight times its input, {so}; leave the site out of "
                f"sites=, or {way}"
            )


def _is_product(layer: nn.Module, x: Tensor, made: Any) -> bool:
    """Whether what the consumer made is W x + b, whatever forward or hooks of its own it has."""
    try:
        if isinstance(layer, nn.Linear):
            expected = F.linear(x, layer.weight, layer.bias)
        else:
            plain = next(kind for kind in CONVOLUTIONS if isinstance(layer, kind))
            expected = plain._conv_forward(layer, x, layer.weight, layer.bias)
    except REFUSALS as error:
        if circumstance(error):
            raise
        return False
    return isinstance(made, Tensor) and _near(made, expected, TOLERANCE)


def _reads_linearly(layer: nn.Module, x: Tensor, arguments: tuple, options: dict) -> bool:
    """Whether an input multiplied by a factor and its column of the weight divided by it leave the output as it is."""
    old, axis = layer.weight, 1 - layer.weight.dim()
    factors_X = torch.tensor(FACTORS).repeat(old.shape[1] // len(FACTORS) + 1)[: old.shape[1]].to(old)
    along = [1] * (-axis - 1)
    try:
        expected = layer.forward(x.clone(), *arguments, **options)
        layer.weight = nn.Parameter(old / factors_X.view(1, -1, *along), requires_grad=False)
        found = layer.forward(x * factors_X.view(-1, *along), *arguments, **options)
    except REFUSALS as error:
        if circumstance(error):
            raise
        return False
    finally:
        layer.weight = old
    return isinstance(found, Tensor) and _near(found, expected, LOOSE)


def _near(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.nan_to_num(), expected.nan_to_num()  # of tokens that do not count
    return bool(torch.linalg.vector_norm(found - expected) <= tolerance * torch.linalg.vector_norm(expected))
