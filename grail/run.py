"""One compression from recipe to report: open, calibrate, stream, evaluate, reopen, rename."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from .allocation import allocate_uniform
from .calibration import Windows, evaluation_windows, load_calibration
from .calibration.text import default_length
from .calibration.tokenizer import load_tokenizer
from .checkpoint import reopen
from .checkpoint.locate import Located, locate
from .checkpoint.writer import OutputFolder
from .errors import GrailError
from .estimate import estimate
from .evaluation.perplexity import perplexity
from .families import open_family
from .families.decoder import Decoder
from .machine import available_memory, usable_device
from .pipeline import Job, Streamed, stream
from .progress import Progress
from .recipe import Recipe
from .report import Report
from .selectors import selector_class

EVALUATED_BY_DEFAULT = 10**9
PROBE_LENGTH = 64


def compress(model: Any, *, progress: Progress | None = None, **flags: Any) -> Report:
    """Compress a model; flags are those of `grail compress` with underscores (see Recipe).

    model: a folder, alias or hub name; or a loaded transformers module, which is not modified: then
    `report.model` is the narrower module, and `output` may be left out. A module needs calibration data that is
    tokenised already (a tensor [N, L], a list of tensors, an iterable of batches, or a .safetensors file).
    Raises GrailError for bad input.
    """
    if not hasattr(model, "save_pretrained"):
        if not flags.get("output"):
            raise GrailError("compress needs output=FOLDER: where to write the smaller checkpoint")
        return run(Recipe(model=str(model), **flags), progress or Progress())
    with tempfile.TemporaryDirectory(prefix="grail-") as work:
        source, output = Path(work) / "source", flags.pop("output", None)
        Recipe(model=model, **flags)
        model.save_pretrained(source)
        recipe = Recipe(model=str(source), output=str(output or Path(work) / "output"), **flags)
        report = run(recipe, progress or Progress())
        report.recipe, report.source["id"] = (
            replace(recipe, model=type(model).__name__, output=output),
            "given in Python",
        )
        report.model = load(report.output).to(next(model.parameters()).device)
        report.output = output and report.output
        return report


def load(path: str | Path) -> torch.nn.Module:
    """Open an output of GRAIL as a module, in the dtype it is stored in, ready for inference."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()


def run(recipe: Recipe, progress: Progress) -> Report:
    """Carry out a recipe. Nothing is written outside OUT.partial, which is renamed at the very end."""
    session = _Session(recipe, progress)
    job, windows = session.job, session.windows
    progress.say(session.headline())
    with OutputFolder(recipe.output, overwrite=recipe.overwrite) as out:
        with session.phase("compress"):
            streamed = stream(job, windows and windows.ids, session.probe, out, progress.layers("compressing"))
        narrow = session.write_rest(job, streamed, out)
        with session.phase("reopen"):
            reopened = session.reopen(out, streamed)
        evaluation = session.evaluate(out)
        report = Report(
            recipe=recipe,
            source=session.source_entry(),
            calibration=session.calibration_entry(),
            results=streamed.results,
            parameters=(session.parameters, out.total_parameters),
            bytes=(session.source_bytes, out.total_bytes),
            loads_with=narrow.loads_with,
            class_changed=narrow.class_changed,
            evaluation=evaluation,
            reopened=reopened,
            phases=session.phases,
        )
        out.write_json("grail.json", report.to_json())
        out.write_json("run.json", report.run_json())
        report.output = str(out.finish())
    return report


