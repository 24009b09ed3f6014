"""SiteStatistics: what selectors and the compensation ask for, from streamed activations."""

from __future__ import annotations

import pytest
import torch

from grail.errors import GrailError
from grail.statistics import DIAGONAL, GRAM, SiteStatistics

WIDTH = 12
NEEDS = {"diag": frozenset({DIAGONAL}), "gram": frozenset({GRAM}), "both": frozenset({DIAGONAL, GRAM})}
EVERY_NEED = pytest.mark.parametrize("needs", list(NEEDS.values()), ids=list(NEEDS))


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collect(needs: frozenset[str], *chunks: torch.Tensor) -> SiteStatistics:
    statistics = SiteStatistics(chunks[0].shape[-1], needs)
    for chunk in chunks:
        statistics.update(chunk)
    return statistics


@EVERY_NEED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mean_square(needs, dtype):
    x = (activations(4, 250, WIDTH) + 1).to(dtype)
    statistics = collect(needs, *x)
    assert statistics.count == 1000
    torch.testing.assert_close(statistics.mean_square().double(), x.double().square().mean((0, 1)), rtol=1e-5, atol=0)


@EVERY_NEED
def test_float16_squares_beyond_its_range(needs):
    x = torch.full((5, WIDTH), 30_000.0, dtype=torch.float16)
    torch.testing.assert_close(
        collect(needs, x).mean_square().double(), torch.full((WIDTH,), 9e8).double(), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("needs", [NEEDS["gram"], NEEDS["both"]], ids=["gram", "both"])
def test_gram(needs):
    x = activations(3, 40, WIDTH)
    want = x.double().flatten(0, 1).mT @ x.double().flatten(0, 1)
    torch.testing.assert_close(collect(needs, *x).gram.to_dense().double(), want, rtol=1e-5, atol=1e-4)


@EVERY_NEED
def test_masked_rows_do_not_count(needs):
    x = activations(4, 30, WIDTH)
    mask = torch.rand(4, 30, generator=torch.Generator().manual_seed(1)) < 0.6
    poisoned = torch.where(mask[..., None], x, torch.tensor(float("nan")))
    statistics = SiteStatistics(WIDTH, needs)
    statistics.update(poisoned, mask)
    assert statistics.count == int(mask.sum())
    torch.testing.assert_close(statistics.mean_square().double(), x[mask].double().square().mean(0), rtol=1e-5, atol=0)


@EVERY_NEED
def test_integer_mask_is_a_mask_or_refused(needs):
    """Zeros and ones of an attention mask must never be taken for row numbers."""
    x, mask = activations(4, 5, WIDTH), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    statistics = SiteStatistics(WIDTH, needs)
    try:
        statistics.update(x, mask)
    except (TypeError, ValueError):
        return
    assert statistics.count == 12
    torch.testing.assert_close(
        statistics.mean_square().double(), x[:, :3].double().square().mean((0, 1)), rtol=1e-5, atol=0
    )


@EVERY_NEED
@pytest.mark.parametrize("shape", [(6, 2 * WIDTH), (WIDTH, 6), (6, WIDTH // 2), (6, 5)], ids=str)
def test_wrong_width_raises(needs, shape):
    """Also where the number of elements happens to divide."""
    with pytest.raises(ValueError):
        SiteStatistics(WIDTH, needs).update(activations(*shape))


@EVERY_NEED
def test_wrong_mask_raises(needs):
    with pytest.raises((ValueError, IndexError)):
        SiteStatistics(WIDTH, needs).update(activations(4, 5, WIDTH), torch.ones(4, 6, dtype=torch.bool))


def test_only_what_was_asked_for_is_there():
    with pytest.raises(LookupError, match="gram"):
        _ = collect(NEEDS["diag"], activations(5, WIDTH)).gram
    nothing = collect(frozenset(), activations(5, WIDTH))
    assert nothing.count == 5
    with pytest.raises(LookupError, match="diag"):
        nothing.mean_square()


def test_unknown_need_is_refused():
    with pytest.raises(ValueError, match="spectrum"):
        SiteStatistics(WIDTH, frozenset({"spectrum"}))


@EVERY_NEED
def test_no_rows_yet(needs):
    statistics = SiteStatistics(WIDTH, needs)
    assert statistics.count == 0
    assert not statistics.mean_square().any()


@EVERY_NEED
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_check_finite_names_the_site_and_the_channel(needs, poison):
    x = activations(50, WIDTH)
    x[17, 7] = poison
    statistics = collect(needs, x)
    with pytest.raises(GrailError, match=r"model\.layers\.3\.mlp.*channel 7"):
        statistics.check_finite("model.layers.3.mlp")


@EVERY_NEED
def test_check_finite_accepts_healthy_activations(needs):
    collect(needs, activations(50, WIDTH)).check_finite("site")


@EVERY_NEED
def test_input_is_only_read(needs):
    x = activations(50, WIDTH)
    collect(needs, x)
    assert torch.equal(x, activations(50, WIDTH))
