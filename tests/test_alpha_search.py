"""--alpha search: whole runs as candidates, judged by perplexity on the deciding windows. Killed at any point:
tests/killed_runs.py."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import grail
from grail.alpha_search import AlphaSearch
from grail.checkpoint.journal import Journal
from grail.checkpoint.writer import CANDIDATES, JOURNAL
from grail.cli import app
from grail.errors import Circumstance, GrailError, Interrupted
from grail.evaluation.perplexity import logits, perplexity
from grail.families import open_family
from grail.recipe import ALPHAS, AUTO, Recipe
from tests.killed_runs import Case, committed_layers, files_of
from tests.test_resume import interrupted
from tests.test_stream_target import windows
from tests.test_torchrun import several
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
PLAIN = {"ratio": 0.4, "eval": "none", "target": "stream"}
KINDS = {
    "plain": {},
    "folded": {"method": "fold", "bias": True},
    "its own widths": {"method": "gram", "allocation": "error"},
    "several sweeps": {"sweeps": 2},
    "on disk": {"store": "disk"},
    "in memory": {"store": "memory"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=3)


def compress(source, out, **options):
    return grail.compress(source, output=out, **{"calibration": windows()} | PLAIN | options)


def of_the_network(folder) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name != "grail.json"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_candidates_are_whole_runs_and_the_one_of_least_perplexity_stays(source, tmp_path, kind):
    told = []
    found = compress(source, tmp_path / "out", alpha="search", on_site=told.append, **KINDS[kind])
    assert [one["alpha"] for one in found.candidates] == list(ALPHAS)
    [taken] = [one for one in found.candidates if one["taken"]]
    assert taken["perplexity"] == min(one["perplexity"] for one in found.candidates)
    for one in found.candidates if kind == "plain" else [taken]:
        alone = tmp_path / f"alone {one['alpha']}"
        compress(source, alone, alpha=one["alpha"], **KINDS[kind])
        assert perplexity(open_family(alone), windows()[11:]) == pytest.approx(one["perplexity"], rel=1e-6)
    alone = tmp_path / f"alone {taken['alpha']}"
    assert of_the_network(tmp_path / "out") == of_the_network(alone)
    ours, theirs = (json.loads((folder / "grail.json").read_text()) for folder in (tmp_path / "out", alone))
    assert ours.pop("alpha_search") == found.candidates and theirs.pop("alpha_search") is None
    assert ours["sites"] == theirs["sites"] == told
    assert ours.pop("recipe") == theirs.pop("recipe") | {"alpha": "search"} and ours == theirs


def test_equal_candidates_leave_the_choice_by_site(source, tmp_path, monkeypatch):
    monkeypatch.setattr("grail.alpha_search.perplexity", lambda *args, **options: 7.0)
    found = compress(source, tmp_path / "out", alpha="search")
    assert [one["taken"] for one in found.candidates] == [True, False, False, False, False]


@pytest.mark.parametrize("best", [AUTO, 0.25, 1.0])
def test_wherever_the_best_one_comes_two_are_there_at_a_time(source, tmp_path, monkeypatch, best):
    judged, there = iter(ALPHAS), []

    def perplexity_of(*args, **options):
        there.append(sorted(folder.name for folder in (tmp_path / "out.partial" / CANDIDATES).iterdir()))
        return 1.0 if next(judged) == best else 2.0

    monkeypatch.setattr("grail.alpha_search.perplexity", perplexity_of)
    found = compress(source, tmp_path / "out", alpha="search")
    assert [one["alpha"] for one in found.candidates if one["taken"]] == [best]
    assert len(there[0]) == 1 and all(len(now) == 2 for now in there[1:])
    compress(source, tmp_path / "alone", alpha=best)
    assert of_the_network(tmp_path / "out") == of_the_network(tmp_path / "alone")


def test_where_nothing_is_removed_nothing_is_searched(source, tmp_path):
    assert compress(source, tmp_path / "out", alpha="search", ratio=0.0).candidates is None
    assert compress(source, tmp_path / "pruned", alpha="search", compensate=False).candidates is None
    compress(source, tmp_path / "plain", compensate=False)
    assert of_the_network(tmp_path / "pruned") == of_the_network(tmp_path / "plain")


def test_a_file_system_without_second_names_gets_copies(source, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(os.strerror(1))

    compress(source, tmp_path / "linked", alpha="search")
    monkeypatch.setattr(os, "link", refuse)
    compress(source, tmp_path / "copied", alpha="search")
    assert files_of(tmp_path / "copied") == files_of(tmp_path / "linked")


@pytest.mark.parametrize("lines", [3, 9, 20, 27])
def test_a_stopped_search_goes_on_with_what_is_done(tmp_path, lines):
    """Stopped before the so manyth line of any journal: the folder's own, or a candidate's."""
    case = Case("search", tmp_path / "case")
    case.compress(tmp_path / "whole")
    interrupted(case, tmp_path / "out", lines)
    partial = tmp_path / "out.partial"
    done = sum(map(committed_layers, (partial / CANDIDATES).glob("*.partial")))
    assert done or committed_layers(partial) or lines == 3
    case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert not partial.exists()


@pytest.mark.parametrize("stops", [1, 2, 3])
def test_stopped_again_and_again_after_the_choice_it_makes_nothing_again(tmp_path, monkeypatch, stops):
    case = Case("search", tmp_path / "case")
    case.compress(tmp_path / "whole")
    evaluate, layer, made = grail.run.evaluate, grail.pipeline._compress_layer, []

    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(grail.run, "evaluate", cut_off)
    for number in range(stops):
        with pytest.raises(Interrupted):
            case.compress(tmp_path / "out", resume=number > 0)
    monkeypatch.setattr(grail.run, "evaluate", evaluate)
    monkeypatch.setattr(grail.pipeline, "_compress_layer", lambda *run: made.append(1) or layer(*run))
    case.compress(tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and not made


def test_stopped_before_its_first_layer_is_done_it_leaves_nothing(tmp_path, monkeypatch):
    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(grail.pipeline, "_compress_layer", cut_off)
    with pytest.raises(KeyboardInterrupt):
        Case("search", tmp_path / "case").compress(tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["case"]


def test_a_loser_is_not_there_beside_two_others_after_a_stop(tmp_path, monkeypatch):
    """Stopped between the line that says how good the second one is, and taking away the worse of the two."""
    case, there = Case("search", tmp_path / "case"), []
    drop = AlphaSearch._drop_losers

    def cut_off(search):
        if len(search.found) == 2:
            raise KeyboardInterrupt
        drop(search)

    monkeypatch.setattr(AlphaSearch, "_drop_losers", cut_off)
    with pytest.raises(Interrupted):
        case.compress(tmp_path / "out")
    monkeypatch.setattr(AlphaSearch, "_drop_losers", drop)
    make = AlphaSearch._make

    def counted(search, alpha, *where):
        there.append(len(list((tmp_path / "out.partial" / CANDIDATES).iterdir())))
        return make(search, alpha, *where)

    monkeypatch.setattr(AlphaSearch, "_make", counted)
    case.compress(tmp_path / "out", resume=True)
    assert there == [1, 1, 1]


def test_what_ends_a_candidate_says_whose_it_was(source, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise GrailError("the evaluation loss is not finite")

    monkeypatch.setattr("grail.alpha_search.perplexity", refuse)
    with pytest.raises(GrailError, match=r"^--alpha search, alpha by site: the evaluation loss"):
        compress(source, tmp_path / "out", alpha="search")


def test_input_that_cannot_be_read_any_more_leaves_what_is_done(source, tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise GrailError("model.safetensors cannot be read") from OSError("the disk is gone")

    monkeypatch.setattr("grail.alpha_search.perplexity", refuse)
    with pytest.raises(Circumstance, match=r"alpha by site: model\.safetensors cannot be read; what is done is kept"):
        compress(source, tmp_path / "out", alpha="search")
    assert (tmp_path / "out.partial").exists()


def test_times_add_up_and_the_page_shows_the_candidates(source, tmp_path):
    found = compress(source, tmp_path / "out", alpha="search")
    begun = time.perf_counter()
    assert set(found.phases) >= {"compress", "judging"}
    compress(source, tmp_path / "out", alpha="search", overwrite=True)
    ran = json.loads((tmp_path / "out" / "run.json").read_text())["seconds"]
    assert sum(ran.values()) <= time.perf_counter() - begun
    page = (tmp_path / "out" / "report.html").read_text()
    assert "perplexity on the deciding windows: by site" in page and "(taken)" in page


def test_a_search_that_goes_on_makes_no_candidate_again(tmp_path, monkeypatch):
    case, made = Case("search", tmp_path / "case"), []
    interrupted(case, tmp_path / "out", 20)
    layer = grail.pipeline._compress_layer
    monkeypatch.setattr(
        grail.pipeline, "_compress_layer", lambda run, *rest: made.append(run.layer) or layer(run, *rest)
    )
    case.compress(tmp_path / "out", resume=True)
    assert 0 < len(made) < 3 * len(ALPHAS) - 6


@pytest.mark.parametrize("step", [{"alpha": 0.3, "perplexity": 7.0}, {"alpha": "auto", "perplexity": [1]},
                                  {"alpha": "auto", "perplexity": float("nan")}, {}])  # fmt: skip
def test_a_journal_that_says_what_no_search_says_is_refused(tmp_path, step):
    case = Case("search", tmp_path / "case")
    interrupted(case, tmp_path / "out", 9)
    Journal(tmp_path / "out.partial" / JOURNAL).append({"step": "candidate", **step})
    with pytest.raises(Circumstance, match="what no run of grail says"):
        case.compress(tmp_path / "out", resume=True)


def test_two_processes_search_like_one(tmp_path):
    tiny_checkpoint(tmp_path / "source")
    ids = str(tiny_calibration(tmp_path / "ids.safetensors", windows=12))
    case = PLAIN | {"method": "wanda-sp", "alpha": "search"}
    done = several(2, "tests.torchrun_script", str(tmp_path), json.dumps([case]))
    assert done.returncode == 0, done.stderr[-3000:]
    one = compress(tmp_path / "source", tmp_path / "out", calibration=ids, alpha="search").candidates
    two = json.loads((tmp_path / "out-2-0" / "grail.json").read_text())["alpha_search"]
    for ours, theirs in zip(one, two, strict=True):
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-2)


def test_tokens_that_do_not_count_are_not_judged(source):
    model, ids = open_family(source), windows()[:3]
    weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(2)).round()
    losses = torch.nn.functional.cross_entropy(
        logits(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    counts = weights[:, 1:].flatten()
    wanted = ((losses * counts).sum() / counts.sum()).exp().item()
    assert perplexity(model, ids, weights_NL=weights) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(GrailError, match="predict"):
        perplexity(model, ids, weights_NL=weights * 0)


def test_the_plan_counts_every_candidate(source, tmp_path):
    def planned(alpha):
        recipe = Recipe(str(source), output=str(tmp_path / "o"), calibration=windows(), alpha=alpha, **PLAIN)
        return grail.run.plan(recipe, grail.progress.Progress())

    by_site, search = planned("auto"), planned("search")
    ours, theirs = search.to_json(), by_site.to_json()
    assert ours["passes"] == 5 * theirs["passes"] == 5
    for kind in ("forward", "gram", "solve"):
        assert ours["flops"][kind] == pytest.approx(5 * theirs["flops"][kind])
    assert ours["bytes_written"] == 5 * theirs["bytes_written"] and search.disk > by_site.disk
    assert any("five" in note or "5 whole runs" in note for note in search.session.notes())


def test_what_it_is_not_for_is_refused(source, tmp_path):
    def said(*flags: str) -> str:
        result = CliRunner().invoke(app, ["compress", "--output", str(tmp_path / "o"), "--alpha", *flags])
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        return result.stderr

    few = str(tiny_calibration(tmp_path / "few.safetensors", windows=3))
    model = ("--model", str(source), "--calibration", few)
    assert "auto or search; got sometimes" in said("sometimes", *model)
    assert "--alpha is for --target stream" in said("search", "--target", "hidden", *model)
    assert "needs some to choose alpha" in said("search", *model)
    assert "for language models" in said("search", "--model", "timm/resnet18")
    assert replace(Recipe("m", alpha="search", ridge=0.1)).chooses
