"""The formats a compressed model is written in: uniform, grail and padded (DESIGN section 7).

uniform: one width for all layers, in the source's own class or a carrier of the same computation. grail: widths (and
consumer biases) by layer, `per_layer_config` in config.json and a class file in the folder. padded: the original
widths with zeros where something was removed, for runtimes that know nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig

from .. import modeling_grail
from ..errors import GrailError
from ..modeling_grail import BASES, PREFIX
from ..reduction import Reduction
from .base import OutputFormat, Site
from .layout import LINEARS, LayerWidths, move_tensors, reduction_moves, widening_moves
from .plain import ASKED, BIAS, CLASSES, HEADS, WIDTHS, Reason, biased, never_biased, plain_config, width_fields

if TYPE_CHECKING:
    from .llama import LlamaFamily

AUTO, UNIFORM, GRAIL, PADDED = "auto", "uniform", "grail", "padded"
FORMATS = (AUTO, UNIFORM, GRAIL, PADDED)
CLASS_FILE = "modeling_grail.py"
Biases = frozenset[str]


@dataclass(frozen=True, eq=False)
class LayerFormat(OutputFormat):
    """A format of this family. widths and biases: of each layer, as written; sites: those that reductions name."""

    widths: tuple[LayerWidths, ...]
    biases: tuple[Biases, ...]
    model: LlamaFamily = field(repr=False)
    sites: tuple[Site, ...] = field(default=(), repr=False)

    @property
    def loads(self) -> str:
        return "grail" if self.name == GRAIL else "plain"

    @property
    def original_widths(self) -> dict[str, int]:
        return width_fields(self.model.original)

    @property
    def tensor_parallel(self) -> int:
        """The greatest common divisor of every layer's query heads, key/value heads and MLP width."""
        return math.gcd(*(width for w in self.widths for width in (w.heads, w.kv_heads, w.channels)))

    @property
    def numbers_added(self) -> int:
        found = 0
        for layer in range(len(self.widths)):
            for name, part in LINEARS.items():
                module = f"{self.model.prefix(layer)}{part}.{name}"
                stored, biased = f"{module}.weight", f"{module}.bias" in self.model.source
                before = math.prod(shape := self.model.source.info(stored).shape) + biased * shape[0]
                rows, columns = self.widths[layer].shape(name, self.model.config.hidden_size, self.model.head_dim)
                found += rows * (columns + (biased or name in self.biases[layer])) - before
        return found

    def layer_tensors(
        self, layer: int, changed: dict[str, Tensor], reductions: dict[str, Reduction]
    ) -> dict[str, Tensor]:
        tensors = dict(changed)
        if self.name == PADDED:
            for site in self.sites:
                if site.layer == layer and site.name in reductions:
                    tensors = move_tensors(tensors, reduction_moves(site, reductions[site.name]), widen=True)
            if self.model.widths[layer] != self.widths[layer]:  # the source is in the format grail itself
                tensors = self.widened(layer, self.model.linear_tensors(layer) | tensors, self.model.widths[layer])
        return self.with_biases(layer, tensors)

    def widened(self, layer: int, tensors: dict[str, Tensor], widths: LayerWidths) -> dict[str, Tensor]:
        """A layer's linear layers, which have these widths, with zeros up to the widths that are written."""
        model = self.model
        moves = widening_moves(model.prefix(layer), model.head_dim, widths, self.widths[layer])
        return move_tensors(tensors, moves, widen=True)

    def with_biases(self, layer: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, and zeros for each bias that the class asks for and nobody has."""
        source, found = self.model.source, dict(tensors)
        for name in sorted(self.biases[layer]):
            module = f"{self.model.prefix(layer)}{LINEARS[name]}.{name}"
            if f"{module}.bias" in tensors or f"{module}.bias" in source:
                continue
            weight = tensors.get(f"{module}.weight")
            like = source.info(f"{module}.weight") if weight is None else weight
            found[f"{module}.bias"] = torch.zeros(like.shape[0], dtype=like.dtype)
        return found


@dataclass(frozen=True)
class Advice:
    """What the user of a command can do: its option that names a format, the one that there is already (None: any
    may be chosen), and its remedies by what a reason is about."""

    option: str
    current: str | None = None
    remedies: Mapping[str, str] = field(default_factory=dict)

    def changed(self, model: LlamaFamily, why: Reason) -> str:
        """Why the class is not the source's, and how to keep that one if the command can."""
        remedy = self.remedies.get(why.about)
        return f"{why.text}; to keep {model.class_name}, {remedy}" if remedy else why.text

    def refused(self, asked: str, why: Reason, others: str) -> GrailError:
        """The format asked for cannot be; `others` can."""
        remedy = self.remedies.get(why.about)
        if others == self.current:
            without = " with --no-bias" if why.about == BIAS else ""
            other = f"leave the folder in the format {others}, or compress again{without}"
        else:
            other = f"choose {self.option} {others}"
        choices = ([remedy] if remedy else []) + [other]
        return GrailError(f"{self.option} {asked}: {why.text}; {', or '.join(choices)}")


def output_format(
    model: LlamaFamily, sites: list[Site], kept: dict[str, int], *, given_bias: Collection[str], asked: str
) -> LayerFormat:
    """The format for keeping kept[site.name] units per group at each site; given_bias: names of the sites whose
    consumers get one. Raises GrailError, saying what to choose, where the format asked for cannot be.
    """
    widths, biases = list(model.widths), list(model.biases)
    for site in sites:
        if kept[site.name] < site.units.per_group:
            widths[site.layer] = _kept_widths(widths[site.layer], site, kept[site.name], model.head_dim)
        if site.name in given_bias:
            biases[site.layer] |= {site.consumer.rpartition(".")[2]}
    return choose(model, widths, biases, asked, _compress_advice(model, bool(given_bias)), tuple(sites))


def _compress_advice(model: LlamaFamily, bias: bool) -> Advice:
    """What `grail compress` can do about a reason: only what helps with this source."""
    remedies = {HEADS: "choose an --attn-ratio whose heads divide the hidden size"}
    if len(set(model.widths)) == 1:
        remedies[WIDTHS] = "choose --allocation uniform"
    if bias and not never_biased(model.base_type) & frozenset().union(*model.biases):
        remedies[BIAS] = "add --no-bias"
    return Advice("--format", remedies=remedies)


def choose(
    model: LlamaFamily,
    widths: list[LayerWidths],
    biases: list[Biases],
    asked: str,
    advice: Advice,
    sites: tuple[Site, ...] = (),
) -> LayerFormat:
    """The format for layers of these widths and biases; see output_format. advice: the command's own, for messages."""
    if asked not in FORMATS:
        raise GrailError(f"{advice.option} {asked}: choose one of {', '.join(FORMATS)}")
    needed = frozenset().union(*biases)
    if asked == GRAIL:
        why = Reason(ASKED, f"{advice.option} grail was asked for")
        return _grail_format(model, widths, biases, advice.changed(model, why), sites)
    if asked != PADDED and len(set(widths)) > 1:
        config, why, others = None, Reason(WIDTHS, "the widths differ between layers"), "grail or padded"
    else:
        written = [model.original] * len(widths) if asked == PADDED else widths
        config, why = _plain(model, written[0], needed)
        others = GRAIL
    if config is not None:
        name = PADDED if asked == PADDED else UNIFORM
        return _plain_format(name, model, config, why and advice.changed(model, why), written, sites)
    if asked != AUTO:
        raise advice.refused(asked, why, others)
    why = Reason(why.about, f"{why.text}, which no class of transformers' own takes")
    return _grail_format(model, widths, biases, advice.changed(model, why), sites)


def _kept_widths(widths: LayerWidths, site: Site, kept: int, head_dim: int) -> LayerWidths:
    width = site.units.groups * kept * site.units.size
    if site.kind == "channels":
        return LayerWidths(widths.heads, widths.kv_heads, width)
    whole = any(producer.name.endswith("k_proj") for producer in site.producers)
    return LayerWidths(width // head_dim, kept * site.units.groups if whole else widths.kv_heads, widths.channels)


def _plain(model: LlamaFamily, widths: LayerWidths, needed: Biases) -> tuple[dict | None, Reason | None]:
    unchanged = {widths} == set(model.widths) and all(needed == biases for biases in model.biases)
    if unchanged and not model.in_grail_format:
        return model.plain_raw, None
    return plain_config(model.base_type, model.config, model.plain_raw, model.head_dim, widths, needed)


def _plain_format(
    name: str, model: LlamaFamily, config: dict, changed: str | None, widths: list[LayerWidths], sites: tuple[Site, ...]
) -> LayerFormat:
    # what the class itself will ask for, which may be more than is needed
    fields = {key: value for key, value in config.items() if key != "model_type"}
    asked_for = biased(config["model_type"], AutoConfig.for_model(config["model_type"], **fields))
    files = {} if config["model_type"] == model.plain_raw["model_type"] else model.tokenizer_files
    loads_with, biases = f"transformers {CLASSES[config['model_type']]}", (asked_for,) * len(widths)
    return LayerFormat(name, config, files, loads_with, changed, tuple(widths), biases, model, sites)


def _grail_format(
    model: LlamaFamily, widths: list[LayerWidths], biases: list[Biases], changed: str, sites: tuple[Site, ...]
) -> LayerFormat:
    original, plainly = width_fields(model.original), biased(model.base_type, model.config)
    by_layer = {}
    for layer, (own, has) in enumerate(zip(widths, biases, strict=True)):
        entry = {key: value for key, value in width_fields(own).items() if value != original[key]}
        entry |= {f"{name}_bias": True for name in sorted(has - plainly)}
        if entry:
            by_layer[str(layer)] = entry
    name = f"Grail{BASES[model.base_type]}"
    module = CLASS_FILE.removesuffix(".py")
    tokenizer = {} if model.in_grail_format else model.tokenizer_files
    config = model.plain_raw | original | {"head_dim": model.head_dim}
    config |= {
        "model_type": PREFIX + model.base_type,
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.{name}Config",
            "AutoModelForCausalLM": f"{module}.{name}ForCausalLM",
        },
        "per_layer_config": by_layer,
    }
    return LayerFormat(
        GRAIL,
        config,
        {CLASS_FILE: Path(modeling_grail.__file__).read_text(encoding="utf-8")} | tokenizer,
        f"transformers {name}ForCausalLM with trust_remote_code=True, or after `import grail`",
        None if model.in_grail_format else changed,
        tuple(widths),
        tuple(has | plainly for has in biases),
        model,
        sites,
    )
