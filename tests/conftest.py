"""No network, two threads at most (one where pytest -n starts several processes: Makefile), and a reopening check that
does not start a process for every tiny model."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"
os.environ["TRITON_INTERPRET"] = "0" if os.environ.get("GRAIL_TEST_GPU") == "1" else "1"  # before triton is imported

import pytest
import torch
from hypothesis import settings

from tests.faults import tally

INTERPRETED = ("centred", "cross", "gram_triton", "packed_triton", "ridge_small")
collect_ignore = [f"test_{name}.py" for name in INTERPRETED] if os.environ["TRITON_INTERPRET"] == "0" else []

# a slow example on a machine that does something else beside is no failure
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")

torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), 2))


FAULTS = "faults"


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[FAULTS] = tally.counted()


def pytest_collection_modifyitems(config, items):
    """Of several processes none is left with the longest files at the end."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    tally.add(getattr(node, "workeroutput", {}).get(FAULTS, []))


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable():
    """A failure that quotes half a character would end the process that sends it, untold."""
    return _whole((yield))


def _whole(told):
    if isinstance(told, str):
        return told.encode(errors="backslashreplace").decode()
    if isinstance(told, dict):
        return {key: _whole(entry) for key, entry in told.items()}
    return type(told)(map(_whole, told)) if isinstance(told, (list, tuple)) else told


def pytest_terminal_summary(terminalreporter):
    """One line at the end: what tests/faults tried, in all processes that pytest started (pytest -n)."""
    if told := tally.line():
        terminalreporter.write_line(told)


@pytest.fixture
def reopen_here(monkeypatch, tmp_path_factory):
    """The reopening check itself, in this process: the same comparisons without four seconds of imports."""
    from grail.checkpoint import reopen
    from tests.tiny import verify_in_this_process

    monkeypatch.setattr(reopen, "verify", verify_in_this_process(tmp_path_factory.mktemp))


@pytest.fixture
def fetch_by(monkeypatch):
    """Lets the kernels fetch their operands by "pointer", or by "tma" where this Triton can."""

    def choose(kernel):
        from grail_kernels import launch

        if kernel == "tma" and not launch._has_descriptors():
            pytest.skip("Triton has tensor descriptors from 3.4 on")
        monkeypatch.setenv(launch.KERNEL_ENVIRONMENT, kernel)

    return choose


@pytest.fixture
def poisoned(monkeypatch):
    """Every workspace starts as NaN: an element that a kernel does not write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 1)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture(scope="module")
def small_runs_on_one_thread():
    """Runs in this process that give the same bits as those of tests/killed_runs.py."""
    from tests.killed_runs import small_runs

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with small_runs():
        yield
    torch.set_num_threads(before)
