"""What a shell offers for the values of options, without the seconds that it takes to import torch."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

from .modules.recipe import ModuleRecipe
from .recipe import CHOICES, Recipe

TEXTS = ("builtin", "docstrings", "wikitext2", "c4")
EXPORTS = ("gguf", "onnx", "torch-export")
STORED = ("float32", "float16", "bfloat16", "q8_0")
TOWERS = ("images", "text")
FORMATS = tuple(name for name in CHOICES["format"] if name != "auto")
SEPARATOR = "+"


def one_of(*choices: str | None) -> Callable[[str], list[str]]:
    """Those that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice and choice.startswith(incomplete)]

    return complete


def choice(option: str) -> Callable[[str], list[str]]:
    """What an option that is a word may be."""
    return one_of(*CHOICES[option])


def target(incomplete: str) -> list[str]:
    """Of either kind of network."""
    return one_of(*dict.fromkeys(Recipe.TARGETS + ModuleRecipe.TARGETS))(incomplete)


def text(incomplete: str) -> list[str]:
    """Names of texts, also behind those that are joined to them; where none fits, shells offer files."""
    before, plus, last = incomplete.rpartition(SEPARATOR)
    return [before + plus + name for name in one_of(*TEXTS)(last)]


def evaluated(incomplete: str) -> list[str]:
    """The same, or nothing at all."""
    return text(incomplete) + one_of("none")(incomplete)


def method(incomplete: str) -> list[tuple[str, str]]:
    """Methods with their summaries."""
    return [(name, summary) for name, summary in described_methods().items() if name.startswith(incomplete)]


def described_methods() -> dict[str, str]:
    """name -> summary of every method, from the text of grail/selectors: each of its files may define some."""
    found = {}
    for file in sorted((Path(__file__).parent / "selectors").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                told = dict(filter(None, map(_assigned, node.body)))
                if "name" in told:
                    found[told["name"]] = told.get("summary", "")
    return dict(sorted(found.items()))


def _assigned(statement: ast.stmt) -> tuple[str, str] | None:
    """`name = "text"` as (name, text)."""
    if not isinstance(statement, ast.Assign) or not isinstance(statement.value, ast.Constant):
        return None
    (target, *_), value = statement.targets, statement.value.value
    return (target.id, value) if isinstance(target, ast.Name) and isinstance(value, str) else None
