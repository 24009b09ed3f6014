"""Of several threads one runs at a time: what a fork makes of that, and what a thread says that waits for long."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import grail
from grail import turns
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("small_runs_on_one_thread")
SECONDS = 120
"""Of which a machine with much else to do takes some."""


class Enough(Exception):
    """Ends a compression whose result nobody needs."""


@contextmanager
def compressing(folder: Path):
    """Within, another thread is in the midst of a compression."""
    begun, go_on = threading.Event(), threading.Event()

    def wait(_):
        begun.set()
        go_on.wait(SECONDS)
        raise Enough

    def compress():
        text = tiny_calibration(folder / "ids.safetensors")
        settings = {"method": "mag-l2", "ratio": 0.5, "eval": "none", "seq_len": 32}
        with suppress(Enough):
            grail.compress(tiny_model(), calibration=text, samples=4, on_site=wait, **settings)

    thread = threading.Thread(target=compress)
    thread.start()
    try:
        assert begun.wait(SECONDS)
        yield
    finally:
        go_on.set()
        thread.join(SECONDS)
    assert not thread.is_alive()


def ends_in_time(process: int) -> int | None:
    """The exit code of a child; None where it hangs, and is killed."""
    for _ in range(SECONDS * 20):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def test_a_child_forked_while_a_thread_compresses_does_not_wait_for_it(tmp_path):
    source = tiny_checkpoint(tmp_path / "dense")
    with compressing(tmp_path):
        process = os.fork()
        if not process:
            try:
                model = grail.load(source)
                os._exit(3 if len(model.model.layers) == 2 else 4)
            finally:
                os._exit(70)
        assert ends_in_time(process) == 3


def about(caplog) -> list[str]:
    """What was said of the thread that waits."""
    return [record.getMessage() for record in caplog.records if "of-a-loader" in record.getMessage()]


def test_a_thread_that_waits_for_long_says_so(tmp_path, caplog, monkeypatch):
    source = tiny_checkpoint(tmp_path / "dense")
    monkeypatch.setattr(turns, "PATIENCE", 0.1)
    loaded = []
    with caplog.at_level(logging.WARNING, "grail"), compressing(tmp_path):
        waiting = threading.Thread(target=lambda: loaded.append(grail.load(source)), name="of-a-loader")
        waiting.start()
        until = time.monotonic() + SECONDS
        while not (said := about(caplog)) and time.monotonic() < until:
            time.sleep(0.05)
        assert not loaded
    waiting.join(SECONDS)
    assert said == about(caplog) and len(said) == 1 and "waits" in said[0] and len(loaded) == 1
