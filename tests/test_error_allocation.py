"""--allocation error: the curves, what goes by them, the measured costs against transformers, and whole runs."""

from __future__ import annotations

import copy
import json
import random
from itertools import accumulate, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

import grail.session
from grail.allocation import allowed, shares
from grail.cli import app
from grail.distributed import Group
from grail.error_allocation import ErrorCurve, _lower_hull, _steps, least_error
from grail.families.base import Site
from grail.progress import Progress
from grail.recipe import Recipe
from grail.reduction import Units
from grail.selectors import methods
from grail.store import MemoryStore
from tests.killed_runs import Case, files_of
from tests.test_resume import interrupted
from tests.test_stream_target import BIASES, tensors_of
from tests.test_torchrun import several
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
FREE = settings(max_examples=60, deadline=None, derandomize=True)
ASKED = {"allocation": "error", "eval": "none"}
HEAD, CHANNEL = 2 * 8 * 48, 3 * 48  # parameters of a query head and of a channel of tests.tiny


def rising(seed: int, per_group: int, order=sorted) -> dict[int, float]:
    """Errors at every width, by units kept: the fewer the larger, and (sorted) ever faster."""
    growth = order(random.Random(seed * 999 + i).uniform(0.01, 1) for i in range(per_group - 1))
    return {per_group - gone: sum(growth[:gone]) for gone in range(1, per_group)}


@FREE
@given(st.integers(2, 300), st.integers(0, 999), st.floats(1e-6, 10), st.integers(1, 6))
def test_a_curve_is_the_measured_one_and_rises(per_group, seed, cost, points):
    errors = rising(seed, per_group, list)
    errors = {k: errors[k] for k in random.Random(seed).sample(sorted(errors), min(points, len(errors)))}
    curve = ErrorCurve(errors, random.Random(seed).choice(sorted(errors)), cost)
    for kept, error in errors.items():
        assert curve.cost_at(kept, per_group) == pytest.approx(cost * error / errors[curve.settled], rel=1e-9)
    found, first = [curve.cost_at(k, per_group) for k in range(per_group, 0, -1)], per_group - max(errors)
    assert found[0] == 0 and all(0 < a <= b * (1 + 1e-9) for a, b in pairwise(found[1:]))
    assert all(found[gone] <= found[first] * gone / first * (1 + 1e-9) for gone in range(first))


def test_a_curve_without_errors_or_of_zeros():
    assert [ErrorCurve({}, 9, 3.0).cost_at(k, 9) for k in (9, 5, 1)] == [0, 0, 0]
    for zeros, cost in product(({5: 0.0}, {5: 0.0, 2: 0.0}, {8: 0.0, 5: 0.1}), (0.0, 1.0)):
        found = [ErrorCurve(zeros, 5, cost).cost_at(k, 9) for k in range(9, 0, -1)]
        assert all(0 <= x < float("inf") for x in found) and found[4] == pytest.approx(cost)


@FREE
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-20, 20)), min_size=1, max_size=9))
def test_the_lower_hull(moves):
    points = [(float(x), float(y)) for x, (_, y) in zip(accumulate(step for step, _ in moves), moves)]

    def below_chords(k: int) -> bool:
        (x, y), pairs = points[k], product(points[:k], points[k + 1 :])
        return all(y * (u - s) < t * (u - x) + v * (x - s) for (s, t), (u, v) in pairs)

    assert _lower_hull(points) == list(filter(below_chords, range(len(points))))


def site_of(name: str, kind: str, groups: int, per_group: int) -> Site:
    return Site(name, kind, 0, (), name, Units(groups, per_group, 8 if kind == "heads" else 1))


def curves_of(sites: list[Site], seed: int) -> dict[str, ErrorCurve]:
    errors = {s.name: rising(seed + i, s.units.per_group) for i, s in enumerate(sites)}
    return {n: ErrorCurve(e, min(3, max(e)), random.Random(f"{seed}{n}").uniform(0.1, 2)) for n, e in errors.items()}


def allocated(sites, curves, costs, ratio=0.3, **options) -> dict[str, int]:
    asked = Recipe(model="m", ratio=ratio, **options)
    return least_error(sites, asked, shares(sites, asked, costs), curves, costs)


