"""How the rows of a Gram matrix are split over a GPU's multiprocessors."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grail_kernels.configs import TMA
from grail_kernels.splits import LEAST_ROWS, choose_splits

H100 = 132


def waves(tiles, splits, units):
    return -(-tiles * splits // units)


def tiles_of(width, tile=128):
    panels = -(-width // tile)
    return panels * (panels + 1) // 2


@pytest.mark.parametrize(
    ("width", "rows", "splits"),
    [(1536, 65536, 5), (576, 65536, 8), (4096, 32768, 1), (11008, 8192, 1)],
)
def test_waves_of_known_widths_are_full(width, rows, splits):
    """4096 columns are 528 tiles, four waves of 132; 576 are 15, of which nine parts would need a second wave."""
    assert choose_splits(tiles_of(width), rows, H100) == splits


def test_a_short_stream_is_not_split():
    assert choose_splits(1, LEAST_ROWS * 2 - 1, H100) == 1


@given(
    tiles=st.integers(1, 5000), rows=st.integers(1, 131_072), units=st.integers(1, 300), phases=st.sampled_from([1, 3])
)
def test_never_slower_than_whole_and_never_slivers(tiles, rows, units, phases):
    splits = choose_splits(tiles, rows, units, phases)
    assert splits == 1 or rows / splits >= LEAST_ROWS
    taken = waves(tiles, splits, units) * -(-rows // splits)
    assert taken <= waves(tiles, 1, units) * rows


@given(width=st.integers(500, 2000), rows=st.integers(60_000, 131_072))
def test_a_long_stream_leaves_few_places_empty(width, rows):
    """At least four fifths of the places of all waves have work. (Of very narrow matrices the workspace costs more.)"""
    tiles = tiles_of(width)
    splits = choose_splits(tiles, rows, H100)
    filled = tiles * splits / (waves(tiles, splits, H100) * H100)
    assert filled >= 0.8


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rows", [1, 700, 8192, 73_838, 131_072])
@pytest.mark.parametrize("tiles", [1, 15, 78, 528])
def test_on_a_gpu_every_part_has_rows(monkeypatch, tiles, rows, parts):
    """Also after its length was rounded up to whole blocks: 131,072 rows in 97 of 1,408 would leave three empty."""
    launch = pytest.importorskip("grail_kernels.launch")
    config = TMA["sm_90"]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=H100))
    operand = SimpleNamespace(device=torch.device("cuda"), shape=(1, parts, rows, 128))
    splits = launch._splits(tiles, rows, operand, config)
    each = launch._split_rows(rows, splits, config)
    assert (splits - 1) * each < rows <= splits * each
    assert splits <= choose_splits(tiles, rows, H100, 3 if parts == 2 else 1)


def test_on_a_cpu_nothing_is_split():
    launch = pytest.importorskip("grail_kernels.launch")
    assert launch._splits(1, 100_000, torch.empty(1, 1, 4, 16), TMA["sm_90"]) == 1
