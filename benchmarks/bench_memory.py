"""Peak resident memory and wall time of `grail compress` on networks of real sizes with random weights.

    python benchmarks/bench_memory.py --shape llama-2-7b --layers 2 8 --tokens 2048 16384
    python benchmarks/bench_memory.py --shape llama-2-7b --layers 2 --tokens 2048 -- --method flap --device cuda
    pytest benchmarks/bench_memory.py --benchmark-only

What stands after `--` goes to `grail compress` as it is. Each case is a process of its own on a checkpoint made by
shapes.py; the command line adds a line to benchmarks/results/memory.jsonl for each and shows them as a table.

`peak_bytes` is the working process's own high-water mark (VmHWM), `child_peak_bytes` that of its largest child: the
reopening check, which maps the written files, so that they count where they are read. Both are read from /proc while
the process lives, since wait4's maximum (`rusage_bytes`) covers a process together with its children.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

from benchmarks.shapes import CALIBRATION, SHAPES, write_checkpoint
from benchmarks.table_llm import code_hash
from benchmarks.timing import environment
from grail.errors import GrailError
from grail.report import versions

STORE = Path(__file__).parent / "results" / "memory.jsonl"
POLL = 0.02
SEQ_LEN = 2048
COLUMNS = ("shape", "layers", "tokens", "flags", "planned GB", "compress GB", "reopening GB", "compress s", "wall s")


@dataclass(frozen=True)
class Case:
    """A shape, its layers, and how many calibration tokens in windows of how many."""

    shape: str
    layers: int
    tokens: int
    seq_len: int = SEQ_LEN

    @property
    def window(self) -> int:
        return min(self.seq_len, self.tokens)

    @property
    def windows(self) -> int:
        return self.tokens // self.window

    @property
    def disk(self) -> int:
        """Bytes for the checkpoint, a result as large, and the hidden vectors if they are spilled."""
        shape = SHAPES[self.shape]
        return 2 * 2 * shape.parameters(self.layers) + 4 * self.tokens * (shape.mlp + 3 * shape.hidden)


@dataclass(frozen=True)
class Usage:
    """What a process took: seconds, and largest resident sizes in bytes (0 where there is no /proc to read)."""

    seconds: float
    peak: int
    child_peak: int
    rusage: int
    returncode: int


def usage_of(command: list[str], log: Path, **options) -> Usage:
    """Run a command to its end, its output into `log`, and watch its memory. It is killed when this is interrupted."""
    start, peak, child_peak = time.perf_counter(), 0, 0
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            peak = max(peak, _peak(process.pid))
            child_peak = max(child_peak, *map(_peak, _children(process.pid)), 0)
            time.sleep(POLL)
    except BaseException:
        process.kill()
        process.wait()
        raise
    process.returncode = os.waitstatus_to_exitcode(ended[1])
    unit = 1 if sys.platform == "darwin" else 1024
    seconds = time.perf_counter() - start
    return Usage(seconds, peak, child_peak, ended[2].ru_maxrss * unit, process.returncode)


def _peak(pid: int) -> int:
    """VmHWM in bytes; 0 for a process that is gone."""
    for line in _proc(pid, "status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _children(pid: int) -> list[int]:
    """Processes started by the main thread. One that still shares its parent's memory, between vfork and exec, shows
    the parent's command line and is left out."""
    own = _proc(pid, "cmdline")
    return [int(child) for child in _proc(pid, f"task/{pid}/children").split() if _proc(int(child), "cmdline") != own]


def _proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def measure(case: Case, dense: Path, work: Path, flags: list[str]) -> dict:
    """One `grail compress` of the checkpoint `dense`; its result is deleted. Raises RuntimeError when it fails."""
    output, log = work / "output", work / "log"
    asked = {
        "--model": dense, "--calibration": dense / CALIBRATION, "--samples": case.windows, "--seq-len": case.window,
        "--method": "wanda-sp", "--ratio": 0.3, "--target": "hidden", "--eval": "none", "--output": output,
    }  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "grail",
        "compress",
        "--overwrite",
        *(str(x) for pair in asked.items() for x in pair),
    ]
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    row = vars(case) | {"flags": flags, "versions": versions(), "code": code_hash()}
    used = usage_of([*command, *flags], log, cwd=work, env=os.environ | {"OMP_NUM_THREADS": threads})
    said = log.read_text(errors="replace").strip().splitlines()
    if used.returncode:
        end = " | ".join(said[-3:])
        raise RuntimeError(f"{case} ended with {used.returncode} after a peak of {used.peak / 1e9:.2f} GB: {end}")
    ran, report = (json.loads((output / name).read_text()) for name in ("run.json", "grail.json"))
    shutil.rmtree(output)
    return row | environment() | {
        "threads": int(threads),
        "peak_bytes": used.peak or None,
        "child_peak_bytes": used.child_peak or None,
        "rusage_bytes": used.rusage,
        "reported_bytes": ran["peak_memory_bytes"],
        "seconds": round(used.seconds, 1),
        "phases": ran["seconds"],
        "profile": ran["profile"],
        "planned": ran["planned"]["memory_bytes"],
        "reopened": ran["reopened"],
        "parameters": report["parameters"],
    }  # fmt: skip


