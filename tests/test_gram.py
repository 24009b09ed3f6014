"""GramAccumulator against XᵀX in float64: any sizes, dtypes, strides, masks and cuts of the stream."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import GramAccumulator, gram_reference

TOLERANCE = 1e-6  # relative Frobenius error


def activations(rows: int, width: int, *, seed: int = 0, offset: float = 0.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) + offset


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def accumulate(*chunks: torch.Tensor, **options) -> GramAccumulator:
    accumulator = GramAccumulator(chunks[0].shape[-1], **options)
    for chunk in chunks:
        accumulator.update(chunk)
    return accumulator


def assert_gram_of(accumulator: GramAccumulator, rows_TH: torch.Tensor) -> None:
    """The accumulator holds exactly these rows: Gram matrix, column sums, count, symmetry."""
    gram = accumulator.to_dense()
    assert gram.dtype == torch.float32
    assert error(gram, gram_reference(rows_TH)) <= TOLERANCE
    assert torch.equal(gram, gram.mT)
    assert torch.equal(accumulator.diagonal(), gram.diagonal())
    assert accumulator.count == len(rows_TH)
    torch.testing.assert_close(
        accumulator.sum.double(), rows_TH.double().sum(0), rtol=1e-6, atol=1e-6 * max(len(rows_TH), 1)
    )


def test_reference_by_hand():
    got = gram_reference(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(got, torch.tensor([[10.0, 14.0], [14.0, 20.0]], dtype=torch.float64))


@pytest.mark.parametrize("offset", [0.0, 2.0], ids=["centred", "biased"])
@pytest.mark.parametrize("width", [1, 7, 130, 400])
@pytest.mark.parametrize("rows", [1, 13, 63, 1000, 9001])
def test_matches_float64(rows, width, offset):
    x = activations(rows, width, offset=offset)
    assert_gram_of(accumulate(x), x)


@pytest.mark.parametrize("tile", [1, 16, 64, 129, 130, 500])
def test_any_tile_edge(tile):
    x = activations(300, 130)
    accumulator = accumulate(x, tile=tile)
    assert accumulator.packed.tile == tile
    assert_gram_of(accumulator, x)


@pytest.mark.parametrize("width", [1, 7, 130])
@pytest.mark.parametrize("offset", [0.0, 2.0], ids=["centred", "biased"])
def test_one_long_chunk(width, offset):
    """262,144 rows in one update: the error must not grow with the chain."""
    x = activations(262_144, width, offset=offset)
    assert error(accumulate(x).to_dense(), gram_reference(x)) <= TOLERANCE


@pytest.mark.parametrize("offset", [0.0, 2.0], ids=["centred", "biased"])
def test_many_updates(offset):
    """250 updates; float32 storage itself costs about 3e-8 * sqrt(updates)."""
    x = activations(50_000, 70, offset=offset)
    assert_gram_of(accumulate(*x.split(200), tile=32), x)


def test_precise_is_no_worse():
    x = activations(50_000, 130, offset=2.0)
    accumulator = accumulate(x, precise=True)
    assert accumulator.precise
    assert error(accumulator.to_dense(), gram_reference(x)) <= TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_every_backend(backend):
    x = activations(500, 130)
    accumulator = accumulate(*x.split(77), backend=backend, tile=48)
    assert accumulator.backend.name == backend
    assert_gram_of(accumulator, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_input_dtypes(dtype):
    """Products and sums are float32: the only rounding of the data is the input's own."""
    x = activations(1000, 130).to(dtype)
    assert_gram_of(accumulate(*x.split(300)), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_small_integers_are_exact(dtype):
    x = torch.randint(-8, 9, (777, 130), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(accumulate(*x.split(100), tile=48).to_dense().double(), gram_reference(x))


def test_float16_squares_beyond_its_range():
    x = torch.full((10, 3), 40_000.0, dtype=torch.float16)
    torch.testing.assert_close(accumulate(x).diagonal(), torch.full((3,), 1.6e10), rtol=1e-6, atol=0)


BASE = activations(60 * 4, 64).view(60, 4, 64)
VIEWS = {
    "three-axes": BASE,
    "transposed-batch": BASE.transpose(0, 1),
    "transposed-width": BASE[:, 0].mT,
    "every-other-row": BASE[::2],
    "every-other-channel": BASE[..., ::2],
    "channel-slice": BASE[..., 5:40],
    "broadcast-rows": BASE[:1, :1].expand(9, 5, 64),
    "one-row": BASE[0, 0],
    "no-rows": BASE[:0],
}


@pytest.mark.parametrize("view", list(VIEWS))
def test_views(view):
    x, original = VIEWS[view], BASE.clone()
    accumulator = accumulate(x, tile=24)
    if x.numel():
        assert_gram_of(accumulator, x.reshape(-1, x.shape[-1]))
    else:
        assert accumulator.count == 0
        assert not accumulator.to_dense().any()
    assert torch.equal(BASE, original)


def test_gradient_is_not_recorded():
    x = activations(20, 7).requires_grad_()
    assert not accumulate(x).to_dense().requires_grad


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_masked_rows_cannot_leak(poison, backend):
    x = activations(6 * 50, 130).view(6, 50, 130)
    mask = torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) < 0.7
    poisoned = torch.where(mask[..., None], x, torch.tensor(poison))
    accumulator = GramAccumulator(130, backend=backend, tile=48).update(poisoned, mask)
    assert_gram_of(accumulator, x[mask])


def test_all_rows_masked_changes_nothing():
    x = activations(50, 9)
    accumulator = accumulate(x)
    before = accumulator.to_dense()
    accumulator.update(torch.full((5, 9), float("nan")), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(accumulator.to_dense(), before)
    assert accumulator.count == 50


def test_integer_mask_counts_ones():
    """Attention masks come as int64 zeros and ones."""
    x, mask = activations(20, 9).view(4, 5, 9), torch.tensor([[1, 1, 1, 0, 0]] * 4)
    assert_gram_of(GramAccumulator(9).update(x, mask), x[:, :3].reshape(-1, 9))


def test_unmasked_nan_shows():
    x = activations(20, 9)
    x[3, 4] = float("nan")
    assert torch.isnan(accumulate(x).diagonal()[4])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    width=st.integers(1, 40),
    tile=st.integers(1, 41),
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_cut_of_the_stream(width, tile, cuts, seed):
    x = activations(sum(cuts) + 1, width, seed=seed)
    assert_gram_of(accumulate(*x.split([*cuts, 1]), tile=tile), x)


@pytest.mark.parametrize("width", [7, 130, 400])
def test_same_bits_every_run(width):
    chunks = activations(2000, width).split(333)
    first, second = accumulate(*chunks), accumulate(*chunks)
    assert torch.equal(first.packed.data, second.packed.data)
    assert torch.equal(first.sum, second.sum)


def test_alignment_of_the_chunk_does_not_matter():
    x = activations(500, 130)
    shifted = torch.empty(500 * 130 + 1)[1:].view(500, 130).copy_(x)
    assert torch.equal(accumulate(x).packed.data, accumulate(shifted).packed.data)


@pytest.mark.parametrize("options", [{}, {"precise": True}, {"tile": 24}], ids=["default", "precise", "tile"])
def test_state_dict_continues_with_the_same_bits(options):
    chunks = activations(7000, 70).split([3000, 3500, 500])
    straight = accumulate(*chunks, **options)
    file = io.BytesIO()
    torch.save(accumulate(*chunks[:1], **options).state_dict(), file)
    file.seek(0)
    resumed = GramAccumulator(70)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for chunk in chunks[1:]:
        resumed.update(chunk)
    assert torch.equal(resumed.packed.data, straight.packed.data)
    assert torch.equal(resumed.sum, straight.sum)
    assert (resumed.count, resumed.precise) == (straight.count, straight.precise)


def test_loaded_state_is_a_copy():
    source = accumulate(activations(50, 9))
    target = GramAccumulator(9)
    target.load_state_dict(source.state_dict())
    before = source.to_dense()
    target.update(activations(50, 9, seed=1))
    assert torch.equal(source.to_dense(), before)
    assert source.count == 50


def test_state_of_another_width_is_refused():
    with pytest.raises(ValueError, match="9"):
        GramAccumulator(10).load_state_dict(GramAccumulator(9).state_dict())


def test_gather_is_a_block_of_the_dense_matrix():
    accumulator = accumulate(activations(200, 130), tile=48)
    rows, cols = torch.tensor([129, 0, 0, 64]), torch.tensor([50, 128, 3])
    assert torch.equal(accumulator.gather(rows, cols), accumulator.to_dense()[rows][:, cols])


@pytest.mark.parametrize("width", [7, 130, 400])
def test_gather_is_exactly_symmetric(width):
    accumulator = accumulate(activations(200, width))
    index = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    block = accumulator.gather(index, index)
    assert torch.equal(block, block.mT)


def test_empty_accumulator():
    accumulator = GramAccumulator(9)
    assert accumulator.count == 0
    assert not accumulator.sum.any()
    assert not accumulator.to_dense().any()


def test_update_returns_the_accumulator():
    accumulator = GramAccumulator(9)
    assert accumulator.update(activations(3, 9)) is accumulator
