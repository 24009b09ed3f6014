"""--strict, and where it is seen without it that a λ had to be raised: of repairs, and of methods that select by a
Gram matrix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import grail
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import JOURNAL
from grail.errors import Interrupted
from grail.modules.terminal import show_network
from grail.page.run import Run
from grail.page.single import page
from grail.recipe import Recipe
from grail.recipes.batch import finished_result
from grail.request import Request
from grail.terminal import show_report
from tests.faults.numeric_cases import DOWN, dead_channels, edited, no_reopening
from tests.tiny import tiny_calibration, tiny_checkpoint

SINGULAR = {"ratio": 0.3, "ridge": 0.0, "method": "random"}
TARGETS = {
    "hidden": {},
    "bias": {"bias": True},
    "paper": {"ridge_form": "paper"},
    "fold": {"method": "fold"},
    "stream": {"target": "stream", "alpha": 1.0},
    "sweeps": {"target": "stream", "sweeps": 2},
    "padded": {"format": "padded"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Options of runs whose Gram matrices are singular."""
    work = tmp_path_factory.mktemp("strict")
    source = edited(tiny_checkpoint(work / "source"), work / "dead", dead_channels)
    few = str(tiny_calibration(work / "few.safetensors", windows=8, length=3))
    with no_reopening():
        yield {"model": source, "calibration": few, **SINGULAR}


def raised_at(record: dict) -> list[str]:
    return [site["name"] for site in record["sites"] if site["retries"]]


@pytest.mark.parametrize("kind", TARGETS)
def test_a_raised_ridge_is_in_the_record_and_refused_when_strict(runs, tmp_path, kind):
    flags = runs | TARGETS[kind]
    report = grail.compress(**flags, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "grail.json").read_text())
    names = raised_at(record)
    assert names and record["recipe"].get("strict") is None
    for site in record["sites"]:
        assert (site["raised"] is not None) == (site["retries"] > 0)
    first = next(site for site in record["sites"] if site["retries"])
    asked, taken = first["raised"]
    assert asked == 0.0 and taken > 0 and (kind == "sweeps" or taken == first["lambda"])
    with pytest.raises(grail.GrailError) as refusal:
        grail.compress(**flags, output=tmp_path / "strict", strict=True)
    said = str(refusal.value)
    assert said.startswith(names[0]) and f"{taken:.3g}" in said and "--strict" in said
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with (tmp_path / "shown").open("w") as file:
        show_report(report, Console(file=file, width=200))
    shown = (tmp_path / "shown").read_text()
    assert f"ridge raised   at {len(names)} site" in shown
    assert f"at {len(names)} of {len(record['sites'])} sites" in page(Run("out", record))


def test_sound_equations_are_not_refused_and_give_the_same_bytes(runs, tmp_path):
    flags = runs | {"ridge": 0.1}
    for name in ("loose", "strict"):
        grail.compress(**flags, output=tmp_path / name, strict=name == "strict")
    loose, strict = (
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir() if f.suffix == ".safetensors"}
        | {"grail.json": (tmp_path / name / "grail.json").read_bytes()}
        for name in ("loose", "strict")
    )
    assert loose == strict


@pytest.mark.parametrize("method", ["gram", "slimgpt"])
@pytest.mark.parametrize("options", [{}, {"target": "stream", "alpha": 1.0}, {"allocation": "global"}], ids=str)
def test_a_selection_by_a_singular_matrix_is_told_and_refused_when_strict(runs, tmp_path, method, options):
    flags = runs | {"ridge": 0.1, "method": method, "set": {"damping": "0"}} | options
    report = grail.compress(**flags, output=tmp_path / "out")
    damped = [site for site in report.sites if site["damping"] and site["damping"]["retries"]]
    assert damped and all(site["damping"]["lambda"] > 0 for site in damped)
    assert not raised_at({"sites": report.sites})
    assert bool(report.to_json()["allocation_raised"]) == ("allocation" in options)
    with pytest.raises(grail.GrailError, match=r"damping=.*--strict") as refusal:
        grail.compress(**flags, output=tmp_path / "strict", strict=True)
    assert str(refusal.value).startswith("model.layers.0")
    with (tmp_path / "shown").open("w") as file:
        show_report(report, Console(file=file, width=200))
    assert f"damping raised at {len(damped)} site" in (tmp_path / "shown").read_text()


