"""Narrow the layers of one site in place: producers, the BatchNorms behind them, the consumer.

Shapes: U units, H width, K kept, D inputs of a producer (a convolution's taps counted), O outputs of the consumer, each
tap of a convolution for itself: its weight [o, H, ...] stands as [o · taps, H] (DESIGN section 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GrailError
from ..families.base import Producer
from ..families.network import ModuleSite, Network
from ..reduction import Folding, Reduction, Selection

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format with channels last, by the number of axes."""


def taps_of(layer: nn.Module) -> int:
    """How often an output reads each channel."""
    return layer.weight[0, 0].numel()


def consumer_matrix(layer: nn.Module) -> Tensor:
    """[O, H], a copy where the layer is a convolution."""
    weight = layer.weight.detach()
    return weight if weight.dim() == 2 else weight.movedim(1, -1).reshape(-1, weight.shape[1])


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels of what a layer reads and makes, counted from the last: a batch need not come first."""
    return 1 - layer.weight.dim()


def batched(layer: nn.Module, tensor: Tensor) -> Tensor:
    """What a layer reads or makes, with the first axis that a single map lacks."""
    return tensor[None] if not isinstance(layer, nn.Linear) and tensor.dim() == layer.weight.dim() - 1 else tensor


def rows_of(layer: nn.Module, hidden: Tensor) -> Tensor:
    """The consumer's input as rows [..., H]: tokens, or the positions of a map that it reads at all."""
    if isinstance(layer, nn.Linear):
        return hidden
    if all(k == 1 for k in layer.kernel_size) and not any(_paddings(layer)):
        hidden = hidden[(..., *(slice(None, None, step) for step in layer.stride))]
    return hidden.movedim(channel_axis(layer), -1)


def patches_of(layer: nn.Module, hidden: Tensor) -> Tensor:
    """What each of the layer's outputs is made of, as rows [N, T, H · taps]: a channel's taps one after another, zeros
    or what else pads included. Raises GrailError for a convolution that is not of two dimensions."""
    if isinstance(layer, nn.Linear):
        return hidden
    if not isinstance(layer, nn.Conv2d):
        raise GrailError(f"--target stream takes linear layers and convolutions of maps, not {type(layer).__name__}")
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        hidden, padding = F.pad(hidden, layer._reversed_padding_repeated_twice, mode=mode), 0
    else:
        padding = layer.padding
    found = F.unfold(hidden, layer.kernel_size, layer.dilation, padding, layer.stride)
    return found.mT


def outputs_of(layer: nn.Module, made: Tensor) -> Tensor:
    """The layer's output as rows in the order of `patches_of`, [..., T, O]."""
    return made if isinstance(layer, nn.Linear) else made.flatten(2).mT


def to_patches(layer: nn.Module, weight_OK: Tensor) -> Tensor:
    """A weight in the layout of `consumer_matrix` as one for `patches_of`, [o, K · taps]."""
    outputs = len(layer.weight)
    return weight_OK.reshape(outputs, -1, weight_OK.shape[1]).mT.reshape(outputs, -1)


def from_patches(layer: nn.Module, weight_OX: Tensor) -> Tensor:
    """The inverse."""
    taps = taps_of(layer)
    return weight_OX.reshape(len(weight_OX), -1, taps).mT.reshape(len(weight_OX) * taps, -1)


def _paddings(layer: nn.Module) -> tuple[int, ...]:
    return tuple(layer.padding) if not isinstance(layer.padding, str) else (layer.padding == "same",)


def fused_rows(network: Network, site: ModuleSite) -> dict[str, Tensor]:
    """Each producer's rows [U · rows_per_unit, D + 1], its BatchNorm multiplied in, the shift as one more column; the
    sections of a fused producer under names of their own. float32 or float64."""
    found = {}
    for producer, norm in _with_norms(network, site):
        layer = network.layer(producer.name)
        rows, shift = _fused(layer, norm)
        parts = torch.cat([rows.flatten(1), shift[:, None]], 1).chunk(producer.sections)
        found |= {f"{producer.name}[{i}]" if len(parts) > 1 else producer.name: part for i, part in enumerate(parts)}
    return found


def _with_norms(network: Network, site: ModuleSite) -> list[tuple[Producer, nn.Module | None]]:
    norms = [network.layer(name) for name in site.norms]
    return list(zip(site.producers, norms or [None] * len(site.producers), strict=True))


