"""Real runs that are signalled, and runs killed at any point: exit codes, what is said, the same bytes in the end."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import grail
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import JOURNAL
from grail.cli import app
from tests.killed_runs import files_of
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def killing(tmp_path_factory):
    """A process that kills runs while the other tests go on."""
    work = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.killed_runs", "--trials", "5", "--timed", "1", "--seed", "3"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(work)}
    with (
        open(work / "found", "w") as found,
        open(work / "said", "w") as said,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=found, stderr=said) as process,
    ):
        yield process, work
        process.kill()


class Process:
    """Real runs, `grail compress`, to the same output each time."""

    def __init__(self, work: Path):
        self.out, self.partial = work / "out", work / "out.partial"
        self.source = tiny_checkpoint(work / "source", num_hidden_layers=3)
        ids = str(tiny_calibration(work / "ids.safetensors", windows=32, length=64))
        self.flags = {"calibration": ids, "eval": ids, "ratio": 0.4}
        self.command = ["compress", "--model", str(self.source), "--output", str(self.out)]
        self.command += [word for flag, value in self.flags.items() for word in (f"--{flag}", str(value))]

    def start(self, *flags: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "grail", *self.command, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # a shell's background job ignores SIGINT, and so would all that it starts
        listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen
        )

    def refused(self) -> str:
        """The one line that the same command says now, in this process."""
        result = CliRunner().invoke(app, self.command)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    def end(self, process: subprocess.Popen, code: int, signalled: int = 0) -> str:
        """The last line that it says, having ended with this exit code."""
        process.send_signal(signalled)
        said = process.communicate()[1]
        assert process.returncode == code, said
        return said.splitlines()[-1]

    def steps(self) -> int:
        return len(Journal(self.partial / JOURNAL).steps)

    def wait_for(self, process: subprocess.Popen, steps: int) -> None:
        while process.poll() is None and self.steps() < steps:
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()


def test_signals_a_second_run_and_going_on_in_real_processes(tmp_path, monkeypatch, reopen_here, killing):
    run = Process(tmp_path)
    first = run.start()
    run.wait_for(first, steps=2)
    first.send_signal(signal.SIGSTOP)
    assert "another run is working" in run.refused()
    first.send_signal(signal.SIGCONT)
    said = run.end(first, 75, signal.SIGINT)
    assert str(run.partial) in said and said.endswith("--resume")
    done = run.steps()
    said = run.refused()
    assert "--resume" in said and "--overwrite" in said and run.steps() == done
    second = run.start("--resume")
    run.wait_for(second, steps=done + 1)
    assert run.end(second, 75, signal.SIGTERM).endswith("--resume")
    monkeypatch.setattr(grail.workspace, "CHUNK_TOKENS", 4096)
    grail.compress(run.source, output=run.out, resume=True, **run.flags)
    grail.compress(run.source, output=tmp_path / "undisturbed", **run.flags)
    assert files_of(run.out) == files_of(tmp_path / "undisturbed")
    assert not run.partial.exists()


def test_kills_at_any_point_end_in_the_same_bytes(killing):
    """Some thirty here; `python -m tests.killed_runs` tries every event."""
    process, work = killing
    code, found = process.wait(), (work / "found").read_text()
    assert code == 0, found + (work / "said").read_text()
    tried = json.loads(found)["methods"].values()
    assert sum(found["kills"] for found in tried) >= 25 and sum(found["gone on with"] for found in tried) >= 10
