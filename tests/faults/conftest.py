"""One line at the end: what was tried."""

from __future__ import annotations

from tests.faults import tally


def pytest_terminal_summary(terminalreporter):
    if told := tally.line():
        terminalreporter.write_line(told)
