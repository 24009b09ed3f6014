"""What was found in networks in memory by looking for trouble once more: how they are called, read, proven and handed
back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from grail.selectors import selector_class


def rows(count: int = 40, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


MLP_SITES = [grail.channels("fc1", "fc2", width=12)]


def net(make: Callable[[], nn.Module] = MLP) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def compressed(module: nn.Module, x: object = None, **flags):
    given = {"method": "wanda", "ratio": 0.5, "sites": MLP_SITES, "calibration": rows() if x is None else x}
    return grail.compress(module, **given | flags)


def refuse(match: str, module: nn.Module | None = None, x: object = None, **flags) -> None:
    """In one sentence that holds `match`."""
    with pytest.raises(GrailError, match=match) as caught:
        compressed(net() if module is None else module, x, **flags)
    assert "\n" not in str(caught.value)


class TestAllocationByErrors:
    def test_is_refused_before_work(self):
        refuse("--allocation error.*language models.*uniform, log or global", calibration=[], allocation="error")

    def test_is_refused_as_a_methods_own(self, monkeypatch):
        monkeypatch.setattr(selector_class("wanda"), "allocation", "error")
        refuse("--allocation error.*language models")
