"""A script as a user writes it: test_types.py has mypy read it, nobody runs it.

Every `type: ignore` here is a mistake that a type checker must find: one that it does not find is an error
(warn_unused_ignores).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_type

import torch
from torch import Tensor, nn

import grail
from grail.calibration.preprocessing import Preprocessing
from grail.evaluate import evaluate
from grail.families.network import ModuleSite
from grail_kernels import GramAccumulator, PackedSymmetric, RidgeSolution, backend, ridge_solve


class Net(nn.Module):
    """A network of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4]."""
        return torch.relu(self.fc2(torch.relu(self.fc1(x))))


class Pretrained(Net):
    """What transformers' models have."""

    def save_pretrained(self, folder: str) -> None:
        """Write it."""


class Bars(grail.Progress):
    """Progress of one's own."""

    def site(self, entry: dict[str, Any]) -> None:
        """Say it."""
        print(entry["name"])


def language(folder: Path) -> None:
    """A folder, with everything that can be asked for."""
    entries: list[dict[str, Any]] = []
    for target in ("hidden", "stream"):
        report = grail.compress(
            folder,
            output=folder / "small",
            method="wanda-sp",
            ratio=0.3,
            target=target,
            calibration=[torch.zeros(4, 32, dtype=torch.long)],
            memory="4GB",
            set={"passes": "1"},
            progress=Bars(),
            on_site=entries.append,
        )
        assert_type(report, grail.Report | grail.ModuleReport)
        assert_type(report.sites, list[dict[str, Any]])
        assert_type(report.summary(), str)
        assert_type(report.to_json(), dict[str, Any])
        assert_type(report.output, str | None)
        if isinstance(report, grail.Report):
            assert_type(report.parameters, tuple[int, int])
            assert_type(report.loads_with, str)
            assert_type(report.recipe, grail.Recipe)
        else:
            assert_type(report, grail.ModuleReport)
            assert_type(report.model, nn.Module)
    grail.load(folder / "small").generate(max_new_tokens=8)
    grail.compress(str(folder), output="small", on_site=print)


def modules(net: Net, pretrained: Pretrained) -> None:
    """Loaded ones."""
    site = grail.channels("fc1", "fc2", width=16)
    assert_type(site, ModuleSite)
    assert_type(grail.heads(["q", "k", "v"], "o", count=4, size=8), ModuleSite)
    assert_type(grail.residual(["a"], ["b"], width=8, name="stream"), ModuleSite)
    images = Preprocessing((32, 32), 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    report = grail.compress(net, sites=[site], calibration=torch.zeros(8, 8), preprocessing=images, batch=4)
    assert_type(report, grail.ModuleReport)
    assert_type(report.ratio, dict[str, float])
    assert_type(grail.compress(pretrained), grail.Report | grail.ModuleReport)
    assert_type(grail.load("small", module=net), Net)


def others() -> None:
    """What stands beside compress."""
    assert_type(grail.Recipe(model="x").ratio, float)
    assert_type(evaluate("small", data="builtin", samples=4), dict[str, Any])
    gram = GramAccumulator(16, precise=True).update(torch.zeros(4, 16))
    assert_type(gram, GramAccumulator)
    assert_type(PackedSymmetric.from_dense(torch.eye(4)), PackedSymmetric)
    solved = ridge_solve(torch.eye(4), torch.zeros(4, 2), 0.1)
    assert_type(solved, RidgeSolution)
    assert_type(solved.solution, Tensor)
    assert_type(backend("gram").name, str)


def mistakes(net: Net, listener: Callable[[int], None]) -> None:
    """What a type checker finds before anything runs."""
    grail.compress(net, ratoi=0.3)  # type: ignore[call-overload]  # no such option
    grail.compress(net, ratio="0.3")  # type: ignore[call-overload]  # not a number
    grail.compress(net, on_site=listener)  # type: ignore[arg-type]  # takes a dict
    grail.compress(3)  # type: ignore[call-overload]  # no model
    grail.channels("fc1", "fc2")  # type: ignore[call-arg]  # how wide?
    grail.Recipe(model="x", ratoi=0.3)  # type: ignore[call-arg]  # no such option
    ridge_solve(torch.eye(4), torch.zeros(4, 2), 0.1, anchr=None)  # type: ignore[call-arg]  # no such argument
    GramAccumulator("16")  # type: ignore[arg-type]  # not a number
