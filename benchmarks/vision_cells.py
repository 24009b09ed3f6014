"""One cell of the vision tables: a trained network made narrower, and its accuracy; and where cells are kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import grail
from benchmarks.table_llm import code_hash
from benchmarks.vision_train import accuracy, images, recipe_hash, trained
from grail.report import versions

RESULTS = Path(__file__).parent / "results"
METHODS = ("mag-l1", "mag-l2", "wanda", "gram", "fold", "random")
RATIOS = (0.3, 0.5, 0.65, 0.8, 0.9)
DENSE = "dense"

VARIANTS = {
    "none": {"compensate": False, "repair": False},
    "REPAIR": {"compensate": False, "repair": True},
    "GRAIL": {"compensate": True, "repair": False},
    "GRAIL + REPAIR": {"compensate": True, "repair": True},
}


@dataclass(frozen=True)
class Cell:
    """What is asked: a method, a ratio, one of the variants, how many calibration images."""

    net: str
    data: str
    method: str
    ratio: float
    seed: int
    variant: str
    samples: int = 128

    @property
    def options(self) -> dict:
        """More for grail.compress: the publication's target."""
        return {"target": "dense"}


def variants_of(net: nn.Module) -> list[str]:
    """Those that mean something: REPAIR needs BatchNorms."""
    has_norms = any(isinstance(module, _BatchNorm) for module in net.modules())
    return [name for name, options in VARIANTS.items() if has_norms or not options["repair"]]


def calibration(data: str, samples: int, seed: int) -> Tensor:
    """Images of the training part, without their labels."""
    pixels, _ = images(data, "calibration")
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[:samples]]


def measure(cell: Cell, net: nn.Module) -> dict:
    """{accuracy, parameters, seconds, what became of the sites}."""
    inputs = calibration(cell.data, cell.samples, cell.seed)
    asked = {"method": cell.method, "ratio": cell.ratio, "seed": cell.seed} | VARIANTS[cell.variant] | cell.options
    report = grail.compress(net, calibration=inputs, samples=cell.samples, **asked)
    return {
        "accuracy": accuracy(report.model, cell.data),
        "parameters": report.parameters[1],
        "seconds": round(report.phases["compress"], 2),
        **_errors([site for site in report.sites if site["error_after"] is not None]),
    }


def _errors(repaired: list[dict]) -> dict:
    """Mean errors over the sites that were repaired, how many got worse, and for how many the ridge was raised."""
    if not repaired:
        return {}
    return {
        "error_before": sum(site["error_before"] for site in repaired) / len(repaired),
        "error_after": sum(site["error_after"] for site in repaired) / len(repaired),
        "worse_sites": sum(site["error_after"] > site["error_before"] * (1 + 1e-6) for site in repaired),
        "raised_sites": sum(site["retries"] > 0 for site in repaired),
    }


class Store:
    """Measured cells of one kind, a line of JSON each. Those of networks that are trained otherwise by now are other
    cells."""

    kind: type[Cell] = Cell

    def __init__(self, name: str):
        self.file = RESULTS / name

    def rows(self) -> list[dict]:
        """All that are stored; a line that was cut off by a kill is none."""
        found = []
        for line in self.file.read_text().splitlines() if self.file.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def latest(self) -> dict[Cell, dict]:
        """Rows of the networks of the last row: the last of equal cells counts."""
        rows = self.rows()
        return {self.cell_of(row): row for row in rows if row["network"] == rows[-1]["network"]}

    def cell_of(self, row: dict) -> Cell:
        return self.kind(**{each.name: row[each.name] for each in fields(self.kind)})

    def append(self, row: dict) -> None:
        self.file.parent.mkdir(exist_ok=True)
        whole = not self.file.exists() or self.file.read_bytes().endswith(b"\n")
        with open(self.file, "a") as handle:
            handle.write(("" if whole else "\n") + json.dumps(row) + "\n")

    def run(self, cells: Iterable[Cell]) -> None:
        """Measure what is not stored yet, cell by cell."""
        done = {self.cell_of(row) for row in self.rows() if row["network"] == recipe_hash()}
        wanted = [cell for cell in dict.fromkeys(cells) if cell not in done]
        told = {"network": recipe_hash(), "code": code_hash(), "threads": torch.get_num_threads()}
        nets: dict[tuple, nn.Module] = {}
        for number, cell in enumerate(wanted, 1):
            key = (cell.net, cell.data, cell.seed)
            if key not in nets:
                nets = {key: trained(*key)}
            found = {"accuracy": accuracy(nets[key], cell.data)} if cell.method == DENSE else measure(cell, nets[key])
            self.append(asdict(cell) | found | told | {"versions": versions()})
            sys.stderr.write(f"{number} of {len(wanted)}: {cell} {found['accuracy']:.4f}\n")


def dense_cell(net: str, data: str, seed: int) -> Cell:
    """The network as it was trained."""
    return Cell(net, data, DENSE, 0.0, seed, "none", 0)


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Of a sample; the deviation of a single value is 0."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else 0.0
