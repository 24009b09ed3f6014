"""Accuracy on Fashion-MNIST when a ResNet's residual streams are narrowed along with its blocks, at the same ratio.

    python benchmarks/residual_vision.py            # all cells that are not stored yet, and the table

128 unlabelled images; lines of benchmarks/results/residual_vision.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads that spin fight with other programs

import torch

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

from benchmarks.vision_cells import RESULTS, VARIANTS, Cell, Store, mean_and_deviation
from benchmarks.vision_train import THREADS

NET, DATA, SAMPLES = "resnet18-quarter", "fashion-mnist", 128
TABLE = RESULTS / "residual_vision.md"
METHODS, RATIOS = ("wanda", "gram", "fold"), (0.2, 0.3, 0.5)


@dataclass(frozen=True)
class ResidualCell(Cell):
    """A cell with the same ratio for the residual streams."""

    @property
    def options(self) -> dict:
        return {"residual_ratio": self.ratio}


class ResidualStore(Store):
    """Lines of such cells."""

    kind = ResidualCell


STORE = ResidualStore("residual_vision.jsonl")


def cells(seeds: list[int]) -> list[ResidualCell]:
    return [
        ResidualCell(NET, DATA, method, ratio, seed, variant, SAMPLES)
        for seed in seeds
        for method in METHODS
        for ratio in RATIOS
        for variant in VARIANTS
    ]


def render() -> str:
    """A row for each method and ratio: accuracy in % and parameters."""
    found: dict[tuple, list[float]] = {}
    sizes: dict[tuple, int] = {}
    for cell, row in STORE.latest().items():
        found.setdefault((cell.method, cell.ratio, cell.variant), []).append(100 * row["accuracy"])
        sizes[cell.method, cell.ratio] = row["parameters"]
    lines = [f"| method | ratio | parameters |{''.join(f' {v} |' for v in VARIANTS)}", "|---|---|---|" + "---|" * 4]
    for method, ratio in sizes:
        values = [found.get((method, ratio, variant), []) for variant in VARIANTS]
        shown = [f"{mean_and_deviation(v)[0]:.1f}" if v else "" for v in values]
        lines.append(f"| {method} | {ratio:g} | {sizes[method, ratio]:,} |{''.join(f' {value} |' for value in shown)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--render", action="store_true", help="only write the table from what is stored")
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1, torch.get_num_threads()))
    if not asked.render:
        STORE.run(cells(asked.seeds))
    TABLE.write_text(render())
    sys.stdout.write(TABLE.read_text())


if __name__ == "__main__":
    main()
