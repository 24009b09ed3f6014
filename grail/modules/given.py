"""Modules that are given in Python: what none can be, before any work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..calibration.preprocessing import Preprocessing
from ..checkpoint.pieces import DTYPE_NAMES
from ..errors import GrailError
from ..families.network import ModuleSite, Network


def check_module(module: nn.Module) -> None:
    """Raises GrailError for one that torch has compiled, and naming the first tensor that holds no plain numbers."""
    if isinstance(module, torch.jit.ScriptModule):
        raise GrailError(f"{type(module).__name__} is compiled by TorchScript; give the module that it was made of")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            raise GrailError(f"the network's tensor {name} has no shape yet; run the network once on an input")
        if tensor.is_meta:
            raise GrailError(f"the network's tensor {name} holds no data (it is on the meta device); load its weights")
    for name, parameter in module.named_parameters():
        if parameter.layout != torch.strided:
            raise GrailError(f"the network's tensor {name} is sparse; give it as tensor.to_dense()")


def check_untied(network: Network, sites: Iterable[ModuleSite]) -> None:
    """Raises GrailError naming the first of the sites one of whose layers shares a parameter with another layer: to
    narrow one of them would cut that tie."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, layer in network.module.named_modules():
        for parameter in layer._parameters.values():
            owners.setdefault(id(parameter), []).append((name, layer))
    for site in sites:
        for name in (*(p.name for p in site.producers), *site.norms, *site.reader_norms, *site.consumers):
            layer = network.layer(name)  # which may have several names
            for part, parameter in layer._parameters.items():
                others = [other for other, owner in owners[id(parameter)] if owner is not layer]
                if parameter is not None and others:
                    raise GrailError(
                        f"{site.name}: {name} shares its {part} with {others[0]}, a tie that narrowing would cut; give "
                        f"{name} a {part} of its own, or leave the site out"
                    )


def check_storable(module: nn.Module) -> None:
    """Raises GrailError naming the first tensor that no file of safetensors can hold."""
    for name, tensor in module.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise GrailError(
                f"the network's {name} is a {type(tensor).__name__}, which no file of tensors can hold; take it out of "
                f"the state dict, or leave out output"
            )
        if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
            what = str(tensor.dtype) if tensor.layout == torch.strided else "sparse"
            raise GrailError(
                f"the network's tensor {name} is {what}, which no file of safetensors can hold here; register it with "
                f"persistent=False, or leave out output"
            )


def check_preprocessing(preprocessing: object, *, stored: bool) -> None:
    """Raises GrailError for one that is none, or cannot be written."""
    if preprocessing is None or isinstance(preprocessing, Preprocessing):
        return
    if stored or not callable(preprocessing):
        raise GrailError(f"preprocessing must be grail.Preprocessing(...); got a {type(preprocessing).__name__}")
