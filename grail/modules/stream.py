"""A network run block by block over calibration batches, stopped where a site's hidden vector is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import GrailError, circumstance
from ..families.network import INPUT, OUTPUT, ModuleSite, Network
from .answers import REFUSALS, NotTaken, answer
from .verify import unlike

ROUNDING = 1e-3
"""Of the same products in the same order, in 16 bits on a GPU at most."""


@dataclass(frozen=True)
class Rest:
    """What a block is called with beside its first argument: masks, flags."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def same(self, other: Rest) -> bool:
        """Whether the values are equal."""
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            return False
        pairs = [*zip(self.args, other.args, strict=True), *((self.kwargs[k], other.kwargs[k]) for k in self.kwargs)]
        return all(_equal(*pair) for pair in pairs)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b)))
    try:
        return a is b or bool(a == b)
    except (RuntimeError, ValueError, TypeError):
        return False


class _Reached(Exception):
    """Unwinds a forward at the module whose input is wanted."""

    def __init__(self, hidden: Tensor, rest: Rest):
        super().__init__()
        self.hidden, self.rest = hidden, rest


@torch.no_grad()
def given_to(layer: nn.Module, name: str, run: Callable, x: Tensor, rest: Rest = Rest()) -> tuple[Tensor, Rest]:
    """What `layer` is given when `run` is called with x and the rest. Raises GrailError naming it when it is never
    called."""

    def reached(_: nn.Module, arguments: tuple, options: dict) -> None:
        if not arguments:
            first, *others = options
            raise _Reached(options[first], Rest((), {key: options[key] for key in others}))
        raise _Reached(arguments[0], Rest(arguments[1:], options))

    handle = layer.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        run(x.clone(), *rest.args, **rest.kwargs)  # networks may change their input in place, and it is read again
    except _Reached as found:
        return found.hidden, found.rest
    finally:
        handle.remove()
    raise GrailError(f"{name} is never called in a forward of the network: its hidden vector cannot be seen")


@torch.no_grad()
def seen_at(network: Network, places: list[tuple[str, str]], run: Callable, x: Tensor, rest: Rest) -> list[Tensor]:
    """What goes into or comes out of modules, each a name and a side, at its first call when `run` is called with x and
    the rest, as far as the last of them. Raises GrailError naming one that is never called."""
    found: dict[tuple[str, str], Tensor] = {}

    def see(place: tuple[str, str], tensor: Tensor) -> None:
        if place not in found:
            found[place] = tensor
            if len(found) == len(places):
                raise _AllSeen
            found[place] = tensor.clone()  # what follows may change it in place

    handles = [seeing(network.layer(place[0]), place[1], partial(see, place)) for place in places]
    try:
        run(x.clone(), *rest.args, **rest.kwargs)
    except _AllSeen:
        return [found[place] for place in places]
    finally:
        for handle in handles:
            handle.remove()
    missing = next(name for name, side in places if (name, side) not in found)
    raise GrailError(f"{missing} is never called in a forward of the network: the residual stream cannot be seen")


class _AllSeen(Exception):
    """Unwinds a forward."""


def seeing(layer: nn.Module, side: str, see: Callable[[Tensor], None]) -> RemovableHandle:
    """A hook on a layer: what goes into it or comes out of it, the first of several things, is given to `see`."""
    if side == OUTPUT:
        return layer.register_forward_hook(lambda _, __, output: see(_first(output)))

    def before(_: nn.Module, arguments: tuple, options: dict) -> None:
        see(next(iter((*arguments, *options.values()))))

    return layer.register_forward_pre_hook(before, with_kwargs=True)


class Stream:
    """One network and the states of all calibration batches before its current block. Without blocks the states are the
    network's inputs and never advance. `number` is that of the batch that is run."""

    def __init__(self, network: Network, batches: list[Tensor]):
        self.network, self.number = network, 0
        self.states = [(x, Rest()) for x in batches]
        if network.blocks:
            first = network.blocks[0]
            self.states = [given_to(network.layer(first), first, network.run, x) for x in batches]

    def hidden(self, consumer: str) -> Iterator[Tensor]:
        """A consumer's input for each batch, as the layers in front of it are now."""
        block = self.network.block_of(consumer)
        run = self.network.layer(block) if block else self.network.run
        layer = self.network.layer(consumer)
        for number, state in enumerate(self.states):
            self.number = number
            yield given_to(layer, consumer, run, *state)[0]

    def added(self, site: ModuleSite) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch what the site's consumer makes, and the residual stream before that is added."""
        block = self.network.block_of(site.consumer)
        run = self.network.layer(block) if block else self.network.run
        for number, state in enumerate(self.states):
            self.number = number
            yield tuple(seen_at(self.network, [(site.consumer, OUTPUT), site.stream], run, *state))

    @torch.no_grad()
    def advance(self, block: str) -> None:
        """From a block's input to its output."""
        if block:
            layer = self.network.layer(block)
            self.states = [(_first(layer(x, *rest.args, **rest.kwargs)), rest) for x, rest in self.states]

    def at(self, network: Network) -> Stream:
        """Another network at the same place: the same states."""
        other = object.__new__(Stream)
        other.network, other.states, other.number = network, self.states, 0
        return other


