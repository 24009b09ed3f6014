"""ridge_solve against the dense float64 formula, on healthy, graded, singular and broken matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import RidgeError, ridge_reference, ridge_solve
from grail_kernels.ridge import MatrixRows, ridge_solve_


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gram(size: int, rows: int | None = None, *, seed: int = 0) -> torch.Tensor:
    """XᵀX of `rows` rows (default: plenty), float64."""
    x = normal(rows or 4 * size, size, seed=seed)
    return x.mT @ x


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert ((got.double() - want).norm() / want.norm()).item() <= tolerance


class TestReference:
    """The specification must itself satisfy its optimality condition."""

    @pytest.mark.parametrize("lam", [0.0, 0.3, 100.0])
    @pytest.mark.parametrize("anchored", [False, True])
    def test_gradient_vanishes(self, lam, anchored):
        a, rhs = gram(6), normal(6, 3, seed=1)
        anchor = normal(6, 3, seed=2) if anchored else None
        x = ridge_reference(a, rhs, lam, anchor).requires_grad_()
        pull = x if anchor is None else x - anchor
        objective = (x * (a @ x)).sum() - 2 * (x * rhs).sum() + lam * pull.square().sum()
        (slope,) = torch.autograd.grad(objective, x)
        assert slope.abs().max() < 1e-9

    def test_by_hand(self):
        got = ridge_reference(torch.tensor([[3.0]]), torch.tensor([[8.0]]), 1.0, torch.tensor([[4.0]]))
        assert got.item() == 3.0  # (8 + 1 * 4) / (3 + 1)


@pytest.mark.parametrize("lam", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("columns", [1, 5, 300])
@pytest.mark.parametrize("size", [1, 2, 7, 130])
def test_matches_the_reference(size, columns, lam):
    a, rhs = gram(size), normal(size, columns, seed=1)
    got = ridge_solve(a, rhs, lam)
    assert_close(got.solution, ridge_reference(a, rhs, lam))
    assert (got.lam, got.info, got.retries) == (lam, 0, 0)


@pytest.mark.parametrize("lam", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("size", [1, 7, 130])
def test_anchored_matches_the_reference(size, lam):
    a, rhs, anchor = gram(size), normal(size, 5, seed=1), normal(size, 5, seed=2)
    assert_close(ridge_solve(a, rhs, lam, anchor=anchor).solution, ridge_reference(a, rhs, lam, anchor))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend(backend):
    a, rhs, anchor = gram(20), normal(20, 3, seed=1), normal(20, 3, seed=2)
    got = ridge_solve(a, rhs, 0.5, anchor=anchor, backend=backend)
    assert_close(got.solution, ridge_reference(a, rhs, 0.5, anchor))
    assert (got.lam, got.info, got.retries) == (0.5, 0, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_solves_in_float64(dtype):
    a, rhs = gram(40).to(dtype), normal(40, 3, seed=1).to(dtype)
    got = ridge_solve(a, rhs, 1e-3)
    assert got.solution.dtype == torch.float64
    assert_close(got.solution, ridge_reference(a, rhs, 1e-3))


def test_badly_scaled_channels_are_solved_without_raising():
    """Channels of very different size are not singular: scaling is not the condition that matters."""
    scale = torch.logspace(-9, 9, 30, dtype=torch.float64)[:, None]
    balanced = gram(30)
    a = (balanced * scale * scale.mT).float()
    got = ridge_solve(a, scale * normal(30, 2, seed=1), 0.0)
    assert (got.retries, got.info, got.lam) == (0, 0, 0.0)
    want = torch.linalg.solve(a.double() / scale / scale.mT, normal(30, 2, seed=1))
    assert_close(scale * got.solution, want)


class TestAnchor:
    def test_huge_ridge_gives_the_anchor(self):
        a, rhs, anchor = gram(12), normal(12, 4, seed=1), normal(12, 4, seed=2)
        assert_close(ridge_solve(a, rhs, 1e14, anchor=anchor).solution, anchor)

    def test_huge_ridge_without_anchor_gives_zero(self):
        assert ridge_solve(gram(12), normal(12, 4, seed=1), 1e14).solution.abs().max() < 1e-10

    def test_zero_ridge_ignores_the_anchor(self):
        a, rhs = gram(12), normal(12, 4, seed=1)
        got = ridge_solve(a, rhs, 0.0, anchor=1e3 * normal(12, 4, seed=2)).solution
        assert_close(got, ridge_reference(a, rhs, 0.0))

    def test_zero_anchor_is_no_anchor(self):
        a, rhs = gram(12), normal(12, 4, seed=1)
        got = ridge_solve(a, rhs, 0.7, anchor=torch.zeros(12, 4)).solution
        assert_close(got, ridge_solve(a, rhs, 0.7).solution, 1e-14)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(lam=st.floats(0, 1e9), size=st.integers(1, 20), seed=st.integers(0, 99))
    def test_an_anchor_that_solves_the_problem_stays(self, lam, size, seed):
        a, anchor = gram(size, seed=seed), normal(size, 2, seed=seed + 1)
        assert_close(ridge_solve(a, a @ anchor, lam, anchor=anchor).solution, anchor, 1e-8)

    @pytest.mark.parametrize("shape", [(12, 1), (1, 4), (13, 4), (12,), (4,), (12, 5)], ids=str)
    def test_anchor_of_another_shape_raises(self, shape):
        with pytest.raises(ValueError):
            ridge_solve(gram(12), normal(12, 4, seed=1), 0.7, anchor=normal(*shape))


def dead_channels() -> torch.Tensor:
    a = gram(20)
    a[[0, 7, 19]] = 0
    a[:, [0, 7, 19]] = 0
    return a


def duplicated_channel() -> torch.Tensor:
    x = normal(80, 20)
    x[:, 4] = x[:, 11]
    return x.mT @ x


SINGULAR = {
    "dead-channels": dead_channels(),
    "dead-channels-float32": dead_channels().float(),
    "duplicated-channel": duplicated_channel(),
    "duplicated-channel-float32": duplicated_channel().float(),
    "fewer-rows-than-channels": gram(20, 5),
    "fewer-rows-than-channels-float32": gram(20, 5).float(),
    "rank-one-float32": torch.ones(20, 20),
    "tiny-scale-float32": gram(20, 5).float() * 1e-20,
}


class TestSingular:
    @pytest.mark.parametrize("name", list(SINGULAR))
    @pytest.mark.parametrize("columns", [1, 6])
    def test_ridge_is_raised_in_tenfold_steps_and_reported(self, name, columns):
        a, rhs = SINGULAR[name], SINGULAR[name].double() @ normal(20, columns, seed=3)
        got = ridge_solve(a, rhs, 0.0)
        mean = a.double().diagonal().mean().item()
        assert got.info != 0
        assert got.retries >= 1
        assert got.lam == pytest.approx(1e-8 * mean * 10 ** (got.retries - 1), rel=1e-9)
        assert got.lam <= mean
        assert torch.isfinite(got.solution).all()
        # the answer belongs to the λ that is reported
        system = a.double() + got.lam * torch.eye(20, dtype=torch.float64)
        assert_close(system @ got.solution, rhs, 1e-8)

    @pytest.mark.parametrize("name", list(SINGULAR))
    def test_consistent_system_is_still_solved(self, name):
        a = SINGULAR[name].double()
        rhs = a @ normal(20, 2, seed=3)
        assert_close(a @ ridge_solve(SINGULAR[name], rhs, 0.0).solution, rhs, 1e-3)

    @pytest.mark.parametrize("relative", [1e-3, 1e-1])
    @pytest.mark.parametrize("name", list(SINGULAR))
    def test_a_sufficient_ridge_is_used_as_given(self, name, relative):
        a = SINGULAR[name]
        lam = relative * a.double().diagonal().mean().item()
        got = ridge_solve(a, normal(20, 2, seed=3) * lam, lam)
        assert (got.lam, got.info, got.retries) == (lam, 0, 0)

    def test_an_insufficient_ridge_is_multiplied_by_ten(self):
        a = SINGULAR["fewer-rows-than-channels-float32"]
        mean = a.double().diagonal().mean().item()
        lam = 3e-11 * mean
        got = ridge_solve(a, normal(20, 2, seed=3), lam)
        assert got.retries >= 1
        assert got.lam == pytest.approx(1e-8 * mean * 10 ** (got.retries - 1), rel=1e-9)

    @pytest.mark.parametrize(("first", "second"), [(4, 11), (4, 12), (0, 199)])
    def test_duplicate_down_to_float32_noise_is_singular(self, first, second):
        """Two channels that differ by 1e-5 of their size: their difference, 1e-10 of A, is below float32's 6e-8, so
        a float32 Gram matrix cannot tell it from noise and no answer may be built on it."""
        x = normal(800, 200)
        x[:, second] = x[:, first] + 1e-5 * normal(800, seed=1)
        got = ridge_solve(x.mT @ x, normal(200, 1, seed=2), 0.0)
        assert (got.retries, got.info) == (0, 0)  # float64 carries it
        rounded = (x.mT @ x).float()
        got = ridge_solve(rounded, normal(200, 1, seed=2), 0.0)
        assert got.retries >= 1
        assert got.info != 0

    def test_zero_matrix(self):
        got = ridge_solve(torch.zeros(5, 5), torch.zeros(5, 2), 0.0)
        assert got.info != 0
        assert got.retries >= 1
        assert got.lam > 0
        assert not got.solution.any()

    def test_zero_matrix_with_anchor_stays_at_the_anchor(self):
        anchor = normal(5, 2)
        assert_close(ridge_solve(torch.zeros(5, 5), torch.zeros(5, 2), 0.0, anchor=anchor).solution, anchor)

    def test_dead_channels_stay_at_the_anchor(self):
        anchor = normal(20, 2, seed=5)
        got = ridge_solve(dead_channels(), dead_channels() @ normal(20, 2, seed=6), 0.0, anchor=anchor)
        assert_close(got.solution[[0, 7, 19]], anchor[[0, 7, 19]])

    def test_hopeless_matrix_raises(self):
        """No λ up to mean(diag A) = 1 makes this indefinite matrix positive."""
        with pytest.raises(RidgeError):
            ridge_solve(torch.tensor([[1.0, 10.0], [10.0, 1.0]]), torch.ones(2, 1), 0.0)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["matrix", "matrix-diagonal", "rhs", "anchor"])
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_nan_and_infinity_raise(where, poison, lam, backend):
    a, rhs, anchor = gram(6), normal(6, 2, seed=1), normal(6, 2, seed=2)
    if where == "matrix":
        a[1, 2] = a[2, 1] = poison
    elif where == "matrix-diagonal":
        a[3, 3] = poison
    else:
        (rhs if where == "rhs" else anchor)[4, 1] = poison
    with pytest.raises(RidgeError):
        ridge_solve(a, rhs, lam, anchor=anchor, backend=backend)


def test_the_reference_names_a_singular_matrix():
    with pytest.raises(RidgeError, match="reference"):
        ridge_solve(torch.zeros(3, 3), torch.ones(3, 1), 0.0, backend="reference")


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_unknowns_and_no_right_hand_sides(backend):
    """As LAPACK's quick return."""
    got = ridge_solve(torch.ones(0, 0), torch.ones(0, 3), 0.1, backend=backend)
    assert (got.solution.shape, got.info, got.retries) == ((0, 3), 0, 0)
    assert ridge_solve(gram(4), torch.ones(4, 0), 0.1, backend=backend).solution.shape == (4, 0)


