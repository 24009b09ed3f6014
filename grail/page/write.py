"""`grail report`: pages of folders that were written earlier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.writer import OutputFolder
from ..errors import GrailError
from ..recipe import FILE
from ..replacing import refuse_part_of, replacing
from .card import card
from .command import recipe_text
from .compare import comparable, comparing_page
from .run import GRAIL, RAN, Run, read_run
from .single import page
from .source_card import README, source_card

REPORT = "report.html"


def write_told(out: OutputFolder, grail: dict, ran: dict | None, source: Path | None) -> None:
    """What a run says of itself, into its open output folder: grail.json, run.json, recipe.yaml (unless it was given
    objects of Python), report.html, README.md. ran: None for a folder that was converted, which no recipe gives.
    source: the folder that was compressed, whose card says what its descendants have to carry."""
    run = Run(out.path.name, grail, ran)
    out.write_json(GRAIL, grail)
    if ran is not None:
        out.write_json(RAN, ran)
        if (text := recipe_text(run)) is not None:
            out.write_text(FILE, text)
    out.write_text(REPORT, page(run))
    out.write_text(README, card(run, source_card(source), out.partial))


def write_report(folders: Sequence[str], output: str | None = None, *, overwrite: bool = False) -> dict:
    """Write the page of one folder (by default into it), or one that compares several (by default report.html here).
    A folder's own page is written anew; another file only with `overwrite`. Raises GrailError for bad input."""
    if not folders:
        raise GrailError("grail report needs a folder that grail compress wrote")
    single = len(folders) == 1
    runs = [read_run(folder, None if single else str(folder)) for folder in folders]
    file = Path(output) if output else (Path(folders[0]) if single else Path()) / REPORT
    if file.is_dir():
        raise GrailError(f"--output {file} is a folder; name a file, such as {file / REPORT}")
    own = single and file.resolve() == (Path(folders[0]) / REPORT).resolve()
    if file.exists() and not (own or overwrite):
        raise GrailError(f"--output {file} exists; choose another, or add --overwrite")
    for folder in folders:
        refuse_part_of(Path(folder), file, Path(REPORT).suffix)
    _replace(file, page(runs[0]) if single else comparing_page(runs))
    texts = comparable(runs)
    return {
        "schema_version": 1,
        "output": str(file),
        "runs": [_entry(folder, run, texts) for folder, run in zip(folders, runs, strict=True)],
    }


def _entry(folder: str, run: Run, texts: dict[tuple, list[int]]) -> dict:
    """A run as --json has it; comparable: equal numbers mean that figures were measured on the same data."""
    before, after = run.sizes("parameters")
    measure = run.measure
    return {
        "folder": str(folder),
        "model": run.model,
        "method": run.method,
        "parameters": {"before": before and int(before), "after": after and int(after)},
        "measure": measure and measure.name,
        "data": measure and measure.data,
        "comparable": list(texts).index(measure.same) if measure else None,
        "values": measure.values if measure else {},
    }


def _replace(file: Path, content: str) -> None:
    """Beside, then renamed: whatever happens, there is no half of a page."""
    if not file.parent.is_dir():
        raise GrailError(f"--output {file}: there is no folder {file.parent}")
    with replacing(file) as temporary:
        temporary.write_bytes(content.encode())
