"""A network held in memory, described by its sites: what a vision family gives, and what anyone can write by hand.

    Network(module, [channels("fc1", "fc2", width=64), channels("conv1", "conv2", width=32, norms=["bn1"])])

Names are those of `module.named_modules()`, any of them where a module has several. Sites stand in execution order.
`blocks` name modules that run one after another, each on the output of the one before; without them the whole network
is one block, and every site costs forwards of all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import GrailError
from ..reduction import Units
from . import fields
from .base import Producer, Site
from .copies import copied

LAYERS = (nn.Linear, _ConvNd)
IMAGES, TEXT = "images", "text"
INPUT, OUTPUT = SIDES = "input", "output"
RESIDUAL = "residual"
"""The kind of sites that are residual streams."""
KINDS = "heads", "channels", RESIDUAL
STILL = frozenset({RESIDUAL})
"""Kinds that stay as they are where nothing else is said."""
BY_HAND = "describe the sites to narrow by hand, grail.compress(module, sites=[grail.channels(...), ...])"
"""The way out where a family does not know a network, or some of its blocks."""


@dataclass(frozen=True)
class ModuleSite(Site):
    """A site of a network in memory. norms: BatchNorms between producers and consumer, one for each producer that has
    one, in the producers' order; counts: (module, attribute) pairs that hold the number of units (`num_heads`), widths:
    those that hold the width. A residual stream (kind "residual") has all that write into it as producers,
    `readers` beside the consumer, and as reader_norms the BatchNorms through which some of them read it.

    stream: where the residual stream can be seen to which the consumer's output is added, before the addition: the
    input or output of a module, ("norm1", "input"); None where there is none or it is not known. scales: modules
    between the consumer and the addition, each a scale and a shift of every channel for itself (LayerScale,
    BatchNorm), in order."""

    norms: tuple[str, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    widths: tuple[tuple[str, str], ...] = ()
    readers: tuple[str, ...] = ()
    reader_norms: tuple[str, ...] = ()
    stream: tuple[str, str] | None = None
    scales: tuple[str, ...] = ()

    @property
    def consumers(self) -> tuple[str, ...]:
        """All that read the hidden vector."""
        return (self.consumer, *self.readers)

    @property
    def role(self) -> str:
        """What it is to a selector: heads or channels."""
        return "heads" if self.kind == "heads" else "channels"

    def read_in(self, order: dict[str, int]) -> ModuleSite:
        """The same with the consumers in the order of these numbers."""
        first, *others = sorted(self.consumers, key=lambda name: order.get(name, len(order)))
        return replace(self, consumer=first, readers=tuple(others))

    def to_json(self) -> dict[str, Any]:
        """For config.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> ModuleSite:
        """The inverse. Raises KeyError, TypeError or ValueError for anything else."""
        name, units = fields.text("a site", "name", found["name"]), Units(**found["units"])
        if found["kind"] not in KINDS or not found["producers"]:
            raise ValueError(f"{name}: its kind is none of {', '.join(KINDS)}, or it has no producers")
        for part in ("groups", "per_group", "size"):
            fields.whole(name, f"units.{part}", getattr(units, part))
        pairs = {key: fields.pairs(name, key, found[key]) for key in ("counts", "widths")}
        lists = ("norms", "readers", "reader_norms", "scales")
        names = {key: fields.names(name, key, found.get(key, ())) for key in lists}
        own = {
            "layer": fields.whole(name, "layer", found["layer"], least=0),
            "producers": tuple(_producer_from(name, producer) for producer in found["producers"]),
            "consumer": fields.text(name, "consumer", found["consumer"]),
            "units": units,
            "stream": fields.place(name, found.get("stream")),
        }
        return cls(**found | own | names | pairs)


def _producer_from(site: str, found: dict[str, Any]) -> Producer:
    producer = Producer(**found)
    fields.text(site, "producers.name", producer.name)
    for part in ("rows_per_unit", "sections"):
        fields.whole(site, f"producers.{part}", getattr(producer, part))
    return producer


