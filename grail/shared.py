"""What the commands have in common: options, the results' console, the one document of --json."""

from __future__ import annotations

import json
import math
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from .streams import holds_every_character

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors, warnings and the result.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More detail; -vv also from libraries.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; everything else on stderr.")]


class Results(Console):
    """Stdout. That its reader went away is for the guard to judge."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise BrokenPipeError


def results() -> Console:
    """Where a command's closing lines go."""
    return Results(highlight=False, soft_wrap=True)


def write_json(document: dict) -> None:
    """One document on stdout; numbers that JSON does not have (infinite, undefined) are null in it."""
    escaped = not holds_every_character(sys.stdout)
    sys.stdout.write(json.dumps(_finite(document), indent=2, ensure_ascii=escaped, allow_nan=False) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
