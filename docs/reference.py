"""Write docs/cli.md, the reference of the command line, from the declarations of the commands themselves.

    python docs/reference.py            # write it
    python docs/reference.py --check    # exit 1 if it is stale, and say so

Only the functions' signatures are read (names, defaults, help, panels), so that the page depends neither on typer's
version nor on the width of a terminal.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """\
# Command line

Made by `python docs/reference.py` from the commands themselves; `tests/test_docs.py` fails when it is stale. Do not
edit it by hand.

Every command has `--help` (`-h`). Exit codes: 0 done, 2 bad input, 75 interrupted and resumable, 130 interrupted with
nothing to go on from, 1 a bug of ours ([files.md](files.md) says more). `grail --version` shows the version.
"""
KINDS = {str: "TEXT", int: "INTEGER", float: "FLOAT"}
GENERAL = "Options"


@dataclass(frozen=True)
class Parameter:
    """An argument or an option as the page shows it."""

    spelled: str
    told: str
    default: str
    panel: str
    required: bool
    option: bool


def page() -> str:
    """The whole of docs/cli.md."""
    from grail.cli import app
    from grail.selectors import methods

    commands = {info.name or info.callback.__name__: info.callback for info in app.registered_commands}
    contents = "\n".join(f"- [`grail {name}`](#grail-{name})" for name in commands)
    return "\n".join([INTRODUCTION, contents, "- [Methods](#methods)\n", *map(section, commands, commands.values()),
                      methods_section(methods())])  # fmt: skip


def section(name: str, command: Callable) -> str:
    """One command: help, usage, its options by panel."""
    parameters = list(parameters_of(command))
    options = [parameter for parameter in parameters if parameter.option]
    words = [name, *(p.spelled for p in parameters if not p.option)]
    words += [f"{p.spelled.split(',')[0].split()[0]} {p.spelled.split()[-1]}" for p in options if p.required]
    lines = [f"## grail {name}", "", *prose(command), "```text", f"grail {' '.join(words)} [OPTIONS]", "```", ""]
    arguments = [parameter for parameter in parameters if not parameter.option]
    for panel, members in {"Arguments": arguments, **by_panel(options)}.items():
        if members:
            lines += [f"**{panel}**", "", "| name | default | meaning |", "|---|---|---|"]
            lines += [f"| `{p.spelled}` | {p.default} | {cell(p.told)} |" for p in members]
            lines.append("")
    return "\n".join(lines)


def prose(command: Callable) -> Iterator[str]:
    """The docstring's paragraphs; an example as a block of its own."""
    for paragraph in inspect.getdoc(command).split("\n\n"):
        text = " ".join(paragraph.split())
        if text.startswith("Example: "):
            yield from ("```sh", text.removeprefix("Example: "), "```", "")
        else:
            yield from (text, "")


def by_panel(options: list[Parameter]) -> dict[str, list[Parameter]]:
    """Options under the heading they have in the help, in the order in which headings come up."""
    found: dict[str, list[Parameter]] = {}
    for option in options:
        found.setdefault(option.panel, []).append(option)
    return found


def parameters_of(command: Callable) -> Iterator[Parameter]:
    """What a command takes, in the order of its signature."""
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind, info = get_args(parameter.annotation)
        several = get_origin(kind) is list
        required = parameter.default is inspect.Parameter.empty
        told = f"{info.help} Required." if required else info.help
        common = {"told": told, "panel": info.rich_help_panel or GENERAL, "required": required}
        default = "" if required or getattr(info, "count", False) else shown(parameter.default)
        if type(info).__name__ == "ArgumentInfo":
            name = parameter.name.upper() + (" ..." if several else "")
            yield Parameter(name if required else f"[{name}]", default=default, option=False, **common)
        else:
            yield Parameter(spelling(parameter.name, kind, info), default=default, option=True, **common)


def spelling(name: str, kind: Any, info: Any) -> str:
    """An option's names, and what kind of value follows."""
    first = (
        [info.default] if isinstance(info.default, str) else []
    )  # typer's first argument, read as a name in Annotated
    names = ", ".join([*first, *(info.param_decls or [])] or [f"--{name.replace('_', '-')}"])
    plain = next((inner for inner in (kind, *get_args(kind)) if inner in (*KINDS, bool)), str)
    return names if plain is bool or info.count else f"{names} {KINDS[plain]}"


def shown(default: object) -> str:
    """A default, empty for a switch that is off and a list that is empty."""
    if default is True:
        return "on"
    return "" if default is None or default is False or default == [] else f"`{default}`"


def cell(text: str) -> str:
    """Text for a table."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def methods_section(methods: dict[str, Any]) -> str:
    """Every selection method with its own options."""
    lines = ["## Methods", "", "What `--method` takes, and the options of each that `--set key=value` takes.", ""]
    lines += ["| method | does | options and their defaults | allocation | from |", "|---|---|---|---|---|"]
    for name, cls in methods.items():
        entry = cls.describe()
        options = ", ".join(f"`{key}={value}`" for key, value in entry["options"].items())
        lines.append(
            f"| `{name}` | {cell(entry['summary'])} | {options} | {entry['allocation']} | {cell(entry['source'])} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check it. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Write docs/cli.md from the command line's declarations.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the page is stale")
    wanted = page()
    if parser.parse_args(arguments).check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        sys.stderr.write(f"{PAGE} is stale: run  python docs/reference.py\n")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
