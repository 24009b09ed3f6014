"""One decoder layer, run in phases: what feeds a consumer, what it makes of it, and the layer's output.

The layer is transformers' own; stand-ins take the places of branches whose output is known. A tensor is read when it
is first needed and can be given back. Shapes: B windows, L tokens, D hidden size, H a site's width, K kept, O outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Part:
    """One residual branch of a layer: the sub-module, the norm that feeds it, its last linear layer, and how the
    layer expects its result."""

    module: str
    norm: str
    consumer: str
    wrap: Callable[[Tensor], object]


class _Reached(Exception):
    """Carries a consumer's input out of a forward that need not go on."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


class _Tap(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        raise _Reached(hidden)


class _Given(nn.Module):
    """Stands for a branch whose output is already known."""

    def __init__(self, value: object):
        super().__init__()
        self.value = value

    def forward(self, *args, **kwargs) -> object:
        return self.value


class Block:
    """One decoder layer. `hidden` and `output` replay the layer's own forward with the branches that are already known
    put in place, so that each expensive part runs once.

    module: on the meta device; fetch: a tensor by its name within the layer, in the compute dtype; parts: the branches
    in execution order.
    """

    def __init__(
        self,
        module: nn.Module,
        parts: dict[str, Part],
        fetch: Callable[[str], Tensor],
        kwargs_for: Callable[[int, int], dict],
    ):
        self.module = module
        self.parts = parts
        self._fetch = fetch
        self._kwargs_for = kwargs_for
        self._names = list(module.state_dict())
        self._need(name for name in self._names if not name.startswith(tuple(f"{part}." for part in parts)))

    @property
    def numbers(self) -> int:
        """Of all its tensors, read or not."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def release(self, part: str) -> None:
        """Give back the memory of a branch; it is read again when it is needed again."""
        for name in self._of(part):
            self._assign(name, self.module.get_parameter(name).to("meta"))

    def _need(self, names: Iterable[str]) -> None:
        for name in names:
            if self.module.get_parameter(name).is_meta:
                self._assign(name, self._fetch(name))

    def _of(self, part: str) -> list[str]:
        return [name for name in self._names if name.startswith(f"{part}.")]

    @torch.no_grad()
    def run(self, x_BLD: Tensor) -> Tensor:
        """The layer's output."""
        self._need(self._names)
        return self._forward(x_BLD)

    def _forward(self, x_BLD: Tensor) -> Tensor:
        return self.module(x_BLD, **self._kwargs_for(*x_BLD.shape[:2]))

    @torch.no_grad()
    def hidden(self, part: str, x_BLD: Tensor, known: dict[str, Tensor]) -> Tensor:
        """The input of the part's consumer, [B, L, H], given the outputs of the branches before it."""
        branch = self.parts[part]
        names = list(self.parts)
        for earlier in names[: names.index(part)]:
            self._need(self._of(earlier) if earlier not in known else ())
        self._need(name for name in self._of(part) if not name.startswith(f"{part}.{branch.consumer}."))
        with self._with_known(known), _replaced(self.module.get_submodule(part), {branch.consumer: _Tap()}):
            try:
                self._forward(x_BLD)
            except _Reached as reached:
                return reached.hidden
        raise RuntimeError(f"{part}.{branch.consumer} was never called")

    @torch.no_grad()
    def consume(
        self, part: str, hidden: Tensor, weight_OK: Tensor | None = None, bias_O: Tensor | None = None
    ) -> Tensor:
        """The branch's output from its consumer's input, with a narrower weight or another bias if one is given."""
        consumer = self.module.get_submodule(f"{part}.{self.parts[part].consumer}")
        leaves = ("weight",) * (weight_OK is None) + ("bias",) * (consumer.bias is not None)
        self._need(f"{part}.{self.parts[part].consumer}.{leaf}" for leaf in leaves)
        weight_OK = consumer.weight if weight_OK is None else weight_OK.to(hidden.device, hidden.dtype)
        bias_O = consumer.bias if bias_O is None else bias_O.to(hidden.device, hidden.dtype)
        return nn.functional.linear(hidden, weight_OK, bias_O)

    @contextmanager
    def with_tensors(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Other weights in place for a while, narrower ones too: names within the layer, in the compute dtype and on
        the compute device."""
        kept = {name: self.module.get_parameter(name) for name in tensors}
        try:
            for name, tensor in tensors.items():
                self._assign(name, tensor)
            yield
        finally:
            for name, parameter in kept.items():
                self._assign(name, parameter)

    def tensors(self) -> dict[str, Tensor]:
        """The layer's own tensors by their names within it."""
        self._need(self._names)
        return dict(self.module.state_dict())

    def apply(self, tensors: dict[str, Tensor], x_BLD: Tensor) -> Tensor:
        """The layer's output with other tensors of the same shapes, in their dtype; differentiable."""
        dtype = next(iter(tensors.values())).dtype
        cast = functools.partial(_as_float, dtype=dtype)
        kwargs = tree_map(cast, self._kwargs_for(*x_BLD.shape[:2]))
        return torch.func.functional_call(self.module, tensors, (cast(x_BLD),), kwargs)

    def add_bias(self, part: str) -> None:
        """Give a part's consumer a bias of zeros, if it has none."""
        name = f"{part}.{self.parts[part].consumer}"
        consumer = self.module.get_submodule(name)
        if consumer.bias is None:
            self._need([f"{name}.weight"])
            zeros_O = consumer.weight.new_zeros(consumer.weight.shape[0])
            consumer.bias = nn.Parameter(zeros_O, requires_grad=False)

    def _assign(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))

    @torch.no_grad()
    def output(self, x_BLD: Tensor, known: dict[str, Tensor]) -> Tensor:
        """The layer's output, given branches that are known."""
        for part in self.parts:
            self._need(self._of(part) if part not in known else ())
        with self._with_known(known):
            return self._forward(x_BLD)

    def stream(self, x_BLD: Tensor, known: dict[str, Tensor]) -> Tensor:
        """The residual stream after the branches that are known and before the others: these add nothing."""
        nothing = {part: torch.zeros_like(x_BLD) for part in self.parts if part not in known}
        return self.output(x_BLD, known | nothing)

    @contextmanager
    def _with_known(self, known: dict[str, Tensor]) -> Iterator[None]:
        stands: dict[str, nn.Module] = {}
        for name, value in known.items():
            stands[name] = _Given(self.parts[name].wrap(value))
            stands[self.parts[name].norm] = nn.Identity()
        with _replaced(self.module, stands):
            yield


def _as_float(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def _replaced(module: nn.Module, stands: dict[str, nn.Module]) -> Iterator[None]:
    """Put other sub-modules in place for a while."""
    kept = {name: getattr(module, name) for name in stands}
    try:
        for name, stand in stands.items():
            setattr(module, name, stand)
        yield
    finally:
        for name, original in kept.items():
            setattr(module, name, original)