@FREE
@given(st.integers(0, 9999), st.floats(0, 0.95), st.sampled_from([1, 2, 3]), st.sampled_from([1, 4, 8]))
def test_what_goes_is_the_exhaustive_optimum(seed, ratio, round_to, head_multiple):
    sites = [site_of("a", "heads", 2, 4), site_of("b", "channels", 1, 7), site_of("c", "channels", 1, 5)]
    costs = dict(zip("abc", random.Random(seed).choices(range(1, 10), k=3)))
    curves, options = curves_of(sites, seed), {"round_to": round_to, "head_multiple": head_multiple}
    kept = allocated(sites, curves, costs, ratio, **options)
    choices = [sorted({*allowed(s, Recipe(model="m", **options)), s.units.per_group}) for s in sites]
    assert all(kept[s.name] in of and kept[s.name] >= 1 for s, of in zip(sites, choices))

    def suffered(kept: dict[str, int]) -> float:
        return sum(curves[s.name].cost_at(kept[s.name], s.units.per_group) for s in sites)

    def gone(kept: dict[str, int]) -> int:
        return sum((s.units.per_group - kept[s.name]) * s.units.groups * costs[s.name] for s in sites)

    every, spent = [dict(zip("abc", widths)) for widths in product(*choices)], gone(kept)
    assert suffered(kept) <= min(suffered(k) for k in every if gone(k) >= spent) * (1 + 1e-9)
    jumps = [(b - a) * s.units.groups * costs[s.name] for s, of in zip(sites, choices) for a, b in pairwise(of)]
    budget = ratio * sum(s.units.count * costs[s.name] for s in sites)
    assert spent == max(map(gone, every)) < budget or abs(spent - budget) <= max(jumps) / 2 + 1e-6


@FREE
@given(st.integers(17, 400), st.integers(0, 999), st.sampled_from([0.3, 1.0, 1.7]))
def test_no_step_is_cheaper_than_one_before_it(width, seed, power):
    """Or a later one could be taken without it; 1: all steps cost the same but for rounding."""
    errors = {k: (1 - k / width) ** power for k in grail.survey._widths(width)}
    curve = ErrorCurve(errors, sorted(errors)[2], random.Random(seed).uniform(0.01, 2))
    steps = list(_steps(site_of("m", "channels", 1, width), Recipe(model="m"), curve, CHANNEL))
    assert len(steps) == width - 1 and all(a[0] <= b[0] and a[1] > b[1] for a, b in pairwise(steps))


def test_the_dearer_keep_more_in_any_order_and_kinds_can_be_apart():
    sites = [site_of(name, "channels", 1, 40) for name in "pqr"] + [site_of("h", "heads", 2, 3)]
    costs, errors = {"p": 3, "q": 3, "r": 3, "h": 8}, rising(1, 40)
    curves = curves_of(sites, 3) | {n: ErrorCurve(errors, 28, c) for n, c in {"p": 1, "q": 10, "r": 1.1}.items()}
    kept = allocated(sites, curves, costs)
    assert kept["q"] > kept["r"] >= kept["p"]
    assert allocated([sites[i] for i in (3, 1, 0, 2)], curves, costs) == kept
    apart = allocated(sites, curves, costs, attn_ratio=0.0, mlp_ratio=0.5)
    assert apart["h"] == 3 and sum(apart[n] for n in "pqr") == 60


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return str(tiny_calibration(tmp_path_factory.mktemp("ids") / "ids.safetensors"))


def surveyed(source, ids, store, group=None, **options):
    recipe = Recipe(model=str(source), output=str(source / "out"), calibration=ids, **(ASKED | options))
    session = grail.session.Session(recipe, Progress(), Group())
    work = grail.workspace.Workspace(store, group or Group(), 64)
    texts = grail.chunks.Texts(session.windows.ids, session.deciding_windows)
    return session, grail.survey.error_survey(session.job, work, texts)[0]


