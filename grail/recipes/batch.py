"""The runs of a recipe file, one after another in this process: those that are finished are left as they are."""

from __future__ import annotations

import fnmatch
import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoint.writer import JOURNAL, OutputFolder
from ..documents import read_json
from ..errors import Circumstance, GrailError, Interrupted, circumstance, verdict
from ..page.command import flags
from ..page.run import GRAIL, RAN, mapping, read_run, scarce
from ..progress import Progress
from ..recipe import Recipe
from ..request import Request

WAITING, FINISHED, DONE, FAILED = "to do", "finished", "done", "failed"


@dataclass
class Outcome:
    """state: one of WAITING, FINISHED (before this call), DONE (by it) and FAILED; error and code: what it ended
    with."""

    asked: Request
    state: str
    error: str | None = None
    code: int = 0

    @property
    def output(self) -> str:
        """Where the result lies."""
        return self.asked.recipe.output

    @property
    def command(self) -> str:
        """For a shell."""
        return "grail compress " + " ".join(shlex.join(part) for part in flags(self.asked.options()))

    def to_json(self) -> dict[str, Any]:
        """As --json has it; sizes and figures where there is a result."""
        run = read_run(self.output) if self.state in (FINISHED, DONE) else None
        before, after = run.sizes("parameters") if run else (None, None)
        measure = run.measure if run else None
        return {
            "output": self.output,
            "state": self.state,
            "command": self.command,
            "parameters": {"before": before and int(before), "after": after and int(after)},
            "measure": measure and measure.name,
            "data": measure and measure.data,
            "values": measure.values if measure else {},
        }


def chosen(requests: list[Request], patterns: Sequence[str]) -> list[Request]:
    """Those whose output, or its last name, fits one of the patterns; all where there are none. Raises GrailError for a
    pattern that nothing fits."""
    found = {}
    for pattern in patterns:
        fitting = [r for r in requests if _fits(r.recipe.output, pattern)]
        if not fitting:
            outputs = [r.recipe.output for r in requests]
            more = f" and {len(outputs) - 5} others" if len(outputs) > 5 else ""
            raise GrailError(f"--only {pattern} fits no output; they are {', '.join(outputs[:5])}{more}")
        found |= {id(r): r for r in fitting}
    return [r for r in requests if id(r) in found] if patterns else requests


def _fits(output: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (output, Path(output).name))


def is_finished(asked: Request) -> bool:
    """Whether the output holds what is asked for: a grail.json with an equal recipe. Input files are not compared."""
    return finished_result(asked) is not None


def finished_result(asked: Request) -> dict[str, Any] | None:
    """The grail.json that is_finished goes by, with run.json as "run"; None where there is work left, be it to clean
    up after a run that was cut off at its very end, or to go on with one that was to replace what is there."""
    folder = Path(asked.recipe.output)
    if not (folder / GRAIL).is_file() or (folder / JOURNAL).exists():
        return None
    if asked.recipe.overwrite and OutputFolder(folder).partial.exists():
        return None
    found = read_json(folder / GRAIL)
    options = mapping(mapping(found.get("source")).get("options"))
    if found.get("recipe") != _recipe_of_result(asked.recipe, found) or options != asked.model_options:
        return None
    if asked.recipe.strict:
        _refuse_raised(folder, found)
    return found | ({"run": read_json(folder / RAN)} if (folder / RAN).is_file() else {})


def _recipe_of_result(recipe: Recipe, found: dict[str, Any]) -> Any:
    """What a result of this recipe names: every site on its own where no target was asked for and the data, as `found`
    says, are too little to choose by."""
    if scarce(found) and recipe.chooses and not recipe.wants_target:
        recipe = recipe.site_by_site()
    return json.loads(json.dumps(recipe.to_json()))


def _refuse_raised(folder: Path, found: dict[str, Any]) -> None:
    """Raises GrailError for a result that --strict would not have let through."""
    sites = found.get("sites")
    raised = [
        str(site.get("name"))
        for site in map(mapping, sites if isinstance(sites, list) else [])
        if site.get("retries") or mapping(site.get("damping")).get("retries")
    ]
    for name in [*raised, *mapping(found.get("allocation_raised"))]:
        raise GrailError(
            f"{folder} is finished, and a λ was raised at {name}; leave out --strict, or start over with other options "
            f"and --overwrite"
        )


def states(requests: list[Request], *, overwrite: bool = False, resume: bool = False) -> list[Outcome]:
    """What there is to do. overwrite and resume are added to the recipes; what is overwritten is not finished."""
    found = []
    for asked in requests:
        asked.recipe.overwrite |= overwrite
        asked.recipe.resume |= resume and not asked.vision
        finished = not asked.recipe.overwrite and is_finished(asked)
        found.append(Outcome(asked, FINISHED if finished else WAITING))
    return found


def check_ready(outcomes: list[Outcome]) -> None:
    """Look at files and outputs of all that is to be done. Raises GrailError before there is any work to lose."""
    from .ready import check, check_apart, check_models

    waiting = [outcome.asked for outcome in outcomes if outcome.state == WAITING]
    check_models(waiting)
    for outcome in outcomes:
        if outcome.state == WAITING:
            try:
                check(outcome.asked)
            except GrailError as error:
                raise type(error)(f"{outcome.output}: {error}") from error
    check_apart([outcome.asked for outcome in outcomes], waiting)


def carry_out(outcomes: list[Outcome], progress: Progress, *, keep_going: bool = False) -> None:
    """Run what is to be done; states are brought up to date. Raises what stopped a run, naming its output; with
    keep_going only an interruption."""
    for outcome in outcomes:
        if outcome.state == FINISHED:
            progress.say(f"{outcome.output} is finished and stays as it is")
    waiting = [outcome for outcome in outcomes if outcome.state == WAITING]
    for number, outcome in enumerate(waiting, 1):
        progress.say(f"run {number} of {len(waiting)}: {outcome.output}")
        try:
            outcome.asked.carry_out(progress)
        except KeyboardInterrupt:
            if not (done := sum(each.state == DONE for each in waiting)):
                raise
            raise Interrupted(
                f"{outcome.output}: interrupted; {done} of {len(waiting)} runs are finished, and the same command goes "
                f"on with the others"
            ) from None
        except Interrupted as stop:
            raise Interrupted(f"{outcome.output}: {stop}") from None
        except Exception as error:
            if not keep_going:
                _stop(outcome.output, error)
            told = verdict(error) or (f"unexpected {type(error).__name__}: {error} (a bug in grail)", 1)
            outcome.state, (outcome.error, outcome.code) = FAILED, told
            progress.warn(f"{outcome.output}: {outcome.error}")
        else:
            outcome.state = DONE


def _stop(output: str, error: Exception) -> NoReturn:
    """Raise the same kind of error, its sentence with the output's name; a bug as it is, with a note."""
    if isinstance(error, GrailError):
        raise type(error)(f"{output}: {error}") from error
    if (told := circumstance(error)) is not None:
        raise Circumstance(f"{output}: {told}") from error
    error.add_note(f"in the run {output}")
    raise error


def speaks() -> bool:
    """Whether this is the process that reports, of several that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


def refuse_to_keep_going() -> None:
    """Raises GrailError under torchrun, where the other processes end with the one that failed."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise GrailError("--keep-going is for one process: when a run fails in one of several, all of them end")
