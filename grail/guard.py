"""Exceptions to one sentence and an exit code, and what every command begins with."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import typer

from .errors import CIRCUMSTANCES, GrailError, Interrupted, sentence_of
from .terminal import NORMAL, TerminalProgress, set_logging

ISSUES = "please report it with this output and the command"
UsageError = typer.BadParameter.__base__  # click's, or typer's own copy of it


class OneSentence(typer.core.TyperGroup):
    """Wrong options are told like any other bad input, without the usage box."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            fail(f"{error.format_message()} (see grail {ctx.invoked_subcommand or ''} --help)", 2)


def guarded(command: Callable) -> Callable:
    """Turn exceptions into one sentence on stderr and the exit codes of CONTRACTS."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except GrailError as error:
            fail(str(error), 2)
        except Interrupted as stop:
            fail(str(stop), 75)
        except KeyboardInterrupt:
            fail("interrupted; nothing new was kept", 130)
        except OSError as error:
            if error.errno not in CIRCUMSTANCES:
                _bug(error, kwargs)
            fail(sentence_of(error), 2)
        except Exception as error:
            _bug(error, kwargs)

    return run


def _bug(error: Exception, options: dict) -> None:
    if options.get("verbose"):
        raise error
    fail(f"unexpected {type(error).__name__}: {error} (a bug in grail: {ISSUES}; -v shows the trace)", 1)


def fail(sentence: str, code: int) -> None:
    """One line, whatever stands in a file's name or a library's message."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(sentence.split()))
    sys.stderr.write(f"grail: {line}\n")
    raise typer.Exit(code)


def start(quiet: bool, verbose: int) -> TerminalProgress:
    """Set up logging and signals as asked, and give the progress that the command reports to."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request is treated like Ctrl-C
    if int(os.environ.get("RANK", "0")):
        quiet = True  # of several processes one speaks
    verbosity = 0 if quiet else NORMAL + verbose
    set_logging(verbosity)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return TerminalProgress(verbosity)
