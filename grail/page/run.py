"""One run as its output folder tells of it: grail.json and run.json, whatever they lack.

These are files from anywhere: a value of another type than expected counts as missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..documents import read_json
from ..errors import GrailError

GRAIL, RAN = "grail.json", "run.json"
NEWEST = 1
"""The schema_version that is understood."""
VARIANTS = {"dense": "dense", "pruned": "pruned only", "compressed": "repaired"}
KINDS = {"heads": "heads", "channels": "channels", "residual": "residual streams"}


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def string(value: Any) -> str | None:
    """Text that is not empty, else None."""
    return value if isinstance(value, str) and value else None


def mapping(value: Any) -> dict:
    """An object, else an empty one."""
    return value if isinstance(value, dict) else {}


def scarce(found: dict[str, Any]) -> bool:
    """Whether the data of a result, by its grail.json, are too little to choose alpha and ridge by, so that without a
    target every site is repaired on its own."""
    return any(mapping(found.get(name)).get("scarce") is True for name in ("calibration", "calibration_text"))


def numbers(value: Any) -> dict[str, float]:
    """The entries of an object that are numbers."""
    return {str(key): n for key, entry in mapping(value).items() if (n := number(entry)) is not None}


@dataclass(frozen=True)
class SiteRow:
    """A site; condition: of the equations that were solved; held_out: errors of the repair on its own and towards the
    stream, on windows that enter no statistic; sweeps: how many, where there were several."""

    name: str
    kind: str
    before: float | None
    after: float | None
    error_before: float | None
    error_after: float | None
    lam: float | None
    retries: float | None
    condition: float | None
    effective_rank: float | None
    alpha: float | None
    held_out: tuple[float | None, float | None]
    sweeps: int | None
    trained: bool
    damping_retries: float | None

    @classmethod
    def of(cls, entry: dict) -> SiteRow:
        """From an entry of grail.json."""
        name = string(entry.get("name")) or "?"
        rcond, held_out = number(entry.get("rcond")), entry.get("held_out_errors")
        own, stream = held_out if isinstance(held_out, list) and len(held_out) == 2 else (None, None)
        return cls(
            name,
            string(entry.get("kind")) or _kind(name),
            number(entry.get("before")),
            number(entry.get("after")),
            number(entry.get("error_before")),
            number(entry.get("error_after")),
            number(entry.get("lambda")),
            number(entry.get("retries")),
            number(1 / rcond) if rcond else None,
            number(entry.get("effective_rank")),
            number(entry.get("alpha")),
            (number(own), number(stream)),
            len(sweeps) if isinstance(sweeps := entry.get("sweeps"), list) else None,
            entry.get("trained") is True,
            number(mapping(entry.get("damping")).get("retries")),
        )

    @property
    def layer(self) -> int | None:
        """The first number in its name."""
        found = re.search(r"(?:^|\.)(\d{1,6})(?:\.|$)", self.name)
        return int(found[1]) if found else None


def _kind(name: str) -> str:
    """Folders written before grail.json said it."""
    if name.startswith("residual"):
        return "residual"
    return "heads" if "attn" in name or "attention" in name else "channels"


@dataclass(frozen=True)
class Measure:
    """values: by name of VARIANTS, perplexities or shares of right answers; same: what has to be equal for two of them
    to be comparable."""

    name: str
    values: dict[str, float]
    data: str
    same: tuple

    def shown(self, value: float) -> str:
        """As a person reads it."""
        if self.name == "accuracy":
            return f"{100 * value:.1f} %"
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


@dataclass(frozen=True)
class Run:
    """folder: as it is called on the page; ran: run.json, None where there is none."""

    folder: str
    grail: dict
    ran: dict | None = None

    @property
    def recipe(self) -> dict:
        """What was asked."""
        return mapping(self.grail.get("recipe"))

    @property
    def vision(self) -> bool:
        """A network that was held in memory."""
        return self.grail.get("format") == "module"

    @property
    def model(self) -> str:
        """What was compressed."""
        return string(mapping(self.grail.get("source")).get("id")) or string(self.recipe.get("model")) or "unknown"

    @property
    def from_python(self) -> bool:
        """Whether a network or data were given as objects, which no command can name."""
        source = mapping(self.grail.get("source"))
        given = source.get("given_in_python") is True or (self.vision and "sha256" not in source)
        return given or "given in Python" in (self.recipe.get("calibration"), self.recipe.get("calibration_text"))

    @property
    def repaired(self) -> bool:
        """Whether there was a repair at all."""
        return self.recipe.get("compensate") is not False

    @property
    def streams(self) -> bool:
        """Whether every site of a language model was repaired towards the dense stream."""
        return self.repaired and not self.vision and self.recipe.get("target") == "stream"

    @property
    def method(self) -> str:
        """The method and what else sets a run apart, in a few words."""
        parts = [string(self.recipe.get("method")) or "unknown method"]
        if self.vision and self.recipe.get("one_shot") is True:
            parts.append("one-shot")
        if self.repaired and string(self.recipe.get("target")) in self._unusual_targets:
            parts.append(f"target {self.recipe['target']}")
        if (allocation := string(self.grail.get("allocation"))) not in (None, "uniform"):
            parts.append(f"allocation {allocation}")
        if self.recipe.get("ridge_form") == "paper":
            parts.append("paper's ridge")
        if self.grail.get("bias") is True:
            parts.append("bias")
        if not self.repaired:
            parts.append("not repaired")
        return ", ".join(parts)

    @property
    def _unusual_targets(self) -> set[str]:
        """Targets that are not what the other options lead to by themselves."""
        if not self.vision:
            return {"hidden"}
        follows = self.recipe.get("one_shot") is not True and not number(self.recipe.get("residual_ratio"))
        return {"dense", "own", "stream"} - {"stream" if follows else "dense"}

    @property
    def sites(self) -> list[SiteRow]:
        """In execution order."""
        found = self.grail.get("sites")
        return [SiteRow.of(entry) for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def sizes(self, name: str) -> tuple[float | None, float | None]:
        """(before, after) of "parameters", "bytes" or "macs"."""
        found = mapping(self.grail.get(name))
        return number(found.get("before")), number(found.get("after"))

    @property
    def measure(self) -> Measure | None:
        """What the evaluation found, if there was one."""
        found = mapping(self.grail.get("evaluation"))
        data = string(found.get("data")) or "unknown data"
        for name, inner in (("perplexity", number), ("accuracy", lambda v: number(mapping(v).get("top1")))):
            values = _ordered(mapping(found.get(name)), inner)
            if values:
                counts = (number(found.get(key)) for key in ("windows", "seq_len", "images"))
                identity = string(found.get("sha256")) or data
                return Measure(name, values, data, (name, identity, *counts))
        return None

    def variant(self, name: str) -> str:
        """How a variant is called; what was not repaired is not called so."""
        return VARIANTS[name] if self.repaired or name != "compressed" else "pruned only"


def _ordered(found: dict, inner: Callable[[Any], float | None]) -> dict[str, float]:
    return {name: value for name in VARIANTS if (value := inner(found.get(name))) is not None}


def read_run(path: str | Path, called: str | None = None) -> Run:
    """The run that wrote a folder. Raises GrailError naming the folder where there is none that is understood."""
    folder = Path(path)
    if not folder.is_dir():
        raise GrailError(f"{path} is no folder: name one that grail compress wrote")
    if not (folder / GRAIL).is_file():
        raise GrailError(f"{path} has no {GRAIL}: name a folder that grail compress wrote")
    found = read_json(folder / GRAIL)
    version = number(found.get("schema_version"))
    if version is not None and version > NEWEST:
        raise GrailError(f"{folder / GRAIL} was written by a newer grail (schema_version {version:g}); update this one")
    if not isinstance(found.get("recipe"), dict) and not isinstance(found.get("sites"), list):
        raise GrailError(f"{folder / GRAIL} says nothing of a compression (no recipe, no sites)")
    ran = read_json(folder / RAN) if (folder / RAN).is_file() else None
    return Run(called or folder.resolve().name, found, ran)