@contextmanager
def dense_checkpoint(case: Case, work: Path) -> Iterator[Path]:
    """The case's network with its calibration ids, deleted afterwards."""
    folder = work / f"{case.shape}-{case.layers}"
    try:
        yield write_checkpoint(
            case.shape, folder, layers=case.layers, windows=case.windows, seq_len=case.window, overwrite=True
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def missing_disk(case: Case, work: Path) -> str | None:
    """Why a case does not fit on the disk under `work`, or None when it does."""
    free = shutil.disk_usage(work).free
    if free >= case.disk:
        return None
    return f"{case} needs {case.disk / 1e9:.1f} GB of disk, {work} has {free / 1e9:.1f} GB"


BENCHES = {
    "smollm2-2-layers": Case("smollm2-135m", 2, 2048),
    "smollm2-8-layers": Case("smollm2-135m", 8, 2048),
    "smollm2-more-tokens": Case("smollm2-135m", 2, 16384),
    "llama-2-7b": Case("llama-2-7b", 2, 2048),
}


@pytest.mark.parametrize("case", BENCHES.values(), ids=BENCHES)
def bench_compress(benchmark, tmp_path, case):
    if (lacking := missing_disk(case, tmp_path)) is not None:
        pytest.skip(lacking)
    with dense_checkpoint(case, tmp_path) as dense:
        row = benchmark.pedantic(measure, args=(case, dense, tmp_path, []), rounds=1)
    benchmark.extra_info.update(row)


def table(rows: list[dict]) -> str:
    """The rows for a terminal, aligned."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines) + "\n"


def _cells(row: dict) -> tuple[str, ...]:
    size = lambda count: "?" if count is None else f"{count / 1e9:.2f}"  # noqa: E731
    named = (row["shape"], str(row["layers"]), f"{row['tokens']:,}", " ".join(row["flags"]) or "-")
    peaks = (size(row["planned"]["peak"]), size(row["peak_bytes"]), size(row["child_peak_bytes"]))
    return (*named, *peaks, f"{row['phases']['compress']:.0f}", f"{row['seconds']:.0f}")


def append(row: dict) -> None:
    STORE.parent.mkdir(exist_ok=True)
    with open(STORE, "a") as handle:
        handle.write(json.dumps(row) + "\n")


def main() -> None:
    own, flags = sys.argv[1:], []
    if "--" in own:
        own, flags = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--layers", nargs="+", type=int, default=[2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[SEQ_LEN])
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN, help="tokens per window")
    parser.add_argument("--work", type=Path, help="folder for temporary files (the system's own)")
    asked = parser.parse_args(own)
    cases = [Case(asked.shape, layers, tokens, asked.seq_len) for layers in asked.layers for tokens in asked.tokens]
    try:
        rows = list(run(cases, asked.work, flags))
    except (GrailError, RuntimeError) as error:
        sys.exit(f"bench_memory: {error}")
    sys.stdout.write(table(rows))


def run(cases: list[Case], folder: Path | None, flags: list[str]) -> Iterator[dict]:
    """Measure and store case by case, so that what is done stays when a later one fails."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="grail-memory-", dir=folder) as work:
        for number, case in enumerate(cases, 1):
            if (lacking := missing_disk(case, Path(work))) is not None:
                raise GrailError(lacking)
            sys.stderr.write(f"{number} of {len(cases)}: {case}\n")
            with dense_checkpoint(case, Path(work)) as dense:
                row = measure(case, dense, Path(work), flags)
            append(row)
            yield row


if __name__ == "__main__":
    main()
