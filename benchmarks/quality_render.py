"""Tables and figures of benchmarks/quality.py, from its stored cells."""

from __future__ import annotations

from pathlib import Path

TEXTS = ("builtin", "docstrings")
ROW = ("method", "ratio", "samples", "seed", "allocation")


def render(rows: list[dict], folder: Path) -> None:
    """quality.md, and the figures that the cells suffice for."""
    dense = next(row["perplexity"] for row in rows if row["method"] == "dense")
    every = [row for row in rows if row["method"] != "dense"]
    cells = [row for row in every if row.get("calibration", "builtin") == "builtin"]
    parts = [_head(dense), _targets(cells, dense), _alone(cells), _alphas(cells), _ridges(cells), _mixtures(every)]
    (folder / "quality.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    _figures(cells, dense, folder)


def _head(dense: dict) -> str:
    texts = ", ".join(f"{text} {dense[text]:.2f}" for text in TEXTS)
    return (
        f"Multi-head SmolLM2-135M, perplexity on held-out text (built-in / docstrings). Dense: {texts}.\n"
        "Excess is perplexity minus the dense network's; the ratio of excesses compares the stream target with the\n"
        "best plain repair (target hidden) of the same cell. Made by `python benchmarks/quality.py`. Cells with a\n"
        "`device` in quality.jsonl were measured on it, the others on two CPU cores; wanda-sp 0.3 with 256 windows\n"
        "was measured on both: stream 16.533 / 20.407 on the CPU, 16.534 / 20.416 on an H100. Rows of 32 windows, and\n"
        "of 64 with seed 0, had twice as many deciding windows as a run has now."
    )


def _targets(cells: list[dict], dense: dict) -> str:
    """hidden against stream, everything else equal; of several λ for hidden the best on the built-in text counts."""
    titles = ("method", "ratio", "windows", "seed", "sweeps", "hidden", "stream", "excess ratio", "other text")
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    repaired = [c for c in cells if c["compensate"] and c["ridge_form"] == "anchored"]
    for key in sorted({tuple(c[k] for k in ROW) for c in repaired}, key=str):
        same = [c for c in repaired if tuple(c[k] for k in ROW) == key]
        hidden = [c for c in same if c["target"] == "hidden"]
        stream = [c for c in same if c["target"] == "stream" and c["alpha"] == "auto" and c["ridge"] is None]
        if not hidden or not stream:
            continue
        plain = min(hidden, key=lambda c: c["perplexity"]["builtin"])
        method, ratio, samples, seed, allocation = key
        for cell in sorted(stream, key=sweeps):
            found, old = cell["perplexity"], plain["perplexity"]
            share, other = ((found[t] - dense[t]) / (old[t] - dense[t]) for t in TEXTS)
            lines.append(
                f"| {method}{f' ({allocation})' if allocation else ''} | {ratio} | {samples} | {seed} | {sweeps(cell)} "
                f"| {_both(plain)} | {_both(cell)} | {share:.2f} | {other:.2f} |"
            )
    return "\n".join(lines) if len(lines) > 2 else ""


def _alone(cells: list[dict]) -> str:
    """What was measured towards the stream alone: where the budget is shared out by errors."""
    found = sorted((c for c in cells if c["allocation"]), key=lambda c: (c["ratio"], c["samples"]))
    told = [f"* {c['method']} ({c['allocation']}) {c['ratio']}, {c['samples']} windows, {c['target']}" for c in found]
    return "\n".join(f"{name}: {_both(c)}" for name, c in zip(told, found, strict=True))


def sweeps(cell: dict) -> int:
    """How often a cell's consumers were solved for."""
    return cell.get("sweeps", 1)


def _alphas(cells: list[dict]) -> str:
    """α for the whole network against the choice by site."""
    cells = [c for c in cells if sweeps(c) == 1]
    samples = sorted({c["samples"] for c in cells if c["target"] == "stream" and c["alpha"] != "auto"})
    lines = []
    for count in samples:
        found = [
            c
            for c in cells
            if (c["method"], c["target"], c["samples"], c["ridge"], c["seed"]) == ("wanda-sp", "stream", count, None, 0)
            and c["ratio"] == 0.3
        ]
        told = ", ".join(f"{c['alpha']}: {_both(c)}" for c in sorted(found, key=lambda c: str(c["alpha"])))
        lines.append(f"* α for all sites, wanda-sp 0.3, {count} windows: {told}")
    return "\n".join(lines)


def _ridges(cells: list[dict]) -> str:
    found = [c for c in cells if c["ridge"] is not None and c["samples"] == 16]
    if not found:
        return ""
    columns = sorted({(c["target"], c["ridge_form"]) for c in found})
    lines = ["| λ |" + "".join(f" {target}, {form} |" for target, form in columns), "|---" * (1 + len(columns)) + "|"]
    for ridge in sorted({c["ridge"] for c in found}):
        row = {(c["target"], c["ridge_form"]): _both(c) for c in found if c["ridge"] == ridge}
        lines.append(f"| {ridge:g} |" + "".join(f" {row.get(column, '')} |" for column in columns))
    pruned = [c for c in cells if not c["compensate"]]
    lines += [f"\nOnly pruned (wanda-sp 0.3): {_both(pruned[0])}."] if pruned else []
    return "\n".join(lines)


def _mixtures(cells: list[dict]) -> str:
    """By what calibration read."""
    texts = {c["calibration"] for c in cells if "calibration" in c} - {"builtin"}
    if not texts:
        return ""
    lines = ["| calibration (wanda-sp 0.3, 64 windows) | hidden | stream |", "|---" * 3 + "|"]
    for text in ("builtin", *sorted(texts, key=len)):
        found = {
            c["target"]: _both(c)
            for c in cells
            if (c.get("calibration", "builtin"), c["method"], c["ratio"], c["samples"], c["seed"], c["allocation"])
            == (text, "wanda-sp", 0.3, 64, 0, None)
            and c["ridge"] in (None, 1e-3)
        }
        lines.append(f"| {text} | {found.get('hidden', '')} | {found.get('stream', '')} |")
    return "\n".join(lines)


def _both(cell: dict) -> str:
    return " / ".join(f"{cell['perplexity'][text]:.2f}" for text in TEXTS)


def _figures(cells: list[dict], dense: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pictures = {
        "ratio": ("ratio", [c for c in cells if c["samples"] == 16 and c["seed"] == 0 and c["ridge"] is None]),
        "windows": ("samples", [c for c in cells if c["ratio"] == 0.3 and c["seed"] == 0 and c["ridge"] is None]),
        "ridge": ("ridge", [c for c in cells if c["ridge"] is not None and c["samples"] == 16]),
    }
    for name, (axis, some) in pictures.items():
        some = [c for c in some if c["alpha"] == "auto" and c["compensate"] and c["allocation"] is None]
        some = [c for c in some if sweeps(c) == 1]
        figure, plot = pyplot.subplots(figsize=(6, 4))
        for key in sorted({(c["method"], c["target"], c["ridge_form"]) for c in some}):
            points = sorted(
                (c[axis], c["perplexity"]["builtin"])
                for c in some
                if (c["method"], c["target"], c["ridge_form"]) == key
            )
            if len(points) > 1:
                method, target, form = key
                label = f"{method}, {target}" + (f", {form}" if axis == "ridge" else "")
                plot.plot(
                    *zip(*points, strict=True), marker="o", linestyle="-" if target == "stream" else ":", label=label
                )
        if plot.lines:
            plot.axhline(dense["builtin"], color="grey", linewidth=1)
            plot.set(xlabel={"samples": "calibration windows"}.get(axis, axis), ylabel="perplexity", yscale="log")
            plot.set_xscale("linear" if axis == "ratio" else "log")
            plot.legend(fontsize=6)
            figure.savefig(folder / f"quality_{name}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