def test_gradients_and_autocast_do_not_apply():
    a, rhs = gram(60).float(), normal(60, 3, seed=1).float()
    want = ridge_solve(a, rhs, 0.1, solve_dtype=torch.float32).solution
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ridge_solve(a.requires_grad_(), rhs.requires_grad_(), 0.1, solve_dtype=torch.float32).solution
    assert not got.requires_grad
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["healthy", *SINGULAR])
def test_inputs_are_only_read(name):
    a = gram(20) if name == "healthy" else SINGULAR[name].clone()
    rhs, anchor = normal(20, 3, seed=1), normal(20, 3, seed=2)
    kept = a.clone(), rhs.clone(), anchor.clone()
    ridge_solve(a, rhs, 0.0, anchor=anchor)
    ridge_solve(a, rhs, 0.0)
    assert all(torch.equal(now, then) for now, then in zip((a, rhs, anchor), kept, strict=True))


def test_solution_does_not_alias_the_inputs():
    a, rhs = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    ridge_solve(a, rhs, 0.0).solution.zero_()
    assert torch.equal(rhs, torch.ones(3, 1, dtype=torch.float64))


def test_strided_inputs():
    big_a, big_rhs = gram(24), normal(5, 24, seed=1)
    a, rhs = big_a[::2, ::2], big_rhs[:, ::2].mT
    assert_close(ridge_solve(a.mT, rhs, 0.3).solution, ridge_reference(a.contiguous(), rhs.contiguous(), 0.3))


