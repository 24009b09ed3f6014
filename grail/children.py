"""Fresh processes that run a module of grail, and no code of the folder that somebody is in."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (
    "import sys; sys.path.append(sys.argv.pop(1)); import runpy; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


def python(module: str, *arguments: object) -> list[str]:
    """A command line. -m would search the current folder first, and run a transformers.py that lies there."""
    return [sys.executable, "-P", "-c", SCRIPT, str(ROOT), module, *map(str, arguments)]
