"""Many small ridge problems: the kernel in the interpreter, sweeps of λ, and problems that fail among healthy ones."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import RidgeError, ridge_reference, ridge_solve

pytest.importorskip("triton")

from grail_kernels.small import solve_small


def problems(count, size, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2 * size + 3, size, generator=generator)
    a = x.mT @ x
    return (a + a.mT) / 2, torch.randn(count, size, columns, generator=generator)


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("count", "size", "columns"), [(1, 1, 1), (3, 7, 2), (2, 33, 70), (2, 64, 5)])
@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
def test_a_stack_equals_the_reference(backend, count, size, columns, anchored):
    a, rhs = problems(count, size, columns)
    anchor = torch.randn_like(rhs) if anchored else None
    found = ridge_solve(a, rhs, 0.1, anchor=anchor, backend=backend)
    assert found.info == [0] * count and found.retries == [0] * count and found.lam == [0.1] * count
    for i in range(count):
        expected = ridge_reference(a[i], rhs[i], 0.1, None if anchor is None else anchor[i])
        assert error(found.solution[i], expected) < 1e-6


def test_the_largest_size_of_the_kernel():
    a, rhs = problems(1, 128, 3)
    found = ridge_solve(a, rhs, 1.0, backend="triton")
    assert error(found.solution[0], ridge_reference(a[0], rhs[0], 1.0)) < 1e-6


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_sweep_of_lambda_on_one_matrix(backend):
    a, rhs = problems(1, 20, 4)
    lams = [0.0, 1e-3, 1.0, 1e3]
    found = ridge_solve(a[0], rhs[0], lams, backend=backend)
    assert found.lam == lams
    for solution, lam in zip(found.solution, lams, strict=True):
        assert error(solution, ridge_reference(a[0], rhs[0], lam)) < 1e-6
    with pytest.raises(ValueError):
        ridge_solve(problems(3, 5, 1)[0], problems(3, 5, 1)[1], [0.1, 0.2], backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_singular_problem_raises_its_own_lambda_and_leaves_the_others_alone(backend):
    a, rhs = problems(4, 12, 3)
    alone = ridge_solve(a[[0, 2, 3]], rhs[[0, 2, 3]], 0.0, backend=backend).solution
    a[1, :, 5] = a[1, :, 4]
    a[1, 5, :] = a[1, 4, :]
    found = ridge_solve(a, rhs, 0.0, backend=backend)
    assert torch.equal(found.solution[[0, 2, 3]], alone)
    assert found.retries[1] > 0 and found.lam[1] > 0 and found.info[1] != 0
    assert found.retries[0] == found.retries[2] == found.retries[3] == 0
    assert torch.isfinite(found.solution[1]).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_nan_names_its_problem(backend):
    a, rhs = problems(3, 6, 2)
    a[2, 0, 0] = float("nan")
    with pytest.raises(RidgeError, match="problem 2 of 3"):
        ridge_solve(a, rhs, 0.1, backend=backend)


def test_the_kernel_reports_the_first_pivot_that_failed():
    a, rhs = problems(3, 10, 2)
    a[1] = torch.eye(10)
    a[1, 6, 6] = -1.0
    found = solve_small(a, rhs, None, torch.zeros(3, dtype=torch.float64))
    assert found.info == [0, 7, 0]
    assert found.accepted == [True, False, True]
    assert found.rcond[1] == 0.0


def kahan(size, theta=1.0):
    """RᵀR of Kahan's matrix: every pivot of its Cholesky factor is harmless, its condition is not."""
    sine, cosine = torch.tensor(theta, dtype=torch.float64).sin(), torch.tensor(theta, dtype=torch.float64).cos()
    upper = torch.eye(size, dtype=torch.float64) - cosine * torch.ones(size, size, dtype=torch.float64).triu(1)
    upper = sine ** torch.arange(size, dtype=torch.float64)[:, None] * upper
    scale = upper.norm(dim=0)
    return (upper / scale).mT @ (upper / scale)


