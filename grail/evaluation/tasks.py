"""Tasks of lm-eval, EleutherAI's evaluation harness: zero-shot accuracy and whatever else its tasks measure."""

from __future__ import annotations

import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch

from ..errors import GrailError, first_line

BATCH = 8
MAIN = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "perplexity")
"""Which of a task's metrics is shown first."""


class Tasks:
    """Tasks by name, found before anything is loaded.

    Names may be patterns. folder: of task descriptions (.yaml) of one's own, whose functions and templates lm-eval
    runs as code; limit: so many questions of each task; shots: worked examples
    before each question (None: as the task says). Raises GrailError for names that lm-eval does not know.
    """

    def __init__(
        self, names: str, *, folder: str | Path | None = None, limit: int | None = None, shots: int | None = None
    ):
        self.names = [name.strip() for name in names.split(",") if name.strip()]
        self.limit, self.shots = limit, shots
        if not self.names:
            raise GrailError("--tasks names no task; example: --tasks piqa,hellaswag")
        if folder is not None and not Path(folder).is_dir():
            raise GrailError(f"--tasks-folder {folder} is no folder")
        for option, value, least in (("--limit", limit, 1), ("--shots", shots, 0)):
            if value is not None and value < least:
                raise GrailError(f"{option} must be at least {least}; got {value}")
        with _imported() as lm_eval:
            self._manager = lm_eval.tasks.TaskManager(include_path=folder and str(folder))
        fitting = {name: self._manager.match_tasks([name]) for name in self.names}
        for name, found in fitting.items():
            if not found:
                raise GrailError(f"--tasks {name}: lm-eval knows no such task (`lm-eval ls tasks` lists them)")
        self.names = list(dict.fromkeys(task for found in fitting.values() for task in found))

    def fetch(self) -> None:
        """Get the tasks' data, before anything is measured. Raises GrailError where it cannot be had."""
        with _imported():
            try:
                self._manager.load(self.names)
            except Exception as error:
                raise GrailError(f"--tasks {','.join(self.names)}: {_sentence(error)}") from error

    def measure(self, model: Any, tokenizer: Any, label: str) -> dict[str, dict]:
        """By task what it measures of a transformers model, the main metric first: metrics, each with its standard
        error as NAME_stderr where there is one, and "questions". Raises GrailError where a task's data cannot be had
        or a task fails."""
        with _imported() as lm_eval, _random_state_kept():
            from lm_eval.models.huggingface import HFLM

            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
            silent = redirect_stderr(io.StringIO()) if os.environ.get("TQDM_DISABLE") else nullcontext()
            try:
                with silent:  # its bars do not heed the variable
                    found = lm_eval.simple_evaluate(
                        wrapped,
                        tasks=self.names,
                        task_manager=self._manager,
                        num_fewshot=self.shots,
                        limit=self.limit,
                        log_samples=False,
                        random_seed=None,
                        numpy_random_seed=None,
                        torch_random_seed=None,
                    )
            except Exception as error:
                raise GrailError(f"--tasks {','.join(self.names)} on {label}: {_sentence(error)}") from error
        counts = found.get("n-samples", {})
        return {
            name: _metrics(values) | {"questions": counts.get(name, {}).get("effective")}
            for name, values in found["results"].items()
        }


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """ "acc,none": 0.5, "acc_stderr,none": 0.1 -> "acc": 0.5, "acc_stderr": 0.1; other filters than none keep their
    name behind a slash."""
    found = {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if isinstance(value, (int, float)) and kind:
            found[metric if kind == "none" else f"{metric}/{kind}"] = float(value)
    order = [name for name in MAIN if name in found]
    return {name: found[name] for name in [*order, *(name for name in found if name not in order)]}


def main_metric(scores: dict[str, Any]) -> tuple[str, float, float | None] | None:
    """Name, value and standard error of what is shown of a task; None where it has no number."""
    for name, value in scores.items():
        if isinstance(value, float) and "_stderr" not in name:
            return name, value, scores.get(f"{name}_stderr")
    return None


def _sentence(error: Exception) -> str:
    """What went wrong, in one sentence; lack of a network is the usual reason."""
    text = first_line(error)
    if "confirm_run_unsafe_code" in text:
        return "a task runs code that the model writes, which grail does not do"
    if any(word in f"{type(error).__name__} {text}" for word in ("Connection", "Offline", "LocalEntryNotFound", "Hub")):
        return f"its data cannot be fetched and is not in the hub's cache ({text})"
    return text or type(error).__name__


@contextmanager
def _imported() -> Iterator[Any]:
    """lm_eval, quiet: its own log lines are not ours."""
    log = logging.getLogger("lm_eval")
    level = log.level
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise GrailError("--tasks needs lm-eval: pip install 'grail-compress[eval]'") from error
    log.setLevel(logging.ERROR)
    try:
        yield lm_eval
    finally:
        log.setLevel(level)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """The process's random numbers go on as if nothing had been drawn."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
