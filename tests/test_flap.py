"""FLAP's metrics, structures and unbiased variance; Wanda++'s score."""

from __future__ import annotations

import pytest
import torch

from grail.errors import GrailError
from grail.reduction import Units
from grail.selectors import SiteView, selector_class
from grail.statistics import SiteStatistics

T, H, O = 300, 24, 9  # noqa: E741


def data(offset: float = 0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator) * torch.rand(H, generator=generator) + offset
    return x, torch.randn(O, H, generator=generator)


def view(selector, x, weight, units, kind, kept=1, affine=False, **extra):
    statistics = SiteStatistics(H, selector.needs - {"block_gradients"}, affine=affine)
    for part in x.split(70):
        statistics.update(part)
    return SiteView("site", kind, units, weight, {}, statistics, kept, 0, **extra)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
@pytest.mark.parametrize("kind", ["heads", "channels"])
def test_metrics_in_float64(metric, kind, offset):
    """Variance is the unbiased one over all rows, also where the mean is a thousand deviations."""
    x, weight = data(offset)
    flap = selector_class("flap").from_options({"metric": metric})
    units = Units(1, 6, 4) if kind == "heads" else Units(1, H, 1)
    found = flap.scores(view(flap, x, weight, units, kind))
    xd, wd = x.double(), weight.double()
    expected = {
        "WIFV": xd.var(0, correction=1) * wd.square().sum(0),
        "IFV": xd.var(0, correction=1),
        "WIFN": wd.abs().mean(0) * xd.square().mean(0).sqrt(),
    }[metric]
    torch.testing.assert_close(found, expected.square() if kind == "heads" else expected, rtol=1e-6, atol=0)


def test_global_scores_are_z_scores_over_channels_averaged_per_head():
    x, weight = data()
    flap = selector_class("flap").from_options({})
    site = view(flap, x, weight, Units(1, 6, 4), "heads")
    scores = (x.double().var(0) * weight.double().square().sum(0)).square()
    z = (scores - scores.mean()) / scores.std(correction=0)
    torch.testing.assert_close(flap.global_scores(site), z.view(6, 4).mean(1))


def test_uniform_structures_sum_per_head():
    x, weight = data()
    flap = selector_class("flap").from_options({"structure": "UL-UM"})
    chosen = flap.select(view(flap, x, weight, Units(1, 6, 4), "heads", kept=2)).kept
    scores = (x.double().var(0) * weight.double().square().sum(0)).square().view(6, 4).sum(1)
    assert sorted(scores.topk(2).indices.tolist()) == chosen.tolist()


@pytest.mark.parametrize(
    ("structure", "allocation"),
    [("AL-AM", "global"), ("AL-MM", "global"), ("UL-UM", "uniform"), ("UL-MM", "uniform")],
)
def test_structures_say_how_much_goes_where(structure, allocation):
    options = {"structure": structure} | ({"remove_heads": "8"} if structure.endswith("MM") else {})
    flap = selector_class("flap").from_options(options)
    assert flap.own_allocation() == allocation
    assert flap.fixed_heads() == (8 if structure.endswith("MM") else None)


@pytest.mark.parametrize(
    "options",
    [{"metric": "nope"}, {"structure": "nope"}, {"structure": "AL-MM"}, {"structure": "UL-UM", "remove_heads": "3"}],
)
def test_bad_options_are_named(options):
    with pytest.raises(GrailError, match="--set"):
        selector_class("flap").from_options(options)


def test_wanda_pp_score_in_float64():
    x, weight = data()
    method = selector_class("wanda-pp-sp").from_options({"alpha": "7"})
    gradients = torch.rand(O, H, generator=torch.Generator().manual_seed(5))
    site = view(method, x, weight, Units(1, H, 1), "channels", gradients_OH=gradients, windows=10)
    norm = (x.double().square().sum(0) / 10).sqrt()
    expected = ((7 * gradients.double() + norm) * weight.double().abs()).mean(0)
    torch.testing.assert_close(method.scores(site), expected, rtol=1e-6, atol=0)
