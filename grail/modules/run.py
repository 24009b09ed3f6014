"""One compression of a network in memory, from module to report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..allocation import KINDS, kept_per_group, rounded
from ..calibration.preprocessing import Preprocessing
from ..checkpoint.writer import OutputFolder
from ..errors import GrailError
from ..evaluation.macs import macs
from ..families import describe
from ..families.network import RESIDUAL, ModuleSite, Network, check
from ..machine import usable_device
from ..progress import Progress
from ..selectors import selector_class
from ..selectors.base import PRODUCERS
from ..widths import WidthPlan
from .architecture import Architecture, open_network
from .compress import ModulePass
from .evaluate import accuracies, held_out
from .folder import config_of, reopen, reopen_here, write
from .inputs import calibration_inputs
from .recipe import ModuleRecipe
from .repair import repair
from .report import ModuleReport
from .stream import chained, in_order
from .verify import verify


def compress_named(recipe: ModuleRecipe, options: dict[str, Any], progress: Progress) -> ModuleReport:
    """Compress `timm/NAME` or `torchvision/NAME` with weights from a file; options go to the library's factory. Raises
    GrailError for bad input."""
    out = OutputFolder(recipe.output, overwrite=recipe.overwrite)
    named = (path for path in (recipe.weights, recipe.calibration) if isinstance(path, (str, Path)))
    out.check(*(Path(path) for path in named if Path(path).exists()))
    module, architecture, source = open_network(recipe.model, recipe.weights, options)
    module.to(usable_device(recipe.device))
    ready = architecture.preprocessing(module)
    return compress_module(
        module, recipe, progress, preprocessing=ready, architecture=architecture, source=source, out=out
    )


def _evaluated(
    module: nn.Module, report: ModuleReport, recipe: ModuleRecipe, preprocessing: Preprocessing | None, pruned: Callable
) -> dict | None:
    """Accuracies of the given network, the result and, with --compare-pruned, the same without repair."""
    images = held_out(recipe.calibration, recipe.eval)
    if images is None:
        return None
    modules = {"dense": module, "compressed": report.model}
    if recipe.compare_pruned and recipe.compensate:
        modules = {"dense": module, "pruned": pruned().model, "compressed": report.model}
    return accuracies(modules, images, preprocessing, next(module.parameters()).device)


def compress_module(
    module: nn.Module,
    recipe: ModuleRecipe,
    progress: Progress,
    *,
    sites: Iterable[ModuleSite] | None = None,
    preprocessing: Preprocessing | None = None,
    architecture: Architecture | None = None,
    source: dict | None = None,
    out: OutputFolder | None = None,
) -> ModuleReport:
    """A narrower copy of a module; the given one is not modified. sites: a description by hand (families.network);
    else that of the family it belongs to. Calibration inputs that are tensors of floats go into the network as they
    are. Raises GrailError for bad input."""
    if recipe.output and out is None:
        out = OutputFolder(recipe.output, overwrite=recipe.overwrite)
    with out or nullcontext():
        report = _compressed(module, recipe, progress, sites, preprocessing)
        report.source = source or report.source
        plain = replace(recipe, compensate=False, bias=False, repair=False)
        report.evaluation = _evaluated(
            module, report, recipe, preprocessing, lambda: _compressed(module, plain, progress, sites, preprocessing)
        )
        if out is not None:
            _write(out, report, module, architecture, preprocessing)
    return report


def _write(
    out: OutputFolder,
    report: ModuleReport,
    module: nn.Module,
    architecture: Architecture | None,
    preprocessing: Preprocessing | None,
) -> None:
    """The folder, opened again before it takes its name: in a fresh process where a library builds the class."""
    report.bytes = write(out, report.model, config_of(architecture, report.results, preprocessing, report.classes))
    if report.example is not None:
        if architecture is None:
            reopen_here(out.partial, report.model, report.example, module)
        else:
            reopen(out.partial, report.model, report.example)
    out.write_json("grail.json", report.to_json())
    out.write_json("run.json", report.run_json())
    report.output = str(out.finish())


def _compressed(
    module: nn.Module,
    recipe: ModuleRecipe,
    progress: Progress,
    sites: Iterable[ModuleSite] | None,
    preprocessing: Preprocessing | None,
) -> ModuleReport:
    selector = selector_class(recipe.method).from_options(recipe.set)
    dense = _described(module, sites, recipe)
    device = next(module.parameters()).device
    progress.say(f"{type(module).__name__}: {len(dense.sites)} sites, method {recipe.method}")
    batches, calibration, classes = _calibration(recipe, preprocessing, dense, device)
    if batches:
        in_order(dense, batches[0][:2])
    plan = WidthPlan.of(dense.sites, recipe, selector, _Shapes(dense.module))
    kept = plan.before_work()
    for site in dense.residual:
        kept[site.name] = rounded(site, recipe, kept_per_group(site.units.count, recipe.residual_ratio))
    if batches:
        sites = [*dense.residual, *dense.sites]
        verify(dense, [site for site in sites if kept[site.name] < site.units.count], batches[0][:2])
        if dense.blocks and not chained(dense, batches[0][:2]):
            dense.blocks = []
    work = dense.clone()
    streams = [Network(network.module, dense.residual) for network in (dense, work)]
    passes = [ModulePass(*pair, batches, kept, selector, recipe) for pair in (streams, (dense, work))]
    if plan.needs_scores:
        kept |= plan.from_scores(passes[1].scores())
    start = time.perf_counter()
    results = [result for job in passes if job.work.sites for result in job.run(progress)]
    repaired = repair(work.module, batches) if recipe.repair else 0
    seconds = time.perf_counter() - start
    example = batches[0][:1] if batches else None
    return ModuleReport(
        recipe=recipe,
        model=work.module,
        results=results,
        calibration=calibration,
        source={"id": recipe.called or type(module).__name__},
        parameters=(_parameters(module), _parameters(work.module)),
        macs=None if example is None else (macs(dense.module, example), macs(work.module, example)),
        allocation=plan.allocation,
        affine=passes[-1].affine,
        repaired_norms=repaired,
        classes=classes,
        example=example,
        phases={"compress": seconds},
    )


def _described(module: nn.Module, sites: Iterable[ModuleSite] | None, recipe: ModuleRecipe) -> Network:
    """A copy of the module in evaluation mode, and its sites. Raises GrailError where they do not fit it."""
    still = frozenset(kind for kind in (*KINDS, RESIDUAL) if recipe.ratio_of(kind) == 0)
    found = describe(module, still) if sites is None else _by_hand(module, list(sites))
    if not found.sites and not found.residual:
        raise GrailError("no sites are given: there is nothing to make narrower")
    if RESIDUAL in still:
        found.residual = []
    elif not found.residual:
        raise GrailError(
            f"--residual-ratio: no residual stream of {type(module).__name__} is described; it is for ResNets, and for "
            f"streams described by hand, grail.residual(...)"
        )
    found = found.clone()
    found.module.eval().requires_grad_(False)
    check(found)
    return found


def _by_hand(module: nn.Module, sites: list[ModuleSite]) -> Network:
    parts = [[site for site in sites if (site.kind == RESIDUAL) is residual] for residual in (False, True)]
    return Network(module, parts[0], residual=parts[1])


def _calibration(
    recipe: ModuleRecipe, preprocessing: Preprocessing | None, network: Network, device: torch.device
) -> tuple[list[Tensor], dict | None, list[str] | None]:
    """Batches on the network's device, what they are, and names of classes where the images have some; no batches where
    None was given and nothing needs them."""
    if recipe.calibration is None:
        selector = selector_class(recipe.method).from_options(recipe.set)
        changed = [site for site in (*network.sites, *network.residual) if recipe.ratio_of(site.kind)]
        needs = {need for site in changed for need in selector.needs_of(site.role)}
        if recipe.compensate or needs - {PRODUCERS} or recipe.repair or recipe.bias:
            raise GrailError(f"--method {recipe.method} with these options needs calibration images")
        return [], None, None
    batches, told, classes = calibration_inputs(recipe, preprocessing)
    dtype = next(network.module.parameters()).dtype
    return [batch.to(device, dtype) for batch in batches], told, classes


class _Info(NamedTuple):
    shape: tuple[int, ...]


class _Shapes:
    """Weight shapes by name, as the allocation asks for them; taps of a convolution count as inputs."""

    def __init__(self, module: nn.Module):
        self._tensors = module.state_dict()

    def info(self, name: str) -> Any:
        """rows, and numbers per row."""
        tensor = self._tensors[name]
        taps = tensor[0, 0].numel() if tensor.dim() > 2 else 1
        return _Info((tensor.shape[0], tensor.shape[1] * taps))


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