@pytest.mark.parametrize(
    ("a_shape", "rhs_shape"),
    [
        pytest.param((4, 5), (4, 1), id="not-square"),
        pytest.param((4, 4), (5, 1), id="rows-differ"),
        pytest.param((4, 4), (4,), id="vector"),
        pytest.param((2, 4, 4), (4, 1), id="stack-against-one"),
        pytest.param((2, 4, 4), (3, 4, 1), id="stacks-differ"),
    ],
)
def test_shapes_that_do_not_fit_raise(a_shape, rhs_shape):
    with pytest.raises(ValueError):
        ridge_solve(torch.ones(a_shape), torch.ones(rhs_shape), 1.0)


@pytest.mark.parametrize("lam", [-1.0, -1e-12, math.nan, math.inf], ids=str)
def test_negative_or_non_finite_ridge_raises(lam):
    with pytest.raises(ValueError):
        ridge_solve(gram(3), torch.ones(3, 1), lam)


class TestInPlace:
    """A by rows, the solution over the right-hand side: otherwise as ridge_solve."""

    @staticmethod
    def read(a, log):
        """A's rows, each reading in the log."""
        return MatrixRows(len(a), a.device, lambda start, end: log.append((start, end)) or a[start:end])

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("name", ["healthy", *SINGULAR])
    def test_same_bits_as_ridge_solve(self, name, transposed):
        a = gram(20) if name == "healthy" else SINGULAR[name]
        rhs = normal(6, 20, seed=1).mT if transposed else normal(20, 6, seed=1)
        want, log = ridge_solve(a, rhs, 0.0), []
        kept = a.clone()
        got = ridge_solve_(self.read(a, log), rhs, 0.0)
        assert got.solution is rhs
        assert torch.equal(rhs, want.solution)
        assert (got.lam, got.info, got.retries, got.rcond) == (want.lam, want.info, want.retries, want.rcond)
        assert len(log) == 1 + got.retries
        assert torch.equal(a, kept)

    @pytest.fixture
    def eight_rows_at_once(self, monkeypatch):
        monkeypatch.setattr("grail_kernels.cholesky.BLOCK_ROWS", 8)
        monkeypatch.setattr("grail_kernels.cholesky.BLOCK_NUMBERS", 1)

    @pytest.mark.usefixtures("eight_rows_at_once")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_more_rows_than_are_read_at_once(self, dtype):
        """Also with an anchor, and where the residuals of a float32 factor need A again."""
        a, rhs, anchor, log = gram(20), normal(20, 3, seed=1), normal(20, 3, seed=2), []
        got = ridge_solve(a, rhs, 0.3, anchor=anchor, solve_dtype=dtype)
        assert_close(got.solution, ridge_reference(a, rhs, 0.3, anchor))
        want = ridge_reference(a, rhs, 0.3)
        assert_close(ridge_solve_(self.read(a, log), rhs, 0.3).solution, want)
        assert log == [(0, 8), (8, 16), (16, 20)]

    @pytest.mark.usefixtures("eight_rows_at_once")
    @pytest.mark.parametrize("row", [0, 7, 8, 19])
    def test_nan_in_any_block(self, row):
        a = gram(20)
        a[row, 3] = math.nan
        with pytest.raises(RidgeError, match="matrix"):
            ridge_solve_(MatrixRows.of(a), normal(20, 3, seed=1), 0.3)

    def test_a_strided_right_hand_side(self):
        a, wide = gram(20), normal(40, 12, seed=1)
        want = ridge_reference(a, wide[::2, ::3].clone(), 0.3)
        rest = wide[1::2].clone()
        ridge_solve_(MatrixRows.of(a), wide[::2, ::3], 0.3)
        assert_close(wide[::2, ::3], want)
        assert torch.equal(wide[1::2], rest)

    def test_reference_backend(self):
        a, rhs = gram(20), normal(20, 3, seed=1)
        want = ridge_reference(a, rhs, 0.3)
        got = ridge_solve_(MatrixRows.of(a), rhs, 0.3, backend="reference")
        assert got.solution is rhs
        assert_close(rhs, want)

    @pytest.mark.parametrize("where", ["matrix", "rhs", "hopeless"])
    def test_failures_raise(self, where):
        a, rhs = gram(2), normal(2, 2, seed=1)
        if where == "hopeless":
            a = torch.tensor([[1.0, 10.0], [10.0, 1.0]])
        else:
            (a if where == "matrix" else rhs)[1, 0] = math.nan
        with pytest.raises(RidgeError):
            ridge_solve_(MatrixRows.of(a), rhs, 0.0)

    @pytest.mark.parametrize(
        "rhs",
        [
            pytest.param(torch.ones(20, 2), id="float32"),
            pytest.param(torch.ones(19, 2, dtype=torch.float64), id="rows-differ"),
            pytest.param(torch.ones(20, dtype=torch.float64), id="vector"),
        ],
    )
    def test_a_right_hand_side_that_cannot_hold_the_solution_is_refused(self, rhs):
        with pytest.raises(ValueError, match="float64 with 20 rows"):
            ridge_solve_(MatrixRows.of(gram(20)), rhs, 0.3)

    @pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf, [0.1, 0.2]], ids=str)
    def test_another_ridge_than_one_number_is_refused(self, lam):
        with pytest.raises(ValueError, match="λ"):
            ridge_solve_(MatrixRows.of(gram(3)), torch.ones(3, 1, dtype=torch.float64), lam)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 25), columns=st.integers(1, 6), lam=st.floats(0, 1e6), anchored=st.booleans(),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_any_size_and_ridge(size, columns, lam, anchored, seed):
    a, rhs = gram(size, seed=seed), normal(size, columns, seed=seed + 1)
    anchor = normal(size, columns, seed=seed + 2) if anchored else None
    got = ridge_solve(a, rhs, lam, anchor=anchor)
    assert_close(got.solution, ridge_reference(a, rhs, lam, anchor), 1e-8)
