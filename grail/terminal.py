"""What a person sees: progress bars on a terminal, plain lines elsewhere, and the closing table."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from .numbers import bytes_of, scaled
from .progress import Progress
from .recipe import FILE, alpha_name

if TYPE_CHECKING:
    from .report import Report

QUIET, NORMAL, VERBOSE = 0, 1, 2
LINES_PER_LOOP = 5
MEASURED = {
    "perplexity": "{:.3f}",
    "parameters": "{:,}",
    "bytes": "{:,}",
    "prefill tokens/s": "{:.1f}",
    "decode tokens/s": "{:.1f}",
    "memory peak": "{:,}",
}
"""What `grail eval` shows of a model, and how."""
CHANNELS = {"heads": "channels of heads", "channels": "channels of MLPs"}
"""What widths count, by kind of site."""


class _Stderr(Console):
    """Work goes on when nobody reads of it any more."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class TerminalProgress(Progress):
    """Bars with time left when stderr is a terminal; otherwise a line now and then. All on stderr."""

    def __init__(self, verbosity: int = NORMAL):
        self.console = _Stderr(stderr=True, highlight=False, soft_wrap=True)
        self.verbosity = verbosity

    def say(self, line: str) -> None:
        if self.verbosity > QUIET:
            self.console.print(line, markup=False)

    def warn(self, line: str) -> None:
        self.console.print(f"warning: {line}", style="yellow", markup=False)

    def layers(self, label: str) -> Callable[[Iterable[int]], Iterable[int]]:
        if self.verbosity == QUIET:
            return lambda layers: layers
        return lambda layers: (self._bar if self.console.is_terminal else self._lines)(label, list(layers))

    def _bar(self, label: str, layers: list[int]) -> Iterator[int]:
        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("layers"))
        with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console) as bars:
            yield from bars.track(layers, description=escape(label))

    def _lines(self, label: str, layers: list[int]) -> Iterator[int]:
        start, every = time.monotonic(), max(len(layers) // LINES_PER_LOOP, 1)
        for done, layer in enumerate(layers):
            yield layer
            if (done + 1) % every == 0 or done + 1 == len(layers):
                spent = time.monotonic() - start
                left = spent / (done + 1) * (len(layers) - done - 1)
                self.say(f"{label}: layer {done + 1} of {len(layers)}, {spent:.0f} s, about {left:.0f} s left")


def set_logging(verbosity: int) -> None:
    """Our own log at the asked level; libraries speak only with -v."""
    level = {QUIET: logging.ERROR, NORMAL: logging.WARNING}.get(verbosity, logging.INFO)
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    logging.getLogger("grail").setLevel(level if verbosity != NORMAL else logging.INFO)
    for library in ("transformers", "datasets", "huggingface_hub", "httpx", "filelock"):
        logging.getLogger(library).setLevel(logging.INFO if verbosity > VERBOSE else logging.ERROR)


def show_report(report: Report, console: Console) -> None:
    """The closing lines of `grail compress`."""
    lines = {
        "parameters": before_after(*report.parameters),
        "size on disk": before_after(*report.bytes, "B"),
        "ratio": ", ".join(
            f"{kind} {shares['reached']:.3f}" + ("" if shares["asked"] is None else f" (asked {shares['asked']:g})")
            for kind, shares in report.ratio.items()
        ),
    }
    compensated = [site for site in report.sites if site["error_after"] is not None]
    if compensated:
        pruned, repaired = (mean(compensated, key) for key in ("error_before", "error_after"))
        streams = report.recipe.streams
        of = " of what is missing to the dense stream" if streams else ""
        errors = f"mean of {len(compensated)} sites: pruned {pruned:.4f}, repaired {repaired:.4f}{of}"
        lines["stream error" if streams else "output error"] = errors
    lines |= raised(report.sites, report.raised)
    if report.candidates:
        lines["alpha search"] = ", ".join(
            f"{alpha_name(one['alpha'])} {one['perplexity']:.3f}{' (taken)' if one['taken'] else ''}"
            for one in report.candidates
        )
    if report.evaluation:
        found = report.evaluation
        names = {"dense": "dense", "pruned": "pruned only", "compressed": "compressed"}
        shown = ", ".join(f"{names[name]} {value:.3f}" for name, value in found["perplexity"].items())
        lines["perplexity"] = f"{shown}  ({found['data']}, {found['windows']} windows of {found['seq_len']})"
    lines["written to"] = str(report.output)
    lines["recipe"] = str(Path(report.output) / FILE)
    trust = ", trust_remote_code=True" if report.format.loads == "grail" else ""
    lines["loads with"] = f"AutoModelForCausalLM.from_pretrained({report.output!r}{trust}), {report.loads_with}"
    lines["tensor par."] = f"up to {counted(report.format.tensor_parallel, 'process', 'es')}"
    if report.class_changed:
        lines["class changed"] = report.class_changed
    for key, value in lines.items():
        console.print(f"{key:14} {value}", markup=False)


def show_plan(found: dict, console: Console) -> None:
    """What `grail plan` says."""
    memory, seconds, flops = found["memory_bytes"], found["seconds"], found["flops"]
    kinds = ", ".join(
        f"{entry['before']} -> {entry['after']} {CHANNELS[kind]} at {entry['changed']} of {entry['sites']} sites"
        if entry["changed"]
        else f"{kind} keep their width"
        for kind, entry in found["sites"].items()
    )
    stand_in = "" if found["widths_settled"] else " (before the network is scored)"
    chosen = f" and {found['trial_tokens']:,} to choose by" if found["trial_tokens"] else ""
    lines = {
        "model": f"{found['model']}, {found['layers']} layers",
        "method": f"{found['method']}, allocation {found['allocation']}, passes over the text: {found['passes']}",
        "target": found["target"] or "none: no repair",
        "widths": kinds + stand_in,
        "parameters": before_after(found["parameters"]["before"], found["parameters"]["after"]) + stand_in,
        "size on disk": before_after(found["bytes"]["before"], found["bytes"]["after"], "B") + stand_in,
        "text": f"{found['calibration_tokens']:,} calibration tokens{chosen}, {found['chunk_tokens']:,} at a time; "
        f"{found['evaluation_tokens']:,} for evaluation",
        "activations": f"in the {found['store']} store, hidden vectors {found['hidden_states']}, "
        f"{bytes_of(found['store_traffic_bytes'])} of traffic",
        "arithmetic": ", ".join(f"{name} {value / 1e12:.2f} TFLOP" for name, value in flops.items() if value),
        "files": f"{bytes_of(found['bytes_read'])} read, {bytes_of(found['bytes_written'])} written, "
        f"{bytes_of(found['disk_bytes'])} of disk needed",
        "memory": f"{memory['peak'] / 1e9:.2f} GB at most: "
        + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.items() if name != "peak"),
        "time": f"about {seconds['total']:.0f} s: "
        + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items() if name != "total"),
        "loads with": found["loads_with"] or "decided when the network was scored",
    }
    for key, value in lines.items():
        console.print(f"{key:14} {value}", markup=False)


