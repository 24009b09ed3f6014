"""The one place that decides which implementation of an operation runs, and says why.

Order: the `backend=` argument, then the environment variable GRAIL_KERNELS_BACKEND, then the device's default.
An implementation that fails raises; nothing else is tried in its place.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch

from .configs import target_of
from .inputs import Device, device_of

ENVIRONMENT = "GRAIL_KERNELS_BACKEND"
IMPLEMENTATIONS = {
    "gram": ("reference", "torch", "triton"),
    "packed": ("torch", "triton"),
    "ridge": ("reference", "torch", "triton"),
}


class Backend(NamedTuple):
    """What will run (`name`) and who decided (`reason`)."""

    name: str
    reason: str


def backend(operation: str = "gram", device: Device = None, override: str | None = None) -> Backend:
    """Choose the implementation of `operation` ("gram", "packed" or "ridge") for a device.

    "reference" is the plain formula in float64; "torch" is blocked torch, on CPU and CUDA; "triton" are our kernels,
    the default on a GPU whose configurations were checked (for "ridge": stacks of K <= 128, the rest goes through
    torch.linalg). The environment names
    one implementation for all operations; an operation that has none of that name keeps its default.
    Raises ValueError for an operation or an implementation that does not exist, and for one that cannot run here.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {operation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    device = device_of(device)
    asked, reason = override, "argument backend="
    environment = os.environ.get(ENVIRONMENT)
    if asked is None and environment:
        elsewhere = any(environment in names for names in IMPLEMENTATIONS.values())
        if environment in IMPLEMENTATIONS[operation] or not elsewhere:
            asked, reason = environment, f"environment {ENVIRONMENT}"
    if asked is None:
        return _default(operation, device)
    if asked not in IMPLEMENTATIONS[operation]:
        known = ", ".join(IMPLEMENTATIONS[operation])
        raise ValueError(f"{reason}: no implementation {asked!r} of {operation}; known: {known}")
    if asked == "triton" and (obstacle := _triton_obstacle(device)):
        raise ValueError(f"{reason}: triton cannot run here: {obstacle}")
    return Backend(asked, reason)


def _default(operation: str, device: torch.device) -> Backend:
    if "triton" not in IMPLEMENTATIONS[operation] or device.type == "cpu":
        return Backend("torch", f"default on {device.type}")
    obstacle = _triton_obstacle(device)
    if obstacle:
        return Backend("torch", f"default on {device.type}: {obstacle}")
    return Backend("triton", f"default on {device.type}")


def _triton_obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"no kernels for {device.type} (TRITON_INTERPRET=1 interprets them)"
    try:
        device_target(device)
    except RuntimeError as error:
        return str(error)
    return None


def device_target(device: torch.device) -> str:
    """The name of a GPU's configurations; raises RuntimeError for one that none was checked for."""
    if torch.version.hip:
        return target_of(None, torch.cuda.get_device_properties(device).gcnArchName)
    return target_of(torch.cuda.get_device_capability(device))
