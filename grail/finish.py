"""After the stream: the other files, the reopening check, the evaluation of what was written."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from .checkpoint import reopen
from .checkpoint.carried import stamps
from .checkpoint.writer import OutputFolder
from .chunks import Texts
from .errors import Circumstance
from .evaluation.perplexity import perplexity
from .job import Job
from .machine import resident_memory
from .pipeline import Streamed, stream
from .session import Session
from .workspace import Workspace

PERPLEXITY = "perplexity"
AT_ONCE = 2 * 10**9
"""Without --memory the reopening check loads the whole model where its process stays below so many bytes."""


def write_rest(session: Session, job: Job, out: OutputFolder) -> None:
    """Configuration, carried files, index last."""
    config = dict(job.format.config)
    if session.recipe.output_dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = session.recipe.output_dtype
    out.write_json("config.json", config)
    for name, text in job.format.files.items():
        out.write_text(name, text)
    _refuse_changed(session)
    out.carry_over(session.located.folder)
    out.write_index()


def _refuse_changed(session: Session) -> None:
    """Raises Circumstance where a file beside the weights is not what it was when the run began with it."""
    now = stamps(session.located.folder)
    for file, before in session.carried.items():
        if now.get(file) != before:
            raise Circumstance(f"{file} was changed or touched while the run worked; put back what it was")


def reopen_written(session: Session, out: OutputFolder, streamed: Streamed) -> dict:
    """Open what was written in a fresh process and compare its logits with the streamed ones (checkpoint.reopen)."""
    tokens = session.tokenizer(reopen.SAMPLE).input_ids if session.has_tokenizer else None
    needed = out.total_parameters * session.model.dtype.itemsize + resident_memory()
    return reopen.verify(
        out.partial,
        session.probe,
        streamed.probe_logits,
        str(session.model.dtype).removeprefix("torch."),
        tokens,
        out.written,
        layerwise=needed > (session.recipe.memory or AT_ONCE),
        loads=session.job.format.loads,
    )


def evaluate(session: Session, work: Workspace, out: OutputFolder) -> dict | None:
    """Perplexities of the written files on the held-out windows; each is a committed step."""
    if session.evaluated is None:
        return None
    steps = session.group.broadcast(out.journal.find(PERPLEXITY) if session.group.main else None)
    found = {step["of"]: step["value"] for step in steps}
    wanted = ["dense", "compressed"]
    if session.recipe.compare_pruned and session.recipe.compensate:
        wanted.insert(1, "pruned")
    for name in wanted:
        if name not in found:
            found[name] = _perplexity_of(session, work, out, name)
            if session.group.main:
                out.journal.append({"step": PERPLEXITY, "of": name, "value": found[name]})
    count, length = session.evaluated.ids.shape
    return {
        "data": session.evaluated.source,
        "sha256": session.evaluated.sha256,
        "windows": count,
        "seq_len": length,
        "held_out": session.held_out(session.evaluated.source),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "perplexity": {name: found[name] for name in wanted},
    }


def _perplexity_of(session: Session, work: Workspace, out: OutputFolder, name: str) -> float:
    if name == "dense":
        return _perplexity(session, work, "evaluating dense", session.located.folder)
    if name == "compressed":
        return _perplexity(session, work, "evaluating compressed", out.partial)
    return _pruned_perplexity(session, work, out)


def _perplexity(session: Session, work: Workspace, label: str, folder: Path) -> float:
    session.group.barrier()  # what the main process wrote is there for all
    with session.phase(label):
        windows, track = session.evaluated, session.progress.layers(label)
        return perplexity(session.open(folder), windows.ids, work, weights_NL=windows.weights, track=track)


def _pruned_perplexity(session: Session, work: Workspace, out: OutputFolder) -> float:
    """What the same recipe gives with --no-compensate on the same windows: a run of its own, evaluated and thrown
    away."""
    job = replace(session.job, recipe=replace(session.recipe, compensate=False))
    pruned = OutputFolder(out.partial / "pruned")
    with pruned if session.group.main else nullcontext():
        session.group.barrier()
        with session.phase("pruned only"):
            texts = Texts(probe=session.probe)
            if job.needs_data:
                texts = replace(texts, windows=session.windows.ids, weights=session.windows.weights)
            stream(job, work, texts, pruned, session.progress.layers("pruning only"), "pruned")
        if session.group.main:
            write_rest(session, job, pruned)
        found = _perplexity(session, work, "evaluating pruned", pruned.partial)
        session.group.barrier()
    return found
