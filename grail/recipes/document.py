"""YAML in and out, the plain part of it: no tags, no anchors, no key twice; scalars as in YAML 1.2.

PyYAML's own rules are those of YAML 1.1, by which 1e-3 is a word, `no` is false and 010 is eight.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ..documents import check_regular
from ..errors import GrailError, first_line

LARGEST = 10**6
"""Bytes; a recipe has hundreds."""
WIDTH = 120
SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))", list("-+.")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's, filled below

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases (&, *) are not read", problem_mark=event.start_mark)
        if event.tag is not None:
            raise yaml.MarkedYAMLError(problem=f"tags ({event.tag}) are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):  # written as an escape
            raise yaml.MarkedYAMLError(problem="a character that no file can hold", problem_mark=node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"{key!r} is no name", problem_mark=key_node.start_mark)
            if key in found:
                raise yaml.MarkedYAMLError(problem=f"{key} is said twice", problem_mark=key_node.start_mark)
            found[key] = self.construct_object(value_node, deep=True)
        return found


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'  # PyYAML's single quotes lose line breaks of a key
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _name, _pattern, _first in SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^{_pattern}$"), _first)


def parse(text: str, where: str) -> Any:
    """The value of one document: mappings (keys are text), lists, text, numbers, true, false, None. Raises GrailError,
    which begins with `where`, for anything else."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise GrailError(f"{where}{place}: {problem}") from error
    except RecursionError as error:
        raise GrailError(f"{where}: brackets are nested too deeply") from error
    except ValueError as error:
        raise GrailError(f"{where}: {first_line(error)}") from error


def read(path: str | Path) -> dict[str, Any]:
    """The mapping that a file holds. Raises GrailError naming the file and the line."""
    try:
        check_regular(Path(path))
        with open(path, "rb") as handle:
            content = handle.read(LARGEST + 1)
    except OSError as error:
        raise GrailError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(content) > LARGEST:
        raise GrailError(f"{path} is larger than a recipe can be ({LARGEST // 10**6} MB)")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GrailError(f"{path} is not UTF-8 text (byte {error.start})") from error
    found = parse(text, str(path))
    if not isinstance(found, dict):
        raise GrailError(f"{path} must hold a mapping, option: value to a line; see `grail run --help`")
    return found


def dump(options: dict[str, Any]) -> str:
    """The text of a mapping, its keys in their order; `parse` gives the same mapping."""
    return yaml.dump(options, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
