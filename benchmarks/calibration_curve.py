"""Accuracy on Fashion-MNIST against the number of calibration images, 8 to 1024: is 128 enough?

    python benchmarks/calibration_curve.py                              # all cells that are not stored yet, the figure
    python benchmarks/calibration_curve.py --nets vit-small --methods fold --ratio 0.5 --seeds 0
    python benchmarks/calibration_curve.py --render                     # only the figure, from what is stored

Cells are lines of benchmarks/results/calibration_curve.jsonl as in table_vision.py; the figure is
calibration_curve.png beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads that spin fight with other programs

import torch

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

from benchmarks.vision_cells import DENSE, METHODS, RESULTS, Cell, Store, dense_cell, mean_and_deviation, variants_of
from benchmarks.vision_train import NETS, THREADS
from grail.errors import GrailError

DATA = "fashion-mnist"
STORE, FIGURE = Store("calibration_curve.jsonl"), RESULTS / "calibration_curve.png"
SAMPLES = [8 << i for i in range(8)]
SEEDS = (0, 1, 2)


def cells(nets: list[str], methods: list[str], ratio: float, seeds: list[int]) -> Iterator[Cell]:
    variants = {net: variants_of(NETS[net]()) for net in nets}
    for seed in seeds:
        for net in nets:
            yield dense_cell(net, DATA, seed)
            for method in methods:
                for samples in SAMPLES:
                    for variant in variants[net]:
                        yield Cell(net, DATA, method, ratio, seed, variant, samples)


def curves() -> dict[tuple, dict[str, dict[int, tuple[float, float]]]]:
    """By (network, method, ratio), then by variant: (mean, deviation) for each number of images."""
    seen: dict[Cell, list[float]] = {}
    for cell, row in STORE.latest().items():
        key = Cell(cell.net, cell.data, cell.method, cell.ratio, 0, cell.variant, cell.samples)
        seen.setdefault(key, []).append(row["accuracy"])
    found: dict = {}
    for cell, values in sorted(seen.items(), key=lambda item: item[0].samples):
        if cell.method != DENSE:
            panel = found.setdefault((cell.net, cell.method, cell.ratio), {})
            panel.setdefault(cell.variant, {})[cell.samples] = mean_and_deviation(values)
    return found


def draw(found: dict, file: Path) -> None:
    """A panel for each network, method and ratio; bars are deviations over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4.5 * len(found), 4), squeeze=False, sharey=True)
    for panel, ((net, method, ratio), variants) in zip(panels[0], found.items(), strict=True):
        for name, points in variants.items():
            means, deviations = ([100 * value for value in values] for values in zip(*points.values(), strict=True))
            panel.errorbar(list(points), means, deviations, marker="o", capsize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.set(title=f"{net}, {method} {ratio:g}", xlabel="calibration images", xticks=SAMPLES, xticklabels=SAMPLES)
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0][0].set_ylabel("accuracy, %")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def table(found: dict) -> str:
    """The same in Markdown."""
    lines = [f"| network | |{''.join(f' {samples} |' for samples in SAMPLES)}", f"|---|---|{'---|' * len(SAMPLES)}"]
    for (net, method, ratio), variants in found.items():
        for name, points in variants.items():
            values = ("{:.1f} ± {:.1f}".format(*(100 * v for v in points[s])) if s in points else "" for s in SAMPLES)
            lines.append(f"| {net}, {method} {ratio:g} | {name} |{''.join(f' {value} |' for value in values)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=["resnet18-quarter", "vit-small"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["wanda", "fold"])
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--render", action="store_true", help="only draw what is stored")
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1, torch.get_num_threads()))
    if not asked.render:
        STORE.run(cells(asked.nets, asked.methods, asked.ratio, asked.seeds))
    found = curves()
    draw(found, FIGURE)
    sys.stdout.write(table(found))


if __name__ == "__main__":
    try:
        main()
    except GrailError as error:
        sys.exit(f"calibration_curve: {error}")
