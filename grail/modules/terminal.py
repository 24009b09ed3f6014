"""What a person sees of vision networks: the closing lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..recipe import FILE
from ..terminal import before_after, mean, raised, show_table

if TYPE_CHECKING:
    from .report import ModuleReport


def show_network(report: ModuleReport, console: Console) -> None:
    """The closing lines of `grail compress` for a vision network."""
    lines = {
        "parameters": before_after(*report.parameters),
        "ratio": ", ".join(f"{kind} {share:.3f}" for kind, share in report.ratio.items()),
    }
    if report.macs:
        lines["arithmetic"] = before_after(*report.macs, "MAC")
    repaired = [site for site in report.sites if site["error_after"] is not None]
    if repaired:
        before, after = (mean(repaired, key) for key in ("error_before", "error_after"))
        lines["output error"] = f"mean of {len(repaired)} sites: without repair {before:.4f}, with it {after:.4f}"
    lines |= raised(report.sites, report.raised)
    if report.repaired_norms:
        lines["BatchNorms"] = f"{report.repaired_norms} estimated anew"
    if report.evaluation:
        found = report.evaluation
        shown = ", ".join(f"{name} {value['top1']:.2%}" for name, value in found["accuracy"].items())
        lines["accuracy"] = f"{shown}  ({found['data']}, {found['images']} images)"
    if report.calibration_text:
        text = report.calibration_text
        lines["captions"] = f"{text['captions']} from {text['source']}"
    lines["written to"] = str(report.output)
    lines["recipe"] = str(Path(report.output) / FILE)
    lines["loads with"] = f"grail.load({report.output!r})"
    for key, value in lines.items():
        console.print(f"{key:14} {value}", markup=False)


def show_accuracy(found: dict, console: Console) -> None:
    """The closing lines of `grail eval` for vision networks."""
    labels = list(found["models"])
    table = [["", *labels]]
    rows = {"top1": "{:.2%}", "top5": "{:.2%}", "parameters": "{:,}", "macs": "{:,}", "milliseconds": "{}"}
    for key, form in rows.items():
        values = [found["models"][label].get(key) for label in labels]
        if any(value is not None for value in values):
            values = [value["p50"] if isinstance(value, dict) else value for value in values]
            table.append([key, *("-" if value is None else form.format(value) for value in values)])
    probes = [found["models"][label].get("probe") for label in labels]
    if all(probes):
        table.append(["linear probe", *(f"{probe['top1']:.2%}" for probe in probes)])
    if "data" in found:
        console.print(f"{found['data']}: {found['images']} images", markup=False)
    show_table(table, console)
