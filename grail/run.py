"""One compression from recipe to report: open, calibrate, stream, reopen, evaluate, rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, Unpack, overload

import torch

from .alpha_search import AlphaSearch
from .begun import check_same_everywhere, workspace_of
from .checkpoint.writer import OutputFolder
from .distributed import Group
from .documents import is_utf8, not_utf8
from .errors import Circumstance, GrailError, Interrupted, Lost, circumstance
from .finish import evaluate, reopen_written, write_rest
from .flags import Flags, Savable
from .loaded import check_function, save, told_as, trained_like
from .modules.architecture import Architecture
from .modules.folder import load as load_module
from .modules.hf import as_tokenizer
from .modules.names import is_hf_module, is_module_folder, is_network
from .modules.recipe import ModuleRecipe
from .modules.report import ModuleReport
from .modules.run import compress_module, compress_named
from .page import write_told
from .pipeline import stream
from .plan import Plan, check_disk, headline, make_plan, warn_if_tight
from .progress import Progress, Telling
from .recipe import Recipe
from .report import Report
from .session import Session
from .surroundings import undisturbed

M = TypeVar("M", bound=torch.nn.Module)


@overload
def compress(
    model: str | Path | Savable,
    *,
    progress: Progress | None = None,
    on_site: Callable[[dict[str, Any]], object] | None = None,
    **flags: Unpack[Flags],
) -> Report | ModuleReport: ...


@overload
def compress(
    model: torch.nn.Module,
    *,
    progress: Progress | None = None,
    on_site: Callable[[dict[str, Any]], object] | None = None,
    **flags: Unpack[Flags],
) -> ModuleReport: ...


def compress(
    model: Any,
    *,
    progress: Progress | None = None,
    on_site: Callable[[dict[str, Any]], object] | None = None,
    **flags: Any,
) -> Report | ModuleReport | None:
    """Compress a model; flags are those of `grail compress` with underscores (see Recipe, for other modules than those
    of transformers ModuleRecipe).

    model: a folder, alias or hub name; or a loaded transformers module, which is not modified: then
    `report.model` is the narrower module, and `output` may be left out. A module needs its `tokenizer`, or calibration
    data that is tokenised already (a tensor [N, L], a list of tensors, an iterable of batches with input_ids and maybe
    an attention_mask or weights, or a .safetensors file).
    Or a vision network: transformers' ViT, DeiT, DINOv2 or CLIP as a folder or loaded; any other module (`sites`: a
    description by hand; `preprocessing`: for images that are not floats as it reads them; `tokenizer`: for captions);
    timm/NAME, torchvision/NAME and open_clip/NAME with `weights` (`model_options`: for the library's factory).

    A language model gives a Report, any other network a ModuleReport; of several processes (torchrun) all but the main
    one get None.

    on_site is called with a site's entry of `report.sites` when that is final: once for each, in execution order, of
    several processes in the main one alone. With `resume` the sites of the layers that are there already come first;
    a layer that was cut off comes again. What the function raises stops the run like any other error; work that was
    done is kept as it is then.

    May stand in the middle of any script: the result does not depend on what the script has set in torch, and all of it
    is afterwards as it was (grail.surroundings). Raises GrailError for bad input.
    """
    if on_site is not None and not callable(on_site):
        raise GrailError(f"on_site must be a function that takes a site's entry; got {type(on_site).__name__}")
    if progress is not None and not isinstance(progress, Progress):
        raise GrailError(f"progress must be a grail.Progress; got {type(progress).__name__}")
    for name, value in {"model": model, **flags}.items():
        if not is_utf8(value):
            raise GrailError(not_utf8(name, value))
    with undisturbed() as caller:
        flags |= {name: caller.lent(flags[name]) for name in ("calibration",) if name in flags}
        progress = progress or Progress()
        return _compress(model, progress if on_site is None else Telling(progress, caller.own(on_site)), **flags)


def _compress(model: Any, progress: Progress, **flags: Any) -> Report | ModuleReport | None:
    by_hand = flags.get("sites") is not None or not hasattr(model, "save_pretrained")
    if isinstance(model, torch.nn.Module) and (by_hand or is_hf_module(model)):
        return _compress_in_memory(model, progress, **flags)
    if isinstance(model, (str, Path)) and is_network(str(model)):
        return _compress_named(str(model), progress, **flags)
    loaded = hasattr(model, "save_pretrained") and not isinstance(model, type)
    if not loaded and not isinstance(model, (str, os.PathLike)):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise GrailError(f"compress takes a module or a checkpoint's folder or name; got {given}")
    unknown = set(flags) - {f.name for f in fields(Recipe)} - ({"tokenizer"} if loaded else set())
    if unknown:
        of_networks = not loaded and unknown <= {f.name for f in fields(ModuleRecipe)} | {"model_options"}
        known = f" for a language model, and {model} is no vision network by its name or config.json"
        raise GrailError(f"compress has no option {', '.join(sorted(unknown))}{known if of_networks else ''}")
    if not loaded:
        if not flags.get("output"):
            raise GrailError("compress needs output=FOLDER: where to write the smaller checkpoint")
        return run(Recipe(model=str(model), **flags), progress)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GrailError("compress of a module works in one process: save it to a folder and compress that")
    with tempfile.TemporaryDirectory(prefix="grail-") as work:
        source, output, tokenizer = Path(work) / "source", flags.pop("output", None), flags.pop("tokenizer", None)
        flags["called"] = type(model).__name__
        Recipe(model=str(source), **flags)
        save(model, tokenizer, source)
        with told_as(type(model).__name__, source):
            check_function(model, source)
            report = run(Recipe(model=str(source), output=str(output or Path(work) / "output"), **flags), progress)
        assert report is not None and report.output is not None, "there is one process, and it is the main one"
        report.model = load(report.output).to(next(model.parameters()).device)
        trained_like(report.model, model)
        report.output = output and report.output
        return report


def _compress_in_memory(module: torch.nn.Module, progress: Progress, **flags: Any) -> ModuleReport:
    own: dict[str, Any] = {name: flags.pop(name) for name in ("sites", "preprocessing", "tokenizer") if name in flags}
    if flags.get("device", "auto") != "auto":
        raise GrailError("a module is compressed where it is: move it there, and leave out device")
    if flags.get("weights") is not None:
        raise GrailError("--weights: a module has weights of its own; load others into it, and leave out weights")
    recipe = _module_recipe(None, **{"called": type(module).__name__} | flags)
    if is_hf_module(module):
        own["tokenizer"] = as_tokenizer(own.get("tokenizer"), module)
        own["architecture"] = Architecture.of_module(module) if recipe.output else None
    return compress_module(module, recipe, progress, **own)


def _compress_named(name: str, progress: Progress, **flags: Any) -> ModuleReport:
    options = flags.pop("model_options", {})
    if not flags.get("output"):
        raise GrailError("compress needs output=FOLDER: where to write the smaller network")
    return compress_named(_module_recipe(name, **flags), options, progress)


def _module_recipe(model: str | None, **flags: Any) -> ModuleRecipe:
    unknown = set(flags) - {f.name for f in fields(ModuleRecipe)}
    if unknown:
        raise GrailError(f"compress of a vision network has no option {', '.join(sorted(unknown))}")
    return ModuleRecipe(model=model, **flags)


@overload
def load(path: str | Path, module: None = None) -> Any: ...  # its class is that of what was compressed


@overload
def load(path: str | Path, module: M) -> M: ...


@undisturbed()
def load(path: str | Path, module: torch.nn.Module | None = None) -> torch.nn.Module:
    """Open an output of GRAIL as a module, in the dtype it is stored in, ready for inference. module: for a network of
    your own class, one of the original widths (it is not modified). Raises GrailError for what is no such folder."""
    _check_folder(path)
    if is_module_folder(Path(path)):
        return load_module(path, module)
    from .evaluation.whole import load_whole
    from .registration import register

    register()
    return load_whole(Path(path))


def _check_folder(path: Any) -> None:
    """Raises GrailError for what cannot be a folder, nor the name of one."""
    if not isinstance(path, (str, os.PathLike)) or not str(path):
        given = "an empty text" if path == "" else type(path).__name__
        raise GrailError(f"load takes the folder of a model; got {given}")
    if Path(path).is_file():
        raise GrailError(f"{path} is a file; give load the folder that it lies in, {Path(path).parent}")
    if not Path(path).exists() and (Path(path).is_absolute() or str(path).startswith(".")):
        raise GrailError(f"{path}: no such folder")


@undisturbed()
def plan(recipe: Recipe, progress: Progress) -> Plan:
    """What `run` would do and need. Nothing is written. Raises GrailError for bad input, and for a budget that cannot
    be kept."""
    group = Group.from_environment(recipe.device)
    with group.guard():
        progress = progress if group.main else Progress()
        found = make_plan(Session(recipe, progress, group))
        for note in found.session.notes():
            progress.say(note)
    group.close()
    return found


@undisturbed()
def run(recipe: Recipe, progress: Progress) -> Report | None:
    """Carry out a recipe. Nothing is written outside OUT.partial, which is renamed at the very end.

    Returns None in all but the main one of several processes. Raises GrailError for bad input and where the system
    refuses (disk full, another process gone), Interrupted when it was asked to stop; both say so when work is kept.
    """
    group = Group.from_environment(recipe.device)
    with group.guard():
        progress = progress if group.main else Progress()
        session = Session(recipe, progress, group)
        check_same_everywhere(session)
        plan = make_plan(session)
        out = session.out
        out.keep = plan.store != "memory"  # nobody could go on with activations that died with this process
        check_disk(plan)
        for line in (headline(plan), *plan.session.notes()):
            progress.say(line)
        if tight := warn_if_tight(plan):
            progress.warn(tight)
        # the inner guard: the others must know before the folder in which they write is taken away
        folder, opened = plan.session.located.folder, out if group.main else nullcontext()
        with _telling_what_is_kept(out), opened, group.guard(), _input_that_was_sound(folder):
            report = _carry_out(plan, out)
    group.close()
    return report


@contextmanager
def _telling_what_is_kept(out: OutputFolder) -> Iterator[None]:
    """Add to what stopped the run that there is work to go on with."""
    try:
        yield
    except KeyboardInterrupt:
        if out.kept:
            raise Interrupted(f"interrupted; {_kept(out)}") from None
        raise
    except Lost:
        raise
    except Exception as error:
        sentence = str(error) if isinstance(error, GrailError) else circumstance(error)
        if sentence is None or not out.kept:
            raise
        raise Circumstance(f"{sentence}; {_kept(out)}") from error


@contextmanager
def _input_that_was_sound(folder: Path) -> Iterator[None]:
    """Input that cannot be read any more, because its folder or its disk went, is no bad input: work is kept."""
    try:
        yield
    except Circumstance:
        raise
    except GrailError as error:
        if folder.exists() and not isinstance(error.__cause__, OSError):
            raise
        raise Circumstance(str(error)) from error


def _kept(out: OutputFolder) -> str:
    return f"what is done is kept in {out.home}: the command that began it goes on from there with --resume"


def _carry_out(plan: Plan, out: OutputFolder) -> Report | None:
    session = plan.session
    work = workspace_of(plan, out)
    session.settle_widths(work)
    job = session.job
    assert job.format is not None, "settled with the widths"
    search = AlphaSearch(session, work, out) if session.searches else None
    if search is not None:
        streamed = search.run()
    else:
        with session.phase("compress"):
            progress = session.progress
            streamed = stream(job, work, session.texts, out, progress.layers("compressing"), tell=progress.site)
    if session.group.main:
        write_rest(session, job, out)
        with session.phase("reopen"):
            reopened = reopen_written(session, out, streamed)
    evaluation = evaluate(session, work, out)
    if not session.group.main:
        return None
    recipe = session.recipe.told()
    report = Report(
        recipe=recipe,
        source=session.source_entry(),
        calibration=session.calibration_entry(),
        results=streamed.results,
        trained=streamed.trained,
        widths=replace(session.widths, recipe=recipe),
        affine=job.affine,
        format=job.format.told(),
        parameters=(session.parameters, out.total_parameters),
        bytes=(session.source_bytes, out.total_bytes),
        evaluation=evaluation,
        candidates=None if search is None else search.to_json(),
        raised=session.raised,
        reopened=reopened,
        phases=session.phases,
        profile=work.profile,
        planned=plan.to_json(),
    )
    write_told(out, report.to_json(), report.run_json(), session.located.folder)
    report.output = str(out.finish())
    return report