@dataclass
class Network:
    """A module in evaluation mode, its sites in execution order, the blocks it is run by, and its residual streams.

    call: the method that runs it ("": forward); reads: images, or text in token ids; counted: which tokens count, bool
    of ids [B, L] (None: all). A module of several towers is several networks."""

    module: nn.Module
    sites: list[ModuleSite]
    blocks: list[str] = field(default_factory=list)
    residual: list[ModuleSite] = field(default_factory=list)
    call: str = ""
    reads: str = IMAGES
    counted: Callable[[Tensor], Tensor] | None = None

    def run(self, x: Tensor) -> Any:
        """The network's output."""
        return getattr(self.module, self.call)(x) if self.call else self.module(x)

    def layer(self, name: str) -> nn.Module:
        """A module by name."""
        return self.module.get_submodule(name)

    def clone(self) -> Network:
        """The same description of a copy of the module."""
        return replace(self, module=copied(self.module))

    def block_of(self, consumer: str) -> str:
        """The block a site's consumer lies in ("": the whole network)."""
        return next((block for block in self.blocks if consumer.startswith(f"{block}.")), "")


def channels(
    producer: str | Sequence[str],
    consumer: str,
    *,
    width: int,
    norms: Sequence[str] = (),
    size: int = 1,
    sections: int = 1,
    name: str | None = None,
    layer: int = 0,
    stream: tuple[str, str] | None = None,
    scales: Sequence[str] = (),
) -> ModuleSite:
    """A site of `width` channels between producers and a consumer, each read by `size` consecutive inputs of the
    consumer (more than one: a linear layer behind a flattened map). All producers' channels are multiplied or added
    element by element on the way (gate and up). stream and scales as in ModuleSite."""
    shown = name or producer
    producers = fields.producers(shown, producer)
    sections = fields.whole(shown, "sections", sections)
    return ModuleSite(
        fields.text(shown, "name", name or producers[0]),
        "channels",
        fields.whole(shown, "layer", layer, least=0),
        tuple(Producer(each, 1, sections) for each in producers),
        fields.text(shown, "consumer", consumer),
        Units(1, fields.whole(shown, "width", width), fields.whole(shown, "size", size)),
        norms=fields.names(shown, "norms", norms),
        stream=fields.place(shown, stream),
        scales=fields.names(shown, "scales", scales),
    )


def heads(
    producer: str | Sequence[str],
    consumer: str,
    *,
    count: int,
    size: int,
    sections: int = 1,
    counts: Iterable[tuple[str, str]] = (),
    widths: Iterable[tuple[str, str]] = (),
    name: str | None = None,
    layer: int = 0,
    stream: tuple[str, str] | None = None,
    scales: Sequence[str] = (),
) -> ModuleSite:
    """A site of `count` attention heads of `size` channels; `sections` is 3 for a fused projection to queries, keys and
    values. stream and scales as in ModuleSite."""
    shown = name or consumer
    size, sections = fields.whole(shown, "size", size), fields.whole(shown, "sections", sections)
    return ModuleSite(
        fields.text(shown, "name", shown),
        "heads",
        fields.whole(shown, "layer", layer, least=0),
        tuple(Producer(each, size, sections) for each in fields.producers(shown, producer)),
        fields.text(shown, "consumer", consumer),
        Units(1, fields.whole(shown, "count", count), size),
        counts=fields.pairs(shown, "counts", counts),
        widths=fields.pairs(shown, "widths", widths),
        stream=fields.place(shown, stream),
        scales=fields.names(shown, "scales", scales),
    )


def residual(
    writers: Sequence[str],
    readers: Sequence[str],
    *,
    width: int,
    norms: Sequence[str] = (),
    reader_norms: Sequence[str] = (),
    name: str,
) -> ModuleSite:
    """A residual stream of `width` channels: all layers whose outputs are added to it (`norms`: the BatchNorm behind
    each of them, or none at all) and all layers that read it (`reader_norms`: BatchNorms that some of them read it
    through, in pre-activation blocks; such a stream cannot be folded). It is narrowed by `--residual-ratio`. Raises
    GrailError for a stream without writers or readers."""
    if isinstance(writers, str) or isinstance(readers, str) or not writers or not readers:
        raise GrailError(f"{name}: give lists of writers and of readers, at least one of each")
    first, *others = fields.names(name, "readers", readers)
    return ModuleSite(
        fields.text(name, "name", name),
        RESIDUAL,
        0,
        tuple(Producer(writer, 1) for writer in fields.names(name, "writers", writers)),
        first,
        Units(1, fields.whole(name, "width", width), 1),
        norms=fields.names(name, "norms", norms),
        readers=tuple(others),
        reader_norms=fields.names(name, "reader_norms", reader_norms),
    )


