"""One compression from recipe to report: open, calibrate, stream, reopen, evaluate, rename."""

from __future__ import annotations

import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .checkpoint.writer import OutputFolder
from .errors import GrailError
from .pipeline import stream
from .progress import Progress
from .recipe import Recipe
from .report import Report
from .session import Session


def compress(model: Any, *, progress: Progress | None = None, **flags: Any) -> Report:
    """Compress a model; flags are those of `grail compress` with underscores (see Recipe).

    model: a folder, alias or hub name; or a loaded transformers module, which is not modified: then
    `report.model` is the narrower module, and `output` may be left out. A module needs calibration data that is
    tokenised already (a tensor [N, L], a list of tensors, an iterable of batches, or a .safetensors file).
    Raises GrailError for bad input.
    """
    unknown = set(flags) - {f.name for f in fields(Recipe)}
    if unknown:
        raise GrailError(f"compress has no option {', '.join(sorted(unknown))}")
    if not hasattr(model, "save_pretrained"):
        if not flags.get("output"):
            raise GrailError("compress needs output=FOLDER: where to write the smaller checkpoint")
        return run(Recipe(model=str(model), **flags), progress or Progress())
    with tempfile.TemporaryDirectory(prefix="grail-") as work:
        source, output = Path(work) / "source", flags.pop("output", None)
        flags["called"] = type(model).__name__
        Recipe(model=str(source), **flags)
        model.save_pretrained(source)
        report = run(
            Recipe(model=str(source), output=str(output or Path(work) / "output"), **flags), progress or Progress()
        )
        report.model = load(report.output).to(next(model.parameters()).device)
        report.output = output and report.output
        return report


def load(path: str | Path) -> torch.nn.Module:
    """Open an output of GRAIL as a module, in the dtype it is stored in, ready for inference."""
    from transformers import AutoModelForCausalLM

    from .registration import register

    register()
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def run(recipe: Recipe, progress: Progress) -> Report:
    """Carry out a recipe. Nothing is written outside OUT.partial, which is renamed at the very end."""
    session = Session(recipe, progress)
    job, windows = session.job, session.windows
    progress.say(session.headline())
    for note in session.notes():
        progress.say(note)
    session.settle_widths()
    with OutputFolder(recipe.output, overwrite=recipe.overwrite) as out:
        with session.phase("compress"):
            streamed = stream(job, windows and windows.ids, session.probe, out, progress.layers("compressing"))
        session.write_rest(job, out)
        with session.phase("reopen"):
            reopened = session.reopen(out, streamed)
        evaluation = session.evaluate(out)
        report = Report(
            recipe=recipe,
            source=session.source_entry(),
            calibration=session.calibration_entry(),
            results=streamed.results,
            trained=streamed.trained,
            widths=session.widths,
            affine=job.affine,
            format=job.format,
            parameters=(session.parameters, out.total_parameters),
            bytes=(session.source_bytes, out.total_bytes),
            evaluation=evaluation,
            reopened=reopened,
            phases=session.phases,
        )
        out.write_json("grail.json", report.to_json())
        out.write_json("run.json", report.run_json())
        report.output = str(out.finish())
    return report
