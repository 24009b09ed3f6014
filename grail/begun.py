"""How the passes of a run are carried out: as planned, or as an earlier run did whose work is gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .checkpoint.journal import START, understood
from .checkpoint.writer import STORE, OutputFolder
from .errors import Circumstance, GrailError
from .numbers import bytes_of
from .plan import Plan
from .profile import Profile
from .session import Session
from .store import CachedStore, DiskStore, MemoryStore
from .workspace import Workspace

HASHED = ("model", "model's config.json", "calibration", "evaluation")
MOST = {"chunk_tokens": 2**20, "threads": 2**12}
"""More than any run begins with."""
EVERYWHERE = ("output", "overwrite", "resume", "store", "memory", "strict")
"""Options that decide no result, and that all processes of a run have to share."""
ELSEWHERE = ("device", "eval")
"""Of each process its own: one GPU of a machine, a path; the kind of device and the text's hash are compared."""
STORES = {"disk": DiskStore, "cached": CachedStore}


def workspace_of(plan: Plan, out: OutputFolder) -> Workspace:
    """How the passes are carried out: as an earlier run did whose work is gone on with, else as planned."""
    session, group = plan.session, plan.session.group
    asked = group.broadcast(_begun(plan, out) if group.main else None)  # the same chunks and threads for all
    torch.set_num_threads(asked["threads"])
    store = MemoryStore() if plan.store == "memory" else STORES[plan.store](out.partial / STORE)
    profile = Profile(watch_memory=session.recipe.profile)
    return Workspace(store, group, asked["chunk_tokens"], plan.costs.spill, profile=profile)


def _begun(plan: Plan, out: OutputFolder) -> dict[str, Any]:
    """The journal's first line, written now or by an earlier run. Raises Circumstance when that asked for something
    else or does not fit the memory that there is now."""
    chunk_tokens = plan.costs.chunk_tokens
    asked: dict[str, Any] = {
        "identity": plan.session.identity(),
        "chunk_tokens": chunk_tokens,
        "threads": torch.get_num_threads(),
    }
    started = out.journal.find(START)
    if not started:
        out.journal.append({"step": START, **asked})
        return asked
    with understood(out.journal.path):
        _check_kinds(started[0])
        _check_same(started[0]["identity"], asked["identity"])
    budget = plan.session.recipe.memory
    if budget is not None and started[0]["chunk_tokens"] > chunk_tokens:
        raise Circumstance(
            f"--memory {bytes_of(budget)}: the run was begun with {started[0]['chunk_tokens']} tokens at a time and "
            f"must go on so, which needs more; give more, or start over with --overwrite and not --resume"
        )
    return started[0]


def _check_kinds(started: dict[str, Any]) -> None:
    """Raises ValueError for numbers that no run begins with."""
    for key in ("chunk_tokens", "threads"):
        if type(started[key]) is not int or not 1 <= started[key] <= MOST[key]:
            raise ValueError(f"{key} is {started[key]}")


def _check_same(begun: dict[str, Any], asked: dict[str, Any]) -> None:
    """Raises Circumstance, which leaves the work as it is, naming the first thing that is not as it was."""
    for what, was, now in _differing(begun, asked):
        raise Circumstance(
            f"--resume: the run was begun with {what} {was}, this command has {what} {now} (to start over, give "
            f"--overwrite and not --resume)"
        )


def _differing(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What is not the same in the identities of two runs: (what, that of one, that of the other)."""
    flat = [{**run.pop("recipe"), **run.pop("versions"), **run} for run in ({**one}, {**other})]
    for key in sorted(set(flat[0]) | set(flat[1])):
        was, now = (found.get(key) for found in flat)
        if was != now:
            yield f"{key} sha256" if key in HASHED else key, was, now


def check_same_everywhere(session: Session) -> None:
    """Raises GrailError, on every process of a run, where one was started with other options, text, weights, settings
    or versions than the main one: their statistics would be added up, or they would wait for each other for ever."""
    if session.group.size == 1:
        return
    recipe, group = session.recipe, session.group
    files = group.gather(session.model.source.stamps())  # hashing a large checkpoint takes minutes, on each machine
    here = session.identity(weights=None if any(one != files[0] for one in files) else "the same files")
    here["recipe"] |= {name: getattr(recipe, name) for name in EVERYWHERE}
    for name in ELSEWHERE:
        here["recipe"].pop(name)
    main, *others = group.gather(here)
    for rank, other in enumerate(others, 1):
        for what, of_main, its_own in _differing(main, other):
            raise GrailError(
                f"process {rank} of {group.size} was started with {what} {its_own}, and process 0 with {what} "
                f"{of_main}; start all with the same command, model and text"
            )