def show_profile(report: Report, console: Console) -> None:
    """Where time went, largest first; phases of background threads overlap with the others."""
    rows = [["phase", "seconds", "CPU s", "GFLOP/s", "GB/s", "times", "GB at most"]]
    phases = report.profile.to_json()
    for name in sorted(phases, key=lambda name: -phases[name]["seconds"]):
        found = phases[name]
        most = f"{found['peak_memory_bytes'] / 1e9:.2f}" if found["peak_memory_bytes"] else ""
        rates = (f"{found[key]:.1f}" if found[key] else "" for key in ("gflops", "gbps"))
        rows.append([name, f"{found['seconds']:.2f}", f"{found['cpu_seconds']:.2f}", *rates, str(found["count"]), most])
    show_table(rows, console)
    console.print(f"peak resident memory {report.run_json()['peak_memory_bytes'] / 1e9:.2f} GB", markup=False)


def show_evaluation(found: dict, console: Console) -> None:
    """The closing lines of `grail eval`."""
    from .evaluation.tasks import main_metric

    labels = list(found["models"])
    rows = [["", *labels]]
    for key, form in MEASURED.items():
        if any(key in found["models"][label] for label in labels):
            rows.append([key, *(form.format(found["models"][label][key]) for label in labels)])
    for task in found["models"][labels[0]].get("tasks", {}):
        scores = [main_metric(found["models"][label]["tasks"][task]) for label in labels]
        if scores[0] is not None:
            rows.append([f"{task} {scores[0][0]}", *map(_score, scores)])
    if "data" in found:
        console.print(f"{found['data']}: {found['windows']} windows of {found['seq_len']} tokens", markup=False)
    show_table(rows, console)
    for label in labels:
        if "sample" in found["models"][label]:
            console.print(f"{label} says: {found['models'][label]['sample']!r}", markup=False)


def show_table(rows: Sequence[Sequence[str]], console: Console, right: bool = True) -> None:
    """Columns under one another, all but the first to the right. Whole, however narrow the terminal is: a path that is
    cut off names nothing."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (
            cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(others, widths[1:], strict=True)
        )
        console.print("  ".join([first.ljust(widths[0]), *cells]).rstrip(), markup=False)


def _score(found: tuple[str, float, float | None] | None) -> str:
    """A value with its standard error."""
    if found is None:
        return ""
    _, value, error = found
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def counted(number: int, what: str, plural: str = "s") -> str:
    """1 site, 2 sites."""
    return f"{number:,} {what}{'' if number == 1 else plural}"


def before_after(before: int, after: int, unit: str = "") -> str:
    """Two sizes and their relation."""
    return f"{scaled(before, unit)} -> {scaled(after, unit)} ({(after - before) / before:+.1%})"


def raised(sites: list[dict], measured: dict[str, list[float]] | None = None) -> dict[str, str]:
    """Lines on how many sites had a λ raised: that of their repair, that of the method's own selection, and to measure
    what they can spare (`measured`, by site)."""
    counts = {
        "ridge raised": sum(site["retries"] > 0 for site in sites),
        "damping raised": sum((site["damping"] or {"retries": 0})["retries"] > 0 for site in sites),
        "raised to measure": len(measured or ()),
    }
    why = "where the Gram matrix is singular (see grail.json)"
    return {key: f"at {count} {'sites' if count > 1 else 'site'}, {why}" for key, count in counts.items() if count}


def mean(entries: list[dict], key: str) -> float:
    """Of one value of all entries."""
    return sum(entry[key] for entry in entries) / len(entries)
