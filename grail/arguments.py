"""From the words of a command line to what is asked."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer
from typer.models import ArgumentInfo, ParameterInfo

from .documents import is_utf8, not_utf8
from .errors import GrailError
from .shared import write_json

if TYPE_CHECKING:
    from .request import Request


JUDGED = ("method", "set")
"""Options that are refused with what they can be, empty or not."""


def refuse_empty(command: Callable, options: dict) -> None:
    """Raises GrailError for a value without a character, as an unset variable of a shell leaves it: some would be taken
    for the current folder, some for not given."""
    for name, value in options.items():
        if name not in JUDGED and (value == "" or (isinstance(value, list) and "" in value)):
            called = _called(command, name)
            optional = ", or leave it out" if called.startswith("--") else ""
            raise GrailError(f"{called} is empty: give it a value{optional}")


def refuse_other_bytes(command: Callable, options: dict) -> None:
    """Raises GrailError for a word of the command line that is no UTF-8, before any work."""
    for name, value in options.items():
        for word in value if isinstance(value, (list, tuple)) else [value]:
            if not is_utf8(word):
                raise GrailError(not_utf8(_called(command, name), word))


def _called(command: Callable, name: str) -> str:
    """As on the command line."""
    metadata = getattr(inspect.signature(command, eval_str=True).parameters[name].annotation, "__metadata__", ())
    asked = next((entry for entry in metadata if isinstance(entry, ParameterInfo)), None)
    if isinstance(asked, ArgumentInfo):
        return name.upper()
    return next((word for word in getattr(asked, "param_decls", None) or () if word.startswith("--")), _flag(name))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def requested(asked: dict) -> Request:
    """From the options of the command line."""
    from .modules.command import factory_options
    from .request import request

    _numbers(asked)
    model_options = factory_options(asked.pop("model_option"))
    return request(asked | {"set": _pairs(asked["set"])}, model_options)


def print_recipe_of(wanted: Request, as_json: bool) -> None:
    """To stdout, once it is known to be sound."""
    from .recipes.document import dump

    wanted.check()
    if as_json:
        write_json({"schema_version": 1, "recipe": wanted.options()})
    else:
        typer.echo(dump(wanted.options()), nl=False)


def _numbers(asked: dict) -> None:
    """What may be a number or a word, in place."""
    for name in ("alpha", "ridge"):
        with contextlib.suppress(ValueError):  # a word is for the recipe to judge
            asked[name] = None if asked[name] is None else float(asked[name])


def _pairs(settings: list[str]) -> dict[str, str]:
    for setting in settings:
        if "=" not in setting:
            raise GrailError(f"--set {setting}: expected key=value")
    return dict(setting.split("=", 1) for setting in settings)


def with_options_of(command: Callable, without: set[str], **defaults: object) -> Callable:
    """The command line of another command, some options left out; some get a default of their own."""

    def decorate(own: Callable) -> Callable:
        parameters = [
            p.replace(default=defaults.get(name, p.default), kind=p.KEYWORD_ONLY)
            for name, p in inspect.signature(command, eval_str=True).parameters.items()
            if name not in without
        ]
        own.__signature__ = inspect.Signature(parameters)
        own.__annotations__ = {p.name: p.annotation for p in parameters}
        return own

    return decorate
