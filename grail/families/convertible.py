"""What converting between formats needs to know: the units that do something, and the widths before compression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import GrailError
from .formats import GRAIL, PADDED, UNIFORM, Advice, LayerFormat, choose
from .layout import ATTENTION, MLP, LayerWidths, Move, move_tensors, unit_moves
from .plain import width_fields

if TYPE_CHECKING:
    from .llama import LlamaFamily

MOST_HEADS, MOST_CHANNELS = 2**14, 2**20
"""More than any model has: a record is data from anywhere, and says how much is allocated."""
SITE_KINDS = {"o_proj": "heads", "down_proj": "channels"}


@dataclass(frozen=True, eq=False)
class UsefulUnits:
    """The part of a layer that does something: its widths, and where it lies in the layer."""

    widths: LayerWidths
    moves: dict[str, Move]

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The layer's linear layers (by full name) without what does nothing."""
        return move_tensors(tensors, self.moves, widen=False)


def useful_units(model: LlamaFamily, layer: int) -> UsefulUnits:
    """Leave out heads and channels whose columns of the consumer are all zero.

    A key/value head goes with the last of its query heads. The remaining ones keep equally many query heads each, as
    grouped attention needs: some may stay that do nothing. Of each kind at least one unit stays.
    """
    prefix, wide, size = model.prefix(layer), model.widths[layer], model.head_dim
    out_OH = model.source.get(f"{prefix}{ATTENTION}.o_proj.weight")
    down_OH = model.source.get(f"{prefix}{MLP}.down_proj.weight")
    channels = (down_OH != 0).any(0)
    channels[0] |= not channels.any()
    live_GS = (out_OH != 0).any(0).view(wide.kv_heads, wide.shared, size).any(-1)
    live_GS[0, 0] |= not live_GS.any()
    kv_heads = live_GS.any(1).nonzero()[:, 0]
    shared = int(live_GS.sum(1).max())
    # useful query heads first, each group in its own order, then ascending again
    order_GS = torch.sort(live_GS[kv_heads].to(torch.uint8), dim=1, descending=True, stable=True).indices
    heads = (kv_heads[:, None] * wide.shared + order_GS[:, :shared].sort(1).values).flatten()
    channels = channels.nonzero()[:, 0]
    widths = LayerWidths(len(heads), len(kv_heads), len(channels))
    return UsefulUnits(widths, unit_moves(prefix, size, wide, heads, kv_heads, channels))


def written_format(model: LlamaFamily, widths: list[LayerWidths], to: str) -> LayerFormat:
    """The format for layers of these useful widths; `uniform` pads every layer to the largest."""
    if to == UNIFORM:
        widths = [LayerWidths.largest(widths)] * len(widths)
    return choose(model, widths, list(model.biases), to, Advice("--to", GRAIL if model.in_grail_format else None))


def described(model: LlamaFamily, record: dict, widths: list[LayerWidths]) -> dict:
    """grail.json's `sites` and `ratio`, their `after` and `reached` brought up to date for layers of these widths.

    Everything else stays as the run recorded it. "overall" is weighted by the parameters of a unit, as in the run: its
    rows of the producers and columns of the consumer. Entries that are not this model's become None.
    """
    entries, ratio = record.get("sites"), record.get("ratio")
    if not _names_sites_of(model, entries):
        return dict.fromkeys(record.keys() & {"sites", "ratio"})
    whole = model.original.shared == 1 or (record.get("recipe") or {}).get("gqa") == "group"
    matrices = {"heads": 2 + (2 / model.original.shared if whole else 0), "channels": 3}
    sites, sums = [], {}
    for entry in entries:
        own, kind = widths[model.layer_of(entry["name"])], SITE_KINDS[entry["name"].rpartition(".")[2]]
        after = own.channels if kind == "channels" else own.heads * model.head_dim
        sites.append(entry | {"after": after})
        for name, weight in ((kind, 1), ("overall", matrices[kind])):
            before_sum, after_sum = sums.get(name, (0, 0))
            sums[name] = before_sum + weight * entry["before"], after_sum + weight * after
    reached = {name: 1 - after_sum / before_sum for name, (before_sum, after_sum) in sums.items()}
    if not isinstance(ratio, dict) or not all(name in reached and isinstance(ratio[name], dict) for name in ratio):
        return {"sites": sites} | dict.fromkeys(record.keys() & {"ratio"})
    return {"sites": sites, "ratio": {name: entry | {"reached": reached[name]} for name, entry in ratio.items()}}


def _names_sites_of(model: LlamaFamily, entries: object) -> bool:
    """Whether grail.json's `sites` are entries for the layers of this model."""

    def known(entry: object) -> bool:
        name, before = (entry.get("name"), entry.get("before")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or type(before) is not int or before < 1:
            return False
        layer = model.layer_of(name)
        return name.rpartition(".")[2] in SITE_KINDS and layer is not None and layer < model.layer_count

    return isinstance(entries, list) and all(map(known, entries))


def original_widths(model: LlamaFamily, record: dict, to: str) -> LayerWidths:
    """The widths before compression, from config.json (format grail) or grail.json (`record`), else the source's.

    grail.json of a run by itself tells the sites' widths but not the number of key/value heads: that has changed with
    the query heads where whole groups were removed and where every query head has its own.
    """
    if model.in_grail_format:
        return model.original
    if not record and to == PADDED:
        raise GrailError(f"{model.source.path} has no grail.json that says how wide the model was; it cannot be padded")
    now, named = model.original, record.get("original_widths")
    if isinstance(named, dict) and all(type(named.get(key)) is int for key in width_fields(now)):
        found = LayerWidths(*(named[key] for key in width_fields(now)))
    else:
        found = _by_sites(model, record)
    likely = 0 < found.kv_heads <= found.heads <= MOST_HEADS and found.channels <= MOST_CHANNELS
    if not likely or found.heads % found.kv_heads or LayerWidths.largest([found, now]) != found:
        raise GrailError(f"{model.source.path / 'grail.json'} records widths that do not fit the model beside it")
    return found


def _by_sites(model: LlamaFamily, record: dict) -> LayerWidths:
    """The widest that its sites were, by a record without the original widths."""
    before = {"o_proj": 0, "down_proj": 0}
    for site in record.get("sites") or []:
        kind = str(site.get("name")).rpartition(".")[2]
        if kind in before and isinstance(site.get("before"), int):
            before[kind] = max(before[kind], site["before"])
    now = model.original
    heads = before["o_proj"] // model.head_dim or now.heads
    whole = now.shared == 1 or (record.get("recipe") or {}).get("gqa") == "group"
    return LayerWidths(heads, heads // now.shared if whole else now.kv_heads, before["down_proj"] or now.channels)
