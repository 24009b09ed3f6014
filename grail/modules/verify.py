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
from .narrow import duplicate, fold_copies, permute, prune, silence

TOLERANCE = 1e-3
ROUNDING = 1e-6
"""Of the largest number of all outputs: what is left of differences and sums that are nothing in exact arithmetic."""
FAINT = 1e-3
"""A parameter whose numbers are all below this may hide what stands before it from the output."""
ORDER = "the order of its units changes the network's output, so something else reads or makes them"
REMOVAL = "units that are removed are missed by something that mixes units or computes its weight"
FOLDING = (
    "units that are copies of each other cannot be folded into one, as norms must stand directly behind their "
    "producers and in their order"
)
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What torch raises where shapes do not fit."""


class NotTaken(GrailError):
    """The network cannot run on the inputs that it is calibrated with, of this shape."""

    def __init__(self, shape: torch.Size, why: str):
        super().__init__(f"the network does not take calibration inputs {list(shape)}: {why}")
        self.shape, self.why = shape, why


@torch.no_grad()
def verify(network: Network, sites: Sequence[ModuleSite], example: Tensor, folded: Sequence[ModuleSite] = ()) -> None:
    """A description is right only if the order of a site's units means nothing, if to remove some is the same as to let
    the consumer ignore them, and if units that are copies of each other can be folded into one (asked of those of the
    sites that are `folded`). Each tensor of the output is judged by itself. Raises GrailError naming the first site for
    which that is not so; or where the network answers with NaN or infinity, but for the -∞ of masks, or with nothing
    but zeros. example: one input batch; arithmetic as `for_proofs` says."""
    network, example = in_float32(network, example)
    _check_answer(network, example)
    network, example = for_proofs(network, example)
    if sites and not any(tensor.any() for tensor in answers(network.run, example)):
        raise GrailError(
            f"the network answers calibration {network.reads} with zeros alone, that prove no description; give inputs "
            f"that it tells apart"
        )
    _prove(_order_matters, ORDER, network, sites, example)
    _prove(_removal_matters, REMOVAL, network, sites, example)
    _prove(_folding_matters, FOLDING, network, folded, example)


def _check_answer(network: Network, example: Tensor) -> None:
    found = answer(network.run, example)
    if bool(found.isnan().any() | found.isposinf().any()):
        option = "--calibration-text" if network.reads == TEXT else "--calibration"
        raise GrailError(
            f"the network answers calibration {network.reads} with NaN or infinity, though its weights hold none: "
            f"numbers of theirs or of {option} are too large"
        )


def _prove(wrong: Wrong, why: str, network: Network, sites: Sequence[ModuleSite], example: Tensor) -> None:
    """All sites at once, and one by one where that fails."""
    if not sites or not wrong(network, sites, example):
        return
    for site in sites:
        if wrong(network, [site], example):
            layers = f"{', '.join(p.name for p in site.producers)} and {', '.join(site.consumers)}"
            way = "leave out --residual-ratio" if site.kind == RESIDUAL else "describe the site anew or leave it out"
            raise GrailError(f"{site.name}: {why}, beside {layers}; {way}")
    raise GrailError("the described sites depend on each other: the same layer is the producer of two of them")


def for_proofs(network: Network, example: Tensor) -> tuple[Network, Tensor]:
    """The network and an input as all proofs take them: in float32, and with random numbers in the place of parameters
    that are next to nothing (zero-initialised heads, gates, scales of branches; no biases), behind which no wrong
    description could be seen. What is true of a description does not hang on the weights. A copy where that changes
    anything."""
    network, example = in_float32(network, example)
    if next(_faint(network.module), None) is not None:
        network = network.clone()
        random = torch.Generator().manual_seed(0)
        for parameter in _faint(network.module):
            drawn = torch.rand(parameter.shape, generator=random)
            if parameter.dim() > 1 and (inputs := parameter[0].numel()) > 1:
                parameter.copy_((drawn - 0.5) * (3 / inputs) ** 0.5)  # outputs half as large as inputs
            else:  # positive ones, since a forward may take a root or a logarithm
                parameter.copy_(0.05 + 0.1 * drawn)
    return network, example


def _faint(module: nn.Module) -> Iterator[nn.Parameter]:
    for name, parameter in module.named_parameters():
        if not name.endswith("bias") and parameter.numel() and parameter.abs().max() < FAINT:
            yield parameter


def in_float32(network: Network, example: Tensor) -> tuple[Network, Tensor]:
    """The network and an input in float32; a copy where it computes in another arithmetic."""
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
    """All of `answers` in one."""
    return torch.cat(answers(run, example))


def answers(run: Callable[[Tensor], Any], example: Tensor) -> list[Tensor]:
    """The tensors of a network's output, each flat in float64. Raises NotTaken where it cannot run on the input, and
    GrailError where there are none."""
    try:
        found = run(example.clone())
    except REFUSALS as error:
        if circumstance(error):
            raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotTaken(example.shape, what) from error
    tensors = [t.double().flatten() for t in tree_leaves(found) if isinstance(t, Tensor)]
    if not tensors:
        raise GrailError(
            f"the network's output holds no tensor that can be seen (it is a {type(found).__name__}); let its forward "
            f"return tensors, or a list, tuple or dict of them"
        )
    return tensors


def _order_matters(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.units.count, generator=random) for site in sites]
    return _differs(example, lambda: network, lambda: _changed(network, sites, orders, permute))


def _removal_matters(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    half = [torch.randperm(s.units.count, generator=random)[: (s.units.count + 1) // 2].sort().values for s in sites]
    changed = (functools.partial(_changed, network, sites, half, change) for change in (silence, prune))
    return _differs(example, *changed)


def _folding_matters(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> bool:
    random = torch.Generator().manual_seed(0)
    pairs = [torch.randperm(site.units.count, generator=random)[:2].sort().values for site in sites]
    changed = (functools.partial(_changed, network, sites, pairs, change) for change in (duplicate, fold_copies))
    return _differs(example, *changed)


Wrong = Callable[[Network, Sequence[ModuleSite], Tensor], bool]
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
    found = []
    for make in makes:
        network = make()
        if network is None:
            return True
        try:
            found.append(answers(network.run, example))
        except GrailError:
            return True
        del network
    largest = max((tensor[~tensor.isneginf()].abs().max().item() for tensor in found[0] if len(tensor)), default=0.0)
    different = functools.partial(_are_different, least=ROUNDING * largest)
    return len(found[0]) != len(found[1]) or any(map(different, *found))


def _are_different(expected: Tensor, found: Tensor, least: float) -> bool:
    """least: what a number of an output may be off, which may be nothing but what rounding left."""
    if found.shape != expected.shape:
        return True
    masked = expected.isneginf()
    if not torch.equal(masked, found.isneginf()):
        return True
    expected, found = expected[~masked], found[~masked]
    allowed = TOLERANCE * torch.linalg.vector_norm(expected) + least * len(expected) ** 0.5
    return not torch.linalg.vector_norm(found - expected) <= allowed
