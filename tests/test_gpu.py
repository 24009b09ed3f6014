"""The kernels on a GPU, against float64: sizes that fill it, odd ones, poisoned workspaces, the same bits every time.

`make test-gpu` runs these. The kernels' other tests run in Triton's interpreter, which a process has either for all
kernels or for none.
"""

from __future__ import annotations

import os

import pytest
import torch

from grail_kernels import (
    CrossAccumulator,
    GramAccumulator,
    PackedSymmetric,
    RidgeError,
    backend,
    cross_reference,
    gram_reference,
    ridge_reference,
    ridge_solve,
)

pytestmark = pytest.mark.skipif(
    os.environ.get("GRAIL_TEST_GPU") != "1" or not torch.cuda.is_available(), reason="make test-gpu, on a GPU"
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = [(1, 1), (63, 7), (257, 96), (1000, 130), (9001, 1000), (5000, 2049), (12000, 4096), (4100, 11008)]
UNROUNDED = {torch.bfloat16: 1e-6, torch.float16: 2.5e-6, torch.float32: 5e-6}
"""Matrix units do not round to nearest, and of products of 11 bits they lose more than of products of 8; float32 is
multiplied as two bf16 parts, three products: 16 bits."""
CENTRED = 1e-5


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def bound(x):
    if x.dtype == torch.float32 and min(x.reshape(-1, x.shape[-1]).shape) < 32:
        return 2**-16  # one product; over a matrix it averages
    return UNROUNDED[x.dtype]


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.fixture(params=["pointer", "tma"])
def kernel(request, monkeypatch):
    """Both ways to fetch operands; several sites at once take the pointer kernel under either name."""
    monkeypatch.setenv("GRAIL_KERNELS_GRAM", request.param)
    return request.param


@pytest.mark.parametrize("operation", ["gram", "packed", "ridge"])
def test_triton_is_the_default(operation):
    assert backend(operation, "cuda").name == "triton"


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), SHAPES)
def test_gram(poisoned, kernel, count, width, dtype, masked):
    x = randn(count, width, dtype=DTYPES[dtype])
    mask = torch.arange(count, device="cuda") % 3 != 1 if masked else None
    dirty = x.clone()
    if masked:
        dirty[~mask] = float("nan")
    found = GramAccumulator(width, device="cuda").update(dirty, mask)
    kept = x if mask is None else x[mask]
    assert found.backend.name == "triton"
    dense = found.to_dense()
    assert error(dense, gram_reference(kept)) <= bound(kept)
    assert torch.equal(dense, dense.mT)
    scale = kept.double().abs().sum(0).clamp_min(1)
    assert ((found.sum.double() - kept.double().sum(0)).abs() / scale).max() <= 2e-5
    assert found.count == len(kept)


def test_the_same_bits_every_time(kernel):
    """A race would show as bits that change."""
    for count, width, dtype in ((30000, 200, "bf16"), (9000, 3000, "fp32"), (9000, 3000, "bf16"), (4100, 8200, "fp32")):
        x = randn(count, width, dtype=DTYPES[dtype])
        first = GramAccumulator(width, device="cuda").update(x)
        for _ in range(10):
            again = GramAccumulator(width, device="cuda").update(x)
            assert torch.equal(again.packed.data, first.packed.data) and torch.equal(again.sum, first.sum)
        y = randn(count, 520, dtype=DTYPES[dtype], seed=5)
        moments = [CrossAccumulator(width, 520, device="cuda").update(x, y).value for _ in range(5)]
        assert all(torch.equal(moment, moments[0]) for moment in moments)


@pytest.mark.parametrize("precise", [False, True])
def test_a_long_stream(precise):
    x = randn(200_000, 96, dtype=torch.bfloat16) + 2
    found = GramAccumulator(96, device="cuda", precise=precise)
    for part in x.split(7_000):
        found.update(part)
    assert error(found.to_dense(), gram_reference(x)) <= (5e-7 if precise else 1e-6)


