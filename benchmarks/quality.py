"""What each target of the repair is worth: perplexity of compressed SmolLM2-135M on text of the calibration's source
and on text of another.

    python benchmarks/quality.py grid                 # 8 methods x 3 ratios x 2 targets, 16 windows, seed 0
    python benchmarks/quality.py seeds                # wanda-sp and slimgpt at 0.3: more windows, seeds 1 and 2
    python benchmarks/quality.py ridges               # λ by hand, anchored and paper form
    python benchmarks/quality.py acceptance           # against plain GRAIL, with 64 windows and more
    python benchmarks/quality.py headline             # the README's rows: three of these cells
    python benchmarks/quality.py alphas               # α for all sites, against the choice by site
    python benchmarks/quality.py searches             # --alpha search: whole runs judged by perplexity
    python benchmarks/quality.py few                  # wanda-sp and slimgpt at 0.3: 2 to 16 windows, and larger λ
    python benchmarks/quality.py mixtures             # calibration on one text, on another, on both
    python benchmarks/quality.py --render             # tables and figures from what is stored

Every cell is a line of benchmarks/results/quality.jsonl, written when it is done: a run that is stopped goes on with
the next. A cell is one `grail compress` of the multi-head form (SmolLM2's three key/value heads repeated: the same
network, LLaMA-2 style) with its reopening check, and an evaluation of the written files on the held-out part of the
built-in text and on the held-out docstrings of the standard library, each in windows of 512 tokens. Ratios are those
of the channels; of the heads two of nine go at 0.2 and 0.3, four at 0.5. With --allocation error both kinds share one
budget of as many parameters.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from quality_render import render
from quality_smollm2 import multi_head_form
from table_llm import METHODS, append, code_hash, stored

from grail import compress
from grail.checkpoint.locate import SMOLLM2, locate
from grail.evaluate import evaluate
from grail.report import versions

RESULTS = Path(__file__).parent / "results"
STORE = RESULTS / "quality.jsonl"
TEXTS = ("builtin", "docstrings")
HEADS = {0.2: 0.2222, 0.3: 0.2222, 0.5: 0.4444}
"""Shares of heads: 2, 2 and 4 of 9."""
PLAIN = {
    "alpha": "auto", "sweeps": 1, "ridge": None, "ridge_form": "anchored", "allocation": None, "samples": 16, "seed": 0,
    "compensate": True, "calibration": "builtin",
}  # fmt: skip
KEYS = ("method", "ratio", "target", *PLAIN)
TARGETS = ("hidden", "stream")
SHRUNK = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def cell(method: str, ratio: float, target: str, **options: object) -> dict:
    """One compression: what differs from the plain settings is named."""
    return PLAIN | {"method": method, "ratio": ratio, "target": target} | options


def grid() -> Iterator[dict]:
    """Every method, ratio and target."""
    for ratio in (0.3, 0.2, 0.5):
        for method in METHODS:
            yield from (cell(method, ratio, target) for target in TARGETS)


def seeds() -> Iterator[dict]:
    """More seeds, and more calibration text."""
    for method in ("wanda-sp", "slimgpt"):
        for target in TARGETS:
            yield from (cell(method, 0.3, target, seed=seed) for seed in (1, 2))
            yield from (cell(method, 0.3, target, samples=samples) for samples in (64, 128))
        for seed in (1, 2):
            yield cell(method, 0.3, "hidden", samples=64, ridge=1e-3, seed=seed)
            yield cell(method, 0.3, "stream", samples=64, seed=seed)


def few() -> Iterator[dict]:
    """Little calibration text; for the plain repair also with larger λ."""
    for samples, method in itertools.product((16, 8, 4, 2), ("wanda-sp", "slimgpt")):
        yield from (cell(method, 0.3, target, samples=samples) for target in TARGETS)
    for samples, ridge in [*itertools.product((64, 8, 4), (1e-1, 1e-2)), (128, 1e-1)]:
        yield cell("wanda-sp", 0.3, "hidden", samples=samples, ridge=ridge)


def ridges() -> Iterator[dict]:
    """λ by hand, and the network that is only pruned."""
    yield cell("wanda-sp", 0.3, "hidden", compensate=False)
    for ridge in SHRUNK:
        for form in ("anchored", "paper"):
            yield from (cell("wanda-sp", 0.3, target, ridge=ridge, ridge_form=form) for target in TARGETS)


def alphas() -> Iterator[dict]:
    """α for the whole network, against the choice by site."""
    for samples in (32, 128):
        yield cell("wanda-sp", 0.3, "stream", samples=samples)
        yield from (cell("wanda-sp", 0.3, "stream", samples=samples, alpha=a) for a in (0.0, 0.25, 0.5, 1.0))
    yield cell("wanda-sp", 0.3, "stream", samples=256, alpha=0.5)
    yield cell("slimgpt", 0.3, "stream", samples=64, alpha=0.5)


def searches() -> Iterator[dict]:
    """Whole runs as candidates: what the deciding windows say of each, in "candidates" of a row."""
    yield from (cell("wanda-sp", ratio, "stream", alpha="search") for ratio in (0.3, 0.5))


def headline() -> Iterator[dict]:
    """The README's rows."""
    yield cell("wanda-sp", 0.3, "hidden", samples=128, ridge=1e-3)
    yield cell("wanda-sp", 0.3, "stream", samples=128)
    yield cell("gram", 0.3, "stream", samples=128, allocation="error")