def _first(output: Any) -> Tensor:
    """A block's new state: what it gives, or the first of several things."""
    several = isinstance(output, (tuple, list)) or hasattr(output, "to_tuple")
    return output[0] if several and len(output) else output


class _Transformed(Exception):
    """Unwinds a forward that calls the named layer with what is no plain tensor."""


@torch.no_grad()
def in_order(network: Network, example: Tensor) -> None:
    """Let the network's sites, consumers and blocks stand in the order in which a forward comes to them."""
    order: dict[str, int] = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, options: dict) -> None:
            order.setdefault(name, len(order))
            tensors = (t for t in (*arguments, *options.values()) if isinstance(t, Tensor))
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):
                raise _Transformed(name)

        return hook

    names = {*network.blocks, *(name for site in (*network.residual, *network.sites) for name in site.consumers)}
    handles = [network.layer(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in names]
    try:
        answer(network.run, example)
    except _Transformed as called:
        raise GrailError(
            f"{called} is called inside torch.vmap or another transform of torch.func, where what it reads is hidden; "
            f"let the network's forward call its layers on whole batches"
        ) from None
    except NotTaken as error:
        raise NotTaken(error.shape, f"{error.why}{unlike(network.module)}") from error
    finally:
        for handle in handles:
            handle.remove()
    for sites in (network.sites, network.residual):
        sites[:] = sorted((s.read_in(order) for s in sites), key=lambda site: order.get(site.consumer, len(order)))
    network.blocks.sort(key=lambda block: order.get(block, len(order)))


@torch.no_grad()
def chained(network: Network, batches: list[Tensor]) -> bool:
    """Whether a Stream sees at every site what whole forwards see there: every site lies in a block, each block is
    called once, with what the one before gave and beside it with the same masks and flags as all others, and nothing
    between them or beside them (work in place, what is kept from call to call) has a part in it. Tried on two inputs
    of the first of the batches and two of the last, one after another."""
    if not network.blocks or not all(network.block_of(site.consumer) for site in network.sites):
        return False
    examples = [batches[0][:2], batches[-1][-2:]]
    seen = [_whole(network, x) for x in examples]
    if None in seen:
        return False
    try:
        return _agrees(Stream(network, examples), seen)
    except REFUSALS as error:
        if circumstance(error):
            raise
        return False


def _whole(network: Network, example: Tensor) -> dict[str, Tensor] | None:
    """What blocks and consumers are given in one forward; None where the blocks are no chain."""
    calls: list[tuple[str, tuple, dict, object]] = []
    given: dict[str, Tensor] = {}

    def note(name: str) -> Callable:
        def hook(_: nn.Module, arguments: tuple, options: dict, output: object) -> None:
            calls.append((name, arguments, options, output))

        return hook

    def keep(name: str, seen: object) -> None:
        if isinstance(seen, Tensor):
            given.setdefault(name, seen.clone())

    layers = [network.layer(name) for name in network.blocks]
    handles = [b.register_forward_hook(note(n), with_kwargs=True) for n, b in zip(network.blocks, layers, strict=True)]
    for name in (*network.blocks, *(name for site in network.sites for name in site.consumers)):
        handles.append(seeing(network.layer(name), INPUT, partial(keep, name)))
    try:
        network.run(example.clone())
    finally:
        for handle in handles:
            handle.remove()
    if [name for name, *_ in calls] != network.blocks or not all(arguments for _, arguments, *_ in calls):
        return None
    if not given.keys() >= {*network.blocks, *(name for site in network.sites for name in site.consumers)}:
        return None
    outputs = [output for *_, output in calls]
    if not all(isinstance(out, Tensor) or (isinstance(out, tuple) and isinstance(out[0], Tensor)) for out in outputs):
        return None
    first, *others = [Rest(arguments[1:], options) for _, arguments, options, _ in calls]
    return given if all(rest.same(first) for rest in others) else None


def _agrees(stream: Stream, seen: list[dict[str, Tensor]]) -> bool:
    """Whether a stream comes to the same inputs as whole forwards."""
    network = stream.network
    for block in network.blocks:
        sites = [site for site in network.sites if network.block_of(site.consumer) == block]
        for name in (name for site in sites for name in site.consumers):
            if not all(_alike(x, given[name]) for x, given in zip(stream.hidden(name), seen, strict=True)):
                return False
        if not all(_alike(x, given[block]) for (x, _), given in zip(stream.states, seen, strict=True)):
            return False
        stream.advance(block)
    return True


def _alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether they are equal but for rounding."""
    if found.shape != wanted.shape:
        return False
    found, wanted = found.double(), wanted.double()
    return bool(torch.linalg.vector_norm(found - wanted) <= ROUNDING * torch.linalg.vector_norm(wanted))


@contextmanager
def watched(layers: list[nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While forwards run, `see` is given the number of a layer and its input."""
    handles = [seeing(layer, INPUT, partial(see, i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
