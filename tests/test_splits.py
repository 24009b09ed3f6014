"""How the rows of a Gram matrix are split over a GPU's multiprocessors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grail_kernels.splits import LEAST_ROWS, choose_splits

H100 = 132


def waves(tiles, splits, units):
    return -(-tiles * splits // units)


def tiles_of(width, tile=128):
    panels = -(-width // tile)
    return panels * (panels + 1) // 2


@pytest.mark.parametrize(
    ("width", "rows", "splits"),
    [(1536, 65536, 5), (576, 65536, 8), (768, 65536, 6), (4096, 32768, 1), (11008, 8192, 1)],
)
def test_waves_of_known_widths_are_full(width, rows, splits):
    """4096 columns are 528 tiles, four waves of 132; 576 are 15, of which nine parts would need a second wave."""
    assert choose_splits(tiles_of(width), rows, H100) == splits


def test_a_short_stream_is_not_split():
    assert choose_splits(1, LEAST_ROWS * 2 - 1, H100) == 1


@given(
    tiles=st.integers(1, 5000), rows=st.integers(1, 300_000), units=st.integers(1, 300), phases=st.sampled_from([1, 3])
)
def test_never_slower_than_whole_and_never_slivers(tiles, rows, units, phases):
    splits = choose_splits(tiles, rows, units, phases)
    assert splits == 1 or rows / splits >= LEAST_ROWS
    taken = waves(tiles, splits, units) * -(-rows // splits)
    assert taken <= waves(tiles, 1, units) * rows


@given(width=st.integers(500, 2000), rows=st.integers(60_000, 300_000))
def test_a_long_stream_leaves_few_places_empty(width, rows):
    """At least four fifths of the places of all waves have work. (Of very narrow matrices the workspace costs more.)"""
    tiles = tiles_of(width)
    splits = choose_splits(tiles, rows, H100)
    filled = tiles * splits / (waves(tiles, splits, H100) * H100)
    assert filled >= 0.8