def acceptance() -> Iterator[dict]:
    """Both masks at every ratio with little and much text, plain GRAIL's λ at its best of three; a second sweep; and
    the best."""
    much = [(512, *which) for which in (("wanda-sp", 0.3), ("slimgpt", 0.3), ("wanda-sp", 0.2))]
    asked = [*itertools.product((64, 256), ("wanda-sp", "slimgpt"), (0.3, 0.2, 0.5)), *much]
    for samples, method, ratio in [*asked, (512, "slimgpt", 0.5)]:
        yield cell(method, ratio, "hidden", samples=samples, ridge=1e-3)
        yield cell(method, ratio, "stream", samples=samples)
    yield cell("wanda-sp", 0.3, "stream", samples=256, sweeps=2)
    for (samples, method, ratio), ridge in itertools.product(asked, (1e-2, 1e-4)):
        yield cell(method, ratio, "hidden", samples=samples, ridge=ridge)
    for ratio in (0.2, 0.5):
        yield cell("gram", ratio, "stream", samples=64, allocation="error")


def mixtures() -> Iterator[dict]:
    """Calibration on the text that is evaluated, on the other, and on both."""
    for text in ("builtin", "docstrings", "builtin+docstrings"):
        yield cell("wanda-sp", 0.3, "hidden", samples=64, ridge=1e-3, calibration=text)
        yield cell("wanda-sp", 0.3, "stream", samples=64, calibration=text)


STUDIES = {f.__name__: f for f in (headline, acceptance, mixtures, ridges, grid, seeds, alphas, searches, few)}


def measure(asked: dict, work: Path) -> dict:
    """One compression and its evaluations."""
    output, options = work / "cell", {key: asked[key] for key in KEYS if asked[key] is not None}
    if asked["target"] == "hidden":
        del options["alpha"], options["sweeps"]
    ratio = options.pop("ratio")
    heads = HEADS.get(ratio, ratio)
    if asked["allocation"] == "error":
        options["ratio"] = (heads + 2 * ratio) / 3  # a layer's attention has half as many parameters as its MLP
    else:
        options |= {"attn_ratio": heads, "mlp_ratio": ratio}
    folder = multi_head_form(locate(SMOLLM2).folder)
    report = compress(folder, seq_len=512, eval="none", output=str(output), overwrite=True, **options)
    return asked | {
        "perplexity": {text: perplexity_of(output, text) for text in TEXTS},
        "parameters": report.parameters[1],
        "widths": [site["after"] for site in report.sites],
        "alphas": [site["alpha"] for site in report.sites],
        "alphas_of_sweeps": [[one["alpha"] for one in site["sweeps"] or ()] for site in report.sites],
        "lambdas": [site["lambda"] for site in report.sites],
        "candidates": report.candidates,
        "raised_sites": sum(site["retries"] > 0 for site in report.sites),
        "seconds": {name: round(seconds, 1) for name, seconds in report.phases.items()},
        "versions": versions(),
        "code": code_hash(),
    }


def perplexity_of(folder: Path, text: str) -> float:
    """Of at most 40 held-out windows."""
    return evaluate(str(folder), data=text, seq_len=512, samples=40)["models"][str(folder)]["perplexity"]


def key_of(row: dict) -> str:
    """What tells a cell from others."""
    return json.dumps([(PLAIN | row).get(key) for key in KEYS])


def run(cells: list[dict]) -> None:
    """Measure those that are not stored."""
    done = {key_of(row) for row in stored(STORE)}
    if not any(row["method"] == "dense" for row in stored(STORE)):
        folder = multi_head_form(locate(SMOLLM2).folder)
        found = {text: perplexity_of(folder, text) for text in TEXTS}
        append(dict.fromkeys(KEYS) | {"method": "dense", "perplexity": found, "versions": versions()}, STORE)
    with tempfile.TemporaryDirectory(prefix="grail-quality-") as work:
        for number, asked in enumerate(cells, 1):
            if key_of(asked) in done:
                continue
            row = measure(asked, Path(work))
            append(row, STORE)
            told = {key: asked[key] for key in KEYS if asked[key] != PLAIN.get(key)}
            sys.stderr.write(f"{number} of {len(cells)}: {told} {row['perplexity']}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "study", nargs="*", choices=[*STUDIES, []], default=[], metavar="study", help=", ".join(STUDIES)
    )
    parser.add_argument("--render", action="store_true", help="only the tables and figures, from what is stored")
    asked = parser.parse_args()
    if not asked.render:
        for name in asked.study or STUDIES:
            run(list(STUDIES[name]()))
    latest = {key_of(row): row for row in stored(STORE)}
    render(list(latest.values()), RESULTS)


if __name__ == "__main__":
    main()
