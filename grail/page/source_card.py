"""What the README of a source says that its descendants have to carry: licence, languages, citation.

It is a file from anywhere: what cannot be read or is of another kind than expected counts as not said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..documents import check_regular
from ..errors import GrailError

README = "README.md"
CARRIED = "Citation of the base model"
"""The heading under which our own cards keep it, so that a card made from such a card carries it on unchanged."""
OURS = "grail"
LARGEST = 2**20
LONGEST = 20_000
LICENCE = ("license", "license_name", "license_link")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_HEADING = re.compile(r"(#{1,6})\s+(.*)")
_CITES = re.compile(r"\b(citation|citing|cite|bibtex)\b", re.IGNORECASE)
_NOTHING = ("null", "~")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")


@dataclass(frozen=True)
class SourceCard:
    """licence: those fields of LICENCE that are said; base_model: the hub names it derives from itself; citation: the
    Markdown under its heading."""

    licence: dict[str, str] = field(default_factory=dict)
    language: list[str] = field(default_factory=list)
    base_model: list[str] = field(default_factory=list)
    citation: str | None = None


def source_card(folder: Path | None) -> SourceCard:
    """That of a folder; an empty one where it has no README."""
    try:
        there = folder is not None and check_regular(folder / README, LARGEST)
        raw = (folder / README).read_bytes() if folder and there else b""
    except (OSError, GrailError):
        return SourceCard()
    text = raw.decode("utf-8-sig", errors="replace")
    found = _BLOCK.match(text)
    metadata = _metadata(found[1]) if found else {}
    body = text[found.end() :] if found else text
    return SourceCard(
        {key: value for key in LICENCE if _is_name(value := metadata.get(key))},
        _strings(metadata.get("language")),
        [name for name in _strings(metadata.get("base_model")) if HUB_ID.fullmatch(name)],
        _citation(body, OURS in _strings(metadata.get("tags"))),
    )


def _metadata(block: str) -> dict[str, Any]:
    """Scalars are text: no tag is followed, no number computed, and the language `no` is not false."""
    try:
        found = yaml.load(block, yaml.BaseLoader)
    except Exception:  # PyYAML raises whatever comes to it
        return {}
    return found if isinstance(found, dict) else {}


def _strings(value: Any) -> list[str]:
    entries = value if isinstance(value, list) else [value]
    return [entry for entry in entries[:100] if _is_name(entry)]


def _is_name(value: Any) -> bool:
    """Text that any file can hold, on one line."""
    return isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable() and value.lower() not in _NOTHING


def _citation(body: str, ours: bool) -> str | None:
    """What stands under the first heading that speaks of it, up to the next one of its rank; in ours it is the last."""
    kept: list[str] = []
    rank = 0
    for line, heading in _lines(body):
        if heading and rank and not ours and len(heading[1]) <= rank:
            break
        if rank:
            kept.append(line)
        elif heading and (_title(heading) == CARRIED if ours else _CITES.search(heading[2])):
            rank = len(heading[1])
    found = "\n".join(kept).strip()
    return found if found and len(found) <= LONGEST else None


def _title(heading: re.Match[str]) -> str:
    """Without the marks that may close it."""
    return heading[2].rstrip().rstrip("#").rstrip()


def _lines(body: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """Lines, each with the heading that it is; within a fence there is none."""
    fence = ""
    for line in body.splitlines():
        mark = _FENCE.match(line)
        if mark and (not fence or (mark[1].startswith(fence) and line.strip() == mark[1])):
            fence = "" if fence else mark[1]
            yield line, None
        else:
            yield line, None if fence else _HEADING.match(line)
