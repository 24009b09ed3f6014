"""Train one compressed layer towards the dense layer's output (Wanda++'s regional optimisation), as a pipeline step.

The layer is trained in its original shape with removed channels held at zero, which computes the same as the narrow
one. Shapes: L tokens, D hidden size, O outputs and H inputs of a consumer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer import LayerPass
from .reduction import Selection
from .regional import mean_error, optimise
from .result import SiteResult
from .selectors.base import RegionalOptions
from .twin import Twin


@dataclass
class Training:
    """Mean squared error of the layer's output to the dense layer's, on the same inputs: compressed, and trained (after
    rounding to the written dtype)."""

    layer: int
    loss_before: float
    loss_after: float


class LayerTraining:
    """Made before the layer is compressed, since it keeps what the dense layer makes of the first windows (of all
    processes; the main one trains). twin: then the target is the dense network's stream instead."""

    def __init__(self, run: LayerPass, options: RegionalOptions, twin: Twin | None = None):
        self.run, self.options, self._twin = run, options, twin
        self._inputs = self._first_windows(run.state)
        self._targets: list[Tensor] = []
        if twin is None:
            with run.work.profile.phase("training"):
                self._targets = [run.block.run(x_1LD) for x_1LD in self._inputs]
        self._wide: dict[str, Tensor] = {}
        self.outcome: Training | None = None

    def train(self, results: list[SiteResult]) -> dict[str, Tensor]:
        """The trained tensors by full name, narrow and rounded to what is written."""
        run, group = self.run, self.run.work.group
        if self._twin is not None:
            self._targets = self._first_windows(self._twin.output)
        changed = [result for result in results if result.reduction is not None]
        full = self._trained(changed) if group.main else {}
        names = group.broadcast(list(full))
        full = {name: group.broadcast_tensor(full.get(name)) for name in names}
        self.outcome = Training(**group.broadcast(self.outcome and vars(self.outcome)))
        self._wide = {run.local(name): run.computed(tensor) for name, tensor in full.items()}
        for result in changed:
            if result.bias is not None:
                run.block.add_bias(run.part_of(result.site))
        return self._narrowed(full, changed)

    def outputs(self) -> None:
        """Compute each wanted chunk's stream after the trained layer."""
        with self.run.block.with_tensors(self._wide):
            for number in self.run.wanted:
                with self.run.work.profile.phase("forward"):
                    out_BLD = self.run.block.run(self.run.state(number))
                self.run.finish(number, out_BLD)

    def _first_windows(self, states: Callable[[int], Tensor]) -> list[Tensor]:
        """The first windows [1, L, D], in the main process; states: a chunk's by its number."""
        count, found = self.options.windows, []
        for number in self.run.chunks.counted:
            found += list(states(number).split(1))[: count - len(found)]
            if len(found) == count:
                break
        return self.run.work.group.send_to_main(found)[:count]

    def _trained(self, changed: list[SiteResult]) -> dict[str, Tensor]:
        """The trained tensors by full name, in their original shapes, and how it went."""
        run, job = self.run, self.run.job
        start, fixed = self._compressed(changed)
        names = self._trainable(start, changed)
        with run.work.profile.phase("training"):
            trained = optimise(
                run.block.apply, start, names, fixed, self._inputs, self._targets,
                passes=self.options.passes, learning_rate=self.options.learning_rate,
            )  # fmt: skip
            full = {
                run.prefix + name: tensor.to(job.written_dtype(start[name].dtype))
                for name, tensor in trained.parameters.items()
            }
            used = run.block.tensors() | {run.local(name): run.computed(tensor) for name, tensor in full.items()}
            after = mean_error(run.block.apply, used, self._inputs, self._targets)
        self.outcome = Training(run.layer, trained.loss_before, after)
        return full

    def _trainable(self, tensors: dict[str, Tensor], changed: list[SiteResult]) -> list[str]:
        """Weights and biases of the linear layers in the branches that lost something; the others stay as they are."""
        parts = tuple(f"{self.run.part_of(result.site)}." for result in changed)
        return [n for n, t in tensors.items() if n.startswith(parts) and (t.dim() == 2 or n.endswith(".bias"))]

    def _compressed(self, changed: list[SiteResult]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The layer's tensors as stored, with the new consumers spread out, and which of their entries stay zero."""
        run, source, fixed = self.run, self.run.job.model.source, {}
        for result in changed:
            if result.bias is not None:
                run.block.add_bias(run.part_of(result.site))
        tensors = {
            name: source.get(run.prefix + name).to(tensor.device) if run.prefix + name in source else tensor
            for name, tensor in run.block.tensors().items()
        }
        for result in changed:
            assert isinstance(result.reduction, Selection), "only selections are trained"
            weight, bias = (f"{result.site.consumer}.{leaf}".removeprefix(run.prefix) for leaf in ("weight", "bias"))
            tensors[weight] = result.reduction.expand_consumer(result.weight)
            fixed[weight] = torch.ones_like(tensors[weight], dtype=torch.bool)
            fixed[weight][:, result.reduction.channels] = False
            if result.bias is not None:
                tensors[bias] = result.bias
        return tensors, fixed

    def _narrowed(self, full: dict[str, Tensor], changed: list[SiteResult]) -> dict[str, Tensor]:
        tensors = dict(full)
        for result in changed:
            consumer = f"{result.site.consumer}.weight"
            tensors[consumer] = result.reduction.lift_consumer(full[consumer])
            for producer in result.site.producers:
                for name in (f"{producer.name}.weight", f"{producer.name}.bias"):
                    if name in full:
                        tensors[name] = result.reduction.narrow_producer(full[name], producer.rows_per_unit)
        return tensors