def listed(sites: Any) -> list[ModuleSite] | None:
    """The sites of a description by hand; None where there is none. Raises GrailError for anything else."""
    if sites is None:
        return None
    if isinstance(sites, (ModuleSite, str, dict)) or not isinstance(sites, Iterable):
        raise GrailError(f"sites must be a list, [grail.channels(...), ...]; got a {type(sites).__name__}")
    found = list(sites)
    for site in found:
        if not isinstance(site, ModuleSite):
            raise GrailError(
                f"sites must be a list of grail.channels(...), grail.heads(...) and grail.residual(...); it holds a "
                f"{type(site).__name__}"
            )
    return found


def check(network: Network) -> None:
    """Raises GrailError naming the site where layers are missing, of another kind or do not fit together."""
    known = dict(network.module.named_modules(remove_duplicate=False))
    sites = [*network.residual, *network.sites]
    names = [site.name for site in sites]
    for name in {name for name in names if names.count(name) > 1}:
        raise GrailError(f"{name}: two sites have this name")
    for site in sites:
        for name in (*(p.name for p in site.producers), *site.norms, *site.reader_norms, *site.consumers):
            if name not in known:
                raise GrailError(f"{site.name}: the network has no module {name}")
        for name, attribute in (*site.counts, *site.widths):
            if type(getattr(known.get(name), attribute, None)) is not int:
                raise GrailError(f"{site.name}: the network has no number {name}.{attribute}")
        _check_stream(site, known)
        for producer in site.producers:
            _check_layer(site, producer.name, known[producer.name])
            rows, wanted = known[producer.name].weight.shape[0], producer.sections * producer.rows_per_unit
            if rows != wanted * site.units.count:
                raise GrailError(
                    f"{site.name}: {producer.name} has {rows} rows, {site.units.count} units need {wanted} each"
                )
        for consumer in site.consumers:
            _check_layer(site, consumer, known[consumer])
            columns = known[consumer].weight.shape[1]
            if columns != site.units.width:
                raise GrailError(f"{site.name}: {consumer} reads {columns} channels, the site has {site.units.width}")
        if site.norms and len(site.norms) != len(site.producers):
            raise GrailError(
                f"{site.name}: {len(site.norms)} norms for {len(site.producers)} producers; name one for each, or none"
            )
        for name in (*site.norms, *site.reader_norms):
            norm = known[name]
            if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
                raise GrailError(
                    f"{site.name}: {name} is a {type(norm).__name__}, which mixes channels or keeps no statistics; "
                    f"only BatchNorm can stand between a producer and its consumer"
                )
            if norm.num_features != site.units.count:
                raise GrailError(f"{site.name}: {name} has {norm.num_features} channels, the site {site.units.count}")


def _check_stream(site: ModuleSite, known: dict[str, nn.Module]) -> None:
    if site.stream is not None and (len(site.stream) != 2 or site.stream[1] not in SIDES):
        raise GrailError(f"{site.name}: stream names a module and its side, {' or '.join(SIDES)}; got {site.stream}")
    for name in (*(site.stream or ())[:1], *site.scales):
        if name not in known:
            raise GrailError(f"{site.name}: the network has no module {name}")


def _check_layer(site: ModuleSite, name: str, layer: nn.Module) -> None:
    if not isinstance(layer, LAYERS) or getattr(layer, "transposed", False):
        raise GrailError(f"{site.name}: {name} is a {type(layer).__name__}; a linear or convolution layer is needed")
    own = dict(layer.named_parameters(recurse=False))
    for part in ("weight", "bias"):
        if part not in own and (part == "weight" or layer.bias is not None):
            raise GrailError(f"{site.name}: {name} makes its {part} anew in each forward; remove that parametrization")
    if getattr(layer, "groups", 1) != 1:
        raise GrailError(f"{site.name}: {name} is a convolution in {layer.groups} groups, which cannot be narrowed")
