"""Everything a run needs before and after the stream: the model, the text, the probe, the checks and the figures."""

from __future__ import annotations

import hashlib
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

from .calibration.mixture import TOKENISED, in_common, parts_of
from .calibration.tokenizer import has_tokenizer, load_tokenizer
from .checkpoint.carried import check_carried, stamps
from .checkpoint.journal import understood
from .checkpoint.locate import Located, locate
from .checkpoint.writer import OutputFolder
from .chunks import Texts
from .distributed import Group
from .errors import Circumstance, GrailError
from .families import open_family
from .families.decoder import Decoder
from .job import Job
from .machine import usable_device
from .progress import Progress
from .recipe import ALPHAS, Recipe, uncompared, unrepaired
from .report import versions
from .selectors import selector_class
from .statistics import MOMENTS
from .survey import error_survey, score_survey
from .texts import calibration_windows, evaluated_windows
from .widths import WidthPlan
from .workspace import Workspace, chunk_tokens

PROBE_LENGTH = 64
FAR_OFF = 0.05
DECIDING_TOKENS = 2048
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
        check_carried(self.located.folder)
        self.carried = stamps(self.located.folder)
        self.phases: dict[str, float] = {}
        self.raised: dict[str, list[float]] = {}
        written_as = self.recipe.output_dtype and getattr(torch, self.recipe.output_dtype)
        self.model = self.open(self.located.folder, written_as=written_as)
        sites = self.model.sites(self.recipe.gqa)
        self.widths = WidthPlan.of(sites, self.recipe, selector, self.model.source)
        self.job = Job(self.model, sites, self.widths.before_work(), selector, self.recipe)
        if selector.updates_weights() and self.recipe.compensate:
            raise GrailError("--set obs=true writes the method's own weight update: add --no-compensate")
        if self.widths.needs_scores and self.recipe.format == "uniform":
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
            self.windows = calibration_windows(self) if needed else None
            if not self.widths.needs_scores or self.recipe.format == "padded":
                self._decide_format()  # with a global allocation only to see that the biases can be written
            self.evaluated = evaluated_windows(self)

    def _decide_format(self) -> None:
        job = self.job
        biased = [site for site in job.sites if job.affine and job.touches(site)]
        try:
            names = [site.name for site in biased]
            job.format = self.model.output_format(job.sites, job.kept, given_bias=names, asked=self.recipe.format)
        except GrailError as error:
            if all(map(job.changes, biased)):
                raise
            raise GrailError(f"{error}, or take --target hidden: it gives none where nothing is removed") from error

    def settle_widths(self, work: Workspace) -> None:
        """For a global allocation: the first of two passes, unless an earlier run has made it; then widths and format.
        Warns where whole units or multiples keep the result far from the ratio asked for."""
        if self.widths.needs_scores:
            done = self.group.broadcast(self.out.journal.find(WIDTHS) if self.group.main else None)
            if any(map(self.job.changes, self.job.sites)):
                step = done[0] if done else self._survey(work)
                with understood(self.out.journal.path):
                    self.job.kept, self.raised = self.widths.understood(step)
                if self.raised and self.recipe.strict:
                    refuse = f"{next(iter(self.raised))}: λ had to be raised to measure what the site can spare"
                    raise Circumstance(f"{refuse}; use more calibration text or more --ridge, or leave out --strict")
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

    def _survey(self, work: Workspace) -> dict[str, Any]:
        """The step of the journal that says what was found."""
        widths, windows = self.widths, self.windows
        texts = Texts(windows and windows.ids, self.deciding_windows, weights=windows and windows.weights)
        survey, settle = (
            (error_survey, widths.from_curves) if widths.measures_errors else (score_survey, widths.from_scores)
        )
        with self.phase("survey"):
            found, raised = survey(self.job, work, texts, self.progress.layers("scoring the dense network"))
        step = {"step": WIDTHS, "kept": settle(found), "raised": raised} if self.group.main else None
        if self.group.main:
            self.out.journal.append(step)
        return self.group.broadcast(step)

    @property
    def uses_means(self) -> bool:
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
    def searches(self) -> bool:
        """Whether whole runs are candidates; not where nothing is removed, and all would be the same."""
        return self.recipe.searches and self.windows is not None

    @property
    def spill(self) -> bool:
        """Whether inputs of consumers are stored rather than computed twice."""
        return self.model.device.type == "cpu"

    @property
    def chunk_tokens(self) -> int:
        """Tokens that go through a layer at once."""
        return chunk_tokens(max(site.units.width for site in self.job.sites), self.model.dtype.itemsize)

    def identity(self, weights: str | None = None) -> dict[str, Any]:
        """What two runs must have in common for one to go on with the work of the other. weights: what stands for their
        hash, which is computed where nothing does."""
        return {
            "recipe": self.recipe.to_json(),
            "versions": versions(),
            "compute dtype": str(self.model.dtype).removeprefix("torch."),
            "compute device": self.model.device.type,
            "model": weights or self.source_entry()["sha256"],
            "model's config.json": hashlib.sha256((self.located.folder / "config.json").read_bytes()).hexdigest(),
            "calibration": self.windows and self.windows.sha256,
            "evaluation": self.evaluated and self.evaluated.sha256,
        }

    def notes(self) -> list[str]:
        """What a user should know before work begins, beside the headline."""
        said = []
        if left_out := self.model.left_out:
            said.append(f"{left_out[0]} ({len(left_out)} such tensors) is left out: config.json does not ask for it")
        if self.widths.needs_scores:
            said.append("two passes over the model: one to score the dense network, one to compress it")
        if self.searches:
            said.append(f"{len(ALPHAS)} whole runs, with alpha by site and with one for all sites: perplexity decides")
        if nothing := uncompared(self.recipe, evaluated=self.evaluated is not None):
            said.append(nothing)
        said += unrepaired(self.recipe, ("ridge", "ridge_form") if self.widths.measures_errors else ())
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

    def held_out(self, source: str) -> bool:
        """Whether only the part of `source` that calibration never sees is used for evaluation: of all local texts that
        it joins, where one of them is one of calibration's. Token ids have no such part."""
        given = self.recipe.calibration
        return isinstance(given, str) and any(not part.endswith(TOKENISED) for part in in_common(source, given))

    def warn_of_seen(self, source: str) -> None:
        """Of token ids that calibration reads too, which are evaluated whole."""
        given = self.recipe.calibration
        for part in sorted(in_common(source, given)) if isinstance(given, str) else ():
            if part.endswith(TOKENISED):
                self.progress.warn(f"{part} is evaluated whole, and calibration reads it too; name others with --eval")

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
            "scarce": self.windows.scarce is not None,
            "weighted": self.windows.weights is not None,
        }

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
