"""The options of `grail.compress` as type checkers and editors see them.

What they mean and may be is said, and checked, in Recipe and ModuleRecipe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, Protocol, TypedDict

from torch import Tensor, device

from .calibration.preprocessing import Preprocessing
from .families.network import ModuleSite


class Savable(Protocol):
    """A model of transformers, of whatever kind."""

    @property
    def save_pretrained(self) -> Callable[..., Any]:
        """Write it to a folder."""


class Flags(TypedDict, total=False):
    """All of both kinds of network; one that does not fit the network is refused with a sentence, and so is a word that
    is none of an option's choices: these are plain strings here, so that a script can go through several."""

    method: str
    ratio: float
    attn_ratio: float | None
    mlp_ratio: float | None
    output: str | PathLike[str] | None
    calibration: Any
    samples: int
    seq_len: int | None
    seed: int
    compensate: bool
    ridge: float | str | None
    target: str | None
    alpha: float | str
    sweeps: int
    ridge_form: str
    bias: bool | None
    strict: bool
    allocation: str | None
    format: str
    round_to: int | None
    head_multiple: int
    gqa: str
    dtype: str | None
    output_dtype: str | None
    device: str | device
    eval: str | PathLike[str] | None
    compare_pruned: bool
    overwrite: bool
    resume: bool
    store: str
    memory: int | str | None
    profile: bool
    set: dict[str, Any]
    called: str | None
    # networks in memory alone
    weights: str | PathLike[str] | None
    repair: bool
    one_shot: bool
    batch: int
    residual_ratio: float
    calibration_text: str | PathLike[str] | list[str] | Tensor | None
    sites: Iterable[ModuleSite] | None
    preprocessing: Preprocessing | None
    tokenizer: Any
    model_options: dict[str, Any]
