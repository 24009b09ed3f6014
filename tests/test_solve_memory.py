"""The repair goes by blocks: it gives the numbers of the whole, in the memory that `solve_bytes` predicts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from grail import compensation
from grail import normal_equations as equations
from grail import reduction as reductions
from grail.compensation import compensate, compensate_pairs, mean_bias, reconstruction_errors, solve_bytes
from grail.moments import PairStatistics
from grail.reduction import Selection
from grail.statistics import GRAM, SiteStatistics
from grail_kernels import cholesky
from tests.test_compensation import (
    EVERY_FORM,
    EVERY_REDUCTION,
    correlated,
    dense_formula,
    explicit,
    gram_of,
    normal,
    plain_error,
)

ROOT = Path(__file__).parents[1]
MEASURE = """
import ctypes, gc, json, sys
import torch
from grail.compensation import compensate, compensate_pairs
from grail.machine import _status, reset_peak_memory
from grail.moments import PairStatistics
from grail.reduction import Selection
from grail_kernels import GramAccumulator

torch.set_num_threads(1)


def selection(outputs, width, kept):
    gram = GramAccumulator(width).update(torch.randn(256, width)).packed
    removed = torch.randperm(width)[kept:]
    channels = torch.ones(width).index_fill_(0, removed, 0).nonzero()[:, 0]
    weight = torch.randn(outputs, width, dtype=torch.bfloat16)
    return lambda: compensate(weight, gram, Selection(channels, 1, width), ridge=0.1)


def pairs(outputs, kept):
    statistics = PairStatistics(kept, outputs)
    z, y = torch.randn(256, kept), torch.randn(256, outputs)
    statistics.update(z, y, y)
    anchor = torch.zeros(outputs, kept, dtype=torch.bfloat16)
    return lambda: compensate_pairs(anchor, statistics, ridge=0.1)


def peak(solve):
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or what earlier cases left free would be used first, and not be counted
    before = _status("VmRSS:")
    reset_peak_memory()
    assert solve().retries == 0
    return _status("VmHWM:") - before


for warm in (selection(40, 400, 300), selection(400, 400, 300), pairs(40, 300)):
    warm()
