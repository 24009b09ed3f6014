"""Stores of chunks: what was put comes back to the last bit, damage is noticed, memory does not grow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grail.errors import Circumstance
from grail.store import CachedStore, DiskStore, MemoryStore

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
SHAPES = ((), (0,), (3, 0, 2), (1,), (7,), (2, 3, 5))
GROWTH = """
import sys
from pathlib import Path
import torch
from grail.store import DiskStore

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def store_and_read(count):
    for number in range(count):
        store.put("x", number, torch.full((2_500_000,), float(number)))
    assert store.holds("x", range(count))
    for number in range(count):
        assert store.get("x", number)[-1] == number

store = DiskStore(Path(sys.argv[1]))
store_and_read(2)
before = peak()
store_and_read(50)
print(peak() - before)
"""


@pytest.fixture(params=["memory", "disk", "cached"])
def store(request, tmp_path):
    if request.param == "memory":
        return MemoryStore()
    return {"disk": DiskStore, "cached": CachedStore}[request.param](tmp_path / "store")


def bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Any bits at all, NaN among them."""
    raw = torch.randint(256, (torch.Size(shape).numel() * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_put_comes_back_to_the_last_bit(store, dtype, shape):
    torch.manual_seed(0)
    tensor = bits(dtype, shape)
    store.put("x", 3, tensor, lasting=True)
    found = store.get("x", 3)
    assert (found.dtype, found.shape, found.device) == (dtype, tensor.shape, torch.device("cpu"))
    assert raw(found) == raw(tensor)
    assert store.holds("x", [3])


def test_views_are_stored_by_value(tmp_path):
    store, base = DiskStore(tmp_path), torch.randn(6, 8)
    views = [base.T, base[:, ::2], base[:1].expand(5, 8), torch.nn.Parameter(base)]
    for number, view in enumerate(views):
        store.put("x", number, view)
    base.zero_()
    for number, view in enumerate(views):
        found = store.get("x", number)
        assert found.shape == view.shape and not found.requires_grad and found.abs().sum() > 0


def test_what_comes_back_is_ones_own(tmp_path):
    """A chunk may be changed in place by who reads it; what lies on disk stays."""
    store = DiskStore(tmp_path)
    store.put("x", 0, torch.ones(3))
    store.get("x", 0).zero_()
    assert torch.equal(store.get("x", 0), torch.ones(3))


def test_a_later_chunk_takes_the_place_of_an_earlier_one(store):
    for tensor in (torch.randn(40), torch.randint(9, (2, 3)), torch.randn(1000)):
        store.put("x", 0, tensor)
        assert torch.equal(store.get("x", 0), tensor) and store.get("x", 0).dtype == tensor.dtype


def test_dropping_numbers_leaves_the_others(store):
    for series in ("x", "x-1"):
        for number in range(4):
            store.put(series, number, torch.tensor(number), lasting=True)
    store.drop("x", iter([1, 3, 8]))
    store.drop("never", [0])
    assert [store.holds("x", [number]) for number in range(4)] == [True, False, True, False]
    assert not store.holds("x", range(4)) and store.holds("x", [0, 2]) and store.holds("x-1", range(4))
    assert store.get("x", 2) == 2
    with pytest.raises(KeyError):
        store.get("x", 1)


def test_what_is_not_there_is_not_held(store):
    assert not store.holds("x", [0]) and store.holds("x", [])
    with pytest.raises(KeyError):
        store.get("x", 0)


@pytest.mark.parametrize("kind", [DiskStore, CachedStore])
def test_what_is_to_last_outlives_the_process(tmp_path, kind):
    """And no more of it, where what need not last stays in memory."""
    store = kind(tmp_path)
    store.put("x", 0, torch.arange(5), lasting=True)
    store.put("x", 1, torch.arange(5))
    other = kind(tmp_path)
    assert other.outlives_process and other.holds("x", [0]) and torch.equal(other.get("x", 0), torch.arange(5))
    assert other.holds("x", [1]) == store.holds("x", [1]) == (kind is DiskStore)
    assert not MemoryStore().outlives_process


def test_what_is_spared_can_be_gone_on_from(store):
    """Where chunks outlive the process; else they are given up."""
    for number in range(2):
        store.put("x", number, torch.tensor(number), lasting=True)
    store.spare("x", iter([0]))
    assert store.holds("x", [1]) and store.get("x", 1) == 1
    assert store.holds("x", [0]) == store.outlives_process
    if store.outlives_process:
        assert store.get("x", 0) == 0


@pytest.mark.parametrize("tensor", [torch.arange(6.0).view(2, 3), torch.empty(0, 5), torch.tensor(7)], ids=repr)
def test_every_damaged_byte_is_noticed(tmp_path, tensor):
    """In the data, and in the header: an empty tensor's shape is in no data at all."""
    store = DiskStore(tmp_path)
    store.put("x", 0, tensor)
    (path,) = (tmp_path / "x").iterdir()
    sound = path.read_bytes()
    for place in range(len(sound)):
        for change in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ change]) + sound[place + 1 :])
            assert not store.holds("x", [0]), (place, change)
    with pytest.raises(Circumstance, match=f"{path} was damaged"):
        store.get("x", 0)
    path.write_bytes(sound)
    assert raw(store.get("x", 0)) == raw(tensor)


def test_a_truncated_or_longer_file_is_noticed(tmp_path):
    store = DiskStore(tmp_path)
    store.put("x", 0, torch.arange(6.0))
    (path,) = (tmp_path / "x").iterdir()
    sound = path.read_bytes()
    for content in [sound[:length] for length in range(len(sound))] + [sound + b"\0", sound + sound]:
        path.write_bytes(content)
        assert not store.holds("x", [0]), len(content)
        with pytest.raises(Circumstance, match="damaged"):
            store.get("x", 0)


def test_a_disk_error_names_the_file(tmp_path):
    (tmp_path / "x").write_text("a file where a folder should be")
    with pytest.raises(OSError) as refusal:
        DiskStore(tmp_path).put("x", 0, torch.ones(1))
    assert refusal.value.filename == str(tmp_path / "x" / "000000")


def test_writes_that_take_only_a_part_are_gone_on_with(tmp_path, monkeypatch):
    """A raw write may take less than it was given, always so beyond 2 GiB on Linux."""
    from grail import store as module

    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:7])

        def readinto(self, data):
            return self.file.readinto(data[:5])

    slow_open = lambda *args, **options: Slow(open(*args, **options))  # noqa: E731, SIM115
    monkeypatch.setattr(module, "open", slow_open, raising=False)
    store, tensor = DiskStore(tmp_path), torch.randn(50)
    store.put("x", 0, tensor)
    assert torch.equal(store.get("x", 0), tensor)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmHWM")
def test_resident_memory_does_not_grow_with_what_is_stored(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 60e6