@dataclass
class _Session:
    """The parts of a run that depend on the recipe alone."""

    recipe: Recipe
    progress: Progress

    def __post_init__(self):
        selector = selector_class(self.recipe.method).from_options(self.recipe.set)
        output = OutputFolder(self.recipe.output, overwrite=self.recipe.overwrite)
        output.check()
        self.located: Located = locate(self.recipe.model)
        output.check(self.located.folder, *self._local_texts())
        self.phases: dict[str, float] = {}
        written_as = self.recipe.output_dtype and getattr(torch, self.recipe.output_dtype)
        self.model = self._open(self.located.folder, written_as=written_as)
        sites = self.model.sites(self.recipe.gqa)
        self.job = Job(self.model, sites, allocate_uniform(sites, self.recipe), selector, self.recipe)
        names = self.model.source.names()
        self.parameters = sum(torch.Size(self.model.source.info(n).shape).numel() for n in names)
        self.source_bytes = sum(self.model.source.info(n).nbytes for n in names)
        with self.phase("text"):
            self.windows = self._calibration() if self.job.needs_data else None
            self.evaluated = self._evaluated()

    def _open(self, folder: Path, **options: Any) -> Decoder:
        dtype = self.recipe.dtype and getattr(torch, self.recipe.dtype)
        return open_family(folder, device=usable_device(self.recipe.device), dtype=dtype, **options)

    def _local_texts(self) -> list[Path]:
        named = (self.recipe.calibration, self.recipe.eval)
        return [Path(text) for text in named if isinstance(text, (str, Path)) and Path(text).exists()]

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.located.folder)

    @property
    def has_tokenizer(self) -> bool:
        return any(self.located.folder.glob("tokenizer*"))

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
        )
        widest = max(site.units.width for site in self.job.sites)
        if windows.tokens < widest:
            self.progress.warn(
                f"{windows.tokens} calibration tokens for {widest} channels: the Gram matrix is singular; use more text"
            )
        return windows

    def _evaluated(self) -> Windows | None:
        recipe = self.recipe
        source = recipe.eval
        if source == "none":
            return None
        if source is None:
            given = recipe.calibration
            if self.parameters >= EVALUATED_BY_DEFAULT or not isinstance(given, (str, Path)):
                return None
            if str(given).endswith(".safetensors"):
                return None
            source = str(given)
        source = str(source)
        length = recipe.seq_len or (self.windows.ids.shape[1] if self.windows else default_length(source))
        found = evaluation_windows(source, lambda: self.tokenizer, self.model.config.vocab_size, seq_len=length)
        if found is None and recipe.eval is not None:
            raise GrailError(f"--eval {source} holds less than one window of {length} tokens")
        return found

    def headline(self) -> str:
        """The one line before work."""
        changed = sum(map(self.job.changes, self.job.sites))
        tokens = self.windows.tokens if self.windows else 0
        evaluated = self.evaluated.tokens if self.evaluated else 0
        cost = estimate(self.job, tokens, evaluated, self.recipe.compare_pruned and self.recipe.compensate)
        return (
            f"{self.located.id}: {self.parameters / 1e6:.1f} M parameters, {changed} of {len(self.job.sites)} sites, "
            f"{tokens:,} calibration tokens; about {cost.memory / 1e9:.1f} GB and {max(cost.seconds, 1):.0f} s"
        )

    def source_entry(self) -> dict:
        located = self.located
        return {"id": located.id, "revision": located.revision, "sha256": self.model.source.sha256()}

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
        }

    def write_rest(self, job: Job, streamed: Streamed, out: OutputFolder):
        """Configuration, carried files, index last."""
        narrow = self.model.narrow_config(streamed.reductions, job.sites)
        config = copy.deepcopy(narrow.config)
        if self.recipe.output_dtype:
            config.pop("torch_dtype", None)
            config["dtype"] = self.recipe.output_dtype
        out.write_json("config.json", config)
        out.carry_over(self.located.folder)
        out.write_index()
        return narrow

    def reopen(self, out: OutputFolder, streamed: Streamed) -> dict:
        tokens = self.tokenizer(reopen.SAMPLE).input_ids if self.has_tokenizer else None
        needed = out.total_parameters * self.model.dtype.itemsize
        return reopen.verify(
            out.partial,
            self.probe,
            streamed.probe_logits,
            str(self.model.dtype).removeprefix("torch."),
            tokens,
            layerwise=needed > 0.7 * available_memory(),
        )

    def evaluate(self, out: OutputFolder) -> dict | None:
        """Perplexities of the written files on the held-out windows."""
        if self.evaluated is None:
            return None
        found: dict[str, float] = {}
        found["dense"] = self._perplexity("evaluating dense", self.located.folder)
        if self.recipe.compare_pruned and self.recipe.compensate:
            found["pruned"] = self._pruned_perplexity(out)
        found["compressed"] = self._perplexity("evaluating compressed", out.partial)
        count, length = self.evaluated.ids.shape
        entry = {"data": self.evaluated.source, "sha256": self.evaluated.sha256, "windows": count, "seq_len": length}
        return entry | {"perplexity": found}

    def _perplexity(self, label: str, folder: Path) -> float:
        with self.phase(label):
            return perplexity(self._open(folder), self.evaluated.ids, track=self.progress.layers(label))

    def _pruned_perplexity(self, out: OutputFolder) -> float:
        """What the same recipe gives with --no-compensate: a run of its own, evaluated and thrown away."""
        job = replace(self.job, recipe=replace(self.recipe, compensate=False))
        with OutputFolder(out.partial / "pruned") as pruned:
            with self.phase("pruned only"):
                windows = self.windows.ids if job.needs_data else None
                streamed = stream(job, windows, self.probe, pruned, self.progress.layers("pruning only"))
            self.write_rest(job, streamed, pruned)
            return self._perplexity("evaluating pruned", pruned.partial)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
