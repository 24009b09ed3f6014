"""Multiply-accumulates of one image, and measured latency of several modules side by side."""

from __future__ import annotations

import time
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..errors import GrailError
from .accuracy import evaluating

QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}


def macs(module: nn.Module, example: Tensor, call: str = "") -> int:
    """Multiply-accumulates of matrix products, convolutions and attention, for the first input of `example`
    [B, C, H, W] or [B, L]. call: the method that is counted (default: forward)."""
    counter = FlopCounterMode(display=False)
    # neither the CPU's fused attention nor the fast path of torch's own transformer layers is known to the counter
    with evaluating(module), _frozen(module), _plain_attention(), counter:
        (getattr(module, call) if call else module)(example[:1])
    return counter.get_total_flops() // 2


@contextmanager
def _frozen(module: nn.Module):
    """The counter follows gradients, and fails at a view of a parameter that has none here."""
    trained = [p for p in module.parameters() if p.requires_grad and not p.is_inference()]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _plain_attention():
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def latency(
    modules: dict[str, nn.Module], example: Tensor | dict[str, Tensor], rounds: int
) -> dict[str, dict[str, float]]:
    """By label: 20th, 50th and 80th percentile, in seconds, of one call with `example` (all on one device), or with
    each one's own by label.

    Every round times each module once, in alternating order, so that drift of the machine hits them alike; one round
    before does not count. Raises GrailError for less than one round.
    """
    if rounds < 1:
        raise GrailError(f"latency: at least 1 round is needed, not {rounds}")
    times: dict[str, list[float]] = {label: [] for label in modules}
    examples = example if isinstance(example, dict) else dict.fromkeys(modules, example)
    with evaluating(*modules.values()):
        for number in range(rounds + 1):
            for label in list(modules)[:: 1 if number % 2 else -1]:
                seconds = _once(modules[label], examples[label])
                if number:
                    times[label].append(seconds)
    return {label: _quantiles(seconds) for label, seconds in times.items()}


def _once(module: nn.Module, example: Tensor) -> float:
    _finish(example)
    start = time.perf_counter()
    module(example)
    _finish(example)
    return time.perf_counter() - start


def _finish(example: Tensor) -> None:
    if example.is_cuda:
        torch.cuda.synchronize(example.device)


def _quantiles(seconds: list[float]) -> dict[str, float]:
    found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor(list(QUANTILES.values())).double())
    return dict(zip(QUANTILES, found.tolist(), strict=True))
