"""What the rest of GRAIL may know of a model: its sites, and the narrow names around them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..reduction import Reduction, Units


@dataclass(frozen=True)
class Producer:
    """A layer whose output rows make the hidden vector; `rows_per_unit` of its rows belong to each unit. Its rows may
    be several `sections` of equal size one after another (queries, keys and values), each with rows of every unit."""

    name: str
    rows_per_unit: int
    sections: int = 1


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
class WrittenFormat:
    """An output format as a report tells it, without the model and its files: see OutputFormat."""

    name: str
    loads: str
    loads_with: str
    class_changed: str | None
    tensor_parallel: int
    original_widths: dict[str, int]


@dataclass(frozen=True, eq=False)
class OutputFormat(ABC):
    """What will be written: config.json, other files by name, and the tensors that are no plain copies.

    name: uniform, grail or padded. loads_with names what opens the result; class_changed says why it is not the
    source's class and, where the command can, how to keep that one (None: it is).
    """

    name: str
    config: dict[str, Any]
    files: dict[str, str]
    loads_with: str
    class_changed: str | None

    @property
    @abstractmethod
    def loads(self) -> str:
        """How it opens, for checkpoint.reopen: "plain", or "grail" (its class file, or `import grail`)."""

    @property
    @abstractmethod
    def tensor_parallel(self) -> int:
        """The largest number of devices over which every layer can be split evenly."""

    @property
    @abstractmethod
    def original_widths(self) -> dict[str, int]:
        """The widths that `padded` has or would have, under their names in config.json."""

    @property
    @abstractmethod
    def numbers_added(self) -> int:
        """How many numbers the layers have more than the source's, zeros that the class asks for included; below 0
        where they have fewer."""

    def told(self) -> WrittenFormat:
        """What a report says of it."""
        return WrittenFormat(**{f.name: getattr(self, f.name) for f in fields(WrittenFormat)})

    @abstractmethod
    def layer_tensors(
        self, layer: int, changed: dict[str, Tensor], reductions: dict[str, Reduction]
    ) -> dict[str, Tensor]:
        """A layer's tensors that are no plain copies of the source's, by full name, as they are written.

        changed: what `Decoder.narrow` gave for the layer's changed sites; reductions: by site name. Names that the
        source does not have (biases) are among the result.
        """