def _fused(layer: nn.Module, norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(weight, shift [rows]) of the layer with its BatchNorm in evaluation mode, in at least float32."""
    weight = layer.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    shift = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().to(weight)
    if norm is None:
        return weight, shift
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    moved = (shift - norm.running_mean).double() * scale
    if norm.bias is not None:
        moved = moved + norm.bias.detach().double()
    return (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(weight), moved.to(weight)


def narrow_producers(network: Network, site: ModuleSite, reduction: Reduction) -> None:
    """Rows of the kept units, or the means of clusters of fused rows; counts and widths of the modules around. A stream
    with norms of its readers is not folded."""
    for producer, norm in _with_norms(network, site):
        layer = network.layer(producer.name)
        if isinstance(reduction, Selection):
            _slice_rows(layer, producer, reduction)
            if norm is not None:
                _slice_norm(norm, reduction)
        else:
            _average(layer, producer, norm, reduction)
        _set_outputs(layer)
    for norm in map(network.layer, site.reader_norms):
        _slice_norm(norm, reduction)
    for name, attribute in site.counts:
        setattr(network.layer(name), attribute, reduction.kept_width // site.units.size)
    for name, attribute in site.widths:
        setattr(network.layer(name), attribute, reduction.kept_width)


def _slice_rows(layer: nn.Module, producer: Producer, reduction: Selection) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(layer, name)
        if tensor is not None:
            parts = tensor.detach().chunk(producer.sections)
            rows = [reduction.narrow_producer(part, producer.rows_per_unit) for part in parts]
            setattr(layer, name, _parameter(torch.cat(rows), tensor))


def _slice_norm(norm: nn.Module, reduction: Selection) -> None:
    for name in ("weight", "bias"):
        tensor = getattr(norm, name)
        if tensor is not None:
            setattr(norm, name, _parameter(reduction.narrow_producer(tensor.detach(), 1), tensor))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, reduction.narrow_producer(getattr(norm, name), 1))
    norm.num_features = len(norm.running_mean)


def _average(layer: nn.Module, producer: Producer, norm: nn.Module | None, reduction: Folding) -> None:
    """Fused rows averaged over clusters. A BatchNorm is left as the identity but for the shift: its statistics are
    those of nothing yet (`settle_norm`)."""
    old_weight, old_bias = layer.weight, layer.bias
    rows, shift = (
        torch.cat([reduction.narrow_producer(part, 1) for part in tensor.chunk(producer.sections)])
        for tensor in _fused(layer, norm)
    )
    layer.weight = _parameter(rows.to(old_weight.dtype), old_weight)
    if old_bias is not None:
        layer.bias = _parameter((shift if norm is None else torch.zeros_like(shift)).to(old_bias.dtype), old_bias)
    if norm is None:
        return
    shift = shift.to(norm.running_mean.dtype)  # a norm may be wider than what stands around it
    weight, bias = (old_weight if part is None else part for part in (norm.weight, norm.bias))
    norm.num_features = reduction.kept_width
    norm.weight, norm.bias = _parameter(torch.ones_like(shift), weight), _parameter(shift, bias)
    norm.affine = True
    norm.running_mean = torch.zeros_like(shift)
    norm.running_var = torch.ones_like(shift) - norm.eps


def settle_norm(norm: nn.Module, mean_K: Tensor, variance_K: Tensor) -> None:
    """Give an identity BatchNorm the statistics m, v of its inputs without changing what it computes: γ = sqrt(v + eps)
    and β = m + shift. What REPAIR estimates anew has then something to be measured against."""
    shift = norm.bias.detach() + (0 - norm.running_mean) * norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
    norm.running_mean, norm.running_var = mean_K.to(shift), variance_K.to(shift)
    norm.weight = _parameter((norm.running_var + norm.eps).sqrt(), norm.weight)
    norm.bias = _parameter(norm.running_mean + shift, norm.bias)


def set_consumer(layer: nn.Module, weight_OK: Tensor) -> None:
    """A new weight in the layout of `consumer_matrix`."""
    old = layer.weight
    taps = old.shape[2:]
    weight = weight_OK if not taps else weight_OK.reshape(old.shape[0], *taps, -1).movedim(-1, 1)
    # a tensor of axes of length one counts as contiguous with any strides, and other strides take other kernels
    layer.weight = _parameter(torch.empty(weight.shape, dtype=old.dtype, device=old.device).copy_(weight), old)
    width = layer.weight.shape[1]
    setattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", width)


def set_bias(layer: nn.Module, bias: Tensor) -> None:
    """A bias [o] in place of the old one, if there is one."""
    layer.bias = _parameter(bias.to(layer.weight.dtype), layer.weight if layer.bias is None else layer.bias)


def _set_outputs(layer: nn.Module) -> None:
    setattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels", layer.weight.shape[0])


def permute(network: Network, site: ModuleSite, order_U: Tensor) -> None:
    """Reorder a site's units everywhere: the network computes the same."""
    rearranged = _Order(order_U, site.units.size)
    _rearrange(network, site, rearranged)
    for consumer in map(network.layer, site.consumers):
        set_consumer(consumer, consumer_matrix(consumer)[:, rearranged.channels])


def _rearrange(network: Network, site: ModuleSite, rearranged: _Order) -> None:
    """All that stands before the consumers."""
    for producer, norm in _with_norms(network, site):
        _slice_rows(network.layer(producer.name), producer, rearranged)
        if norm is not None:
            _slice_norm(norm, rearranged)
    for norm in map(network.layer, site.reader_norms):
        _slice_norm(norm, rearranged)


def duplicate(network: Network, site: ModuleSite, pair: Tensor) -> None:
    """Make the second of two units a copy of the first, in all that stands before the consumers."""
    order_U = torch.arange(site.units.count)
    order_U[pair[1]] = pair[0]
    _rearrange(network, site, _Order(order_U, site.units.size))


def fold_copies(network: Network, site: ModuleSite, pair: Tensor) -> None:
    """The same, and the two folded into one: the network computes the same. pair: ascending; units of one channel."""
    duplicate(network, site, pair)
    cluster_H = torch.arange(site.units.width)
    cluster_H[pair[1]] = pair[0]
    cluster_H[pair[1] + 1 :] -= 1
    folding = Folding(cluster_H)
    narrow_producers(network, site, folding)
    for consumer in map(network.layer, site.consumers):
        set_consumer(consumer, folding.lift_consumer(consumer_matrix(consumer)))


def prune(network: Network, site: ModuleSite, kept_U: Tensor) -> None:
    """Remove all units but these, ascending, everywhere."""
    kept = Selection(kept_U, site.units.size, site.units.width)
    narrow_producers(network, site, kept)
    for consumer in map(network.layer, site.consumers):
        set_consumer(consumer, kept.lift_consumer(consumer_matrix(consumer)))


def silence(network: Network, site: ModuleSite, kept_U: Tensor) -> None:
    """Let the consumer ignore all units but these."""
    kept = Selection(kept_U, site.units.size, site.units.width)
    for consumer in map(network.layer, site.consumers):
        set_consumer(consumer, kept.expand_consumer(kept.lift_consumer(consumer_matrix(consumer))))


class _Order:
    """All units in another order: as much of a selection as slicing needs."""

    def __init__(self, order_U: Tensor, size: int):
        self.order, self.size = order_U, size

    @property
    def channels(self) -> Tensor:
        return (self.order[:, None] * self.size + torch.arange(self.size)).flatten()

    def narrow_producer(self, rows: Tensor, rows_per_unit: int) -> Tensor:
        return rows[(self.order[:, None] * rows_per_unit + torch.arange(rows_per_unit)).flatten().to(rows.device)]


def _parameter(tensor: Tensor, old: Tensor) -> nn.Parameter:
    """One in the place of another, trained where that was, and in its memory format."""
    return nn.Parameter(laid_as(tensor.detach(), old), requires_grad=old.requires_grad)


def laid_as(tensor: Tensor, old: Tensor) -> Tensor:
    """A copy with the channels last where another's lie so, to the strides of axes of length one, which choose kernels
    too; else the tensor itself."""
    last = LAST.get(old.dim())
    if last is None or tensor.dim() != old.dim():
        return tensor
    last_strides, first_strides = (
        torch.empty_like(old, device="meta", memory_format=order).stride() for order in (last, torch.contiguous_format)
    )
    if old.stride() != last_strides or last_strides == first_strides:
        return tensor
    return torch.empty_like(tensor, memory_format=last).copy_(tensor)
