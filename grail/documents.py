"""JSON files that say what something is: config.json, grail.json, run.json."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import GrailError


def read_json(path: Path) -> dict:
    """A JSON object from a file, or GrailError naming it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GrailError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise GrailError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise GrailError(f"{path} must hold a JSON object")
    return value
