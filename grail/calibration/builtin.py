"""Text that comes with every Python: the documentation's topics, and the docstrings of the standard library."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path

from ..errors import GrailError

HELD_OUT_EVERY = 5
LEAST_DOCSTRING = 400
"""Characters of the shortest docstring that counts as text."""
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def topics(split: str) -> list[str]:
    """Topics of the standard library's documentation, sorted by name."""
    from pydoc_data.topics import topics as found

    return _part([text for _, text in sorted(found.items())], split)


def docstrings(split: str) -> list[str]:
    """Longer docstrings of the standard library's modules, sorted by file. Raises GrailError where an installation has
    no sources."""
    texts = _docstrings(Path(sysconfig.get_paths()["stdlib"]))
    if not texts:
        raise GrailError("docstrings: this Python comes without the sources of its standard library; give a .txt file")
    return _part(list(texts), split)


@functools.cache
def _docstrings(folder: Path) -> tuple[str, ...]:
    found = []
    for file in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # a source in another encoding
        found += [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    return tuple(dict.fromkeys(text for text in found if len(text) >= LEAST_DOCSTRING))


def _part(texts: list[str], split: str) -> list[str]:
    """The first and every fifth after it are held out for evaluation; texts quote each other, so paragraphs of the
    held-out ones are struck from the others."""
    held_out = texts[::HELD_OUT_EVERY]
    if split != "calibration":
        return held_out
    seen = {paragraph for text in held_out for paragraph in _paragraphs(text)}
    others = (text for i, text in enumerate(texts) if i % HELD_OUT_EVERY)
    fresh = ("\n\n".join(p for p in _paragraphs(text) if p not in seen) for text in others)
    return [text for text in fresh if text]


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
