"""The windows of a pass in chunks: which of them this process computes, and what each is for. Shapes: N, V windows of L
tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from .workspace import Workspace


@dataclass(frozen=True)
class Texts:
    """Token ids: the calibration windows [N, L]; those that only decide between candidates [V, L]; the probe [1, L],
    whose logits are compared after reopening; and how much each token of the first two counts, float32. Any may be
    None."""

    windows: Tensor | None = None
    trial: Tensor | None = None
    probe: Tensor | None = None
    weights: Tensor | None = None
    trial_weights: Tensor | None = None


@dataclass
class Chunks:
    """The chunks of one pass that this process computes: `counted` enter the statistics, `trial` only decide between
    candidates, the `probe` (or None) only passes through. `windows` and `trial_windows` count those of all processes.
    weights: by a chunk's number, what each token counts [B, L]; none where all count the same. The hidden states before
    layer k are the store's series `name-k`; lasting: a later run may go on from them."""

    work: Workspace
    name: str
    ids: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    counted: list[int] = field(default_factory=list)
    trial: list[int] = field(default_factory=list)
    windows: int = 0
    trial_windows: int = 0
    probe: int | None = None
    lasting: bool = False

    @classmethod
    def of(cls, work: Workspace, name: str, texts: Texts) -> Chunks:
        """Numbered windows first, then trials, then the probe, which the main process has."""
        parts = [[] if ids is None else work.split(ids) for ids in (texts.windows, texts.trial)]
        ids = dict(enumerate(parts[0] + parts[1] + [texts.probe]))
        start = len(parts[0])
        weights = [
            part for all_NL in (texts.weights, texts.trial_weights) if all_NL is not None for part in work.split(all_NL)
        ]
        has_probe = texts.probe is not None and work.group.main
        return cls(
            work,
            name,
            ids,
            dict(enumerate(weights)),
            work.mine(start),
            [start + number for number in work.mine(len(parts[1]))],
            *(0 if ids_NL is None else len(ids_NL) for ids_NL in (texts.windows, texts.trial)),
            len(ids) - 1 if has_probe else None,
        )

    def weighed(self, number: int, rows_BLX: Tensor) -> Tensor:
        """A chunk's vectors times the root of what each token counts, so that their products count as much."""
        if number not in self.weights:
            return rows_BLX
        return rows_BLX * self.weights[number].to(rows_BLX.device).sqrt()[..., None]

    @property
    def all(self) -> list[int]:
        return self.counted + self.trial + self.passing

    @property
    def passing(self) -> list[int]:
        """The chunks from which nothing is learnt."""
        return [] if self.probe is None else [self.probe]

    def learn_no_more(self) -> None:
        """From here on only the probe goes on."""
        self.counted, self.trial, self.windows, self.trial_windows = [], [], 0, 0

    def beside(self, name: str) -> Chunks:
        """The same windows, without the probe, in series of another name."""
        return replace(self, name=name, probe=None)

    def series(self, layer: int) -> str:
        """The series of the hidden states before a layer (or, one past the last, before the final norm)."""
        return f"{self.name}-{layer}"
