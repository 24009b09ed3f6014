"""Everything a run needs before and after the stream: the model, the text, the probe, the checks and the figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import grail_kernels

from .calibration import Windows, evaluation_windows, load_calibration
from .calibration.mixture import absolute, parts_of
from .calibration.text import default_length
from .calibration.tokenizer import has_tokenizer, load_tokenizer
from .checkpoint.locate import Located, locate
from .checkpoint.writer import OutputFolder
from .chunks import Texts
from .distributed import Group
from .errors import GrailError
from .families import open_family
from .families.decoder import Decoder
from .job import Job
from .machine import usable_device
from .progress import Progress
from .recipe import TRIAL_SHARE, Recipe
from .report import versions
from .selectors import selector_class
from .statistics import MOMENTS
from .survey import error_survey, score_survey
from .widths import WidthPlan
from .workspace import Workspace, chunk_tokens

EVALUATED_BY_DEFAULT = 10**9
PROBE_LENGTH = 64
FAR_OFF = 0.05
DECIDING_TOKENS = 2048
OVERLAPPING = 2
"""How often a token of the text is used, from which on it is said."""
WIDTHS = "widths"


@dataclass
class Session:
    """The parts of a run that follow from the recipe; making one checks all input. Raises GrailError."""

    recipe: Recipe
    progress: Progress
    group: Group

    def __post_init__(self):
        json.dumps(self.recipe.to_json())
        selector = selector_class(self.recipe.method).from_options(self.recipe.set)
        for operation in ("gram", "ridge"):
            try:
                grail_kernels.backend(operation, usable_device(self.group.device))
            except ValueError as error:
                raise GrailError(str(error)) from error
        self.out = OutputFolder(
            self.recipe.output, overwrite=self.recipe.overwrite, keep=True, resume=self.recipe.resume
        )
        self.out.check()
        self.located: Located = locate(self.recipe.model)
        self.out.check(self.located.folder, *self._local_texts())
        self.phases: dict[str, float] = {}
        written_as = self.recipe.output_dtype and getattr(torch, self.recipe.output_dtype)
        self.model = self.open(self.located.folder, written_as=written_as)
        sites = self.model.sites(self.recipe.gqa)
        self.widths = WidthPlan.of(sites, self.recipe, selector, self.model.source)
        self.job = Job(self.model, sites, self.widths.before_work(), selector, self.recipe)
        if selector.updates_weights() and self.recipe.compensate:
            raise GrailError("--set obs=true writes the method's own weight update: add --no-compensate")
        if not self.widths.needs_scores or self.recipe.format == "padded":
            self._decide_format()  # with a global allocation only to see that the biases can be written
        elif self.recipe.format == "uniform":
            raise GrailError(
                f"--format uniform needs the same widths in every layer, which --allocation {self.widths.allocation} "
                f"does not give; choose --allocation uniform, or another --format"
            )
        names = self.model.source.names()
        self.parameters = sum(torch.Size(self.model.source.info(n).shape).numel() for n in names)
        self.source_bytes = sum(self.model.source.info(n).nbytes for n in names)
        if self.has_tokenizer:
            _ = self.tokenizer
        with self.phase("text"):
            changes = any(map(self.job.changes, sites))
            needed = self.job.needs_data or (self.widths.measures_errors and changes)
            self.windows = self._calibration() if needed else None
            self.evaluated = self._evaluated()

    def _decide_format(self) -> None:
        job = self.job
        biased = [site.name for site in job.sites if job.affine and job.touches(site)]
        job.format = self.model.output_format(job.sites, job.kept, given_bias=biased, asked=self.recipe.format)

    def settle_widths(self, work: Workspace) -> None:
        """For a global allocation: the first of two passes, unless an earlier run has made it; then widths and format.
        Warns where whole units or multiples keep the result far from the ratio asked for."""
        if self.widths.needs_scores:
            done = self.group.broadcast(self.out.journal.find(WIDTHS) if self.group.main else None)
            if any(map(self.job.changes, self.job.sites)):
                self.job.kept = done[0]["kept"] if done else self._survey(work)
            self._decide_format()
        asked, reached = self.widths.wanted(), self.widths.reached(self.job.kept)
        if abs(asked - reached) > FAR_OFF:
            self.progress.warn(
                f"a share of {asked:.2f} of the sites' parameters was asked for, whole units make it {reached:.2f}"
            )

    @property
    def deciding_windows(self) -> Tensor | None:
        """The windows on which it is measured what an error costs: those that only decide, or the first of all."""
        if self.windows is None:
            return None
        found = self.windows.ids if self.windows.trial is None else self.windows.trial
        return found[: max(DECIDING_TOKENS // found.shape[1], 1)]

    def _survey(self, work: Workspace) -> dict[str, int]:
        widths, windows = self.widths, self.windows
        texts = Texts(windows and windows.ids, self.deciding_windows, weights=windows and windows.weights)
        survey, settle = (
            (error_survey, widths.from_curves) if widths.measures_errors else (score_survey, widths.from_scores)
        )
        with self.phase("survey"):
            found = survey(self.job, work, texts, self.progress.layers("scoring the dense network"))
        kept = self.group.broadcast(settle(found) if self.group.main else None)
        if self.group.main:
            self.out.journal.append({"step": WIDTHS, "kept": kept})
        return kept

    @property
    def _uses_means(self) -> bool:
        """Whether the selection reads means of activations, which weights of rows do not give."""
        return any(MOMENTS in self.job.statistics_of(site) for site in self.job.sites)

    @property
    def trial_windows(self) -> int:
        """Calibration windows that only decide between candidates."""
        return 0 if self.windows is None or self.windows.trial is None else len(self.windows.trial)

    @property
    def texts(self) -> Texts:
        """The windows that go through the network."""
        if self.windows is None:
            return Texts(probe=self.probe)
        windows = self.windows
        return Texts(windows.ids, windows.trial, self.probe, windows.weights, windows.trial_weights)

    @property
    def spill(self) -> bool:
        """Whether inputs of consumers are stored rather than computed twice."""
        return self.model.device.type == "cpu"

    @property
    def chunk_tokens(self) -> int:
        """Tokens that go through a layer at once."""
        return chunk_tokens(max(site.units.width for site in self.job.sites), self.model.dtype.itemsize)

    def identity(self) -> dict[str, Any]:
        """What two runs must have in common for one to go on with the work of the other."""
        return {
            "recipe": self.recipe.to_json(),
            "versions": versions(),
            "compute dtype": str(self.model.dtype).removeprefix("torch."),
            "compute device": self.model.device.type,
            "model": self.source_entry()["sha256"],
            "calibration": self.windows and self.windows.sha256,
            "evaluation": self.evaluated and self.evaluated.sha256,
        }

    def notes(self) -> list[str]:
        """What a user should know before work begins, beside the headline."""
        said = []
        if self.widths.needs_scores:
            said.append("two passes over the model: one to score the dense network, one to compress it")
        differs = self.widths.needs_scores or (self.job.format and self.job.format.name == "grail")
        if differs and self.recipe.format != "padded":
            plain = "--allocation uniform --no-bias" if self.job.affine else "--allocation uniform"
            said.append(
                "the result needs the class file written beside it (trust_remote_code, or `import grail`); "
                f"{plain} gives a plain checkpoint, --format padded one of the old widths"
            )
        return said

    def open(self, folder: Path, **options: Any) -> Decoder:
        """A checkpoint folder, on the device and in the dtype that were asked for."""
        dtype = self.recipe.dtype and getattr(torch, self.recipe.dtype)
        return open_family(folder, device=usable_device(self.group.device), dtype=dtype, **options)

    def _local_texts(self) -> list[Path]:
        named = [text for text in (self.recipe.calibration, self.recipe.eval) if isinstance(text, str)]
        return [Path(part) for text in named for part in parts_of(text) if Path(part).is_file()]

    @cached_property
    def tokenizer(self) -> Any:
        if self.recipe.called and not self.has_tokenizer:
            raise GrailError(
                f"a {self.recipe.called} given in Python knows no text: give tokenizer= along, or token ids "
                f"[windows, length] as calibration="
            )
        return load_tokenizer(self.located.folder)

    @property
    def has_tokenizer(self) -> bool:
        return has_tokenizer(self.located.folder)

    @cached_property
    def probe(self) -> torch.Tensor:
        """Fixed pseudo-random token ids [1, 64]."""
        generator = torch.Generator().manual_seed(0)
        length = min(PROBE_LENGTH, self.model.config.max_position_embeddings)
        return torch.randint(self.model.config.vocab_size, (1, length), generator=generator)

    def _calibration(self) -> Windows:
        recipe = self.recipe
        windows = load_calibration(
            recipe.calibration,
            lambda: self.tokenizer,
            self.model.config.vocab_size,
            samples=recipe.samples,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            trial=recipe.trial_windows,
        )
        if recipe.trial_windows and windows.trial is None:
            self._choose_nothing(windows)
        if windows.weights is not None and (self.job.affine or self._uses_means):
            what = "--bias" if self.job.affine else f"--method {recipe.method}"
            raise GrailError(f"{windows.source}: weights of tokens are not offered with {what}; leave one of them out")
        widest = max(site.units.width for site in self.job.sites if self.job.changes(site))
        different = windows.different
        if different < widest:
            self.progress.warn(
                f"{different:,} different calibration tokens for {widest:,} channels: the Gram matrix is singular, and "
                f"the errors on this text say little of other text; use more"
            )
        elif windows.tokens > OVERLAPPING * different:
            self.progress.warn(
                f"--calibration {windows.source} has only {different:,} tokens for windows of {windows.tokens:,}: they "
                f"overlap; fewer --samples give nearly the same sooner, more text gives more"
            )
        if isinstance(recipe.calibration, Tensor) and len(recipe.calibration) > recipe.samples + recipe.trial_windows:
            self.progress.warn(f"{len(recipe.calibration)} windows were given, samples={recipe.samples} are used")
        return windows

    def _choose_nothing(self, windows: Windows) -> None:
        """Every site on its own, where no windows can be spared to choose alpha and ridge by."""
        length = windows.ids.shape[1]
        held = f"--calibration {windows.source} holds less than {TRIAL_SHARE} windows of {length} tokens, and with less"
        if self.recipe.wants_target:
            raise GrailError(
                f"{held} --target stream has none to choose alpha and ridge by; give more text, or numbers for --alpha "
                f"and --ridge"
            )
        self.progress.warn(f"{held} none can be spared to choose alpha and ridge by: taking --target hidden")
        self.recipe = self.job.recipe = self.recipe.site_by_site()
        if self.job.format:
            self._decide_format()

    def _evaluated(self) -> Windows | None:
        """Evaluation windows: those asked for, or by default the held-out part of the calibration text."""
        asked, given = self.recipe.eval, self.recipe.calibration
        if asked == "none":
            return None
        if asked is None:
            tokenised = not isinstance(given, str) or any(p.endswith(".safetensors") for p in parts_of(given))
            if tokenised or self.parameters >= EVALUATED_BY_DEFAULT:
                return None
            if not self.has_tokenizer:
                named = self.recipe.called or self.located.folder
                self.progress.warn(f"{named} has no tokenizer: no evaluation (name token ids with --eval)")
                return None
        source = absolute(asked or given)
        length = self.recipe.seq_len or (self.windows.ids.shape[1] if self.windows else default_length(source))
        found = evaluation_windows(
            source,
            lambda: self.tokenizer,
            self.model.config.vocab_size,
            seq_len=None if source.endswith(".safetensors") and self.recipe.seq_len is None else length,
            held_out=self.held_out(source),
        )
        if found is None and asked is not None:
            raise GrailError(f"--eval {asked} holds less than one window of {length} tokens")
        if found is None:
            self.progress.warn(
                f"the part of {given} that is held out holds less than one window of {length} tokens: no evaluation; "
                f"give more text, a smaller --seq-len, or other text with --eval"
            )
        return found

    def held_out(self, source: str) -> bool:
        """Whether only the part of `source` that calibration never sees may be used for evaluation."""
        given = self.recipe.calibration
        return isinstance(given, str) and source in (given, absolute(given))

    @cached_property
    def _source_sha256(self) -> str:
        return self.model.source.sha256()

    def source_entry(self) -> dict:
        located = self.located
        found = {
            "id": self.recipe.called or located.id,
            "revision": located.revision,
            "hub": located.hub,
            "sha256": self._source_sha256,
        }
        return found | ({"given_in_python": True} if self.recipe.called else {})

    def calibration_entry(self) -> dict | None:
        if self.windows is None:
            return None
        count, length = self.windows.ids.shape
        return {
            "source": self.windows.source,
            "sha256": self.windows.sha256,
            "windows": count,
            "seq_len": length,
            "tokens": self.windows.tokens,
            "distinct_tokens": self.windows.different,
            "trial_windows": self.trial_windows,
            "weighted": self.windows.weights is not None,
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