def test_more_elements_than_an_int32_counts():
    x = randn(1, 11008, dtype=torch.bfloat16).expand(200_000, 11008).contiguous()
    x[-1] = randn(11008, dtype=torch.bfloat16, seed=1)
    found = GramAccumulator(11008, device="cuda").update(x)
    expected = 199_999 * torch.outer(x[0].double(), x[0].double()) + torch.outer(x[-1].double(), x[-1].double())
    assert error(found.to_dense(), expected) <= 1e-6


VIEWS = {
    "transposed": lambda: randn(4000, 900, dtype=torch.float16).mT,
    "every other row": lambda: randn(1800, 400, dtype=torch.float16)[::2],
    "middle columns": lambda: randn(900, 800, dtype=torch.float16)[:, 20:600],
    "every other column": lambda: randn(900, 800)[:, ::2],
    "windows": lambda: randn(3, 300, 400, dtype=torch.bfloat16),
    "odd address": lambda: randn(900 * 400 + 1, dtype=torch.bfloat16)[1:].view(900, 400),
    "one row many times": lambda: randn(1, 400, dtype=torch.bfloat16).expand(900, 400),
    "rows that overlap": lambda: randn(900 * 16 + 64, dtype=torch.bfloat16).unfold(0, 64, 16),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(poisoned, kernel, view):
    x = VIEWS[view]()
    found = GramAccumulator(x.shape[-1], device="cuda").update(x)
    assert error(found.to_dense(), gram_reference(x.reshape(-1, x.shape[-1]))) <= bound(x)


def test_heads_of_one_tensor_are_sites(poisoned):
    x = randn(3000, 8 * 64, dtype=torch.bfloat16)
    heads = x.view(3000, 8, 64).transpose(0, 1)
    mask = torch.rand(8, 3000, device="cuda") > 0.3
    found = GramAccumulator(64, sites=8, device="cuda").update(heads, mask)
    assert found.count == mask.sum(1).tolist()
    for site in range(8):
        assert error(found.packed[site].to_dense(), gram_reference(heads[site][mask[site]])) <= 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_about_the_mean(dtype):
    x = (randn(5000, 300) + torch.linspace(-100, 100, 300, device="cuda")).to(DTYPES[dtype])
    found = GramAccumulator(300, centred=True, device="cuda")
    for part in x.split(1700):
        found.update(part)
    deviations = x.double() - x.double().mean(0)
    assert error(found.to_dense(), deviations.mT @ deviations) <= CENTRED
    assert error(found.raw_packed().to_dense(), gram_reference(x)) <= CENTRED


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "width", "columns"), [(1, 1, 1), (150, 70, 45), (9001, 1536, 576), (3000, 4097, 4096)]
)
def test_cross_moment(poisoned, kernel, count, width, columns, dtype, masked):
    x, y = randn(count, width, dtype=DTYPES[dtype]), randn(count, columns, dtype=DTYPES[dtype], seed=3)
    mask = torch.arange(count, device="cuda") % 4 != 2
    dirty, dirty_y = x.clone(), y.clone()
    if masked:
        dirty[~mask], dirty_y[~mask] = float("nan"), float("nan")
    found = CrossAccumulator(width, columns, device="cuda").update(dirty, dirty_y, mask if masked else None)
    kept = mask if masked else torch.ones_like(mask)
    assert error(found.value, cross_reference(x[kept], y[kept])) <= (2**-15 if dtype == "fp32" else UNROUNDED[x.dtype])


def symmetric(width):
    x = randn(width, width)
    return x + x.mT


