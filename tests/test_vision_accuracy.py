"""A small sample of the vision tables: a ResNet trained on real digits, pruned or folded to collapse, and won back."""

from __future__ import annotations

import pytest
from torch import nn

from benchmarks.vision_cells import VARIANTS, Cell, measure
from benchmarks.vision_train import accuracy, trained

NET, DATA, SEED = "resnet18-quarter", "digits", 0
POINTS = 0.6
"""What the publication's headline wins back at 0.65."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAIL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return trained(NET, DATA, SEED)


@pytest.mark.parametrize("method", ["fold", "wanda"])
def test_at_065_at_least_60_points_are_won_back_without_labels(dense, method):
    found = {
        variant: measure(Cell(NET, DATA, method, 0.65, SEED, variant), dense)["accuracy"]
        for variant in VARIANTS
    }  # fmt: skip
    assert accuracy(dense, DATA) > 0.9
    assert found["none"] < 0.35
    assert found["GRAIL"] - found["none"] >= POINTS
    assert found["GRAIL"] > found["none"] and found["GRAIL + REPAIR"] > found["REPAIR"] - 0.02
