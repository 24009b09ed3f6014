"""A network run block by block over calibration batches, stopped where a site's hidden vector is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import GrailError
from ..families.network import Network
from .verify import answer


class _Reached(Exception):
    """Unwinds a forward at the module whose input is wanted."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def input_of(root: nn.Module, layer: nn.Module, x: Tensor, name: str) -> Tensor:
    """What `layer` is given when `root` runs on x. Raises GrailError naming it when it is never called."""

    def reached(_: nn.Module, arguments: tuple) -> None:
        raise _Reached(arguments[0])

    handle = layer.register_forward_pre_hook(reached)
    try:
        root(x.clone())  # networks may change their input in place, and it is read again
    except _Reached as found:
        return found.hidden
    finally:
        handle.remove()
    raise GrailError(f"{name} is never called in a forward of the network: its hidden vector cannot be seen")


class Stream:
    """One network and the states of all calibration batches before its current block. Without blocks the states are the
    network's inputs and never advance."""

    def __init__(self, network: Network, batches: list[Tensor]):
        self.network = network
        self.states = batches
        if network.blocks:
            first = network.blocks[0]
            self.states = [input_of(network.module, network.layer(first), x, first) for x in batches]

    def hidden(self, consumer: str) -> Iterator[Tensor]:
        """A consumer's input for each batch, as the layers in front of it are now."""
        root = self._root(self.network.block_of(consumer))
        layer = self.network.layer(consumer)
        for x in self.states:
            yield input_of(root, layer, x, consumer)

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """From a block's input to its output."""
        if block:
            layer = self.network.layer(block)
            self.states = [layer(x) for x in self.states]

    def at(self, network: Network) -> Stream:
        """Another network at the same place: the same states."""
        other = object.__new__(Stream)
        other.network, other.states = network, self.states
        return other

    def _root(self, block: str) -> nn.Module:
        return self.network.layer(block) if block else self.network.module


@torch.no_grad()
def in_order(network: Network, example: Tensor) -> None:
    """Let the network's sites, consumers and blocks stand in the order in which a forward comes to them."""
    order: dict[str, int] = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple) -> None:
            order.setdefault(name, len(order))

        return hook

    names = {*network.blocks, *(name for site in (*network.residual, *network.sites) for name in site.consumers)}
    handles = [network.layer(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        answer(network.module, example)
    finally:
        for handle in handles:
            handle.remove()
    for sites in (network.sites, network.residual):
        sites[:] = sorted((s.read_in(order) for s in sites), key=lambda site: order.get(site.consumer, len(order)))
    network.blocks.sort(key=lambda block: order.get(block, len(order)))


@torch.no_grad()
def chained(network: Network, example: Tensor) -> bool:
    """Whether every site lies in a block, and each block is called once, with the output of the one before alone."""
    if not network.blocks or not all(network.block_of(site.consumer) for site in network.sites):
        return False
    calls: list[tuple[str, tuple, object]] = []

    def note(name: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, options: dict, output: object) -> None:
            given = (*arguments, *options.values())
            calls.append((name, tuple(a for a in given if a is not None), output))

        return hook

    handles = [network.layer(b).register_forward_hook(note(b), with_kwargs=True) for b in network.blocks]
    try:
        network.module(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, _, _ in calls] != network.blocks or any(len(given) != 1 for _, given, _ in calls):
        return False
    return all(given[0] is before for (_, given, _), (_, _, before) in zip(calls[1:], calls, strict=False))


@contextmanager
def watched(layers: list[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While forwards run, `see` is given the number of a layer and its input."""

    def hook(number: int) -> Callable:
        return lambda _, arguments: see(number, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
