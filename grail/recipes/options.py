"""The options that a recipe may give: those of `grail compress`, of the types that its dataclasses say."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from ..errors import GrailError
from ..modules.recipe import ModuleRecipe
from ..recipe import AUTO, LEFT_OUT, RIDGE, STREAM, Recipe

MODEL_OPTIONS, SET = "model_options", "set"
WIDER: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "calibration": (str,),
    "ridge": (float, str, NoneType),
    "alpha": (float, str),
    "memory": (int, str, NoneType),
    "weights": (str, NoneType),
    "calibration_text": (str, NoneType),
}
"""Types of what may also be an object of Python."""
SAID = {str: "text", float: "a number", int: "a whole number", bool: "true or false", dict: "a mapping"}
ALWAYS = ("model", "method", "ratio")
"""Written even where they are the default."""


def _types(name: str, hint: Any) -> tuple[type, ...]:
    if name in WIDER:
        return WIDER[name]
    return (dict,) if get_origin(hint) is dict else get_args(hint) or (hint,)


TYPES = {
    name: _types(name, hint)
    for name, hint in get_type_hints(ModuleRecipe).items()
    if name in {f.name for f in fields(ModuleRecipe)} - {"called"}
} | {MODEL_OPTIONS: (dict,)}


def checked(given: Any, where: str) -> dict[str, Any]:
    """The same with underscores for hyphens and numbers as the command line gives them. Raises GrailError, which begins
    with `where`, for what is no mapping, unknown names and values of other types."""
    if not isinstance(given, Mapping):
        raise GrailError(f"{where}: expected a mapping, option: value; got {_shown(given)}")
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = named(key, where)
        if name in found:
            raise GrailError(f"{where}: {name} is said twice")
        found[name] = typed(name, value, where)
    return found


def named(key: str, where: str) -> str:
    """The option's name with underscores. Raises GrailError for one that there is not."""
    name = key.replace("-", "_")
    if name not in TYPES:
        near = difflib.get_close_matches(name, TYPES, 1)
        hint = f"did you mean {near[0]}?" if near else "options are those of grail compress"
        raise GrailError(f"{where}: there is no option {key}; {hint}")
    return name


def typed(name: str, value: Any, where: str) -> Any:
    """A value of an option, or GrailError."""
    types = TYPES[name]
    if float in types and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
        value = float(value)
    if not (type(value) in types or (value is None and NoneType in types)):
        wanted = " or ".join(SAID[kind] for kind in types if kind is not NoneType)
        raise GrailError(f"{where}: {name} must be {wanted}; got {_shown(value)}")
    if name == SET:
        return {key: _word(entry, f"{where}: {SET}.{key}") for key, entry in value.items()}
    return value


def _word(value: Any, where: str) -> str:
    """A method's own option as --set has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, (str, int, float)):
        raise GrailError(f"{where} must be text, a number, true or false; got {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    return repr(value)[:60]


def differing(recipe: dict[str, Any], vision: bool) -> dict[str, Any]:
    """Of a recipe as grail.json has it the options that differ from the defaults, in the recipe's order; values are
    text, numbers, True, False or, of `set`, an object."""
    kind = ModuleRecipe if vision else Recipe
    known = {f.name: f for f in fields(kind) if f.name not in LEFT_OUT}
    given = {name: recipe[name] for name in known if name in recipe}
    target = given.get("target") or kind.TARGETS[0]
    defaults = {name: default(f) for name, f in known.items()}
    defaults |= {"target": kind.TARGETS[0], "ridge": AUTO if target == STREAM else RIDGE, "model": None}
    plain = (str, int, float, bool)
    sound = {name: v for name, v in given.items() if isinstance(v, dict if name == SET else plain)}
    return {name: v for name, v in sound.items() if v != defaults[name]}


def default(field: Field) -> Any:
    """What a field is when it is not given."""
    return field.default if field.default is not MISSING else {}


def shortest(recipe: dict[str, Any], vision: bool, model_options: dict[str, Any]) -> dict[str, Any]:
    """The options of a recipe file that asks for the same: those that are always written, and what differs."""
    options = {name: recipe[name] for name in ALWAYS if name in recipe} | differing(recipe, vision)
    return options | ({MODEL_OPTIONS: model_options} if model_options else {})
