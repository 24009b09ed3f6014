"""Where a consumer's output is added to a residual stream: what scales it on the way, and the proof by example that a
description has both right.

Shapes: O channels of the stream, along axis 1 of maps and the last axis of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import GrailError
from ..families.network import OUTPUT, ModuleSite, Network
from . import narrow
from .answers import REFUSALS, TOLERANCE, answer
from .stream import seeing
from .verify import for_proofs

ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@torch.no_grad()
def scale_of(network: Network, site: ModuleSite, made: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b), float32 [O]: of what the consumer makes, y, the stream is given a y + b. made: such a y, which says how
    many axes there are. Raises GrailError naming the site where what stands between does not take its channels."""
    layer = network.layer(site.consumer)
    try:
        ones = _along(layer, layer.weight.new_ones(len(layer.weight)), made)
        at_0, at_1 = (_through(network, site, ones * value).flatten().float() for value in (0, 1))
    except REFUSALS as error:
        raise _no_scale(site) from error
    return at_1 - at_0, at_0


def _along(layer: nn.Module, channels_O: Tensor, made: Tensor) -> Tensor:
    """A number for each channel, with the axes of what the layer made."""
    shape = [1] * made.dim()
    shape[narrow.channel_axis(layer)] = len(layer.weight)
    return channels_O.reshape(shape)


def _no_scale(site: ModuleSite) -> GrailError:
    scales = ", ".join(site.scales)
    return GrailError(f"{site.name}: {scales} does not scale what {site.consumer} makes; name other scales, or none")


def _through(network: Network, site: ModuleSite, x: Tensor) -> Tensor:
    for name in site.scales:
        x = network.layer(name)(x)
    return x


@torch.no_grad()
def unproven(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> dict[str, GrailError]:
    """Somewhere in a forward the stream of each site, as described, and a y + b must be added: why that is not so, by
    name, of the sites for which that does not happen. example: one input batch; float32 arithmetic, whatever the
    network's."""
    network, example = for_proofs(network, example)
    made = _made(network, sites, example)
    additions, wrong = [], {}
    for site in sites:
        try:
            additions += [_Addition(network, site, made[site.consumer])] if site.consumer in made else []
        except GrailError as error:
            wrong[site.name] = error
    with ExitStack() as stack:
        for addition in additions:
            for hook in addition.hooks():
                stack.callback(hook.remove)
        with _Watch(additions):
            answer(network.run, example)
    proven = {addition.site.name for addition in additions if addition.proven}
    return {site.name: wrong.get(site.name) or _not_added(site) for site in sites if site.name not in proven}


def _not_added(site: ModuleSite) -> GrailError:
    scaled = f", scaled by {', '.join(site.scales)}," if site.scales else ""
    return GrailError(
        f"{site.name}: what {site.consumer} makes{scaled} is not added to the {site.stream[1]} of {site.stream[0]}; "
        f"describe its stream anew, or choose another --target"
    )


def _made(network: Network, sites: Sequence[ModuleSite], example: Tensor) -> dict[str, Tensor]:
    """The tensors that the sites' consumers make, by name."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for site in sites:
            see = partial(found.setdefault, site.consumer)
            stack.callback(seeing(network.layer(site.consumer), OUTPUT, see).remove)
        answer(network.run, example)
    return {name: made for name, made in found.items() if isinstance(made, Tensor)}


class _Addition:
    """One site's, while a forward runs."""

    def __init__(self, network: Network, site: ModuleSite, made: Tensor):
        self.network, self.site, self.proven = network, site, False
        layer = network.layer(site.consumer)
        try:
            self.scale, self.shift = (_along(layer, part, made) for part in scale_of(network, site, made))
        except RuntimeError as error:
            raise _no_scale(site) from error
        self.branch: Tensor | None = None
        self.stream: Tensor | None = None

    def hooks(self) -> list[Any]:
        """Registered ones, that note both summands."""
        places = {"branch": (self.site.consumer, OUTPUT), "stream": self.site.stream}
        return [seeing(self.network.layer(p[0]), p[1], partial(self._see, name)) for name, p in places.items()]

    def _see(self, name: str, tensor: Any) -> None:
        if getattr(self, name) is None and isinstance(tensor, Tensor):  # else it cannot be what is added
            setattr(self, name, self.scale * tensor + self.shift if name == "branch" else tensor.clone())

    def look(self, a: Tensor, b: Tensor) -> None:
        """At two tensors that are added."""
        if self.proven or self.branch is None or self.stream is None:
            return
        self.proven = any(_equal(x, self.branch) and _equal(y, self.stream) for x, y in ((a, b), (b, a)))


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return bool(torch.linalg.vector_norm(found - expected) <= TOLERANCE * torch.linalg.vector_norm(expected))


class _Watch(TorchDispatchMode):
    """Shows all additions of tensors to those that wait for theirs."""

    def __init__(self, additions: list[_Addition]):
        super().__init__()
        self.additions = additions

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        plain = func in ADDITIONS and not kwargs and all(isinstance(arg, Tensor) for arg in args)
        for addition in self.additions if plain else ():
            addition.look(*args)
        return func(*args, **(kwargs or {}))
