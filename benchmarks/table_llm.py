"""Held-out perplexity of SmolLM2-135M for every method, ratio, and with and without compensation: one table.

    make table-llm                                          # all cells that are not stored yet, then the table
    python benchmarks/table_llm.py --methods flap --ratios 0.3 --samples 128
    python benchmarks/table_llm.py --render                 # only the table, from what is stored

Each cell is a line of benchmarks/results/table_llm.jsonl, written when it is done: a run that is stopped goes on with
the next cell. A cell is one `grail compress` (with its reopening check: the checkpoint loads in a fresh process) and
one evaluation of the written files on the held-out built-in text. Calibration: `--samples` windows of 512 tokens; every
site is repaired on its own (`--target hidden`, as in the publication).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import grail
import grail_kernels
from grail import compress
from grail.checkpoint.locate import SMOLLM2
from grail.evaluate import evaluate
from grail.report import Report, versions
from grail.selectors import methods

RESULTS = Path(__file__).parent / "results"
STORE, TABLE = RESULTS / "table_llm.jsonl", RESULTS / "table_llm.md"
RATIOS = (0.2, 0.3, 0.5)
METHODS = ("flap", "fold", "gram", "mag-sp", "random", "slimgpt", "wanda-pp-sp", "wanda-sp")
KEYS = ("method", "ratio", "compensate", "bias", "samples")
LIMIT = 1.01
"""A compensated cell may be worse than its uncompensated one by one per cent, or the table says why."""


def cells(names: list[str], ratios: list[float], samples: int) -> list[dict]:
    """Every cell: all methods with and without compensation, and FLAP also with weights alone (no bias)."""
    found = []
    for ratio in ratios:
        for name in names:
            own = methods()[name].bias
            kinds = [(True, own), (False, own)] + ([(True, False)] if own else [])
            found += [dict(zip(KEYS, (name, ratio, *kind, samples), strict=True)) for kind in kinds]
    return found


def measure(cell: dict, work: Path) -> dict:
    """One compression and one evaluation."""
    output = work / "cell"
    asked = {key: cell[key] for key in ("method", "ratio", "compensate", "bias", "samples")} | {"target": "hidden"}
    report = compress(SMOLLM2, output=str(output), overwrite=True, seq_len=512, eval="none", **asked)
    found = evaluate(str(output), data="builtin", seq_len=512)
    return cell | {
        "perplexity": found["models"][str(output)]["perplexity"],
        "evaluated": {key: found[key] for key in ("data", "windows", "seq_len")},
        "parameters": report.parameters[1],
        "format": report.format.name,
        "reached": report.ratio["overall"]["reached"],
        **_errors(report),
        "reopened": report.reopened,
        "seconds": {name: round(seconds, 1) for name, seconds in report.phases.items()},
        "versions": versions(),
        "code": code_hash(),
    }


def _errors(report: Report) -> dict:
    repaired = [site for site in report.sites if site["error_after"] is not None]
    if not repaired:
        return {"error_before": None, "error_after": None, "worse_sites": None, "raised_sites": None}
    return {
        "error_before": sum(site["error_before"] for site in repaired) / len(repaired),
        "error_after": sum(site["error_after"] for site in repaired) / len(repaired),
        "worse_sites": sum(site["error_after"] > site["error_before"] * (1 + 1e-6) for site in repaired),
        "raised_sites": sum(site["retries"] > 0 for site in repaired),
    }


def stored(store: Path = STORE) -> list[dict]:
    """The cells that are done; a line that was cut off by a kill is not one."""
    found = []
    for line in store.read_text().splitlines() if store.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def code_hash() -> str:
    """Over the sources of grail and its kernels: cells made by different code can be told apart."""
    digest = hashlib.sha256()
    for package in (grail, grail_kernels):
        for file in sorted(Path(package.__file__).parent.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def key_of(cell: dict) -> tuple:
    return tuple(cell[key] for key in KEYS)


def append(row: dict, store: Path = STORE) -> None:
    """Add a cell that is done."""
    store.parent.mkdir(exist_ok=True)
    whole = not store.exists() or store.read_bytes().endswith(b"\n")
    with open(store, "a") as handle:
        handle.write(("" if whole else "\n") + json.dumps(row) + "\n")


def render(samples: int) -> str:
    """The table in Markdown, for one number of calibration windows."""
    rows = {key_of(row): row for row in stored() if row["samples"] == samples}
    dense = next((row["perplexity"] for row in stored() if row["method"] == "dense"), float("nan"))
    ratios = sorted({row["ratio"] for row in rows.values()})
    names = sorted({row["method"] for row in rows.values()} - {"dense"})
    head = "".join(f" {ratio:g} pruned | {ratio:g} repaired |" for ratio in ratios)
    lines = [f"Dense: {dense:.2f}. {samples} calibration windows of 512 tokens.", "", f"| method |{head}"]
    lines.append("|---|" + "---|" * (2 * len(ratios)))
    for name in names:
        own = methods()[name].bias
        kinds = [("", own)] + ([(" (no bias)", False)] if own else [])
        for label, bias in kinds:
            found = [rows.get((name, ratio, fit, bias, samples)) for ratio in ratios for fit in (False, True)]
            lines.append(f"| {name}{label} |" + "".join(f" {_cell(row)} |" for row in found))
    codes = len({row.get("code") for row in rows.values()})
    note = [f"The cells were made by {codes} states of the code (`code` in table_llm.jsonl)."] if codes > 1 else []
    return "\n".join([*lines, "", *_remarks(rows), *note, ""])


def _cell(row: dict | None) -> str:
    return "" if row is None else f"{row['perplexity']:.2f}"


def _remarks(rows: dict[tuple, dict]) -> list[str]:
    """Cells where compensation did not help on held-out text, with the calibration error that says why."""
    found = []
    for (name, ratio, fit, bias, samples), row in rows.items():
        pruned = rows.get((name, ratio, False, bias, samples))
        if fit and pruned and row["perplexity"] > LIMIT * pruned["perplexity"]:
            found.append(
                f"* {name} {ratio:g}: repaired {row['perplexity']:.2f}, pruned {pruned['perplexity']:.2f}; the mean "
                f"calibration error fell from {row['error_before']:.4f} to {row['error_after']:.4f}."
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(methods()), default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--render", action="store_true", help="only write the table from what is stored")
    asked = parser.parse_args()
    if not asked.render:
        run(cells(asked.methods, asked.ratios, asked.samples))
    TABLE.write_text(render(asked.samples))
    sys.stdout.write(TABLE.read_text())


def run(wanted: list[dict]) -> None:
    done = {key_of(row) for row in stored()}
    if not any(row["method"] == "dense" for row in stored()):
        found = evaluate(SMOLLM2, data="builtin", seq_len=512)
        dense = dict.fromkeys(KEYS) | {"method": "dense", "perplexity": found["models"][SMOLLM2]["perplexity"]}
        append(dense | {"versions": versions()})
    with tempfile.TemporaryDirectory(prefix="grail-table-") as work:
        for number, cell in enumerate(wanted, 1):
            if key_of(cell) in done:
                continue
            row = measure(cell, Path(work))
            append(row)
            sys.stderr.write(f"{number} of {len(wanted)}: {cell} {row['perplexity']:.3f}\n")


if __name__ == "__main__":
    main()
