"""The command line's way to networks in memory: which options they take, and what is measured of them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import GrailError
from .names import NAMED

DEFAULTS = {
    "weights": None,
    "repair": False,
    "one_shot": False,
    "batch": 64,
    "residual_ratio": 0.0,
    "calibration_text": None,
}
EVALUATED = ("data", "samples", "against", "speed", "weights", "classes", "templates", "probe", "device")


def for_text(asked: dict, model_options: dict) -> dict:
    """Without the options for vision. Raises GrailError for one that was given to a language model."""
    for name, default in DEFAULTS.items():
        if asked.get(name, default) != default:
            raise GrailError(f"--{name.replace('_', '-')} is for {NAMED}")
    if model_options:
        raise GrailError(f"--model-option is for {NAMED}")
    return {name: value for name, value in asked.items() if name not in DEFAULTS}


def evaluate_network(path: str, asked: dict) -> dict[str, Any]:
    """`grail eval`. Raises GrailError for options that are for language models."""
    for name in ("seq_len", "prompt", "dtype", "tasks", "tasks_folder", "limit", "shots"):
        if asked[name] is not None:
            raise GrailError(f"--{name.replace('_', '-')} is for language models")
    from .evaluate import evaluate_folders

    options = factory_options(asked["model_option"])
    return evaluate_folders(path, **{name: asked[name] for name in EVALUATED}, options=options)


def factory_options(options: list[str]) -> dict[str, object]:
    """key=value, the values as JSON where they are that."""
    found: dict[str, object] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not equals:
            raise GrailError(f"--model-option {option}: expected key=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found
