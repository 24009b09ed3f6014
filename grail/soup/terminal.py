"""What a person sees of `grail soup`."""

from __future__ import annotations

import os

from rich.console import Console

from ..terminal import show_table
from .greedy import told


def show_soup(found: dict, console: Console) -> None:
    """The closing lines: each ingredient, whether it was taken, and what the soup is."""
    if found["greedy"]:
        rows = [["", "alone", "soup with it", ""]]
        for label, one in zip(_labels(found["ingredients"]), found["ingredients"], strict=True):
            scores = (told(found["metric"], s) if s is not None else "" for s in (one["score"], one["score_with"]))
            rows.append([label, *scores, "taken" if one["taken"] else "left out"])
        console.print(f"{found['data']}: {found['samples']} samples", markup=False)
        show_table(rows, console)
    taken = sum(one["taken"] for one in found["ingredients"])
    lines = {"average of": f"{taken} of {len(found['ingredients'])} checkpoints"}
    if found["greedy"]:
        score, best = (told(found["metric"], found[key]) for key in ("score", "best_single"))
        lines["score"] = f"{score} (best single {best})"
    lines["parameters"] = f"{found['parameters']:,} in {found['tensors']} tensors"
    lines["size on disk"] = f"{found['bytes'] / 1e6:.1f} MB"
    lines["written to"] = found["output"]
    lines["next"] = found["next"]
    for key, value in lines.items():
        console.print(f"{key:14} {value}", markup=False)


def _labels(ingredients: list[dict]) -> list[str]:
    """Their paths without what all have in common."""
    paths = [os.path.abspath(one["path"]) for one in ingredients]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]