make = {3: selection, 2: pairs}
print(json.dumps([peak(make[len(case)](*case)) for case in json.loads(sys.argv[1])]))
"""
SHAPES = {"few-outputs": (512, 5000, 3500), "few-removed": (1024, 4500, 3900), "half": (1536, 5000, 2800)}
FEW_KEPT = (1024, 6000, 1200)
MIDDLE, PAIRS = (1024, 4096, 2868), (1024, 2868)


def site(outputs: int = 7):
    """Weight and activations of a site of 12 channels."""
    return normal(outputs, 12, seed=1), correlated(400, 12)


@pytest.fixture
def blocks_of_two(monkeypatch):
    """As if every matrix were too large to be handled at once."""
    for module, name in (
        (equations, "CPU_ROWS"), (equations, "GRAM_ROWS"), (reductions, "FOLD_ROWS"), (cholesky, "BLOCK_ROWS")
    ):  # fmt: skip
        monkeypatch.setattr(module, name, 2)
    monkeypatch.setattr(cholesky, "BLOCK_NUMBERS", 1)


@pytest.mark.usefixtures("blocks_of_two")
class TestBlocks:
    @EVERY_FORM
    @EVERY_REDUCTION
    @pytest.mark.parametrize("outputs", [1, 3, 40], ids="O={}".format)
    def test_equals_the_dense_formula(self, reduction, form, outputs):
        weight, x = site(outputs)
        gram = gram_of(x)
        got = compensate(weight, gram, reduction, ridge=0.01, form=form)
        want = dense_formula(weight, gram.to_dense().double(), *explicit(reduction), 0.01, form)
        assert ((got.weight - want).norm() / want.norm()).item() < 1e-5
        assert got.error_after == pytest.approx(plain_error(weight, got.weight, reduction, x), rel=1e-4, abs=1e-6)
        lifted = reduction.lift_consumer(weight)
        assert got.error_before == pytest.approx(plain_error(weight, lifted, reduction, x), rel=1e-4, abs=1e-6)
        errors = reconstruction_errors(weight, [lifted, got.weight], reduction, gram)
        assert errors == pytest.approx([got.error_before, got.error_after], rel=1e-6)

    @EVERY_REDUCTION
    def test_a_raised_ridge_reads_the_matrix_again(self, reduction):
        """A factorisation that failed has overwritten it."""
        weight, x = normal(5, 12, seed=1), correlated(400, 2)[:, torch.arange(12) % 2]
        gram = gram_of(x)
        got = compensate(weight, gram, reduction, ridge=0.0, form="paper")
        assert got.retries >= 1 or reduction.kept_width == 1
        relative = got.lam / reduction.normal_matrix(gram).diagonal().double().mean().item()
        want = dense_formula(weight, gram.to_dense().double(), *explicit(reduction), relative, "paper")
        assert ((got.weight - want).norm() / want.norm()).item() < 1e-3

    @EVERY_FORM
    @pytest.mark.parametrize("affine", [False, True])
    def test_pairs(self, form, affine):
        y, z = correlated(400, 5, seed=1), correlated(400, 12)
        anchor = normal(5, 12, seed=2, dtype=torch.float32)
        pairs = PairStatistics(12, 5, affine=affine)
        pairs.update(z, y, y - z @ anchor.mT)
        found = compensate_pairs(anchor, pairs, ridge=0.01, form=form)
        z, y = z.double(), y.double()
        if affine:
            z, y = z - z.mean(0), y - y.mean(0)
        start = anchor.double() if form == "anchored" else torch.zeros(5, 12, dtype=torch.float64)
        system = z.mT @ z + found.lam * torch.eye(12, dtype=torch.float64)
        want = start + torch.linalg.solve(system, z.mT @ (y - z @ start.mT)).mT
        assert ((found.weight - want).norm() / want.norm()).item() < 1e-4
        error = (y - z @ found.weight.double().mT).square().sum() / y.square().sum()
        assert found.error_after == pytest.approx(error.item(), rel=1e-3)
        if affine:
            left = correlated(400, 5, seed=1) - correlated(400, 12) @ found.weight.mT - found.bias
            assert left.mean(0).abs().max() < 1e-4

    @EVERY_REDUCTION
    def test_bias(self, reduction):
        weight, x = site()
        statistics = SiteStatistics(12, frozenset({GRAM}), affine=True)
        statistics.update(x)
        narrow = normal(7, reduction.kept_width, seed=3)
        got = mean_bias(weight, narrow, reduction, statistics, torch.ones(7))
        lost = x.double() @ weight.mT - reduction.reduce(x.double()) @ narrow.mT
        torch.testing.assert_close(got, lost.mean(0) + 1, rtol=1e-5, atol=1e-5)


@EVERY_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pairs_are_only_read(dtype, form):
    """Also where the cross moment is already in the dtype of the solve."""
    z, y, anchor = correlated(50, 12), correlated(50, 5, seed=1), normal(5, 12, seed=2)
    cross = (z.mT @ y).to(dtype)
    pairs = SimpleNamespace(normal=gram_of(z), cross=cross, difference_energy=1.0, target_energy=1.0, affine=False)
    kept = cross.clone(), pairs.normal.data.clone(), anchor.clone()
    compensate_pairs(anchor, pairs, form=form)
    assert all(torch.equal(now, then) for now, then in zip((cross, pairs.normal.data, anchor), kept, strict=True))


def test_inference_mode_of_the_caller_does_not_matter():
    """Its tensors cannot be updated in place outside it."""
    weight, x = site()
    kept = Selection(torch.tensor([0, 3, 4, 8, 10]), 1, 12)
    want = compensate(weight, gram_of(x), kept).weight
    with torch.inference_mode():
        assert torch.equal(compensate(weight, gram_of(x), kept).weight, want)


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[int, ...], int]:
    """Measured in one process of its own, on one thread."""
    if not (sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)):
        pytest.skip("the peak can be reset on Linux only")
    cases = [MIDDLE, PAIRS, FEW_KEPT, *SHAPES.values()]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    return dict(zip(cases, json.loads(done.stdout), strict=True))


class TestPeak:
    """A, twice the smaller right-hand side, and what the allocator keeps."""

    def test_of_a_selection(self, peaks):
        outputs, width, kept = MIDDLE
        matrices = 8 * kept**2 + 2 * 8 * kept * min(outputs, width - kept)
        assert peaks[MIDDLE] <= 1.1 * matrices + compensation.ALLOCATOR

    def test_of_pairs(self, peaks):
        outputs, kept = PAIRS
        assert peaks[PAIRS] <= 1.1 * (8 * kept**2 + 2 * 8 * kept * outputs) + compensation.ALLOCATOR

    @pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
    def test_is_predicted(self, peaks, shape):
        assert solve_bytes(*shape) == pytest.approx(peaks[shape], rel=0.15)

    def test_of_few_kept_channels(self, peaks):
        """No matrix over the removed ones, which would be the largest; blocks and allocator are most of the rest."""
        assert peaks[FEW_KEPT] <= 1.3 * solve_bytes(*FEW_KEPT)

    def test_of_the_published_models(self):
        """LLaMA-2 7B and 70B with 70% of the MLP's channels."""
        assert solve_bytes(4096, 11008, 7706) < 1.0e9
        assert solve_bytes(8192, 28672, 20070) < 6.3e9

    def test_of_nothing_removed(self):
        assert solve_bytes(4096, 11008, 11008) == 0
