"""The condition number of the factor, and stacks through it one by one: ridge_solve against dense float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import ridge_reference, ridge_solve


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(size: int, rows: int | None = None, *, seed: int = 0) -> torch.Tensor:
    """XᵀX of `rows` rows (default: plenty), float64."""
    x = normal(rows or 4 * size, size, seed=seed)
    return x.mT @ x


def with_spectrum(values: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed)).Q
    return (basis * values) @ basis.mT


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert ((got.double() - want).norm() / want.norm()).item() <= tolerance


class TestStacked:
    FIELDS = ("lam", "info", "retries", "rcond")

    @pytest.mark.parametrize("anchored", [False, True])
    def test_equal_to_one_by_one(self, anchored):
        a = torch.stack([gram(9, seed=s) for s in range(4)])
        rhs = normal(4, 9, 3, seed=9)
        anchor = normal(4, 9, 3, seed=10) if anchored else None
        got = ridge_solve(a, rhs, 0.2, anchor=anchor)
        assert got.solution.shape == (4, 9, 3)
        for i in range(4):
            one = ridge_solve(a[i], rhs[i], 0.2, anchor=anchor[i] if anchored else None)
            assert_close(got.solution[i], one.solution, 1e-12)
            assert [getattr(got, f)[i] for f in self.FIELDS] == [getattr(one, f) for f in self.FIELDS]

    def test_a_singular_one_leaves_the_others_alone(self):
        a = torch.stack([gram(9, seed=0), torch.zeros(9, 9, dtype=torch.float64), gram(9, seed=1)])
        rhs = normal(3, 9, 2, seed=9)
        got = ridge_solve(a, rhs, 0.0)
        for i in (0, 2):
            assert_close(got.solution[i], ridge_reference(a[i], rhs[i], 0.0))
        assert [got.lam[0], got.lam[2]] == [0.0, 0.0]
        assert [got.retries[0], got.retries[2]] == [0, 0]
        assert [got.info[0], got.info[2]] == [0, 0]
        assert got.info[1] != 0
        assert got.retries[1] > 0
        assert got.lam[1] > 0
        assert torch.isfinite(got.solution).all()


class TestConditionNumber:
    MATRICES = {  # noqa: RUF012
        "identity": torch.eye(30, dtype=torch.float64),
        "one": torch.tensor([[5.0]], dtype=torch.float64),
        "two": torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64),
        "gram": gram(60),
        "few-rows": gram(60, 66),
        "graded-1e4": with_spectrum(torch.logspace(0, -4, 50, dtype=torch.float64)),
        "graded-1e10": with_spectrum(torch.logspace(0, -10, 50, dtype=torch.float64)),
        "one-small": with_spectrum(torch.cat([torch.ones(49), torch.tensor([1e-9])]).double()),
        "one-large": with_spectrum(torch.cat([torch.ones(49), torch.tensor([1e9])]).double()),
        "hilbert": 1 / (torch.arange(6.0)[:, None] + torch.arange(6.0) + 1).double(),
        "badly-scaled": gram(40) * torch.logspace(-5, 5, 40).double()[:, None] * torch.logspace(-5, 5, 40).double(),
    }

    @pytest.mark.parametrize("lam", [0.0, 1e-3])
    @pytest.mark.parametrize("name", list(MATRICES))
    def test_within_a_factor_ten(self, name, lam):
        a = self.MATRICES[name]
        got = ridge_solve(a, torch.ones(len(a), 1), lam)
        assert got.retries == 0
        shifted = a + lam * torch.eye(len(a), dtype=torch.float64)
        scale = shifted.diagonal().rsqrt()
        true = 1 / torch.linalg.cond(shifted * scale[:, None] * scale, 1).item()
        assert 0.1 <= got.rcond / true <= 10

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(size=st.integers(1, 40), decades=st.floats(0, 11), seed=st.integers(0, 999))
    def test_random_spectra(self, size, decades, seed):
        a = with_spectrum(torch.logspace(0, -decades, size, dtype=torch.float64), seed=seed)
        a = (a + a.mT) / 2
        got = ridge_solve(a, torch.ones(size, 1), 0.0)
        scale = a.diagonal().rsqrt()
        true = 1 / torch.linalg.cond(a * scale[:, None] * scale, 1).item()
        assert 0.1 <= got.rcond / true <= 10

    @pytest.mark.parametrize(("first", "second"), [(4, 11), (4, 12), (0, 19)])
    @pytest.mark.parametrize("size", [20, 200])
    def test_duplicated_channel(self, size, first, second):
        """The null vector e_i - e_j is orthogonal to the usual starting vector of estimators."""
        x = normal(4 * size, size)
        x[:, first] = x[:, second]
        a = x.mT @ x
        got = ridge_solve(a, torch.ones(size, 1), 0.0)
        assert got.retries >= 1
        shifted = a + got.lam * torch.eye(size, dtype=torch.float64)
        scale = shifted.diagonal().rsqrt()
        true = 1 / torch.linalg.cond(shifted * scale[:, None] * scale, 1).item()
        assert 0.1 <= got.rcond / true <= 10