WIRINGS = {
    "repaired": ({}, {"target": "hidden"}),
    "bias": ({}, {"bias": True}),
    "own biases, pruned": (BIASES, {"method": "mag-sp", "compensate": False}),
    "own biases and a bias, pruned": (BIASES, {"method": "mag-sp", "compensate": False, "bias": True}),
    "gradients": ({}, {"method": "wanda-pp-sp"}),
    "heads whole": ({"num_hidden_layers": 3}, {"attn_ratio": 0.0, "mlp_ratio": 0.4}),
    "channels whole": ({"model_type": "qwen3"}, {"mlp_ratio": 0.0, "ratio": 0.4}),
    "stream": ({"num_key_value_heads": 6}, {"target": "stream"}),
}


@torch.no_grad()
@pytest.mark.parametrize("wiring", WIRINGS)
def test_costs_and_errors_are_those_of_transformers(tmp_path, ids, monkeypatch, wiring):
    """Each site alone put back into the full network, in float64: the mean divergence of a token's logits."""
    (network, options), results, leave = WIRINGS[wiring], {}, grail.survey._leave
    monkeypatch.setattr(grail.survey, "_leave", lambda *a: results.__setitem__(a[2].name, a[3]) or leave(*a))
    monkeypatch.setattr(grail.session, "DECIDING_TOKENS", 96)
    store, model = MemoryStore(), tiny_model(**network).double()
    session, curves = surveyed(tiny_checkpoint(tmp_path, **network), ids, store, **options)
    assert not store._held, "the survey leaves chunks behind"
    trial = session.windows.trial if session.job.streams else load_file(ids)["input_ids"][:3]
    assert torch.equal(session.deciding_windows, trial)
    rows = {}
    for name in curves:
        keep = lambda _, x, name=name: rows.update({name: rows.get(name, x[0].flatten(0, 1))})  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    model(session.windows.ids)
    p, whole = model(trial).logits.log_softmax(-1), curves.keys() - results.keys()
    assert all(curves[name].cost == len(curves[name].errors) == 0 for name in whole)
    assert len(whole) == len(curves) / 2 * ("whole" in wiring)
    for name, result in results.items():
        other, curve, units = copy.deepcopy(model), curves[name], result.site.units
        consumer, dense = (of.get_submodule(name) for of in (other, model))
        assert result.reduction.kept_width == curve.settled * units.groups * units.size
        consumer.weight.data = result.reduction.expand_consumer(result.weight.double())
        if result.bias is not None:
            consumer.bias = torch.nn.Parameter(result.bias.double())
        q = other(trial).logits.log_softmax(-1)
        assert curve.cost == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3) and curve.cost > 1e-6
        outputs = [rows[name] @ weight.mT for weight in (dense.weight, dense.weight - consumer.weight)]
        full, left = ((x - x.mean(0) * session.job.affine).square().sum().item() for x in outputs)
        assert curve.errors[curve.settled] == pytest.approx(left / full, rel=1e-3)


def compress(source, out, ids, **options):
    return grail.compress(str(source), output=str(out), calibration=ids, **(ASKED | options))


