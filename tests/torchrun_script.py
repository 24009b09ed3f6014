"""What test_torchrun.py runs in several processes: compressions of a tiny model, one after the other.

    torchrun --nproc-per-node 2 -m tests.torchrun_script WORK '[{"method": "wanda-sp"}, ...]'

Each writes WORK/out-RANKS-NUMBER, or `output` of its entry. The reopening check runs in the main process itself,
without the seconds of imports. An entry with "die": [rank, layer] has that process killed before it does that layer;
"chunks" are the tokens of a chunk that each process would choose for itself; "of rank 1" what is different there. Then
cut-RANKS-NUMBER.json beside the outputs
holds, by site, the units' scores and which of them stayed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}

import torch

import grail
from grail import pipeline
from grail.checkpoint import reopen
from grail.reduction import Selection
from grail.selectors.base import ScoreSelector, SiteView, keep_best
from grail.session import Session
from tests.tiny import verify_in_this_process


def main() -> None:
    torch.set_num_threads(1)
    work, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    reopen.verify = verify_in_this_process(lambda name: Path(tempfile.mkdtemp(prefix=name, dir=work)))
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    for number, case in enumerate(cases):
        Session.chunk_tokens = case.pop("chunks", [64] * ranks)[int(os.environ.get("RANK", "0"))]
        if rank_and_layer := case.pop("die", None):
            die_before(*rank_and_layer)
        options = {"calibration": str(work / "ids.safetensors"), "eval": str(work / "held.safetensors")}
        different = case.pop("of rank 1", {})
        case |= different if os.environ.get("RANK") == "1" else {}
        source = work / case.pop("model", "source")
        output = work / case.pop("output", f"out-{ranks}-{number}")
        cuts = note_cuts()
        report = grail.compress(str(source), output=str(output), seq_len=32, **options | case)
        assert (report is None) == (os.environ.get("RANK", "0") != "0")
        if report is not None:
            (work / output.name.replace("out", "cut")).with_suffix(".json").write_text(json.dumps(cuts))


def note_cuts() -> dict[str, dict]:
    """From now on: scores of units [groups, units of a group] and the numbers of those that stay, by site."""
    found: dict[str, dict] = {}

    def select(self: ScoreSelector, site: SiteView) -> Selection:
        selection = keep_best(self.scores(site), site.units, site.kept)
        units = site.units
        scores = self.scores(site).view(units.groups, units.per_group, units.size).sum(-1)
        found[site.name] = {"scores": scores.tolist(), "kept": selection.kept.tolist()}
        return selection

    ScoreSelector.select = select
    return found


def die_before(rank: int, layer: int) -> None:
    """Kill this process before that layer, if it is that one."""
    one_layer = pipeline._compress_layer

    def compress_layer(run, *rest):
        if run.layer == layer and run.work.group.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        one_layer(run, *rest)

    pipeline._compress_layer = compress_layer


if __name__ == "__main__":
    main()
