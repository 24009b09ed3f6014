"""Proof by example that a description fits its network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import GrailError, circumstance
from ..families.network import RESIDUAL, TEXT, ModuleSite, Network
from .narrow import permute, prune, silence

TOLERANCE = 1e-3
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What torch raises where shapes do not fit."""


@torch.no_grad()
def verify(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> None:
    """A description is right only if the order of a site's units means nothing, and if to remove some is the same as
    to let the consumer ignore them. Raises GrailError naming the first site of `sites` for which that is not so, or
    where the network answers with NaN. example: one input batch; float32 arithmetic, whatever the network's."""
    network, example = in_float32(network, example)
    if not answer(network.run, example).isfinite().all():
        option = "--calibration-text" if network.reads == TEXT else "--calibration"
        raise GrailError(
            f"the network answers calibration {network.reads} with NaN or infinity, though its weights hold none: "
            f"numbers of theirs or of {option} are too large"
        )
    for wrong, why in (
        (_order_matters, "the order of its units changes the network's output, so something else reads or makes them"),
        (_removal_matters, "units that are removed are missed by something that mixes units or computes its weight"),
    ):
        if not wrong(network, sites, example):
            continue
        for site in sites:
            if wrong(network, [site], example):
                layers = f"{', '.join(p.name for p in site.producers)} and {', '.join(site.consumers)}"
                way = (
                    "leave out --residual-ratio" if site.kind == RESIDUAL else "describe the site anew or leave it out"
                )
                raise GrailError(f"{site.name}: {why}, beside {layers}; {way}")
        raise GrailError("the described sites depend on each other: the same layer is the producer of two of them")


def in_float32(network: Network, example: Tensor) -> tuple[Network, Tensor]:
    """The network and an input in the arithmetic of all proofs; a copy where it computes in another."""
    if any(p.dtype != torch.float32 for p in network.module.parameters()):
        network = network.clone()
        network.module.float()
    return network, example.float() if example.is_floating_point() else example


def _read(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a forward computes with, by name: parameters and running statistics. (A mask may hold infinity.)"""
    yield from module.named_parameters()
    yield from ((name, t) for name, t in module.named_buffers() if name.endswith(("running_mean", "running_var")))


@torch.no_grad()
def check_numbers(module: nn.Module) -> None:
    """Raises GrailError naming the first tensor that holds NaN or infinity: an attention kernel may hide them."""
    for name, tensor in _read(module):
        seen = tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
        if not seen.isfinite().all():
            raise GrailError(f"the network's tensor {name} holds NaN or infinity; give sound weights")


def unlike(module: nn.Module) -> str:
    """What to say of a network that fails where one of its tensors is of another dtype than most; else nothing."""
    dtypes = {name: tensor.dtype for name, tensor in _read(module)}
    most = Counter(dtypes.values()).most_common(1)[0][0]  # a network without any is refused before
    odd = next((name for name, dtype in dtypes.items() if dtype != most), None)
    return "" if odd is None else f"; its tensor {odd} is {dtypes[odd]}, and most are {most}"


def answer(run: Callable[[Tensor], Any], example: Tensor) -> Tensor:
    """All tensors of a network's output, flat in float64. Raises GrailError where it cannot run on the input."""
    try:
        found = run(example.clone())
    except REFUSALS as error:
        if circumstance(error):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise GrailError(f"the network does not take calibration inputs {list(example.shape)}: {what}") from error
    tensors = [t.double().flatten() for t in tree_leaves(found) if isinstance(t, Tensor)]
    if not tensors:
        raise GrailError(
            f"the network's output holds no tensor that can be seen (it is a {type(found).__name__}); let its forward "
            f"return tensors, or a list, tuple or dict of them"
        )
    return torch.cat(tensors)


def _order_matters(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.units.count, generator=random) for site in sites]
    return _differs(example, lambda: network, lambda: _changed(network, sites, orders, permute))


def _removal_matters(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    half = [torch.randperm(s.units.count, generator=random)[: (s.units.count + 1) // 2].sort().values for s in sites]
    changed = (functools.partial(_changed, network, sites, half, change) for change in (silence, prune))
    return _differs(example, *changed)


Change = Callable[[Network, ModuleSite, Tensor], None]


def _changed(network: Network, sites: Sequence[ModuleSite], units: list[Tensor], change: Change) -> Network | None:
    """A copy with a change at each site; None where a layer refuses it."""
    other = network.clone()
    try:
        for site, chosen in zip(sites, units, strict=True):
            change(other, site, chosen)
    except REFUSALS:
        return None
    return other


def _differs(example: Tensor, *makes: Callable[[], Network | None]) -> bool:
    """Whether two networks, made one after the other to spare memory, answer differently."""
    answers = []
    for make in makes:
        network = make()
        if network is None:
            return True
        try:
            answers.append(answer(network.run, example))
        except GrailError:
            return True
        del network
    expected, found = answers
    if found.shape != expected.shape:
        return True
    return not torch.linalg.vector_norm(found - expected) <= TOLERANCE * torch.linalg.vector_norm(expected)
