"""What was asked of `grail compress` for a network in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import GrailError
from ..numbers import is_number
from ..recipe import AUTO, ERROR, SEARCH, STREAM, Recipe, instead

DENSE, OWN = "dense", "own"
ELSEWHERE = (
    "gqa", "dtype", "output_dtype", "format", "head_multiple", "store", "memory", "resume", "seq_len", "sweeps",
    "profile",
)  # fmt: skip


def by_errors_refused() -> GrailError:
    """What a network in memory's error costs is not known: its outputs need not be logits."""
    return GrailError(
        f"--allocation {ERROR} measures what errors do to a language model's logits, and is for language models; "
        f"choose uniform, log or global"
    )


@dataclass
class ModuleRecipe(Recipe):
    """weights: a .safetensors file for a named architecture; repair: estimate BatchNorm statistics anew afterwards;
    target: what compressed hidden vectors should stand for, the dense network's ("dense") or those that the network as
    compressed so far would have ("own"); or what takes the residual stream back to the dense one ("stream"; "dense"
    where no stream is known), of which alpha is the share; one_shot: look at the dense network alone; batch: images at
    once;
    residual_ratio: the share of each residual stream's channels to remove; calibration_text: captions for a text tower
    (calibration.captions)."""

    TARGETS: ClassVar[tuple[str, ...]] = (STREAM, DENSE, OWN)
    ALONE: ClassVar[str] = DENSE
    TRIALS_EVERY: ClassVar[int] = 8
    MOST_TRIALS: ClassVar[int] = 64

    weights: Any = None
    repair: bool = False
    one_shot: bool = False
    batch: int = 64
    residual_ratio: float = 0.0
    calibration_text: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_count("batch")
        for option in ("repair", "one_shot"):
            self._check_switch(option)
        if not is_number(self.residual_ratio) or not 0 <= self.residual_ratio < 1:
            raise GrailError(f"--residual-ratio must be at least 0 and below 1; got {instead(self.residual_ratio)}")
        if not self.compensate and self.alpha != AUTO:
            raise GrailError("--alpha is a share of the repair, and --no-compensate leaves that out: take one")
        if self.one_shot and self.target == STREAM:
            raise GrailError(
                "--target stream follows the network as it is compressed, and --one-shot does not: take one"
            )
        if self.residual_ratio and self.target == STREAM:
            raise GrailError(
                "--target stream compares streams of one width, and --residual-ratio narrows them: take one"
            )
        if self.alpha == SEARCH:
            raise GrailError("--alpha search judges by perplexity: it is for language models; give a number, or auto")
        if self.allocation == ERROR:
            raise by_errors_refused()
        plain = Recipe(model=None)
        for option in ELSEWHERE:
            if getattr(self, option) != getattr(plain, option):
                raise GrailError(f"--{option.replace('_', '-')} is for language models")

    @property
    def default_target(self) -> str:
        """The stream, where the compressed network is followed and its streams keep their widths."""
        return DENSE if self.one_shot or self.residual_ratio else STREAM

    def ratio_of(self, kind: str) -> float:
        """The ratio for a kind of site, "heads", "channels" or "residual"."""
        return self.residual_ratio if kind == "residual" else super().ratio_of(kind)

    def to_json(self) -> dict[str, Any]:
        """Without what is for language models only."""
        text = self.calibration_text
        told = text if text is None or isinstance(text, str) else "given in Python"
        weights = None if self.weights is None else str(self.weights)
        known = {name: value for name, value in super().to_json().items() if name not in ELSEWHERE}
        return known | {"weights": weights, "calibration_text": told}
