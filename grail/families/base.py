"""What the rest of GRAIL may know of a model: its sites, and the narrow names around them."""

from __future__ import annotations

from dataclasses import dataclass

from ..reduction import Units


@dataclass(frozen=True)
class Producer:
    """A layer whose output rows make the hidden vector; `rows_per_unit` of its rows belong to each unit."""

    name: str
    rows_per_unit: int


@dataclass(frozen=True)
class Site:
    """One hidden vector: made by the producers, read by the consumer (full tensor-name prefixes, without ".weight").

    `kind` is "heads" or "channels"; `layer` the block it lies in.
    """

    name: str
    kind: str
    layer: int
    producers: tuple[Producer, ...]
    consumer: str
    units: Units


@dataclass(frozen=True)
class NarrowConfig:
    """config.json of the result, and what opens it: `loads_with` a class by name, `class_changed` why (or None)."""

    config: dict
    loads_with: str
    class_changed: str | None
