"""What every public method does with its arguments: devices, rows and masks, and a context of its own.

Shapes: S sites, T rows, H width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

CPU = torch.device("cpu")
Device = torch.device | str | int | None
"""A device as callers name it."""
P = ParamSpec("P")
R = TypeVar("R")
FINITE_NUMBERS = 1 << 19
"""Numbers of a block in which `all_finite` looks at a tensor."""


def device_of(device: Device) -> torch.device:
    """A torch.device; None is the CPU, 0 the first accelerator (and not "nothing given")."""
    return torch.device("cpu" if device is None else device)


def all_finite(tensor: Tensor) -> bool:
    """Whether nothing is NaN or infinity. On a CPU read once in the usual case: a sum of finite numbers is finite,
    unless they are so large that a look at each is worth its time. By blocks of rows, since both ways make a copy."""
    if tensor.device.type != "cpu":
        return bool(torch.isfinite(tensor).all())
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows = tensor.reshape(-1) if tensor.dim() < 2 else tensor
    step = max(FINITE_NUMBERS // max(rows[:1].numel(), 1), 1)
    return all(
        bool(torch.isfinite(block.sum(dtype=wide))) or bool(torch.isfinite(block).all()) for block in rows.split(step)
    )


def isolated(function: Callable[P, R]) -> Callable[P, R]:
    """Run without autograd, autocast (which would multiply in bf16) and inference mode (whose tensors cannot be updated
    outside it), and with the CPU as the device of what names none, whatever the caller has switched on."""

    @functools.wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if torch.get_default_device() != CPU:  # a mode, which costs time in every call
                stack.enter_context(CPU)
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return alone


def positive(**numbers: int | None) -> None:
    """Raise ValueError for a number below 1, TypeError for what is no whole number; None passes."""
    for name, number in numbers.items():
        if number is None:
            continue
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")


def plain(name: str, tensor: Tensor) -> Tensor:
    """A tensor without its history, its numbers in memory what they are: a sign that torch keeps as a bit of the view
    (as of z.conj().imag) is applied, which kernels would not see. Raises TypeError for what is no dense tensor,
    ValueError for one that holds no data."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor (torch.as_tensor makes one)")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else f"stored as {tensor.layout}"
        raise TypeError(f"{name} is {kind}; give a dense tensor")
    if tensor.is_meta:
        raise ValueError(f"{name} holds no data (it is on the meta device); give numbers")
    return tensor.detach().resolve_neg()


def overlaps(matrix: Tensor) -> bool:
    """Whether two elements lie at one address: whether a step down, taken often enough, is one to the right."""
    step = math.gcd(*matrix.stride()) or 1
    meets = matrix.stride(1) // step < matrix.shape[0] and matrix.stride(0) // step < matrix.shape[1]
    return meets and matrix.numel() > 1


def whole_state(state: dict[str, Any], *names: str) -> None:
    """Raise ValueError where what `load_state_dict` is given lacks something that it reads."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the state lacks {', '.join(missing)}; give what state_dict() returned")


def as_rows(x: Tensor, mask: Tensor | None, sites: int) -> tuple[Tensor, Tensor | None]:
    """x, which is `plain`, as [S, T, H], without a copy where its strides allow, and the mask as bool [S, T]."""
    if not x.is_floating_point():
        raise TypeError(f"expected floating-point activations, got {x.dtype}")
    mask = None if mask is None else plain("the mask", mask)
    if mask is not None and (mask.is_floating_point() or mask.is_complex()):
        raise TypeError(f"a mask is bool or integer (True or 1 = the row counts), got {mask.dtype}")
    if mask is not None and mask.shape != x.shape[:-1]:
        raise ValueError(f"mask {list(mask.shape)} does not match rows {list(x.shape[:-1])}")
    x_STH = x.reshape(sites, -1, x.shape[-1]) if x.numel() else x.new_empty(sites, 0, x.shape[-1])
    return x_STH, None if mask is None else mask.bool().reshape(sites, -1)


def mean_rows(x_STH: Tensor, mask_ST: Tensor | None, rows: int) -> Tensor:
    """Mean of the counted rows, summed in float64 over `rows` at a time; float32 [S, H], 0 where nothing finite."""
    means = []
    for site, x_TH in enumerate(x_STH):
        total_H, count = torch.zeros(x_TH.shape[1], dtype=torch.float64, device=x_TH.device), 0
        for start in range(0, len(x_TH), rows):
            part = x_TH[start : start + rows]
            if mask_ST is not None:
                part = part[mask_ST[site, start : start + rows]]
            total_H += part.sum(0, dtype=torch.float64)
            count += len(part)
        means.append(total_H / max(count, 1))
    return torch.stack(means).nan_to_num(0.0, 0.0, 0.0).float()


def device_dtype(x: Tensor, device: torch.device) -> Tensor:
    """On the device, in a dtype that the kernels read: bf16 and fp16 as they are, all else float32."""
    kept = x.dtype in (torch.bfloat16, torch.float16)
    return x.to(device, x.dtype if kept else torch.float32)


def to_device(mask: Tensor | None, device: torch.device) -> Tensor | None:
    return None if mask is None else mask.to(device)
