"""Exceptions to one sentence and an exit code, and what every command begins with."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import typer

from .arguments import refuse_empty, refuse_other_bytes
from .errors import INTERRUPTED, NOWHERE, GrailError, is_nowhere, sentence_of, verdict
from .streams import StdoutRefused, nobody_reads, silence_stdout
from .terminal import NORMAL, TerminalProgress, set_logging

ISSUES = "please report it with this output and the command"
LOOKS_ONLY = "plan_command"
"""Which writes no output, though it has that option."""
UsageError = typer.BadParameter.__base__  # click's, or typer's own copy of it


class OneSentence(typer.core.TyperGroup):
    """Wrong options are told like any other bad input, without the usage box."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # which shows the help
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            fail(f"{error.format_message()} (see grail --help)", 2)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            fail(f"{error.format_message()} (see grail {ctx.invoked_subcommand or ''} --help)", 2)
        except KeyboardInterrupt:  # before the command itself: typer would end without a word
            fail(*INTERRUPTED)


def guarded(command: Callable) -> Callable:
    """Turn exceptions into one sentence on stderr and the exit codes of CONTRACTS."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            refuse_empty(command, kwargs)
            refuse_other_bytes(command, kwargs)
            command(*args, **kwargs)
            sys.stdout.flush()
        except typer.Exit:
            raise
        except BrokenPipeError as error:
            if not nobody_reads():
                _bug(error, kwargs)
            silence_stdout()
        except StdoutRefused as error:
            silence_stdout()
            fail(sentence_of(error) + _where_the_result_is(command, kwargs), 2)
        except (Exception, KeyboardInterrupt) as error:
            if (known := verdict(error)) is None:
                _bug(error, kwargs)
            elif known == INTERRUPTED and (kept := _earlier_work(kwargs)):
                fail(f"interrupted; what is done is kept in {kept}: the same command goes on from there", 75)
            else:
                fail(*known)

    return run


def _where_the_result_is(command: Callable, options: dict) -> str:
    """Stdout is written to when all work is done."""
    output = options.get("output")
    writes = command.__name__ != LOOKS_ONLY and not options.get("print_recipe")
    return f"; the result is in {output}" if output and writes and os.path.exists(output) else ""


def _earlier_work(options: dict) -> Path | None:
    """What a run that --resume was to go on with has left, when that is stopped before it has opened it."""
    if not options.get("resume") or not options.get("output"):
        return None
    from .checkpoint.journal import JOURNAL, Journal

    out = Path(os.path.realpath(options["output"]))
    partial = out.with_name(f"{out.name}.partial")
    return partial if Journal(partial / JOURNAL).committed else None


def _bug(error: BaseException, options: dict) -> NoReturn:
    if options.get("verbose"):
        raise error
    notes = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    fail(f"unexpected {type(error).__name__}{notes}: {error} (a bug in grail: {ISSUES}; -v shows the trace)", 1)


def fail(sentence: str, code: int) -> NoReturn:
    """One line, whatever stands in a file's name or a library's message."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(sentence.split()))
    sys.stderr.write(f"grail: {line}\n")
    sys.stderr.flush()  # what is ended hard later has said it
    raise typer.Exit(code)


@contextmanager
def outside_of_commands() -> Iterator[None]:
    """What --help and --version meet, which belong to no command."""
    try:
        yield
    except StdoutRefused as error:
        silence_stdout()
        with suppress(typer.Exit):
            fail(sentence_of(error), 2)
        sys.exit(2)


def start(quiet: bool, verbose: int) -> TerminalProgress:
    """Set up logging and signals as asked, and give the progress that the command reports to."""
    if is_nowhere():
        raise GrailError(NOWHERE)  # libraries that torch loads end the process there, without a word of ours
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request is treated like Ctrl-C
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, signal.default_int_handler)  # the terminal went away
    rank = os.environ.get("RANK", "")
    if rank.isdecimal() and int(rank):
        quiet = True  # of several processes one speaks
    verbosity = 0 if quiet else NORMAL + verbose
    set_logging(verbosity)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return TerminalProgress(verbosity)
