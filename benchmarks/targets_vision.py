"""What compressed hidden vectors should stand for: the dense network's, the compressed network's own, what takes the
residual stream back to the dense one, or one-shot.

    python benchmarks/targets_vision.py             # all cells that are not stored yet, and the table
    python benchmarks/targets_vision.py --render    # only the tables, from what is stored

Fashion-MNIST, GRAIL + REPAIR for the ResNet and GRAIL for the ViT, 128 unlabelled images and, at 0.5, fewer; lines of
benchmarks/results/targets_vision.jsonl, with the seconds that grail.compress took.
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

from benchmarks.vision_cells import RESULTS, Cell, Store, mean_and_deviation, variants_of
from benchmarks.vision_train import NETS, THREADS

DATA, SAMPLES = "fashion-mnist", 128
TABLE = RESULTS / "targets_vision.md"
METHODS, RATIOS = ("wanda", "fold"), (0.3, 0.5, 0.65, 0.8)
FEW, FEW_AT = (4, 8, 16, 32, 64), 0.5
"""Numbers of images, and the ratio with them."""
TARGETS = {
    "dense": {"target": "dense"},
    "own": {"target": "own"},
    "stream": {"target": "stream"},
    "one-shot": {"one_shot": True},
}


@dataclass(frozen=True)
class TargetCell(Cell):
    """A cell with one of TARGETS."""

    target: str = "dense"

    @property
    def options(self) -> dict:
        return TARGETS[self.target]


class TargetStore(Store):
    """Lines of such cells."""

    kind = TargetCell


STORE = TargetStore("targets_vision.jsonl")


def cells(nets: list[str], seeds: list[int]) -> list[TargetCell]:
    asked = [(ratio, SAMPLES, target) for ratio in RATIOS for target in TARGETS]
    asked += [(FEW_AT, samples, target) for samples in FEW for target in ("dense", "stream")]
    return [
        TargetCell(net, DATA, method, ratio, seed, variants_of(NETS[net]())[-1], samples, target)
        for seed in seeds
        for net in nets
        for method in METHODS
        for ratio, samples, target in asked
    ]


def render() -> str:
    """A row for each network, method and target, a column for each ratio, or number of images: accuracy in %."""
    latest = STORE.latest()
    much = table({(c, c.ratio): row for c, row in latest.items() if c.samples == SAMPLES}, RATIOS)
    seeds = {c.seed for c in latest if c.samples in FEW}
    each = {(c, c.samples): row for c, row in latest.items() if c.ratio == FEW_AT and c.seed in seeds}
    few = table(each, (*FEW, SAMPLES))
    told = f"{FEW_AT:g}, by the number of images, of {len(seeds)} seed(s):"
    return f"{SAMPLES} images, by ratio:\n\n{much}\n{told}\n\n{few}"


def table(found: dict[tuple[TargetCell, float], dict], columns: tuple[float, ...]) -> str:
    """Means over the seeds that are stored; of rows that have all columns."""
    values: dict[tuple, list[float]] = {}
    for (cell, column), row in found.items():
        values.setdefault((cell.net, cell.method, cell.target, column), []).append(100 * row["accuracy"])
    lines = [
        f"| network | method | target |{''.join(f' {c:g} |' for c in columns)}",
        "|---|---|---|" + "---|" * len(columns),
    ]
    for name in dict.fromkeys(key[:3] for key in values):
        each = [values.get((*name, column)) for column in columns]
        if all(each):
            shown = "".join(f" {mean_and_deviation(v)[0]:.1f} |" for v in each)
            lines.append(f"| {' | '.join(name)} |{shown}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet18-quarter", "vit-small"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--render", action="store_true", help="only write the table from what is stored")
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1, torch.get_num_threads()))
    if not asked.render:
        STORE.run(cells(asked.nets, asked.seeds))
    TABLE.write_text(render())
    sys.stdout.write(TABLE.read_text())


if __name__ == "__main__":
    main()
