"""The Triton kernels in the interpreter, against float64.

What the interpreter cannot show: it multiplies bf16 upcast to float32 (its tl.dot has no bf16), it truncates instead of
rounding when it converts (the kernels round by hand), it runs programs one after the other, and it knows no tensor
cores. So these tests cover indexing, masks, splits and sums; test_aot.py looks at the machine code. Few, large tiles,
since an iteration costs about 2 ms whatever its size.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail_kernels import GramAccumulator, gram_reference
from grail_kernels.configs import GRAM, TMA, TMA_WIDE

triton = pytest.importorskip("triton")
tl = triton.language

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def rows(count, width, dtype=torch.float32, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bound(x):
    """float32 goes through two bf16 parts: 16 bits, so one product is off by up to 2^-16; over a matrix it averages."""
    if x.dtype != torch.float32:
        return 1e-6
    return 5e-6 if min(x.reshape(-1, x.shape[-1]).shape) >= 32 else 2**-16


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 1), (63, 7), (100, 130), (130, 33), (64, 64), (257, 96)])
def test_odd_shapes(poisoned, dtype, count, width):
    x = rows(count, width, DTYPES[dtype])
    found = GramAccumulator(width, backend="triton").update(x)
    assert error(found.to_dense(), gram_reference(x)) <= bound(x)
    assert torch.allclose(found.sum, x.double().sum(0), rtol=1e-4, atol=1e-4)
    assert found.count == count
    assert torch.equal(found.to_dense(), found.to_dense().mT)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_rows_never_leak(poisoned, dtype):
    x = rows(150, 70, DTYPES[dtype])
    mask = torch.rand(150, generator=torch.Generator().manual_seed(1)) > 0.4
    dirty = x.clone()
    dirty[~mask] = float("nan")
    found = GramAccumulator(70, backend="triton").update(dirty, mask)
    assert error(found.to_dense(), gram_reference(x[mask])) <= bound(x)
    assert torch.allclose(found.sum, x[mask].double().sum(0), rtol=1e-4, atol=1e-4)
    assert found.count == int(mask.sum())


VIEWS = {
    "transposed": lambda: rows(40, 90, torch.float16).mT,
    "every other row": lambda: rows(180, 40, torch.float16)[::2],
    "middle columns": lambda: rows(90, 80, torch.float16)[:, 20:60],
    "every other column": lambda: rows(90, 80)[:, ::2],
    "windows": lambda: rows(90, 40, torch.bfloat16).view(3, 30, 40),
    "aligned columns": lambda: rows(90, 96, torch.float16)[:, 16:64],
    "aligned rows": lambda: rows(180, 48, torch.bfloat16)[::2],
    "one row many times": lambda: rows(1, 48, torch.bfloat16).expand(70, 48),
    "rows that overlap": lambda: rows(1, 16 * 70 + 48, torch.bfloat16)[0].unfold(0, 48, 16),
}


@pytest.mark.parametrize("kernel", ["pointer", "tma"])
@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(poisoned, fetch_by, view, kernel):
    fetch_by(kernel)
    x = VIEWS[view]()
    found = GramAccumulator(x.shape[-1], backend="triton").update(x)
    assert error(found.to_dense(), gram_reference(x.reshape(-1, x.shape[-1]))) <= bound(x)


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_splits_agree_and_repeat_to_the_bit(poisoned, splits):
    from grail_kernels.launch import gram_add
    from grail_kernels.packed import packed_size

    x = rows(300, 70, torch.float16)
    results = []
    for _ in range(2):
        data = torch.zeros(1, packed_size(70, GRAM["interpreter"].tile, padded=True))
        sums = gram_add(data, x[None], None, splits=splits)
        results.append((data, sums))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    accumulator = GramAccumulator(70, backend="triton").update(x)
    accumulator._data.copy_(results[0][0])
    assert error(accumulator.to_dense(), gram_reference(x)) <= 1e-6


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(1, 8), (100, 136), (257, 96), (130, 33)])
def test_the_descriptor_kernel_gives_the_same_bits(
    poisoned, monkeypatch, fetch_by, dtype, count, width, masked, splits
):
    from grail_kernels import launch

    x = rows(count, width, DTYPES[dtype])
    mask = torch.arange(count) % 3 != 1 if masked else None
    monkeypatch.setattr(launch, "_splits", lambda *_: splits)
    found = []
    for kernel in launch.KERNELS:
        fetch_by(kernel)
        assert launch.uses_tma(x.device, 1) == (kernel == "tma")
        found.append(GramAccumulator(width, backend="triton").update(x, mask))
    assert torch.equal(found[0].packed.data, found[1].packed.data) and torch.equal(found[0].sum, found[1].sum)
    kept = x if mask is None else x[mask]
    assert error(found[1].to_dense(), gram_reference(kept)) <= bound(kept)


def test_which_kernel_runs(monkeypatch):
    from grail_kernels import launch
    from grail_kernels.configs import MEASURED_TMA, TMA

    device = torch.device("cpu")
    monkeypatch.setattr(launch, "_has_descriptors", lambda: True)
    for target in GRAM:
        monkeypatch.setattr(launch, "_target", lambda device, target=target: target)
        monkeypatch.delenv("GRAIL_KERNELS_GRAM", raising=False)
        assert launch.uses_tma(device, 1) == (target in MEASURED_TMA)
        monkeypatch.setenv("GRAIL_KERNELS_GRAM", "tma")
        assert launch.uses_tma(device, 1) == (target in TMA)
        assert not launch.uses_tma(device, 2), "several sites"
    monkeypatch.setenv("GRAIL_KERNELS_GRAM", "fast")
    with pytest.raises(ValueError, match="pointer, tma"):
        launch.uses_tma(device, 1)
    monkeypatch.setattr(launch, "_has_descriptors", lambda: False)
    monkeypatch.setattr(launch, "_target", lambda device: "sm_90")
    monkeypatch.setenv("GRAIL_KERNELS_GRAM", "tma")
    with pytest.raises(ValueError, match=r"needs triton 3\.4"):
        launch.uses_tma(device, 1)
    monkeypatch.delenv("GRAIL_KERNELS_GRAM")
    assert not launch.uses_tma(device, 1), "that of torch 2.6 has none"


def test_how_many_rows_one_launch_gets():
    from grail_kernels.launch import ROWS_AS_THEY_ARE, ROWS_COPIED, rows_at_once

    x, here = torch.empty(1, 4, 64, dtype=torch.bfloat16), torch.device("cpu")
    assert rows_at_once(x, here, copied=False) == ROWS_AS_THEY_ARE
    for copied in (x.float(), x.double(), x[..., :35], x[..., 1:49], x.mT):
        assert rows_at_once(copied, here, copied=False) == ROWS_COPIED
    assert rows_at_once(x, here, copied=True) == rows_at_once(x, torch.device("meta"), copied=False) == ROWS_COPIED
    huge = torch.empty(1, 2**20, 11008, dtype=torch.bfloat16, device="meta")
    assert rows_at_once(huge, huge.device, copied=False) * 11008 * 2 < 2**31


def test_the_accumulator_of_the_matrix_units_is_emptied(monkeypatch):
    """After so many products, fewer where `precise` asks for it."""
    from grail_kernels import launch

    config, asked = GRAM["interpreter"], []
    real = launch._shared

    def noted(*given):
        asked.append(real(*given)["EVERY"])
        return real(*given)

    monkeypatch.setattr(launch, "_shared", noted)
    for precise in (False, True):
        GramAccumulator(20, backend="triton", precise=precise).update(rows(100, 20))
    assert [every * config.block_k for every in asked] == [512, 128]


def test_many_updates_and_a_long_one(poisoned):
    x = rows(3000, 20, torch.float16)
    parts = GramAccumulator(20, backend="triton", precise=True)
    for part in x.split(110):
        parts.update(part)
    whole = GramAccumulator(20, backend="triton", precise=True).update(x)
    for found in (parts, whole):
        assert error(found.to_dense(), gram_reference(x)) <= 1e-6
        assert found.count == 3000


def test_many_sites_at_once_also_as_heads_of_one_tensor(poisoned):
    x = rows(90, 4 * 24, torch.float16)
    heads = x.view(90, 4, 24).transpose(0, 1)
    mask = torch.rand(4, 90, generator=torch.Generator().manual_seed(2)) > 0.3
    found = GramAccumulator(24, sites=4, backend="triton").update(heads, mask)
    assert found.count == mask.sum(1).tolist()
    for site in range(4):
        assert error(found.packed[site].to_dense(), gram_reference(heads[site][mask[site]])) <= 1e-6
        assert torch.allclose(found.sum[site], heads[site][mask[site]].double().sum(0), atol=1e-4)
    wide = rows(90, 3 * 32, torch.bfloat16)  # read where they lie
    whole = GramAccumulator(32, sites=3, backend="triton").update(wide.view(90, 3, 32).transpose(0, 1))
    for site in range(3):
        assert error(whole.packed[site].to_dense(), gram_reference(wide[:, 32 * site : 32 * site + 32])) <= 1e-6
    same = GramAccumulator(24, sites=4, backend="torch").update(heads, mask)
    assert error(found.to_dense(), same.to_dense().double()) <= 1e-6


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 140), st.integers(1, 110), st.booleans(), st.sampled_from(sorted(DTYPES)))
def test_any_shape(count, width, masked, dtype):
    x = rows(count, width, DTYPES[dtype])
    mask = torch.arange(count) % 3 != 1 if masked else None
    found = GramAccumulator(width, backend="triton").update(x, mask)
    kept = x if mask is None else x[mask]
    assert error(found.to_dense(), gram_reference(kept)) <= bound(kept)


def test_states_move_between_backends():
    x = rows(90, 70)
    for first, second in (("torch", "triton"), ("triton", "torch")):
        started = GramAccumulator(70, backend=first).update(x[:50])
        continued = GramAccumulator(70, backend=second)
        continued.load_state_dict(started.state_dict())
        continued.update(x[50:])
        assert error(continued.to_dense(), gram_reference(x)) <= 5e-6
        assert continued.count == 90


NANS = [0x7FC00000, 0x7F800001, 0x7FFF8000, 0x7FFFFFFF, -1, 0xFFC00000 - 2**32, 0xFFFF8000 - 2**32]


@pytest.mark.parametrize("shifted", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("bits", NANS, ids=lambda bits: f"{bits & 0xFFFFFFFF:08x}")
def test_every_nan_is_seen(bits, shifted):
    """Rounding to bf16 adds to the bits: large payloads would wrap around into zero."""
    x = rows(20, 10)
    x[3, 4] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    found = GramAccumulator(10, backend="triton", centred=shifted).update(x)
    assert not torch.isfinite(found.diagonal()[4]) and not torch.isfinite(found.sum[4])
    assert torch.isfinite(found.diagonal()[[0, 1, 2, 3, 5]]).all()


@pytest.mark.parametrize("bits", NANS, ids=lambda bits: f"{bits & 0xFFFFFFFF:08x}")
def test_both_parts_of_a_nan_are_nan(bits):
    from grail_kernels.operands import parts_of

    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32).view(1, 1, 1)
    high, low = parts_of(x, None, None, 64)[0]
    assert torch.isnan(high[0, 0]) and torch.isnan(low[0, 0])


def test_a_tile_that_the_kernels_do_not_store_is_refused():
    with pytest.raises(ValueError, match="tile"):
        GramAccumulator(70, backend="triton", tile=48)
    assert GramAccumulator(70, backend="triton", tile=GRAM["interpreter"].tile).packed.tile == GRAM["interpreter"].tile


@pytest.mark.parametrize("masked", [False, True], ids=["all rows", "masked"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_are_copied_only_where_they_must(poisoned, dtype, masked):
    from grail_kernels.operands import column_sums, parts_of

    big = rows(3 * 40, 96, DTYPES[dtype]).view(3, 40, 96)
    aligned = {"dense": big, "rows": big[:, ::2], "columns": big[..., 16:48], "one site": big[1:2, 3:]}
    others = {"odd start": big[..., 5:37], "odd width": big[..., :35], "strided": big[..., ::2], "flipped": big.mT}
    for name, x in (aligned | others).items():
        mask = torch.arange(x.shape[1]).expand(len(x), -1) % 3 != 1 if masked else None
        parts = parts_of(x, mask, None, 64)
        assert (parts.data_ptr() == x.data_ptr()) == (name in aligned and dtype != "fp32" and not masked), name
        assert parts.shape[3] % 16 == 0 and all(parts.stride(i) % 16 == 0 for i in (0, 1, 2)) and parts.stride(3) == 1
        assert dtype != "fp32" or parts.shape[2] % 64 == 0
        whole, (count, width) = parts.double().sum(1), x.shape[1:]
        expected = x.double() if mask is None else x.double() * mask[..., None]
        torch.testing.assert_close(whole[:, :count, :width], expected, rtol=2**-15, atol=0, msg=name)
        assert not whole[..., width:].any() and not whole[:, count:].any()
        torch.testing.assert_close(column_sums(parts, width).double(), expected.sum(1), rtol=1e-4, atol=1e-4)


def test_infinity_and_nan_in_counted_rows_are_seen():
    for bad in (float("nan"), float("inf")):
        x = rows(20, 10)
        x[3, 4] = bad
        assert not torch.isfinite(GramAccumulator(10, backend="triton").update(x).diagonal()[4])


@triton.jit
def decode_kernel(panel_ptr, block_ptr, COUNT: tl.constexpr, SPAN: tl.constexpr, STEP: tl.constexpr):
    from_here = tl.arange(0, COUNT)
    panel, block = decode(from_here, SPAN, STEP)
    tl.store(panel_ptr + from_here, panel)
    tl.store(block_ptr + from_here, block)


from grail_kernels.gram_triton import decode_program as decode  # noqa: E402

TABLES = {"gram": GRAM, "tma": TMA, "wide": TMA_WIDE}
SHIPPED = {f"{table} {name}": config for table, held in TABLES.items() for name, config in held.items()}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("panels", [1, 5, 86, 224], ids=lambda n: f"{n} panels")
def test_every_lower_tile_is_made_by_exactly_one_program(name, panels):
    from grail_kernels.launch import _program_count

    config = SHIPPED[name]
    programs = _program_count(panels * config.tile, config)
    count = triton.next_power_of_2(programs)
    panel, block = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    decode_kernel[(1,)](panel, block, COUNT=count, SPAN=config.span, STEP=config.step)
    made = list(zip(panel[:programs].tolist(), block[:programs].tolist(), strict=True))
    per_panel = config.block_m // config.tile
    wanted = {(p, b) for p in range(panels) for b in range(p // per_panel + 1)}
    kept = [(p, b) for p, b in made if p < panels and b * config.block_m < (p + 1) * config.tile]
    assert sorted(kept) == sorted(wanted)
