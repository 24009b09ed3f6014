"""What test_distributed.py runs in several processes: one of these scenes, in a folder.

torchrun --nproc-per-node 2 -m tests.group_script SCENE FOLDER
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch

from grail.distributed import Group
from grail.errors import GrailError
from grail.moments import PairStatistics
from grail.statistics import DIAGONAL, GRAM, MOMENTS, SiteStatistics

ROWS, WIDTH, OUTPUTS, CHUNK = 600, 24, 7, 90
NEEDS = {
    "diag": (frozenset({DIAGONAL}), False),
    "moments": (frozenset({MOMENTS}), False),
    "nothing": (frozenset(), False),
    "gram": (frozenset({GRAM}), False),
    "scatter": (frozenset({GRAM}), True),
}
PAIRS = ("pairs", "affine pairs")
SPLITS = {
    "uneven": {2: [431, 169], 3: [7, 400, 193]},
    "first has none": {2: [0, 600], 3: [0, 250, 350]},
    "last has none": {2: [600, 0], 3: [250, 350, 0]},
    "nobody has any": {2: [0, 0], 3: [0, 0, 0]},
}
DTYPES = (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
SHAPES = ((4,), (3, 8), (0, 4), (2, 3, 2))


def activations() -> torch.Tensor:
    """Rows whose mean drifts, so that processes see different ones, and lies up to 50 deviations from zero."""
    noise = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return noise + torch.linspace(-50, 50, WIDTH) + 3 * torch.linspace(-1, 1, ROWS)[:, None]


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, and y and d that depend on z and have means: the same bits however they are cut into chunks."""
    z = activations()
    weight = torch.randn(WIDTH, OUTPUTS, generator=torch.Generator().manual_seed(1))
    return z, z @ weight, 0.1 * (z @ weight.roll(1, 0)) + 2.0


def gathered(start: int = 0, count: int = ROWS) -> dict:
    """Every kind of statistics of these rows, by name."""
    found = {name: SiteStatistics(WIDTH, needs, affine=affine) for name, (needs, affine) in NEEDS.items()}
    found |= {name: PairStatistics(WIDTH, OUTPUTS, affine=name != "pairs") for name in PAIRS}
    for chunk in zip(*(part[start : start + count].split(CHUNK) for part in pairs()), strict=True):
        for name, statistics in found.items():
            statistics.update(*(chunk if name in PAIRS else chunk[:1]))
    return found


def figures(name: str, statistics) -> dict:
    """What can be read from statistics."""
    if name in PAIRS:
        names = ("count", "cross", "mean", "mean_difference", "difference_energy", "target_energy")
        found = {key: torch.as_tensor(getattr(statistics, key), dtype=torch.float64) for key in names}
        return found | {"gram": statistics.normal.to_dense()}
    found = {"count": torch.as_tensor(statistics.count)}
    if name != "nothing":
        found |= {"mean": statistics.mean(), "mean_square": statistics.mean_square()}
    if name in ("gram", "scatter"):
        found["gram"] = statistics.gram.to_dense()
    if name in ("moments", "scatter"):
        found["variance"] = statistics.variance()
    return found


def drawn(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return (10 * torch.randn(*shape, generator=torch.Generator().manual_seed(3))).to(dtype)


def carried(group: Group) -> dict:
    """What every method but those of statistics gives here."""
    own = torch.randn(1000, generator=torch.Generator().manual_seed(group.rank))
    strided = torch.full((6, 4), group.rank + 1.0).T[::2]
    sent = [torch.full((group.rank, 2), group.rank), torch.tensor(0.5 + group.rank), own[:5].bfloat16()]
    main = group.main
    found = {
        "rank": group.rank,
        "device": group.device,
        "gather": group.gather({"rank": group.rank, "long": "x" * (1 + 5000 * group.rank)}),
        "broadcast": group.broadcast(("from", group.rank)),
        "sum": group.sum_(own.clone()),
        "again": group.sum_(own.clone()),
        "strided": group.sum_(strided),
        "counts": group.sum_(torch.tensor([group.rank, 1])),
        "half": group.sum_(own.bfloat16()),
        "stack": group.stack(own[:6].view(3, 2).T),
        "tensors": [group.broadcast_tensor(drawn(dtype, 5, 3) if main else None) for dtype in DTYPES],
        "shapes": [
            group.broadcast_tensor(drawn(torch.float32, *shape)[..., ::2] if main else None) for shape in SHAPES
        ],
        "scalar": group.broadcast_tensor(torch.tensor(2.5) if main else None),
        "sent": group.send_to_main(sent[: 3 - group.rank]),
        "shares": [list(group.share(count)) for count in (0, 1, 7, 9)],
    }
    group.barrier()
    return found


def work(group: Group, folder: Path) -> None:
    """Save what this process holds after everything has been carried and summed."""
    found = {"carried": carried(group)}
    for split, sizes in SPLITS.items():
        statistics = gathered(sum(sizes[group.size][: group.rank]), sizes[group.size][group.rank])
        for held in statistics.values():
            held.sum_over(group)
        found[split] = {name: figures(name, held) for name, held in statistics.items()}
    poisoned = SiteStatistics(WIDTH, frozenset({GRAM}), affine=True)
    poisoned.update(torch.full((5, WIDTH), 1.0).index_fill(1, torch.tensor([group.rank]), float("nan")))
    poisoned.sum_over(group)
    try:
        poisoned.check_finite("site")
    except GrailError as refused:
        found["refused"] = str(refused)
    torch.save(found, folder / f"{group.rank}.pt")


def killed(group: Group, folder: Path) -> None:
    """The last process is killed while the others wait for it."""
    group.barrier()
    if group.rank == group.size - 1:
        (folder / "dead").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    group.sum_(torch.ones(3))


def fails(group: Group, folder: Path) -> None:
    """The last process fails in the middle of a call, and keeps the error and itself alive."""
    group.barrier()
    if group.rank < group.size - 1:
        group.broadcast_tensor(torch.ones(3) if group.main else None)
        group.gather(1)
    try:
        with group.guard():
            overflow(group)
    except RuntimeError as error:
        assert str(error) == "no memory"
        (folder / "dead").touch()
        time.sleep(100)


def overflow(group: Group) -> None:
    with group.collective() as carrier:
        raise RuntimeError("no memory")
    return carrier


def joins_again(group: Group, folder: Path) -> None:
    """One run after the other, in the same processes; nobody is left behind by one that is quicker, nor waits for a
    thread that frees what came last (torch 2.6)."""
    for turn in range(100):
        assert group.gather(turn) == [turn] * group.size
        assert group.broadcast({"turn": turn}) == {"turn": turn}
        group.close()
        group.close()
        group = Group.from_environment("cpu")
    (folder / f"{group.rank}").write_text(group.device)
    group.close()


def main() -> None:
    """Exit code 3 for the sentence that a user would see."""
    scene, folder = sys.argv[1:]
    group = Group.from_environment("cpu")
    try:
        with group.guard():
            {"work": work, "killed": killed, "fails": fails, "joins_again": joins_again}[scene](group, Path(folder))
    except GrailError as refused:
        sys.stderr.write(f"{refused}\n")
        sys.exit(3)
    group.close()


if __name__ == "__main__":
    main()
