"""Several real processes: what they gather together equals what one gathers, and a death is noticed."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed

from grail import distributed
from grail.distributed import Group
from grail.errors import GrailError
from tests.group_script import DTYPES, NEEDS, PAIRS, SHAPES, SPLITS, WIDTH, drawn, figures, gathered, pairs

ROOT = Path(__file__).parents[1]
FLOAT32, FLOAT64 = 1e-6, 1e-12  # relative error in norm
MEANS = ("mean", "mean_square", "variance")
CANCELLED = 5e-6  # of a cross moment about the mean of z alone, whose products are here 18 times as large as their sum
LOST = r"process {} of {} cannot go on because another one ended \([^)]+\).*--resume"
SOON = 60.0


@contextmanager
def processes(scene: str, size: int, folder: Path) -> Iterator[list[subprocess.Popen]]:
    """So many processes in a scene; none is left at the end."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "WORLD_SIZE": str(size)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.group_script", scene, folder],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def free_port() -> int:
    """One that nothing listens on, outside the range that connections are given."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def endings(running: list[subprocess.Popen], seconds: float = 200) -> list[tuple[int, str]]:
    """Exit code and last words of each."""
    said = [process.communicate(timeout=seconds)[1] for process in running]
    return [(process.returncode, words) for process, words in zip(running, said, strict=True)]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 processes", "3 processes"])
def found(request, tmp_path_factory) -> list[dict]:
    """What each process held at the end of `work`."""
    folder = tmp_path_factory.mktemp("work")
    with processes("work", request.param, folder) as running:
        ended = endings(running)
    assert [code for code, _ in ended] == [0] * request.param, "\n".join(words for _, words in ended)
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


def error(value: torch.Tensor, expected: torch.Tensor) -> float:
    gap = (value.double() - expected).norm()
    return 0.0 if gap == 0 else (gap / expected.double().norm()).item()


def bound(name: str, figure: str) -> float:
    """Gram matrices, cross moments and the means kept with them are sums in float32."""
    if figure == "count":
        return 0.0
    if (name, figure) == ("affine pairs", "cross"):
        return CANCELLED
    float32 = figure in ("gram", "cross") or (name not in ("diag", "moments") and figure in MEANS)
    return FLOAT32 if float32 else FLOAT64


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", [*NEEDS, *PAIRS])
def test_sums_are_those_of_one_process(found, name, split):
    alone = figures(name, gathered(count=sum(SPLITS[split][2]))[name])
    for held in found:
        assert held[split][name].keys() == alone.keys()
        for figure, expected in alone.items():
            assert error(held[split][name][figure], expected) <= bound(name, figure), figure
            assert torch.equal(held[split][name][figure], found[0][split][name][figure]), "the same bits everywhere"


@pytest.mark.parametrize("split", ["uneven", "first has none", "last has none"])
def test_sums_are_those_of_float64(found, split):
    x, y, d = (part.double() for part in pairs())
    deviation = x - x.mean(0)
    sums = found[0][split]
    assert error(sums["scatter"]["variance"], x.var(0)) <= FLOAT32
    assert error(sums["moments"]["variance"], x.var(0)) <= FLOAT64
    assert error(sums["gram"]["gram"], x.mT @ x) <= FLOAT32
    assert error(sums["scatter"]["gram"], x.mT @ x) <= FLOAT32
    assert error(sums["affine pairs"]["gram"], deviation.mT @ deviation) <= FLOAT32
    assert error(sums["pairs"]["cross"], x.mT @ d) <= FLOAT32
    assert error(sums["affine pairs"]["cross"], deviation.mT @ d) <= CANCELLED
    assert error(sums["affine pairs"]["target_energy"], (y - y.mean(0)).square().sum()) <= FLOAT64


def test_a_bad_channel_of_any_process_is_refused_by_all(found):
    assert {held["refused"] for held in found} == {found[0]["refused"]}
    assert f"{len(found)} of {WIDTH} channels" in found[0]["refused"]


def test_values_come_in_rank_order(found):
    for rank, held in enumerate(item["carried"] for item in found):
        assert held["rank"] == rank and held["device"] == "cpu"
        assert [value["rank"] for value in held["gather"]] == list(range(len(found)))
        assert [len(value["long"]) for value in held["gather"]] == [1 + 5000 * r for r in range(len(found))]
        assert held["broadcast"] == ("from", 0)


def test_tensors_are_summed_in_place_and_alike(found):
    own = [torch.randn(1000, generator=torch.Generator().manual_seed(rank)) for rank in range(len(found))]
    size = len(found)
    for held in (item["carried"] for item in found):
        assert error(held["sum"], torch.stack(own).double().sum(0)) <= FLOAT32
        assert torch.equal(held["sum"], held["again"]) and torch.equal(held["sum"], found[0]["carried"]["sum"])
        assert torch.equal(held["strided"], torch.full((2, 6), size * (size + 1) / 2))
        assert held["counts"].tolist() == [sum(range(size)), size]
        assert error(held["half"], torch.stack(own).double().sum(0)) <= 2**-7
        assert torch.equal(held["stack"], torch.stack([part[:6].view(3, 2).T for part in own]))


def test_tensors_of_the_main_process_reach_the_others(found):
    for held in (item["carried"] for item in found):
        for dtype, tensor in zip(DTYPES, held["tensors"], strict=True):
            assert tensor.dtype == dtype
            assert torch.equal(tensor.view(torch.uint8), drawn(dtype, 5, 3).view(torch.uint8))
        for shape, tensor in zip(SHAPES, held["shapes"], strict=True):
            assert torch.equal(tensor, drawn(torch.float32, *shape)[..., ::2])
        assert held["scalar"].shape == () and held["scalar"] == 2.5


def test_tensors_of_the_others_reach_the_main_process(found):
    size = len(found)
    received = found[0]["carried"]["sent"]
    expected = []
    for rank in range(size):
        own = torch.randn(1000, generator=torch.Generator().manual_seed(rank))
        sent = [torch.full((rank, 2), rank), torch.tensor(0.5 + rank), own[:5].bfloat16()]
        expected += sent[: 3 - rank]
    assert len(received) == len(expected)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(received, expected, strict=True))
    assert all(held["carried"]["sent"] == [] for held in found[1:])


def test_shares_are_contiguous_and_even(found):
    for i, count in enumerate((0, 1, 7, 9)):
        shares = [held["carried"]["shares"][i] for held in found]
        assert [item for share in shares for item in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("scene", "size"), [("killed", 2), ("fails", 4)])
def test_a_death_ends_the_others_soon(tmp_path, scene, size):
    with processes(scene, size, tmp_path) as running:
        started = time.monotonic()
        while not (tmp_path / "dead").exists() and time.monotonic() - started < 200:
            time.sleep(0.1)
        died = time.monotonic()
        ended = endings(running[:-1], SOON)
        assert time.monotonic() - died < SOON
        for rank, (code, words) in enumerate(ended):
            assert code == 3 and re.search(LOST.format(rank, size), words), words
        assert (running[-1].poll() is None) == (scene == "fails")


def test_torchrun_starts_it(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen(
        [*command, "-m", "tests.group_script", "joins_again", tmp_path],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        try:
            words = running.communicate(timeout=200)[1]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, words
    assert "warn" not in words.lower() and "error" not in words.lower(), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_one_process_needs_nobody(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    group = Group.from_environment("cpu")
    assert (group.rank, group.size, group.main, group.device) == (0, 1, True, "cpu")
    tensor = torch.arange(3.0)
    assert group.sum_(tensor) is tensor and group.broadcast_tensor(tensor) is tensor
    assert torch.equal(group.stack(tensor), tensor[None]) and tensor.tolist() == [0.0, 1.0, 2.0]
    assert group.gather(4) == [4] and group.broadcast(4) == 4
    assert group.send_to_main([tensor]) == [tensor]
    assert group.share(5) == range(5)
    alone = gathered()
    for name, statistics in gathered().items():
        statistics.sum_over(group)
        for figure, value in figures(name, statistics).items():
            assert torch.equal(value, figures(name, alone[name])[figure])
    group.barrier()
    with pytest.raises(KeyError), group.guard():
        raise KeyError
    group.close()


def torchrun_variables(monkeypatch, **changed: str | None) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in (variables | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | changed).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


@pytest.mark.parametrize("missing", ["RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_without_torchrun_there_is_one_process(monkeypatch, missing):
    torchrun_variables(monkeypatch, **{missing: None})
    assert Group.from_environment().size == 1


def test_a_start_that_fails_is_one_sentence(monkeypatch):
    torchrun_variables(monkeypatch)
    monkeypatch.setattr(distributed, "START_LIMIT", distributed.timedelta(seconds=1))
    with pytest.raises(GrailError, match=r"process 1 of 2 could not join.*127\.0\.0\.1:1 .*torchrun"):
        Group.from_environment("cpu")
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    with pytest.raises(GrailError, match="run one process instead of 2"):
        Group.from_environment("cpu")
    for name in ("nonsense", "cudax", "meta"):
        with pytest.raises(GrailError, match=f"--device {name}"):
            Group.from_environment(name)


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    torchrun_variables(monkeypatch, RANK="9", LOCAL_RANK="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "usable_device", torch.device)
    assert [distributed.own_device(name, 9, 16) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(GrailError, match="cuda:0 is one GPU for 2 processes"):
        distributed.own_device("cuda:0", 9, 16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert distributed.own_device("cuda:0", 9, 16) == "cuda:0"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(GrailError, match="3 processes were started on a machine with 2"):
        distributed.own_device("cuda", 9, 16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.own_device("auto", 9, 16) == "cpu"
