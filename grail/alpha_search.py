"""--alpha search: whole runs, with α chosen by site and with one α for all sites; perplexity decides.

What a site gains on its own target need not be a gain of the network (issue F, point 1). So each candidate is a network
of its own, judged on the windows that only decide, which enter no statistic: the least perplexity is kept. With equal
ones the first. A candidate lies in OUT.partial/candidates, under the α it has, and is a resumable run like any other;
the best so far and the one at work are there at a time.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint.disk import remove
from .checkpoint.journal import START, understood
from .checkpoint.writer import CANDIDATES, SHARD, OutputFolder
from .errors import Circumstance, GrailError
from .evaluation.perplexity import perplexity
from .finish import write_rest
from .job import Job
from .pipeline import Streamed, stream, tell_sites
from .recipe import ALPHAS, alpha_name
from .session import Session
from .workspace import Workspace

BEGUN, JUDGED = "search", "candidate"
PHASE = "compress"


class AlphaSearch:
    """The candidates of one run, whose shards end in `out`."""

    def __init__(self, session: Session, work: Workspace, out: OutputFolder):
        self.session, self.work, self.out = session, work, out
        self.group = session.group
        self.found: dict[str | float, float] = {}
        self._streamed: dict[str | float, Streamed] = {}

    def run(self) -> Streamed:
        """Make and judge those that an earlier run has not, and take the best into the output folder."""
        steps = self.group.broadcast(self.out.journal.find(JUDGED) if self.group.main else None)
        with understood(self.out.journal.path):
            self.found = dict(map(_judged, steps))
        self._drop_losers()
        for alpha in ALPHAS:
            if alpha not in self.found:
                self._judge(alpha)
                self._drop_losers()
        streamed = self._settled()
        tell_sites(streamed, self.session.progress.site)
        return streamed

    @property
    def taken(self) -> str | float:
        """The α of the least perplexity so far."""
        return min(self.found, key=lambda alpha: (self.found[alpha], ALPHAS.index(alpha)))

    def to_json(self) -> list[dict[str, Any]]:
        """Of each candidate α ("auto": by site), the perplexity on the deciding windows, and whether it was taken."""
        return [{"alpha": a, "perplexity": self.found[a], "taken": a == self.taken} for a in ALPHAS]

    def _settled(self) -> Streamed:
        """What is known of the candidate that was taken, once its shards are the output folder's own."""
        shards = {step["file"] for step in self.out.journal.find(SHARD)}
        whole = len(shards) == self.session.model.layer_count + 1
        adopted = self.group.broadcast(whole if self.group.main else None)
        streamed = self._streamed.get(self.taken) or self._make(self.taken, self.out if adopted else None)
        if self.group.main and not adopted:
            self.out.adopt(self._folder(self.taken))
        if self.group.main:
            remove(self._home)  # before the folder is opened: a candidate may hold the class file of its format
        return streamed

    def _judge(self, alpha: str | float) -> None:
        try:
            self._streamed[alpha] = self._make(alpha)
            self.found[alpha] = self._perplexity(self._folder(alpha).partial, alpha_name(alpha))
        except Circumstance:
            raise
        except GrailError as error:
            # what caused it says whether the input was bad, or only its disk went (run.py)
            raise GrailError(f"--alpha search, alpha {alpha_name(alpha)}: {error}") from error.__cause__ or error
        if self.group.main:
            self.out.journal.append({"step": JUDGED, "alpha": alpha, "perplexity": self.found[alpha]})

    def _drop_losers(self) -> None:
        self.group.barrier()  # all have read what is taken away now
        for other in set(self.found) - {self.taken} if self.found else ():
            self._streamed.pop(other, None)
            if self.group.main:
                remove(self._folder(other).partial)

    def _make(self, alpha: str | float, adopted: OutputFolder | None = None) -> Streamed:
        """The whole network with this α, or what an earlier run left of it; adopted: where it lies by now."""
        job: Job = replace(self.session.job, recipe=replace(self.session.recipe, alpha=alpha))
        layers = self.session.progress.layers(f"compressing, alpha {alpha_name(alpha)}")
        make = partial(stream, job, self.work, self.session.texts, track=layers, name=f"alpha-{alpha}")
        folder = self._folder(alpha)
        if adopted is not None:
            with self.session.phase(PHASE):
                return make(adopted)
        with folder if self.group.main else nullcontext(), self.session.phase(PHASE):
            self.group.barrier()
            if self.group.main and not folder.journal.find(START):
                folder.journal.append({"step": START, "alpha": alpha})
            streamed = make(folder, tell=self._note)
            if self.group.main:
                write_rest(self.session, job, folder)
        return streamed

    def _note(self, _: object) -> None:
        """A layer is on its way to the disk: from here on there is work to go on with."""
        if self.group.main and not self.out.journal.find(BEGUN):
            self.out.journal.append({"step": BEGUN})

    def _perplexity(self, folder: Path, name: str) -> float:
        """On the deciding windows."""
        self.group.barrier()  # what the main process wrote is there for all
        windows, label = self.session.windows, f"judging alpha {name}"
        with self.session.phase("judging"):
            model, track = self.session.open(folder), self.session.progress.layers(label)
            return perplexity(model, windows.trial, self.work, weights_NL=windows.trial_weights, track=track)

    @property
    def _home(self) -> Path:
        return self.out.partial / CANDIDATES

    def _folder(self, alpha: str | float) -> OutputFolder:
        return OutputFolder(self._home / str(alpha), keep=True, resume=True)


def _judged(step: dict[str, Any]) -> tuple[str | float, float]:
    """Of a journal line. Raises an error of Python's for what no run says."""
    alpha, perplexity_found = ALPHAS[ALPHAS.index(step["alpha"])], float(step["perplexity"])
    if not math.isfinite(perplexity_found):
        raise ValueError(f"a perplexity of {perplexity_found}")
    return alpha, perplexity_found