def test_what_is_only_measured_is_told_and_refused_too(runs, tmp_path, monkeypatch):
    flags = runs | {"allocation": "error"}
    report = grail.compress(**flags, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "grail.json").read_text())
    raised = record["allocation_raised"]
    assert raised and all(asked == 0.0 and taken > 0 for asked, taken in raised.values())
    with (tmp_path / "shown").open("w") as file:
        show_report(report, Console(file=file, width=200))
    assert f"raised to measure at {len(raised)} site" in (tmp_path / "shown").read_text()
    assert f"at {len(raised)} of {len(record['sites'])} sites, the ridge or" in page(Run("out", record))
    assert grail.compress(**flags | {"ridge": 0.1}, output=tmp_path / "sound").to_json()["allocation_raised"] == {}
    monkeypatch.setattr("grail.run.stream", lambda *args, **options: pytest.fail("went on to compress"))
    with pytest.raises(grail.GrailError, match=r"^model\.layers\.0.*--strict"):
        grail.compress(**flags, output=tmp_path / "strict", strict=True)


def interrupted_once_measured(flags: dict, out: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    """Of a run that has its widths and no layer."""

    def stop(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(Interrupted):
        stopped.setattr("grail.run.stream", stop)
        grail.compress(**flags, output=out)
    return Journal(out.with_name(out.name + ".partial") / JOURNAL)


def test_what_an_earlier_run_raised_to_measure_is_refused_and_its_work_kept(runs, tmp_path, monkeypatch):
    flags = runs | {"allocation": "error"}
    journal = interrupted_once_measured(flags, tmp_path / "out", monkeypatch)
    with pytest.raises(grail.GrailError, match=r"^model\.layers\.0.*to measure.*--strict"):
        grail.compress(**flags, output=tmp_path / "out", resume=True, strict=True)
    assert Journal(journal.path).steps == journal.steps
    assert grail.compress(**flags, output=tmp_path / "out", resume=True).to_json()["allocation_raised"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("kept", {}), ("kept", None), ("kept", 0), ("kept", 10**9), ("raised", {"x": [0, 1]}), ("raised", [1])],
    ids=str,
)
def test_widths_that_no_run_says_are_refused(runs, tmp_path, monkeypatch, key, value):
    flags = runs | {"allocation": "error"}
    journal = interrupted_once_measured(flags, tmp_path / "out", monkeypatch)
    [*before, widths] = journal.steps
    journal.rewind(lambda step: step["step"] != "widths")
    of_each = dict.fromkeys(widths["kept"], value) if isinstance(value, int) else value
    journal.append(widths | {key: of_each})
    with pytest.raises(grail.GrailError, match="says what no run of grail says"):
        grail.compress(**flags, output=tmp_path / "out", resume=True)
    assert before and Journal(journal.path).steps[-1][key] == of_each


def test_forward_selection_is_told_too(runs, tmp_path):
    flags = runs | {"ridge": 0.1, "method": "gram", "set": {"damping": "0", "direction": "forward"}}
    report = grail.compress(**flags, output=tmp_path / "out")
    assert any(site["damping"]["retries"] for site in report.sites)


def test_work_of_a_run_that_was_not_strict_is_looked_at_and_kept(runs, tmp_path):
    flags = runs | {"store": "disk"}

    def stop(entry: dict) -> None:
        if entry["name"] == DOWN:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        grail.compress(**flags, output=tmp_path / "out", on_site=stop)
    steps = len(Journal(tmp_path / "out.partial" / JOURNAL).steps)
    with pytest.raises(grail.GrailError, match=r"model\.layers\.0.*--strict.*kept in"):
        grail.compress(**flags, output=tmp_path / "out", resume=True, strict=True)
    assert len(Journal(tmp_path / "out.partial" / JOURNAL).steps) == steps
    assert raised_at(grail.compress(**flags, output=tmp_path / "out", resume=True).to_json())


def test_a_finished_result_with_a_raised_ridge_is_not_taken_for_a_strict_one(runs, tmp_path):
    flags = runs | {"model": str(runs["model"])}
    grail.compress(**flags, output=tmp_path / "out")
    assert finished_result(Request(Recipe(**flags, output=str(tmp_path / "out")), {})) is not None
    with pytest.raises(grail.GrailError, match=r"finished.*model\.layers\.0"):
        finished_result(Request(Recipe(**flags, output=str(tmp_path / "out"), strict=True), {}))


class Net(nn.Module):
    """A hidden layer in which channels agree, read by another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)
        self.up.weight.data[8:], self.up.bias.data[8:] = self.up.weight.data[:8], self.up.bias.data[:8]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize(
    "options", [{"target": "dense"}, {"target": "own"}, {"one_shot": True}, {"bias": True}, {"ridge_form": "paper"}],
    ids=str,
)  # fmt: skip
def test_vision_networks_too(tmp_path, options):
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    sites = [grail.channels("up", "down", width=16)]
    flags = {"sites": sites, "calibration": images, "ridge": 0.0, "method": "mag-sp", "ratio": 0.2} | options
    report = grail.compress(Net(), **flags, output=tmp_path / "out")
    (site,) = report.sites
    assert site["retries"] > 0 and site["raised"] == [0.0, site["lambda"]]
    with pytest.raises(grail.GrailError, match=r"--strict") as refusal:
        grail.compress(Net(), **flags, strict=True, output=tmp_path / "strict")
    assert str(refusal.value).startswith(site["name"]) and not (tmp_path / "strict").exists()
    with (tmp_path / "shown").open("w") as file:
        show_network(report, Console(file=file, width=200))
    assert "ridge raised   at 1 site," in (tmp_path / "shown").read_text()


def test_what_networks_are_measured_by_is_told_too(tmp_path):
    images = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    flags = {"sites": [grail.channels("up", "down", width=16)], "calibration": images, "method": "gram", "ratio": 0.2}
    flags |= {"allocation": "global", "ridge": 0.1}
    singular = {"set": {"damping": "0"}}
    report = grail.compress(Net(), **flags, **singular, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "grail.json").read_text())
    (site,) = record["sites"]
    ((asked, taken),) = record["allocation_raised"].values()
    assert list(record["allocation_raised"]) == [site["name"]] and asked == 0.0 and taken > 0
    with (tmp_path / "shown").open("w") as file:
        show_network(report, Console(file=file, width=200))
    assert "raised to measure at 1 site," in (tmp_path / "shown").read_text()
    sound = grail.compress(Net(), **flags, set={"damping": "1"})
    assert sound.to_json()["allocation_raised"] == {}


def test_a_finished_result_that_took_more_to_measure_is_not_taken_for_a_strict_one(runs, tmp_path):
    flags = runs | {"model": str(runs["model"]), "method": "gram", "ridge": 0.1, "allocation": "global"}
    flags |= {"set": {"damping": "0"}}
    grail.compress(**flags, output=tmp_path / "out")
    file = tmp_path / "out" / "grail.json"
    record = json.loads(file.read_text())
    (name, *_) = record["allocation_raised"]
    for site in record["sites"]:
        site["damping"]["retries"] = 0
    file.write_text(json.dumps(record))
    with pytest.raises(grail.GrailError, match=rf"finished.*{name}"):
        finished_result(Request(Recipe(**flags, output=str(tmp_path / "out"), strict=True), {}))
