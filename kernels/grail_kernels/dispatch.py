"""The one place that decides which implementation of an operation runs, and says why.

Order: the `backend=` argument, then the environment variable GRAIL_KERNELS_BACKEND, then the device's default.
An implementation that fails raises; nothing else is tried in its place.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

ENVIRONMENT = "GRAIL_KERNELS_BACKEND"
IMPLEMENTATIONS = {"gram": ("reference", "torch"), "ridge": ("reference", "torch")}


class Backend(NamedTuple):
    """What will run (`name`) and who decided (`reason`)."""

    name: str
    reason: str


def backend(operation: str = "gram", device=None, override: str | None = None) -> Backend:
    """Choose the implementation of `operation` ("gram" or "ridge") for a device.

    "reference" is the plain formula in float64; "torch" is blocked torch, on CPU and CUDA.
    Raises ValueError for an operation or an implementation that does not exist.
    """
    if operation not in IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {operation!r}; known: {', '.join(IMPLEMENTATIONS)}")
    asked, reason = override, "argument backend="
    if asked is None and os.environ.get(ENVIRONMENT):
        asked, reason = os.environ[ENVIRONMENT], f"environment {ENVIRONMENT}"
    if asked is None:
        device = torch.device(device or "cpu")
        asked, reason = "torch", f"default on {device.type}"
    if asked not in IMPLEMENTATIONS[operation]:
        known = ", ".join(IMPLEMENTATIONS[operation])
        raise ValueError(f"{reason}: no implementation {asked!r} of {operation}; known: {known}")
    return Backend(asked, reason)
