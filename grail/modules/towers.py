"""The ways through a module that are compressed, each with its own calibration inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..allocation import KINDS
from ..calibration.captions import captions
from ..calibration.preprocessing import Preprocessing
from ..errors import GrailError
from ..evaluation.accuracy import dtype_of
from ..families import describe
from ..families.copies import copied
from ..families.network import BY_HAND, IMAGES, RESIDUAL, TEXT, ModuleSite, Network, check
from ..progress import Progress
from ..selectors import selector_class
from ..selectors.base import PRODUCERS
from .idle import idle_ratios
from .inputs import ENOUGH_INPUTS, FEWEST_INPUTS, calibration_inputs, parted
from .recipe import ModuleRecipe

NONE, BUILTIN = "none", "builtin"
Tokenizer = Callable[[list[str]], Tensor]


@dataclass
class Tower:
    """dense: a network of the copied module, as it was given; batches: its calibration inputs, of which there may be
    none where nothing needs them; counted: which tokens of them count, bool [B, L] (None: all); trial and
    trial_counted: the same of inputs that only decide between candidates (`spare`); told: what the inputs are, for the
    report; classes: names of classes where images have some."""

    dense: Network
    batches: list[Tensor]
    counted: list[Tensor] | None = None
    trial: list[Tensor] = field(default_factory=list)
    trial_counted: list[Tensor] | None = None
    told: dict | None = None
    classes: list[str] | None = None

    @property
    def sites(self) -> list[ModuleSite]:
        """All sites, residual streams first."""
        return [*self.dense.residual, *self.dense.sites]

    @property
    def inputs(self) -> int:
        """How many there are that do not only decide."""
        return sum(map(len, self.batches))

    @property
    def follows(self) -> bool:
        """Whether of any site it is known where it adds to a residual stream."""
        return any(site.stream is not None for site in self.sites)

    def part(self, recipe: ModuleRecipe) -> None:
        """Set inputs aside that only decide, where there is anything to decide, and count what is left."""
        if self.told is None:
            return
        if recipe.chooses and self.follows:
            self.batches, self.trial = parted(self.batches, recipe)
        self.told |= {"trial_windows": sum(map(len, self.trial))}
        if self.dense.reads != TEXT:
            self.told |= {"images": self.inputs}
            return
        counted = self.dense.counted
        self.counted, self.trial_counted = (
            counted and [counted(x) for x in part] for part in (self.batches, self.trial)
        )
        tokens = (
            sum(map(Tensor.numel, self.batches)) if self.counted is None else int(sum(m.sum() for m in self.counted))
        )
        self.told |= {"captions": self.inputs, "tokens": tokens}
        if not tokens:
            raise GrailError("--calibration-text: no token of the captions counts; give texts, not what fills them up")

    def everything(self, batch: int) -> list[Tensor]:
        """All calibration inputs in batches, those that only decided too: for what follows when all is decided."""
        return list(torch.cat([*self.batches, *self.trial]).split(batch)) if self.trial else self.batches


def towers_of(
    module: nn.Module,
    recipe: ModuleRecipe,
    progress: Progress,
    *,
    sites: Iterable[ModuleSite] | None = None,
    preprocessing: Preprocessing | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[Tower]:
    """The towers of a copy of the module, with all their inputs (see `spare`). One of several stays as it is where it
    is given nothing to calibrate with. Raises GrailError where the description does not fit, inputs cannot be read or
    all are missing."""
    networks = _described(module, sites, recipe)
    for nothing in idle_ratios(recipe, module, (site for network in networks for site in network.sites)):
        progress.warn(nothing)
    _check_given(module, networks, recipe)
    found = []
    for network in networks:
        text = network.reads == TEXT
        if len(networks) > 1 and _absent(recipe.calibration_text if text else recipe.calibration):
            option = "--calibration-text" if text else "--calibration"
            progress.say(f"the tower that reads {network.reads} stays as it is: no {option} is given")
            continue
        if len(networks) > 1 and not text and _is(recipe.calibration, BUILTIN):
            progress.say("the tower that reads images is calibrated with built-in digits; --calibration DATA or none")
        found.append((_of_text if text else _of_images)(network, recipe, preprocessing, tokenizer))
    if not found:
        raise GrailError("no tower has anything to calibrate with: give --calibration, --calibration-text or both")
    return found


def spare(towers: list[Tower], recipe: ModuleRecipe, progress: Progress) -> ModuleRecipe:
    """Returns the recipe, which aims at the stream no longer where a tower has too few inputs to set some aside that
    only decide between candidates (`Tower.part`). Raises GrailError where that was asked for and cannot be."""
    following = [tower for tower in towers if tower.told is not None and tower.follows]
    scarce = any(tower.inputs < ENOUGH_INPUTS for tower in following)
    needed = FEWEST_INPUTS if recipe.wants_target else ENOUGH_INPUTS
    few = next((tower for tower in following if tower.inputs < needed), None)
    if few is not None and recipe.chooses:
        if recipe.wants_target:
            raise GrailError(
                f"calibration holds {few.inputs} inputs, and --target stream needs at least {FEWEST_INPUTS}, a part of "
                f"which only decides about alpha and ridge; give more, or numbers for --alpha and --ridge"
            )
        recipe = recipe.site_by_site()
        progress.warn(
            f"calibration holds {few.inputs} inputs, and fewer than {needed} say too little of the residual stream: "
            f"taking --target {recipe.target}"
        )
    for tower in towers if scarce else ():
        if tower.told is not None:
            tower.told["scarce"] = True
    return recipe


def _absent(source: object) -> bool:
    return source is None or _is(source, NONE)


def _is(source: object, name: str) -> bool:
    return isinstance(source, str) and source == name


def _check_given(module: nn.Module, networks: list[Network], recipe: ModuleRecipe) -> None:
    """Raises GrailError for data that no tower reads, and where the only one has none."""
    known, called = {network.reads for network in networks}, type(module).__name__
    if recipe.calibration_text is not None and TEXT not in known:
        raise GrailError(f"--calibration-text: {called} has no text tower that a family knows")
    if known != {TEXT}:
        return
    if not _absent(recipe.calibration) and not _is(recipe.calibration, BUILTIN):
        raise GrailError(f"--calibration: {called} has no image tower that a family knows; leave it out")
    if _absent(recipe.calibration_text):
        raise GrailError(f"{called} has only a text tower that a family knows: give --calibration-text")


def _described(module: nn.Module, sites: Iterable[ModuleSite] | None, recipe: ModuleRecipe) -> list[Network]:
    """The networks of a copy of the module in evaluation mode. Raises GrailError where their sites do not fit it."""
    still = frozenset(kind for kind in (*KINDS, RESIDUAL) if recipe.ratio_of(kind) == 0)
    own = copied(module).eval()
    found = describe(own, still) if sites is None else [_by_hand(own, list(sites))]
    if not any(network.sites or network.residual for network in found):
        raise GrailError("no sites are given: there is nothing to make narrower")
    if RESIDUAL not in still and not any(network.residual for network in found):
        raise GrailError(
            f"--residual-ratio: no residual stream of {type(module).__name__} is described; it is for ResNets, and for "
            f"streams described by hand, grail.residual(...)"
        )
    if RESIDUAL in still and sites is not None and any(network.residual for network in found):
        raise GrailError("residual streams are described, but nothing is to go: give --residual-ratio")
    for network in found:
        network.residual = [] if RESIDUAL in still else network.residual
        try:
            check(network)
        except GrailError as error:
            raise error if sites is not None else GrailError(f"{error}; {BY_HAND}") from error
    return found


def _by_hand(module: nn.Module, sites: list[ModuleSite]) -> Network:
    parts = [[site for site in sites if (site.kind == RESIDUAL) is residual] for residual in (False, True)]
    return Network(module, parts[0], residual=parts[1])


def _of_images(
    network: Network, recipe: ModuleRecipe, preprocessing: Preprocessing | None, _: Tokenizer | None
) -> Tower:
    if recipe.calibration is None:
        selector = selector_class(recipe.method).from_options(recipe.set)
        changed = [site for site in (*network.sites, *network.residual) if recipe.ratio_of(site.kind)]
        needs = {need for site in changed for need in selector.needs_of(site.role)}
        if recipe.compensate or needs - {PRODUCERS} or recipe.repair or recipe.bias:
            raise GrailError(f"--method {recipe.method} with these options needs calibration {IMAGES}")
        return Tower(network, [])
    batches, told, classes = calibration_inputs(recipe, preprocessing)
    device, dtype = _place(network)
    ready = [batch.to(device, dtype if batch.is_floating_point() else batch.dtype) for batch in batches]
    return Tower(network, ready, told=told, classes=classes)


def _of_text(network: Network, recipe: ModuleRecipe, _: Preprocessing | None, tokenizer: Tokenizer | None) -> Tower:
    batches, told = captions(recipe.calibration_text, tokenizer, recipe.samples, recipe.seed, recipe.batch)
    return Tower(network, [batch.to(_place(network)[0]) for batch in batches], told=told)


def _place(network: Network) -> tuple[torch.device, torch.dtype]:
    return next(network.module.parameters()).device, dtype_of(network.module)
