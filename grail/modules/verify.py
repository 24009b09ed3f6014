"""Proof by example that a description fits its network."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import GrailError
from ..families.network import RESIDUAL, TEXT, ModuleSite, Network
from .answers import REFUSALS, ROUNDING, ULP, answer, answers, are_different, of_floats, rounding_of
from .narrow import duplicate, fold_copies, permute, prune, silence

FAINT = 1e-3
"""A parameter whose numbers are all below this may hide what stands before it from the output."""
OPTIONS = {"heads": "attn", "channels": "mlp"}
ORDER = "the order of its units changes the network's output, so something else reads or makes them"
REMOVAL = "units that are removed are missed by something that mixes units or computes its weight"
FOLDING = (
    "units that are copies of each other cannot be folded into one, as norms must stand directly behind their "
    "producers and in their order"
)
REPEATED = (
    "the network answers the same inputs otherwise when it is run again, so that no description of it can be proven: "
    "let its forward be the same each time in evaluation mode (no dropout left on, no counter or buffer that it writes "
    "and reads)"
)


@torch.no_grad()
def verify(
    network: Network,
    sites: Sequence[ModuleSite],
    example: Tensor,
    folded: Sequence[ModuleSite] = (),
    *,
    by_hand: bool = True,
) -> None:
    """A description is right only if the order of a site's units means nothing, if to remove some is the same as to let
    the consumer ignore them, and if units that are copies of each other can be folded into one (asked of those of the
    sites that are `folded`). Each tensor of the output is judged by itself, and each entry of its last axis. Raises
    GrailError naming the first site for which that is not so; or where the network answers with NaN or infinity, but
    for the -∞ of masks, with nothing but zeros, or not the same twice. example: one input batch; arithmetic as
    `for_proofs` says. by_hand: whoever runs this described the sites, and no family."""
    network, example = in_float32(network, example)
    _check_answer(network, example)
    network, example = for_proofs(network, example)
    found = answers(network.run, example)
    if sites and not any(tensor.any() for tensor in found):
        raise GrailError(
            f"the network answers calibration {network.reads} with zeros alone, that prove no description; give inputs "
            f"that it tells apart"
        )
    exact = [
        ROUNDING * ULP * tensor.nan_to_num(neginf=0).abs().max().item() if tensor.numel() else 0 for tensor in found
    ]
    if sites and are_different(found, answers(network.run, example), exact):
        raise GrailError(REPEATED)
    given = Given(example, rounding_of(network, example, found))
    del found
    _prove(_order_matters, ORDER, network, sites, given, by_hand)
    _prove(_removal_matters, REMOVAL, network, sites, given, by_hand)
    _prove(_folding_matters, FOLDING, network, folded, given, by_hand)


@dataclass(frozen=True)
class Given:
    """One input batch, and for each tensor of the output what rounding may do to a number of it."""

    example: Tensor
    rounding: list[float]


def _check_answer(network: Network, example: Tensor) -> None:
    found = answer(network.run, example)
    if bool(found.isnan().any() | found.isposinf().any()):
        option = "--calibration-text" if network.reads == TEXT else "--calibration"
        raise GrailError(
            f"the network answers calibration {network.reads} with NaN or infinity, though its weights hold none: "
            f"numbers of theirs or of {option} are too large"
        )


def _prove(wrong: Wrong, why: str, network: Network, sites: Sequence[ModuleSite], given: Given, by_hand: bool) -> None:
    """All sites at once, and one by one where that fails."""
    if not sites or not wrong(network, sites, given):
        return
    for site in sites:
        if wrong(network, [site], given):
            layers = f"{', '.join(p.name for p in site.producers)} and {', '.join(site.consumers)}"
            raise GrailError(f"{site.name}: {why}, beside {layers}; {_way_out(site, by_hand)}")
    raise GrailError("the described sites depend on each other: the same layer is the producer of two of them")


def _way_out(site: ModuleSite, by_hand: bool) -> str:
    if site.kind == RESIDUAL:
        return "leave out --residual-ratio"
    if by_hand:
        return "describe the site anew or leave it out"
    return f"--{OPTIONS[site.kind]}-ratio 0 leaves all {site.kind} as they are"


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
        sized = of_floats(parameter) and parameter.numel()
        if sized and not name.endswith("bias") and parameter.abs().max() < FAINT:
            yield parameter


def in_float32(network: Network, example: Tensor) -> tuple[Network, Tensor]:
    """The network and an input in float32; a copy where it computes in another arithmetic."""
    if any(p.dtype != torch.float32 for p in network.module.parameters() if p.is_floating_point()):
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
    """What to say of a network that fails where one of its tensors of floats is of another dtype than most; else
    nothing."""
    dtypes = {name: tensor.dtype for name, tensor in _read(module) if tensor.is_floating_point()}
    if not dtypes:
        return ""
    most = Counter(dtypes.values()).most_common(1)[0][0]
    odd = next((name for name, dtype in dtypes.items() if dtype != most), None)
    return "" if odd is None else f"; its tensor {odd} is {dtypes[odd]}, and most are {most}"


def _order_matters(network: Network, sites: Sequence[ModuleSite], given: Given) -> bool:
    random = torch.Generator().manual_seed(0)
    orders = [torch.randperm(site.units.count, generator=random) for site in sites]
    return _differs(given, lambda: network, lambda: _changed(network, sites, orders, permute))


def _removal_matters(network: Network, sites: Sequence[ModuleSite], given: Given) -> bool:
    random = torch.Generator().manual_seed(0)
    half = [torch.randperm(s.units.count, generator=random)[: (s.units.count + 1) // 2].sort().values for s in sites]
    changed = (functools.partial(_changed, network, sites, half, change) for change in (silence, prune))
    return _differs(given, *changed)


def _folding_matters(network: Network, sites: Sequence[ModuleSite], given: Given) -> bool:
    random = torch.Generator().manual_seed(0)
    pairs = [torch.randperm(site.units.count, generator=random)[:2].sort().values for site in sites]
    changed = (functools.partial(_changed, network, sites, pairs, change) for change in (duplicate, fold_copies))
    return _differs(given, *changed)


Wrong = Callable[[Network, Sequence[ModuleSite], Given], bool]
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


def _differs(given: Given, *makes: Callable[[], Network | None]) -> bool:
    """Whether two networks, made one after the other to spare memory, answer differently."""
    found = []
    for make in makes:
        network = make()
        if network is None:
            return True
        try:
            found.append(answers(network.run, given.example))
        except GrailError:
            return True
        del network
    return are_different(*found, given.rounding)