def kept_of(report) -> dict[str, int]:
    widths = {r.site: r.reduction.kept_width if r.reduction else r.site.units.width for r in report.results}
    return {site.name: width // site.units.size for site, width in widths.items()}


def off_by(report, ratio: float) -> float:
    """How far the removed share of the parameters is from a ratio, in slices of a site of heads."""
    (before, after), layers = report.parameters, len(report.results) // 2
    return abs(before - after - ratio * layers * (6 * HEAD + 40 * CHANNEL)) / (2 * HEAD)


def test_widths_are_large_where_errors_cost_most(tmp_path, ids):
    """The first layer writes so much into the stream that what the others add hardly matters."""
    model = tiny_model(num_hidden_layers=3)
    model.model.layers[0].self_attn.o_proj.weight.mul_(8)
    model.model.layers[0].mlp.down_proj.weight.mul_(8)
    model.save_pretrained(tmp_path / "source")
    report = compress(tmp_path / "source", tmp_path / "out", ids)
    first, *others = [count for name, count in kept_of(report).items() if "mlp" in name]
    assert first > max(others) and off_by(report, 0.3) <= 0.5


METHODS = {name: {"method": name} for name in methods() if name != "fold"} | {
    "wanda-pp-sp": {"method": "wanda-pp-sp", "set": {"passes": "1", "windows": "4"}},
    "obs": {"method": "slimgpt", "set": {"obs": "true"}, "compensate": False},
    "heads fixed": {"method": "flap", "set": {"structure": "AL-MM", "remove_heads": "4"}, "ratio": 0.5},
}


@pytest.mark.parametrize("case", METHODS)
def test_every_method(tmp_path, ids, case):
    report = compress(tiny_checkpoint(tmp_path / "source"), tmp_path / "out", ids, **METHODS[case])
    assert off_by(report, METHODS[case].get("ratio", 0.3)) <= 0.5 + (case == "flap") * 4 * 48 / HEAD  # its biases
    assert min(kept_of(report).values()) >= 1 and report.reopened["logit_difference"] < 1e-5
    assert case != "heads fixed" or sum(n for name, n in kept_of(report).items() if "attn" in name) == 12 - 4


@pytest.mark.parametrize("more", [["--method", "fold"], ["--format", "uniform"]], ids=" ".join)
def test_what_is_refused(tmp_path, ids, more):
    source, out = tiny_checkpoint(tmp_path / "source"), tmp_path / "out"
    flags = ["--model", source, "--output", out, "--calibration", ids, "--allocation", "error", "--quiet", *more]
    ended = CliRunner().invoke(app, ["compress", *map(str, flags)])
    assert ended.exit_code == 2 and "--allocation error" in ended.stderr and "Traceback" not in ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_ratio_0_needs_no_survey(tmp_path, ids, monkeypatch):
    monkeypatch.setattr(grail.session, "error_survey", lambda *args: pytest.fail("surveyed"))
    compress(tiny_checkpoint(tmp_path / "source"), tmp_path / "out", ids, ratio=0.0)
    dense, out = (tensors_of(tmp_path / name) for name in ("source", "out"))
    assert all(torch.equal(dense.pop(name), tensor) for name, tensor in out.items()) and not dense


def test_a_resumed_run_does_not_survey_again(tmp_path, monkeypatch):
    case, flags = Case("wanda-sp", tmp_path / "case"), {"allocation": "error", "store": "disk"}
    case.compress(tmp_path / "whole", **flags)
    interrupted(case, tmp_path / "out", 2, **flags)
    assert list((tmp_path / "out.partial" / "store").glob("survey*/*")) == [], "chunks of the survey are left"
    monkeypatch.setattr(grail.session, "error_survey", lambda *args: pytest.fail("surveyed a second time"))
    case.compress(tmp_path / "out", resume=True, **flags)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_two_processes_keep_what_one_keeps(tmp_path):
    ids = str(tiny_calibration(tmp_path / "ids.safetensors", windows=9))
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=3)
    cases = [ASKED, ASKED | {"samples": 1}, ASKED | {"target": "stream", "bias": True}, ASKED | {"store": "disk"}]
    assert several(2, "tests.torchrun_script", tmp_path, json.dumps(cases)).returncode == 0
    for number, case in enumerate(cases):
        alone = compress(source, tmp_path / f"alone-{number}", ids, seq_len=32, **case).to_json()
        both = json.loads((tmp_path / f"out-2-{number}" / "grail.json").read_text())
        assert [s["after"] for s in both["sites"]] == [s["after"] for s in alone["sites"]]


def test_a_site_with_dead_channels_keeps_those_that_live(tmp_path, ids):
    model = tiny_model(num_hidden_layers=3)
    model.model.layers[1].mlp.down_proj.weight.data[:, 20:] = 0
    model.save_pretrained(tmp_path / "source")
    kept = kept_of(compress(tmp_path / "source", tmp_path / "out", ids, method="gram"))
    assert 15 <= kept["model.layers.1.mlp.down_proj"] <= 20


def test_the_plan_counts_both_passes(tmp_path, ids):
    asked = ["plan", "--model", str(tiny_checkpoint(tmp_path)), "--calibration", ids, "--json", "--allocation"]
    error, plain = (json.loads(CliRunner().invoke(app, [*asked, name]).stdout) for name in ("error", "uniform"))
    assert (error["allocation"], error["passes"], plain["passes"]) == ("error", 2, 1)
    assert all(error["flops"][name] > plain["flops"][name] for name in ("forward", "solve"))