def low_rank(size=128, rank=40):
    """Float32 rounding decides the pivots after the first `rank`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * size, rank, generator=generator) @ torch.randn(rank, size, generator=generator)
    x += 1e-3 * torch.randn(4 * size, size, generator=generator)
    return (x.double().mT @ x.double()).float()


HARD = {"low rank and noise": low_rank(), "kahan": kahan(40), "kahan float32": kahan(24, 1.2).float()}


@pytest.mark.parametrize("name", HARD)
def test_an_answer_that_float32_cannot_carry_is_not_the_kernels(name):
    """The kernel's result is that of the float64 path: λ, raises, condition and all."""
    a = HARD[name][None]
    rhs = torch.randn(1, a.shape[1], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = ridge_solve(a, rhs, 0.0, backend="triton")
    trusted = ridge_solve(a, rhs, 0.0, backend="torch")
    assert (found.lam, found.info, found.retries) == (trusted.lam, trusted.info, trusted.retries)
    assert error(found.solution, trusted.solution) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_condition_beyond_the_precision_of_a_is_singular(backend, dtype):
    """rcond 2e-3: data in float32, noise in bf16 (eps 8e-3)."""
    a = torch.eye(6, dtype=torch.float64)
    a[0, 1] = a[1, 0] = 1 - 2**-8
    found = ridge_solve(a[None].to(dtype), torch.ones(1, 6, 1), 0.0, backend=backend)
    assert (found.retries[0] > 0) == (dtype == torch.bfloat16)


def test_the_kernels_condition_is_the_true_one():
    a, rhs = problems(3, 20, 2)
    scale = a.diagonal(dim1=1, dim2=2).double().rsqrt()
    true = torch.stack([1 / torch.linalg.cond(s[:, None] * m.double() * s, 1) for m, s in zip(a, scale, strict=True)])
    found = solve_small(a, rhs, None, torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(torch.tensor(found.rcond, dtype=torch.float64), true, rtol=1e-3)


def test_badly_scaled_problems_stay_in_the_kernel():
    a, rhs = problems(2, 10, 2)
    scale = torch.logspace(-12, 12, 10, dtype=torch.float64)
    hard = scale[:, None] * a.double() * scale
    found = solve_small(hard, scale[:, None] * rhs.double(), None, torch.zeros(2, dtype=torch.float64))
    assert found.accepted == [True, True]
    expected = torch.linalg.solve(a.double(), rhs.double())
    assert error(scale[:, None] * found.solution, expected) < 1e-6


def test_a_stack_is_factored_once_whatever_follows(monkeypatch):
    from grail_kernels import launch_packed

    factored = []
    real = launch_packed.factor_stack
    monkeypatch.setattr(launch_packed, "factor_stack", lambda a: factored.append(len(a)) or real(a))
    a, rhs = problems(2, 9, 70)
    ridge_solve(a, rhs, 0.1, backend="triton")
    assert factored == [2]


def test_a_given_solve_dtype_is_not_ignored(monkeypatch):
    from grail_kernels import small

    monkeypatch.setattr(small, "solve_small", lambda *_: pytest.fail("the float32 kernel ran"))
    a, rhs = problems(2, 9, 3)
    found = ridge_solve(a, rhs, 0.1, backend="triton", solve_dtype=torch.float64)
    assert error(found.solution[0], ridge_reference(a[0], rhs[0], 0.1)) < 1e-12


FAILING = {
    "nan": (lambda a, rhs: a[1, 0, 0].fill_(float("nan")), -2),
    "infinite right-hand side": (lambda a, rhs: rhs[1, 2, 0].fill_(float("inf")), -2),
    "indefinite": (lambda a, rhs: a[1].copy_(torch.eye(6) + 9 * (1 - torch.eye(6))), 2),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("failing", FAILING)
def test_a_bad_problem_leaves_the_others_their_answers(backend, failing):
    a, rhs = problems(4, 6, 2)
    alone = ridge_solve(a[[0, 2, 3]], rhs[[0, 2, 3]], 0.1, backend=backend)
    spoil, info = FAILING[failing]
    spoil(a, rhs)
    found = ridge_solve(a, rhs, 0.1, backend=backend, on_error="report")
    assert torch.equal(found.solution[[0, 2, 3]], alone.solution)
    assert found.info == [0, info, 0, 0]
    assert torch.isnan(found.solution[1]).all() and torch.isnan(torch.tensor([found.lam[1], found.rcond[1]])).all()
    with pytest.raises(RidgeError, match="problem 1 of 4") as caught:
        ridge_solve(a, rhs, 0.1, backend=backend)
    assert (caught.value.problem, caught.value.info) == (1, info)


def test_a_report_of_one_problem():
    found = ridge_solve(torch.full((2, 2), float("nan")), torch.ones(2, 1), 0.1, on_error="report")
    assert found.info == -2 and torch.isnan(found.solution).all()
    with pytest.raises(ValueError, match="ignore"):
        ridge_solve(torch.eye(2), torch.ones(2, 1), 0.1, on_error="ignore")


@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
def test_a_float32_factor_is_refined(anchored):
    """The rule for matrices too large for float64 on a GPU, forced here."""
    a, rhs = problems(1, 150, 6)
    anchor = torch.randn_like(rhs[0]) if anchored else None
    found = ridge_solve(a[0], rhs[0], 1e-3, anchor=anchor, solve_dtype=torch.float32)
    assert error(found.solution, ridge_reference(a[0], rhs[0], 1e-3, anchor)) < 1e-9


def test_a_nearly_singular_problem_is_not_left_to_float32():
    """A pivot that rounding decides sends the problem to float64, not to a raised λ."""
    a = torch.eye(8, dtype=torch.float64)
    a[0, 1] = a[1, 0] = 1 - 1e-8
    rhs = torch.arange(8.0, dtype=torch.float64)[:, None]
    found = ridge_solve(a[None], rhs[None], 0.0, backend="triton")
    assert found.retries == [0]
    assert error(found.solution[0], ridge_reference(a, rhs, 0.0)) < 1e-6
