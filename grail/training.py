"""Train one compressed layer towards the dense layer's output (Wanda++'s regional optimisation), as a pipeline step.

The layer is trained in its original shape with removed channels held at zero, which computes the same as the narrow
one. Shapes: L tokens, D hidden size, O outputs and H inputs of a consumer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reduction import Selection
from .regional import mean_error, optimise
from .selectors.base import RegionalOptions
from .sites import LayerPass, SiteResult, check_finite


@dataclass
class Training:
    """Mean squared error of the layer's output to the dense layer's, on the same inputs: compressed, and trained (after
    rounding to the written dtype)."""

    layer: int
    loss_before: float
    loss_after: float


class LayerTraining:
    """Made before the layer is compressed, since it keeps what the dense layer makes of the first windows."""

    def __init__(self, run: LayerPass, options: RegionalOptions):
        self.run, self.options = run, options
        windows = [x_1LD for x_BLD in run.states[: run.counted] for x_1LD in x_BLD.split(1)]
        self._inputs = windows[: options.windows]
        self._targets = [run.block.run(x_1LD) for x_1LD in self._inputs]
        self._wide: dict[str, Tensor] = {}
        self.outcome: Training | None = None

    def train(self, results: list[SiteResult]) -> dict[str, Tensor]:
        """The trained tensors by full name, narrow and rounded to what is written."""
        run, job = self.run, self.run.job
        changed = [result for result in results if result.reduction is not None]
        start, fixed = self._compressed(changed)
        names = self._trainable(start, changed)
        trained = optimise(
            run.block.apply, start, names, fixed, self._inputs, self._targets,
            passes=self.options.passes, learning_rate=self.options.learning_rate,
        )  # fmt: skip
        full = {
            run.prefix + name: tensor.to(job.written_dtype(start[name].dtype))
            for name, tensor in trained.parameters.items()
        }
        self._wide = {name.removeprefix(run.prefix): t.to(job.model.dtype) for name, t in full.items()}
        left = run.block.tensors() | self._wide
        after = mean_error(run.block.apply, left, self._inputs, self._targets)
        self.outcome = Training(run.layer, trained.loss_before, after)
        return self._narrowed(full, changed)

    def outputs(self) -> list[Tensor]:
        """Each chunk's stream after the trained layer."""
        with self.run.block.with_tensors(self._wide):
            for i, x_BLD in enumerate(self.run.states):
                self.run.states[i] = self.run.block.run(x_BLD)
                check_finite(self.run.states[i], self.run.layer)
        return self.run.states

    def _trainable(self, tensors: dict[str, Tensor], changed: list[SiteResult]) -> list[str]:
        """Weights and biases of the linear layers in the branches that lost something; the others stay as they are."""
        parts = tuple(f"{self.run.job.model.part_of(result.site)}." for result in changed)
        return [n for n, t in tensors.items() if n.startswith(parts) and (t.dim() == 2 or n.endswith(".bias"))]

    def _compressed(self, changed: list[SiteResult]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The layer's tensors as stored, with the new consumers spread out, and which of their entries stay zero."""
        run, source, fixed = self.run, self.run.job.model.source, {}
        for result in changed:
            if result.bias is not None:
                run.block.add_bias(run.job.model.part_of(result.site))
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