@pytest.mark.parametrize("width", [1, 127, 1536, 5000])
def test_packed_matrix(width):
    dense = symmetric(width)
    held = PackedSymmetric.from_dense(dense, padded=True)
    assert (held.backend.name, held.data.device.type) == ("triton", "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    rows = torch.randint(width, (width + 1,), generator=generator, device="cuda")
    cols = torch.randperm(width, generator=generator, device="cuda")[: width // 2 + 1]
    assert torch.equal(held.to_dense(), dense)
    assert torch.equal(held.diagonal(), dense.diagonal())
    assert torch.equal(held.gather(rows, cols), dense[rows][:, cols])
    right = randn(width, 77, seed=2)
    expected = dense.double() @ right.double()
    assert error(held.matmul(right), expected) <= 2e-6
    values = symmetric(len(cols))
    held.scatter_(cols, values.tril())
    dense[cols[:, None], cols] = values
    assert torch.equal(held.to_dense(), dense)


def problems(count, size, columns, seed=0):
    x = randn(count, 2 * size + 3, size, seed=seed)
    a = x.mT @ x
    return (a + a.mT) / 2, randn(count, size, columns, seed=seed + 1)


@pytest.mark.parametrize(
    ("count", "size", "columns"), [(1, 1, 1), (3, 7, 2), (40, 33, 70), (32, 64, 5), (64, 128, 192)]
)
@pytest.mark.parametrize("anchored", [False, True], ids=["plain", "anchored"])
@pytest.mark.parametrize("asked", ["torch", "triton"])
def test_a_stack_of_small_systems(count, size, columns, anchored, asked):
    a, rhs = problems(count, size, columns)
    anchor = torch.randn_like(rhs) if anchored else None
    found = ridge_solve(a, rhs, 0.1, anchor=anchor, backend=asked)
    assert found.info == [0] * count and found.retries == [0] * count
    for i in range(count):
        expected = ridge_reference(a[i], rhs[i], 0.1, None if anchor is None else anchor[i])
        assert error(found.solution[i], expected) < 1e-6


def test_bad_problems_of_a_stack_leave_the_others_alone():
    a, rhs = problems(6, 90, 33)
    alone = ridge_solve(a[[0, 2, 4]], rhs[[0, 2, 4]], 0.0).solution
    a[1, :, 5], a[1, 5, :] = a[1, :, 4], a[1, 4, :]
    a[3, 0, 0] = float("nan")
    a[5] = torch.eye(90, device="cuda")
    a[5, 60, 60] = -1.0
    found = ridge_solve(a, rhs, 0.0, on_error="report")
    assert torch.equal(found.solution[[0, 2, 4]], alone)
    assert found.info[3] == -2 and found.retries[1] > 0 and found.info[5] == 61
    with pytest.raises(RidgeError, match="problem 3 of 6"):
        ridge_solve(a, rhs, 0.0)


@pytest.mark.parametrize("size", [150, 1075, 2880])
@pytest.mark.parametrize(("dtype", "tolerance"), [(None, 1e-9), (torch.float32, 1e-7)], ids=["float64", "refined"])
def test_one_large_system(size, dtype, tolerance):
    a, rhs = problems(1, size, 64)
    lam = 1e-3 * a[0].diagonal().mean().item()
    found = ridge_solve(a[0], rhs[0], lam, solve_dtype=dtype)
    assert found.retries == 0
    assert error(found.solution, ridge_reference(a[0], rhs[0], lam)) < tolerance


def test_another_stream():
    x = randn(5000, 1000, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = GramAccumulator(1000, device="cuda")
        for part in x.split(700):
            found.update(part)
        dense = found.to_dense()
    torch.cuda.current_stream().wait_stream(stream)
    assert error(dense, gram_reference(x)) <= 1e-6


def test_states_move_between_devices_and_backends():
    x = randn(900, 700)
    started = GramAccumulator(700, device="cpu").update(x[:500].cpu())
    continued = GramAccumulator(700, device="cuda")
    continued.load_state_dict(started.state_dict())
    continued.update(x[500:])
    assert error(continued.to_dense(), gram_reference(x)) <= bound(x)
