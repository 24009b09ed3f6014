"""What was done to a network in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..machine import peak_memory
from ..readable import Readable
from ..report import SCHEMA_VERSION, machine_json, site_entry, versions
from ..result import SiteResult
from .names import PACKAGES
from .recipe import ModuleRecipe


@dataclass(repr=False)
class ModuleReport(Readable):
    """`model` is the narrower module; `output` the folder it was written to, if any. parameters and macs (for one
    input of each tower; None where they cannot be counted) are (before, after); raised: λ of the method, as asked and
    as used, that had to be raised to measure what a site can spare; repaired_norms: how many BatchNorms were estimated
    anew; examples: two inputs (not one, of which there are no statistics) by the method that takes them
    ("": forward); evaluation: accuracies by name. At a prompt it is a few lines (`summary`), in a notebook a table with
    plots."""

    recipe: ModuleRecipe
    model: nn.Module
    results: list[SiteResult]
    calibration: dict[str, Any] | None
    source: dict[str, Any]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    allocation: str
    affine: bool
    raised: dict[str, list[float]] = field(default_factory=dict)
    repaired_norms: int = 0
    calibration_text: dict[str, Any] | None = None
    classes: list[str] | None = None
    examples: dict[str, Tensor] = field(default_factory=dict)
    bytes: int | None = None
    evaluation: dict[str, Any] | None = None
    output: str | None = None
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def sites(self) -> list[dict[str, Any]]:
        """One entry per site, in execution order, of plain values as `Report.sites` has them:
        `pandas.DataFrame(report.sites)` is a table. For convolutions of more than one tap the errors are estimates: the
        correlation between taps is left out."""
        return [site_entry(result, trained=False) for result in self.results]

    @property
    def ratio(self) -> dict[str, float]:
        """The share of widths that went, by kind of site."""
        found = {}
        for kind in sorted({r.site.kind for r in self.results}):
            entries = [e for e, r in zip(self.sites, self.results, strict=True) if r.site.kind == kind]
            found[kind] = 1 - sum(e["after"] for e in entries) / sum(e["before"] for e in entries)
        return found

    def run_json(self) -> dict[str, Any]:
        """run.json: what differs between equal runs."""
        seconds = {name: round(value, 3) for name, value in self.phases.items()}
        return machine_json() | {"seconds": seconds, "peak_memory_bytes": peak_memory()}

    def to_json(self) -> dict[str, Any]:
        """The content of grail.json as plain values that json.dumps takes. Equal for equal runs: times and the machine
        are in `run_json`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": self.recipe.to_json(),
            "versions": versions(*PACKAGES),
            "source": self.source,
            "calibration": self.calibration,
            "calibration_text": self.calibration_text,
            "sites": self.sites,
            "allocation": self.allocation,
            "allocation_raised": self.raised,
            "bias": self.affine,
            "ratio": self.ratio,
            "parameters": {"before": self.parameters[0], "after": self.parameters[1]},
            "bytes": self.bytes and {"after": self.bytes},
            "macs": self.macs and {"before": self.macs[0], "after": self.macs[1]},
            "repaired_norms": self.repaired_norms,
            "evaluation": self.evaluation,
            "format": "module",
            "loads_with": "grail.load",
        }
