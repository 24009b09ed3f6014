"""What was done at one site, as tensors for the writer and as plain values for the report, the journal and other
processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .compensation import Compensation
from .distributed import Group
from .errors import GrailError
from .families.base import Site
from .reduction import Folding, Reduction, Selection
from .selectors.base import Damping

FIGURES = (
    "lam", "retries", "info", "rcond", "error_before", "error_after", "alpha", "held_out", "effective_rank", "sweeps",
    "raised", "stream_lam",
)  # fmt: skip
LISTS = ("held_out", "sweeps", "raised")


@dataclass
class SiteResult:
    """`compensation` is None when a site was only pruned, `reduction` too when nothing was removed; `weight` [O, K] and
    `bias` [O] (or None) are the consumer's new ones, None once they are written. damping: what the method added to the
    Gram matrix by which it selected, where it did."""

    site: Site
    reduction: Reduction | None = None
    compensation: Compensation | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    damping: Damping | None = None

    def check(self, *, strict: bool) -> None:
        """Raises GrailError naming the site where its figures are no numbers; strict: or where a λ had to be raised."""
        done = self.compensation
        figures = () if done is None else (done.error_before, done.error_after, *(done.held_out or ()))
        if not all(map(math.isfinite, figures)):
            raise GrailError(
                f"{self.site.name}: activations or weights are so large that the error cannot be computed; check the "
                f"checkpoint"
            )
        if strict:
            self.refuse_raised()

    def refuse_raised(self) -> None:
        """Raises GrailError naming the site where a λ had to be raised: what --strict asks for."""
        if self.damping is not None:
            self.damping.refuse_raised(self.site.name)
        if self.compensation is not None and self.compensation.raised is not None:
            asked, taken = self.compensation.raised
            raise GrailError(
                f"{self.site.name}: the equations are singular with λ = {asked:.3g}, and it took {taken:.3g}; "
                f"use more calibration text or more --ridge, or leave out --strict"
            )

    @property
    def raised(self) -> tuple[float, float] | None:
        """λ as asked and as used of the repair, or else of the selection, where it had to be raised."""
        repair = self.compensation and self.compensation.raised
        return repair or (self.damping and self.damping.raised)

    def without_tensors(self) -> SiteResult:
        """What the report needs: the new weights are on disk by then."""
        compensation = self.compensation and replace(self.compensation, weight=None, bias=None)
        return replace(self, weight=None, bias=None, compensation=compensation)

    def to_json(self) -> dict[str, Any]:
        """Everything but the tensors, exactly (floats survive json)."""
        reduction, done = self.reduction, self.compensation
        found: dict[str, Any] = {"site": self.site.name}
        if isinstance(reduction, Selection):
            found |= {"kept": reduction.kept.tolist(), "size": reduction.size, "width": reduction.width}
        elif isinstance(reduction, Folding):
            found["cluster"] = reduction.cluster.tolist()
        if done is not None:
            found["figures"] = {name: getattr(done, name) for name in FIGURES}
        if self.damping is not None:
            found["damping"] = list(self.damping)
        return found

    @classmethod
    def from_json(cls, site: Site, found: dict[str, Any]) -> SiteResult:
        """The inverse of `to_json`, without tensors. Raises ValueError, TypeError or KeyError for anything else."""
        reduction: Reduction | None = None
        for name, value in found.get("figures", {}).items():
            lists = name in LISTS and value is not None
            if not _is_figure(value) or isinstance(value, (list, tuple)) != lists:
                raise ValueError(f"{name} of {site.name} is {value}")
        if "kept" in found:
            reduction = Selection(torch.tensor(found["kept"]), found["size"], found["width"])
            if (reduction.size, reduction.width) != (site.units.size, site.units.width):
                raise ValueError(f"{site.name} has another width")
        elif "cluster" in found:
            reduction = Folding(torch.tensor(found["cluster"]))
        done = Compensation(weight=None, **found["figures"]) if "figures" in found else None
        return cls(site, reduction, done, damping=Damping(*found["damping"]) if "damping" in found else None)


def _is_figure(value: Any) -> bool:
    """A number or nothing, or lists of these."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_figure, value))
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def from_main(group: Group, site: Site, compute: Callable[[], SiteResult]) -> SiteResult:
    """A result that the main process computes and all get."""
    if group.size == 1:
        return compute()
    result = compute() if group.main else None
    figures = group.broadcast(result and (result.to_json(), [t is not None for t in (result.weight, result.bias)]))
    tensors = [
        group.broadcast_tensor(tensor) if there else None
        for there, tensor in zip(figures[1], (result.weight, result.bias) if result else (None, None), strict=True)
    ]
    if result is not None:
        return result
    result = SiteResult.from_json(site, figures[0])
    return replace(result, weight=tensors[0], bias=tensors[1])
