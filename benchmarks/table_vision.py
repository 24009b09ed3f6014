"""Accuracy on Fashion-MNIST for every method and ratio, pruned alone, with REPAIR, with GRAIL, and with both.

    python benchmarks/table_vision.py                                   # all cells that are not stored yet
    python benchmarks/table_vision.py --nets vit-small --methods fold --ratios 0.5 --seeds 0
    python benchmarks/table_vision.py --render                          # only the table, from what is stored

A cell is one `grail.compress` with 128 unlabelled training images and one evaluation on the 10,000 test images; a seed
is that of the network's training, of the choice of the images and of the method. Each is a line of
benchmarks/results/table_vision.jsonl, written when it is done: a run that is stopped goes on with the next cell.
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

from benchmarks.vision_cells import (
    DENSE,
    METHODS,
    RATIOS,
    RESULTS,
    Cell,
    Store,
    dense_cell,
    mean_and_deviation,
    variants_of,
)
from benchmarks.vision_train import NETS, THREADS
from grail.errors import GrailError

DATA = "fashion-mnist"
STORE, TABLE = Store("table_vision.jsonl"), RESULTS / "table_vision.md"
SHOWN = ("resnet18-quarter", "vit-small")
SEEDS = (0, 1, 2)
SAMPLES = 128
PAIRS = (("none", "GRAIL"), ("REPAIR", "GRAIL + REPAIR"))
"""What GRAIL is measured against."""
CHANCE = 0.1
COLLAPSED_AT, RECOVERED = 0.65, 0.6
"""The publication's headline: at this ratio a pruned ResNet-18 is at chance, and this share of images is won back."""

Figures = dict[tuple[str, str, float, str], tuple[float, float, int]]


def cells(nets: list[str], methods: list[str], ratios: list[float], seeds: list[int]) -> Iterator[Cell]:
    """Seed by seed, so that a run that is stopped has whole tables."""
    variants = {net: variants_of(NETS[net]()) for net in nets}
    for seed in seeds:
        for net in nets:
            yield dense_cell(net, DATA, seed)
            for method in methods:
                for ratio in ratios:
                    for variant in variants[net]:
                        yield Cell(net, DATA, method, ratio, seed, variant, SAMPLES)


def figures() -> Figures:
    """(mean, deviation, number of seeds) by network, method, ratio and variant."""
    found: dict[tuple, list[float]] = {}
    for cell, row in STORE.latest().items():
        found.setdefault((cell.net, cell.method, cell.ratio, cell.variant), []).append(row["accuracy"])
    return {key: (*mean_and_deviation(values), len(values)) for key, values in found.items()}


def render() -> str:
    """The tables in Markdown: one for each network, a row for each method and variant, a column for each ratio."""
    found = figures()
    nets = [net for net in NETS if any(key[0] == net for key in found)]
    parts = [f"Accuracy on the 10,000 test images of Fashion-MNIST, %; {SAMPLES} unlabelled calibration images."]
    parts += [_table(net, found) for net in nets]
    codes = len({row["code"] for row in STORE.latest().values()})
    if codes > 1:
        parts.append(f"The cells were made by {codes} states of the code (`code` in {STORE.file.name}).")
    return "\n\n".join(parts) + "\n"


def _table(net: str, found: Figures) -> str:
    ratios = sorted({ratio for name, method, ratio, _ in found if name == net and method != DENSE})
    lines = [f"| method | |{''.join(f' {ratio:g} |' for ratio in ratios)}", f"|---|---|{'---|' * len(ratios)}"]
    for method in METHODS:
        for variant in dict.fromkeys(key[3] for key in found if key[:2] == (net, method)):
            values = (_text(found.get((net, method, ratio, variant))) for ratio in ratios)
            lines.append(f"| {method} | {variant} |{''.join(f' {value} |' for value in values)}")
    title = f"## {net}: dense {_text(found.get((net, DENSE, 0.0, 'none')))}"
    return "\n\n".join([title, "\n".join(lines), "\n".join(_remarks(net, found))])


def _text(value: tuple[float, float, int] | None) -> str:
    if value is None:
        return ""
    mean, deviation, count = value
    return f"{100 * mean:.1f}" + (f" ± {100 * deviation:.1f}" if count > 1 else "")


def _remarks(net: str, found: Figures) -> list[str]:
    """Cells where GRAIL is below what it is measured against by more than the deviation; and what it recovers where
    pruning alone collapses."""
    lines = []
    for (name, method, ratio, variant), (plain, spread, _) in sorted(found.items()):
        other = dict(PAIRS).get(variant)
        if name != net or method == DENSE or (name, method, ratio, other) not in found:
            continue
        mean, deviation, _ = found[name, method, ratio, other]
        if mean < plain - max(spread, deviation):
            lines.append(f"* {method} {ratio:g}: {other} {100 * mean:.1f}, below {variant} {100 * plain:.1f}.")
        if ratio == COLLAPSED_AT and variant == "none":
            lines.append(_recovery(method, plain, mean, found.get((name, method, ratio, PAIRS[1][1]))))
    return lines


def _recovery(method: str, plain: float, mean: float, both: tuple[float, float, int] | None) -> str:
    best = max(mean, both[0] if both else 0.0)
    line = f"* {method} {COLLAPSED_AT:g}: alone {100 * plain:.1f}, GRAIL wins back {100 * (mean - plain):.1f} points"
    line += f", with REPAIR {100 * (both[0] - plain):.1f}" if both else ""
    if plain < 2 * CHANCE and best - plain < RECOVERED:
        line += f" (less than {100 * RECOVERED:.0f}: it reaches {100 * best:.1f})"
    return f"{line}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(SHOWN))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--render", action="store_true", help="only write the table from what is stored")
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1, torch.get_num_threads()))
    if not asked.render:
        STORE.run(cells(asked.nets, asked.methods, asked.ratios, asked.seeds))
    TABLE.write_text(render())
    sys.stdout.write(TABLE.read_text())


if __name__ == "__main__":
    try:
        main()
    except GrailError as error:
        sys.exit(f"table_vision: {error}")
