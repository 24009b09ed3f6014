"""What was asked of `grail compress`: one dataclass, checked before any work begins."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from types import NoneType
from typing import Any, ClassVar, Self

from .errors import GrailError
from .numbers import MOST, as_whole, is_number, plain

FILE = "recipe.yaml"
"""What `grail run` takes; in every output."""
AUTO, SEARCH, HIDDEN, STREAM = "auto", "search", "hidden", "stream"
RIDGE = 1e-3
ALPHAS: tuple[str | float, ...] = (AUTO, 0.0, 0.25, 0.5, 1.0)
"""What --alpha search tries (alpha_search.py). By site first: with equals the first is kept."""
FEWEST_TRIALS = 2
"""Windows that only decide between candidates, at least."""
TRIAL_SHARE = 5
"""And at most one of so many that there are of a text."""
GIVEN = "given in Python"
"""What a recipe says of data that have no name."""
DTYPES = ("float32", "bfloat16", "float16")
UNIFORM, GLOBAL, LOG, ERROR = ALLOCATIONS = ("uniform", "global", "log", "error")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "ridge_form": ("anchored", "paper"),
    "allocation": (None, *ALLOCATIONS),
    "format": ("auto", "uniform", "grail", "padded"),
    "gqa": ("query", "group"),
    "store": ("auto", "memory", "disk"),
    "dtype": (None, *DTYPES),
    "output_dtype": (None, *DTYPES),
}
"""What the options that are words may be; None: the default for this model and method."""
LEFT_OUT = {"output", "overwrite", "resume", "store", "memory", "profile", "called", "strict"}
"""Where the result goes, how it is computed and what is refused; the rest decides what it is."""
MOST_BYTES = 2**60
MOST_CHARACTERS = 4096
"""Of a path, and of each of several that + joins."""
LONGEST = 60
"""Characters of a value in a sentence."""
OF_REPAIR = {"ridge": None, "target": None, "alpha": AUTO, "sweeps": 1, "ridge_form": "anchored"}
"""Options that say how it is repaired, and what they are where nobody has asked."""
SWITCHES = ("compensate", "strict", "compare_pruned", "overwrite", "resume", "profile")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass
class Recipe:
    """The options of CONTRACTS, with underscores. `None` means "the default for this model and data".

    target: what a repaired consumer should add to the residual stream: what it did before ("hidden"), or also what the
    sites before it got wrong ("stream"), of which alpha is the share, "search": that of whole runs with which the
    network is best (alpha_search.py). Not given: `default_target`, and ALONE where the
    calibration data can spare no windows to choose alpha and ridge by (of a vision network: has fewer than 16 inputs).
    sweeps: how often a consumer is solved for at most, with target "stream": each time towards what is left.
    strict: a λ that would have to be raised ends the run."""

    TARGETS: ClassVar[tuple[str, ...]] = (STREAM, HIDDEN)
    ALONE: ClassVar[str] = HIDDEN
    """The target with which every site is repaired on its own."""
    TRIALS_EVERY: ClassVar[int] = 16
    """One window that only decides for so many that enter the statistics: of text, twice as many give nothing more
    (docs/results.md)."""
    MOST_TRIALS: ClassVar[int] = 16
    """And at most."""

    model: Any
    method: str = "wanda-sp"
    ratio: float = 0.3
    attn_ratio: float | None = None
    mlp_ratio: float | None = None
    output: str | None = None
    calibration: Any = "builtin"
    samples: int = 128
    seq_len: int | None = None
    seed: int = 0
    compensate: bool = True
    ridge: Any = None
    target: str | None = None
    alpha: Any = "auto"
    sweeps: int = 1
    ridge_form: str = "anchored"
    bias: bool | None = None
    strict: bool = False
    allocation: str | None = None
    format: str = "auto"
    round_to: int | None = None
    head_multiple: int = 1
    gqa: str = "query"
    dtype: str | None = None
    output_dtype: str | None = None
    device: str = "auto"
    eval: str | None = None
    compare_pruned: bool = False
    overwrite: bool = False
    resume: bool = False
    store: str = "auto"
    memory: Any = None
    profile: bool = False
    set: dict[str, Any] = field(default_factory=dict)
    called: str | None = None
    """What the model is called in reports, when it was given in Python and has no path of its own."""

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, plain(getattr(self, f.name)))
        self.device = str(self.device)
        for option in ("calibration", "eval"):
            value = getattr(self, option)
            if isinstance(value, os.PathLike):
                setattr(self, option, os.fspath(value))
        self._refuse_no_names()
        if not isinstance(self.eval, (str, NoneType)):
            raise GrailError(f"--eval must be the name of a data set or file; got {type(self.eval).__name__}")
        for option in ("ratio", "attn_ratio", "mlp_ratio"):
            value = getattr(self, option)
            given = value is not None or option == "ratio"
            if given and not (is_number(value) and 0 <= value < 1):
                hint = f" ({value / 100:g} for {value:g} %)" if is_number(value) and 1 < value < 100 else ""
                raise GrailError(
                    f"{_flag(option)} must be a number from 0 up to, not including, 1; got {instead(value)}{hint}"
                )
        if not isinstance(self.set, dict):
            raise GrailError(f"--set must be a mapping, option: value; got {shown(self.set)}")
        self.set = {name: plain(value) for name, value in self.set.items()}
        for option in ("bias", *SWITCHES):
            self._check_switch(option, may_be_none=option == "bias")
        for option in ("samples", "sweeps", "seq_len", "round_to", "head_multiple"):
            self._check_count(option, may_be_none=option in ("seq_len", "round_to"))
        self._settle_target()
        if self.seq_len is not None and self.seq_len < 2:
            raise GrailError("--seq-len must be at least 2: a window of one token predicts nothing")
        self.seed = self._whole("seed", least=0)
        self.memory = None if self.memory is None else _bytes(self.memory)
        for option, choices in CHOICES.items():
            if getattr(self, option) not in choices:
                known = ", ".join(c for c in choices if c)
                raise GrailError(f"{_flag(option)} {shown(getattr(self, option))}: choose one of {known}")

    def _check_switch(self, option: str, *, may_be_none: bool = False) -> None:
        value = getattr(self, option)
        if not isinstance(value, bool) and not (may_be_none and value is None):
            raise GrailError(f"{_flag(option)} must be True or False; got {shown(value)}")

    def _check_count(self, option: str, *, may_be_none: bool = False) -> None:
        if not (may_be_none and getattr(self, option) is None):
            setattr(self, option, self._whole(option))

    def _whole(self, option: str, least: int = 1) -> int:
        given = getattr(self, option)
        value = as_whole(given)
        if value is None or value < least:
            raise GrailError(f"{_flag(option)} must be a whole number, {least} or more; got {instead(given)}")
        if value > MOST:
            raise GrailError(f"{_flag(option)} must be a whole number from {least} to {MOST}; got {shown(given)}")
        return value

    def _refuse_no_names(self) -> None:
        """Raises GrailError for text that is nothing or that no file's name can hold: an empty path would be taken for
        the current folder. An empty method is refused with the list of those that there are."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "method" or not isinstance(value, str):
                continue
            if not value or "\0" in value:
                wrong = "has a NUL character in it" if value else "is empty"
                raise GrailError(f"{_flag(f.name)} {wrong}: give it a value, or leave it out")
            if len(longest := max(value.split("+"), key=len)) > MOST_CHARACTERS:
                raise GrailError(
                    f"{_flag(f.name)} {shown(value)}: {len(longest):,} characters, and no path has more than "
                    f"{MOST_CHARACTERS:,}"
                )

    def _settle_target(self) -> None:
        """The target, and with it the ridge that is not given."""
        self.of_repair = [name for name, default in OF_REPAIR.items() if getattr(self, name) != default]
        # asked for by its name, or by an option that only one of them has
        self.wants_target = self.target is not None or self.ridge == AUTO or (self.alpha, self.sweeps) != (AUTO, 1)
        self.target = self.target or self.default_target
        if self.target not in self.TARGETS:
            raise GrailError(f"--target {shown(self.target)}: choose one of {', '.join(self.TARGETS)}")
        streams = self.target == STREAM
        if self.ridge is None:
            self.ridge = AUTO if streams else RIDGE
        number = is_number(self.ridge) and self.ridge >= 0
        if not number and not (streams and self.ridge == AUTO):
            also = ", or auto" if streams else ""
            raise GrailError(f"--ridge must be a finite number, 0 or more{also}; got {instead(self.ridge)}")
        if not streams and self.alpha != AUTO:
            raise GrailError("--alpha is for --target stream")
        if not streams and self.sweeps != 1:
            raise GrailError("--sweeps is for --target stream: a repair of its own has nothing left to make up for")
        if self.alpha not in (AUTO, SEARCH) and not (is_number(self.alpha) and 0 <= self.alpha <= 1):
            raise GrailError(f"--alpha must be a number from 0 to 1, auto or search; got {instead(self.alpha)}")

    @property
    def default_target(self) -> str:
        """The target where none is asked for."""
        return self.TARGETS[0]

    @property
    def streams(self) -> bool:
        """Whether consumers are repaired towards the dense network's residual stream."""
        return self.compensate and self.target == STREAM

    @property
    def chooses(self) -> bool:
        """Whether windows are needed that only decide between candidates."""
        return self.streams and (AUTO in (self.alpha, self.ridge) or self.searches)

    @property
    def searches(self) -> bool:
        """Whether whole runs are candidates."""
        return self.streams and self.alpha == SEARCH

    @property
    def trial_windows(self) -> int:
        """How many."""
        return self.spare_windows if self.chooses else 0

    @property
    def spare_windows(self) -> int:
        """How many it would be with automatic alpha and ridge."""
        return min(max(self.samples // self.TRIALS_EVERY, FEWEST_TRIALS), self.MOST_TRIALS)

    def site_by_site(self) -> Recipe:
        """The same with every site repaired on its own, whatever others get wrong."""
        return replace(self, target=self.ALONE, alpha=AUTO, sweeps=1, ridge=RIDGE if self.ridge == AUTO else self.ridge)

    def ratio_of(self, kind: str) -> float:
        """The ratio for a kind of site, "heads" or "channels"."""
        own = self.attn_ratio if kind == "heads" else self.mlp_ratio
        return self.ratio if own is None else own

    def channel_multiple(self, width: int) -> int:
        """Kept MLP widths are a multiple of this."""
        return self.round_to or (64 if width >= 2048 else 1)

    def to_json(self) -> dict[str, Any]:
        """Everything that decides the result, and nothing of where it goes."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in LEFT_OUT}
        known["model"] = self.called or str(self.model)
        if not isinstance(self.calibration, str):
            known["calibration"] = GIVEN
        return known

    def told(self) -> Self:
        """A copy for a report, without data given in Python: a loader is the script's own, and may be used up."""
        told, words = copy.copy(self), self.to_json()
        for f in fields(self):
            if words.get(f.name) == GIVEN:
                setattr(told, f.name, GIVEN)
        return told


def uncompared(recipe: Recipe, *, evaluated: bool) -> str | None:
    """Why --compare-pruned compares nothing; None where it does, or is not asked for."""
    if not recipe.compare_pruned or (evaluated and recipe.compensate):
        return None
    why = "without repair the result is the pruned one" if evaluated else "nothing is evaluated; name data with --eval"
    return f"--compare-pruned compares nothing: {why}"


def unrepaired(recipe: Recipe, used: Collection[str] = ()) -> list[str]:
    """What is to be said of options that only a repair has, where there is none. used: those that something else
    needs."""
    left = [] if recipe.compensate else [name for name in recipe.of_repair if name not in used]
    return [f"{_flag(name)} changes nothing: it is for the repair, which --no-compensate leaves out" for name in left]


def alpha_name(alpha: str | float) -> str:
    """An α for people, or that each site has its own."""
    return "by site" if alpha == AUTO else f"{alpha:g}"


def shown(value: Any) -> str:
    """A value in a sentence: its beginning, where it is long."""
    try:
        text = str(value)
    except ValueError:  # a number of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def instead(value: Any) -> str:
    """What was given where a number was expected: that a text is one cannot be seen where it holds a number."""
    return f"the text {shown(value)!r}" if isinstance(value, str) and re.search(r"\d", value) else shown(value)


def _bytes(given: Any) -> int:
    """A size in bytes from a number, or from text like 4GB, 4GiB or 500M."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", shown(given).upper())
    size = float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else 0.0
    if isinstance(given, bool) or not 1 <= size < MOST_BYTES:
        raise GrailError(f"--memory {shown(given)}: expected a size such as 4GB or 500MB")
    return int(size)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
