"""One compression of a network in memory, from module to report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..allocation import kept_per_group, rounded
from ..calibration.images import ImageSet
from ..calibration.preprocessing import Preprocessing
from ..calibration.processor import file_of
from ..checkpoint.writer import OutputFolder
from ..errors import GrailError, first_line
from ..evaluation.macs import macs
from ..evaluation.zero_shot import is_clip
from ..families.buffers import put_back
from ..families.copies import copied
from ..families.network import IMAGES, RESIDUAL, TEXT, ModuleSite, listed
from ..machine import reuse_memory, usable_device
from ..page import write_told
from ..progress import BarsOnly, Progress
from ..recipe import AUTO, uncompared
from ..selectors import selector_class
from ..surroundings import undisturbed
from ..widths import WidthPlan
from . import hf
from .answers import NotTaken
from .architecture import Architecture, open_network
from .compress import ModulePass
from .evaluate import accuracies, check_reads, classifier, held_out
from .folder import config_of, reopen, reopen_here, write
from .given import check_module, check_preprocessing, check_storable, check_untied
from .idle import idle_options
from .names import is_hf_module
from .proof import prove
from .recipe import ModuleRecipe, by_errors_refused
from .repair import repair
from .report import ModuleReport
from .stream import chained, in_order
from .towers import Tokenizer, Tower, spare, towers_of
from .verify import check_numbers


@undisturbed()
def compress_named(recipe: ModuleRecipe, options: dict[str, Any], progress: Progress) -> ModuleReport:
    """Compress `timm/NAME` or `torchvision/NAME` with weights from a file, options going to the library's factory; or a
    folder of transformers. Raises GrailError for bad input."""
    out = OutputFolder(recipe.output, overwrite=recipe.overwrite)
    sources = (recipe.model, recipe.weights, recipe.calibration, recipe.calibration_text)
    named = (path for path in sources if isinstance(path, (str, Path)))
    out.check(*(Path(path) for path in named if Path(path).exists()))
    module, architecture, source = open_network(recipe.model, recipe.weights, options)
    source |= {"options": options} if options else {}
    module.to(usable_device(recipe.device))
    inputs = {"preprocessing": architecture.preprocessing(module), "tokenizer": architecture.tokenizer()}
    try:
        return compress_module(module, recipe, progress, architecture=architecture, source=source, out=out, **inputs)
    except NotTaken as error:
        made = inputs["preprocessing"]
        if not architecture.folder or made is None or error.shape[2:] != made.size:
            raise
        raise GrailError(f"{error}; {file_of(architecture.folder)} says this size: correct it") from error


def _asked_for(module: nn.Module, recipe: ModuleRecipe, tokenizer: Tokenizer | None) -> ImageSet | None:
    """The labelled images of --eval, opened before there is work that a slip would cost. Raises GrailError where they
    cannot be had, or a CLIP cannot be judged by them."""
    images = None if recipe.eval is None else held_out(recipe.calibration, recipe.eval)
    if images is not None and is_clip(module):
        check_reads(tokenizer)
    return images


def _at_hand(
    module: nn.Module, recipe: ModuleRecipe, progress: Progress, tokenizer: Tokenizer | None
) -> ImageSet | None:
    """Those that go with the calibration where none are asked for; None where there are none that the network can be
    judged by."""
    if recipe.eval is not None or not _gives_classes(module, tokenizer):
        return None
    try:
        return held_out(recipe.calibration, None)
    except GrailError as error:
        progress.warn(f"no evaluation: {error}, or images to evaluate on by --eval")
        return None


def _evaluated(
    module: nn.Module,
    report: ModuleReport,
    recipe: ModuleRecipe,
    images: ImageSet | None,
    pruned: Callable[[], ModuleReport],
    progress: Progress,
    preprocessing: Preprocessing | None = None,
    tokenizer: Tokenizer | None = None,
) -> dict | None:
    """Accuracies of the given network, the result and, with --compare-pruned, the same without repair. None without
    images."""
    if images is None:
        return None
    modules = {"dense": module, "compressed": report.model}
    if recipe.compare_pruned and recipe.compensate:
        modules = {"dense": module, "pruned": pruned().model, "compressed": report.model}
    judged = {label: classifier(each, images, tokenizer) for label, each in modules.items()}
    try:
        return accuracies(judged, images, preprocessing, next(module.parameters()).device)
    except GrailError as error:
        if recipe.eval is not None:
            raise
        progress.warn(
            f"no evaluation on {images.name}, which goes with the calibration: {error}; name others by --eval"
        )
        return None


def _gives_classes(module: nn.Module, tokenizer: Tokenizer | None) -> bool:
    """Whether a module can be judged by labels: no CLIP without its tokenizer, no feature extractor of transformers."""
    if is_clip(module):
        return tokenizer is not None
    return not is_hf_module(module) or hasattr(module, "num_labels")


def compress_module(
    module: nn.Module,
    recipe: ModuleRecipe,
    progress: Progress,
    *,
    sites: Iterable[ModuleSite] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: Tokenizer | None = None,
    architecture: Architecture | None = None,
    source: dict | None = None,
    out: OutputFolder | None = None,
) -> ModuleReport:
    """A narrower copy of a module; the given one is not modified. sites: a description by hand (families.network);
    else that of the family it belongs to. Calibration inputs that are tensors of floats go into the network as they
    are; captions need the tokenizer (list of texts -> token ids [N, L]) unless they are token ids. Raises GrailError
    for bad input."""
    check_module(module)
    check_preprocessing(preprocessing, stored=recipe.output is not None)
    if recipe.output:
        check_storable(module)
    if recipe.output and out is None:
        out = OutputFolder(recipe.output, overwrite=recipe.overwrite)
    for nothing in idle_options(recipe, selector_class(recipe.method).from_options(recipe.set), module):
        progress.warn(nothing)
    with out or nullcontext():
        inputs = {"sites": listed(sites), "preprocessing": preprocessing, "tokenizer": tokenizer}
        images = _asked_for(module, recipe, tokenizer)
        report = _compressed(module, recipe, progress, progress.site, **inputs)
        report.source = source or report.source
        plain = replace(recipe, compensate=False, bias=False, repair=False, alpha=AUTO)
        pruned = partial(_compressed, module, plain, BarsOnly(progress), lambda entry: None, **inputs)
        images = images or _at_hand(module, recipe, progress, tokenizer)
        if nothing := uncompared(recipe, evaluated=images is not None):
            progress.warn(nothing)
        report.evaluation = _evaluated(module, report, recipe, images, pruned, progress, preprocessing, tokenizer)
        if out is not None:
            _write(out, report, module, architecture, preprocessing, tokenizer)
    return report


def _write(
    out: OutputFolder,
    report: ModuleReport,
    module: nn.Module,
    architecture: Architecture | None,
    preprocessing: Preprocessing | None,
    tokenizer: Tokenizer | None,
) -> None:
    """The folder, opened again before it takes its name: in a fresh process where a library builds the class."""
    report.bytes = write(out, report.model, config_of(architecture, report.results, preprocessing, report.classes))
    if architecture and architecture.folder:
        out.carry_over(architecture.folder)
    elif isinstance(tokenizer, hf.Tokenizer):
        tokenizer.save_pretrained(out.partial)
    if report.examples:
        if architecture is None:
            reopen_here(out.partial, report.model, report.examples, module)
        else:
            reopen(out.partial, report.model, report.examples)
    write_told(out, report.to_json(), report.run_json(), architecture and architecture.folder)
    report.output = str(out.finish())


@torch.no_grad()
def _compressed(
    module: nn.Module, recipe: ModuleRecipe, progress: Progress, tell: Callable[[dict], None], **inputs: Any
) -> ModuleReport:
    selector = selector_class(recipe.method).from_options(recipe.set)
    check_numbers(module)
    reuse_memory()
    towers = towers_of(module, recipe, progress, **inputs)
    recipe = spare(towers, recipe, progress)
    dense = towers[0].dense.module
    every = [site for tower in towers for site in tower.dense.sites]
    streams = [site for tower in towers for site in tower.dense.residual]
    progress.say(f"{type(module).__name__}: {len(every)} sites, method {recipe.method}")
    for tower in towers:
        if tower.batches:
            in_order(tower.dense, tower.batches[0][:2])
    images = [tower for tower in towers if tower.dense.reads == IMAGES]
    if recipe.repair and not images:
        raise GrailError("--repair estimates statistics from images: give --calibration, or leave it out for text")
    plan = WidthPlan.of(every, recipe, selector, _Shapes(dense))
    if plan.measures_errors:  # an allocation of the method's own
        raise by_errors_refused()
    kept = plan.before_work()
    for site in streams:
        kept[site.name] = rounded(site, recipe, kept_per_group(site.units.count, recipe.residual_ratio))
    for tower in towers:
        check_untied(tower.dense, (site for site in tower.sites if kept[site.name] < site.units.count))
    recipe = prove(towers, kept, recipe, selector, progress, by_hand=inputs["sites"] is not None)
    for tower in towers:
        tower.part(recipe)
        if tower.batches and not chained(tower.dense, tower.batches):
            tower.dense.blocks = []
    if recipe.compensate:
        _warn_of_few_inputs(towers, progress)
    work = copied(dense)
    passes = [job for tower in towers for job in _passes(tower, work, kept, selector, recipe)]
    scores: dict[str, Tensor] = {}
    raised: dict[str, list[float]] = {}
    if plan.needs_scores:
        for job in (job for job in passes if job.work.sites[0].kind != RESIDUAL):
            found, more = job.scores()
            scores, raised = scores | found, raised | more
        kept |= plan.from_scores(scores)
    start = time.perf_counter()
    results = [result for job in passes for result in job.run(progress, tell)]
    narrowed = any(result.reduction is not None for result in results)
    repaired = 0
    if recipe.repair and narrowed:  # statistics of a network that is as it was given are its own
        repaired = repair(work, images[0].everything(recipe.batch), images[0].dense.call)
    put_back(work, module)
    seconds = time.perf_counter() - start
    examples = {tower.dense.call: tower.batches[0][:2].clone() for tower in towers if tower.batches}
    return ModuleReport(
        recipe=recipe.told(),
        model=work,
        results=results,
        calibration=images[0].told if images else None,
        calibration_text=next((tower.told for tower in towers if tower.dense.reads == TEXT), None),
        source={"id": recipe.called or type(module).__name__},
        parameters=(_parameters(module), _parameters(work)),
        macs=_counted((dense, work), examples, progress) if examples else None,
        allocation=plan.allocation,
        affine=passes[-1].affine,
        raised=raised,
        repaired_norms=repaired,
        classes=images[0].classes if images else None,
        examples=examples,
        phases={"compress": seconds},
    )


def _warn_of_few_inputs(towers: list[Tower], progress: Progress) -> None:
    """Where inputs are single rows, so that one is one row of a Gram matrix."""
    for tower in towers:
        count = sum(map(len, tower.batches))
        widest = max((site.units.width for site in tower.sites), default=0)
        rows = tower.batches and tower.batches[0].dim() == 2 and tower.batches[0].is_floating_point()
        if rows and count < widest:
            progress.warn(
                f"{count} calibration inputs for {widest} channels: the Gram matrix is singular, and the errors on "
                f"these inputs say little of others; give more"
            )


def _passes(tower: Tower, work: nn.Module, *asked: Any) -> list[ModulePass]:
    """Residual streams first, by whole forwards; then the sites within the blocks."""
    streams = replace(tower.dense, sites=tower.dense.residual, blocks=[])
    networks = [network for network in (streams, tower.dense) if network.sites]
    trial = tower.trial, tower.trial_counted
    return [ModulePass(n, replace(n, module=work), tower.batches, *asked, tower.counted, *trial) for n in networks]


def _counted(
    modules: tuple[nn.Module, nn.Module], examples: dict[str, Tensor], progress: Progress
) -> tuple[int, int] | None:
    """Multiply-accumulates of both. None, with a warning, where a forward cannot be counted: the work is done, and
    torch's counter or a network that takes no single input must not cost it."""
    try:
        before, after = (sum(macs(module, x, call) for call, x in examples.items()) for module in modules)
    except Exception as error:  # whatever a forward of the user's raises under the counter
        progress.warn(f"multiply-accumulates are not counted: {first_line(error)}")
        return None
    return before, after


class _Info(NamedTuple):
    shape: tuple[int, ...]


class _Shapes:
    """Weight shapes by name, as the allocation asks for them; taps of a convolution count as inputs."""

    def __init__(self, module: nn.Module):
        self._tensors = dict(module.named_parameters(remove_duplicate=False))

    def info(self, name: str) -> Any:
        """rows, and numbers per row."""
        tensor = self._tensors[name]
        taps = tensor[0, 0].numel() if tensor.dim() > 2 else 1
        return _Info((tensor.shape[0], tensor.shape[1] * taps))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
