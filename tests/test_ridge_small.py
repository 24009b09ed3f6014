"""Many small ridge problems: the kernel in the interpreter, sweeps of λ, and problems that fail among healthy ones."""

from __future__ import annotations

import pytest
import torch

from grail_kernels import RidgeError, ridge_reference, ridge_solve

pytest.importorskip("triton")


def problems(count, size, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 2 * size + 3, size, generator=generator)
    return x.mT @ x, torch.randn(count, size, columns, generator=generator)


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
    from grail_kernels.launch_packed import small_ridge

    a, rhs = problems(3, 10, 2)
    a[1] = torch.eye(10)
    a[1, 6, 6] = -1.0
    _, info, pivot = small_ridge(a, rhs, None, torch.zeros(3, dtype=torch.float64))
    assert info == [0, 7, 0]
    assert pivot[1] == 0.0 and pivot[0] > 0


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
