"""The choice of alpha and ridge on windows of their own, and whole runs with --target stream: what is refused, copied,
reported, gone on with and shared by processes. The formulas: test_stream_target.py."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from grail.calibration import load_calibration
from grail.calibration.sources import documents
from grail.cli import app
from grail.errors import GrailError, Interrupted
from grail.recipe import Recipe
from grail.selectors import methods
from grail.trials import RIDGES, TrialErrors, TrialMoments, importance
from tests.killed_runs import Case, Events, committed_layers, files_of
from tests.test_calibration import Numbers, no_tokenizer, numbered_text
from tests.test_compensation import normal
from tests.test_resume import interrupt
from tests.test_stream_target import BIASES, compressed, off, opened, streams, tensors_of, windows
from tests.test_torchrun import several
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
METHODS = sorted(methods().keys() - {"wanda", "mag-l2"})
ATTENTION, MLP = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
DISK, SECOND = {"store": "disk", "target": "stream", "sweeps": 2}, "model.layers.1.self_attn.o_proj.weight"
TRIAL, REST = [11, 12], list(range(11))  # of 13 windows the last two only decide


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "model")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pull=st.sampled_from([-2.0, 0.0, 0.2, 0.6, 5.0]),
    affine=st.booleans(),
    windows=st.sampled_from([1, 16, 64]),
    seed=st.integers(0, 99),
)
def test_errors_are_those_of_the_data_and_the_best_alpha_is_found(pull, affine, windows, seed):
    """pull: about where the best α lies, outside of 0..1 too. Few windows leave it near a half."""
    z, weight = normal(61, 7, seed=seed), normal(61, seed=seed + 1).square() + 0.01
    own, stream = normal(5, 7, seed=seed + 2), normal(5, 7, seed=seed + 3)
    biases = [normal(5, seed=seed + 4 + i) * affine for i in (0, 1)]
    t = z @ own.mT + biases[0] + pull * (z @ stream.mT + biases[1]) + 0.3 * normal(61, 5, seed=seed + 6)
    moments = TrialMoments(7, 5, windows=windows, device=torch.device("cpu"), biased=affine)
    for rows in zip(*(x.float().split([20, 1, 40]) for x in (z, t, weight)), strict=True):
        moments.update(*rows)
    found = moments.errors(*((w, b if affine else None) for w, b in zip((own, stream), biases)))

    def error(alpha: float) -> float:
        left = t - z @ (own + alpha * stream).mT - biases[0] - alpha * biases[1]
        return ((weight * left.square().sum(1)).sum() / (weight * t.square().sum(1)).sum()).item()

    grid = [i / 200 for i in range(201)]
    assert [found.at(alpha) for alpha in grid[::40]] == pytest.approx([error(alpha) for alpha in grid[::40]], rel=1e-3)
    assert 0 <= found.best_alpha <= 1 and found.best_alpha == pytest.approx(min(grid, key=error), abs=0.006)
    assert found.at(found.best_alpha) <= min(map(found.at, grid)) * (1 + 1e-9)
    share = {1: 1 / 17, 16: 0.5, 64: 0.8}[windows]
    drawn = share * found.best_alpha + (1 - share) * 0.5
    assert found.cautious_alpha == pytest.approx(min(drawn, 2 * found.best_alpha))
    assert found.at(found.cautious_alpha) <= found.at(0.0) * (1 + 1e-9)
    nothing = TrialErrors(1.0, 1.0, windows=windows)
    assert nothing.best_alpha == nothing.cautious_alpha == TrialErrors().at(1.0) == 0, "nothing to add, nothing to miss"


def test_a_token_counts_as_much_as_its_larger_stream_lets_it():
    """A stream that is huge in one network alone would outweigh all other tokens."""
    dense, compressed_TD = torch.ones(3, 4), torch.tensor([[1.0], [1000.0], [0.1]]).expand(3, 4)
    assert importance(dense, compressed_TD).tolist() == pytest.approx([1, 1e-6, 1])
    assert importance(compressed_TD).tolist() == pytest.approx([1, 1e-6, 100])
    assert importance(torch.zeros(1, 4)).isfinite().all()


def load(source, samples, trial, seq_len=8, seed=0):
    asked = {"samples": samples, "trial": trial, "seq_len": seq_len, "seed": seed}
    return load_calibration(source, Numbers if isinstance(source, str) else no_tokenizer, 10_000, **asked)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file whose tokens are 0, 1, 2, ..., and how many of them calibration sees."""
    file = str(numbered_text(tmp_path_factory.mktemp("text") / "text.txt", 400))
    return file, len("".join(documents(file, "calibration", "--calibration")).split())


class TestWindows:
    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(length=st.integers(2, 40), samples=st.integers(1, 60), trial=st.integers(1, 16), seed=st.integers(0, 99))
    def test_of_a_text_never_overlap(self, text, length, samples, trial, seed):
        file, tokens = text
        found, again = (load(file, samples, trial, length, seed) for _ in range(2))
        assert found.ids.shape == (samples, length)
        assert found.trial.shape == (min(trial, tokens // (5 * length)), length)
        for ids in (found.ids, found.trial):
            assert torch.equal(ids, ids[:, :1] + torch.arange(length)) and 0 <= ids.min() <= ids.max() < tokens
        assert found.ids.max() < found.trial.min() and (found.trial[:, 0].diff() >= length).all()
        assert torch.equal(found.ids, again.ids) and torch.equal(found.trial, again.trial)
        assert found.sha256 == again.sha256 != load(file, samples, 0, length, seed).sha256

    def test_that_decide_are_the_end_of_the_text_and_the_others_lie_anywhere_before(self, text):
        """Between the others they would be about the same things, and overfitting would look like learning."""
        file, tokens = text
        found = load(file, 20_000, 3)
        starts = found.trial[:, 0]
        assert torch.equal(found.ids[:, 0].unique(), torch.arange(starts[0] - 7))
        assert starts[0] == tokens - tokens // 8 and starts[-1] == tokens - 8
        assert (starts.diff() - (tokens // 8 - 8) / 2).abs().max() <= 1
        starts = torch.randint(tokens - 8 + 1, (50,), generator=torch.Generator().manual_seed(3))
        found = load(file, 50, 0, seed=3)
        assert torch.equal(found.ids, starts[:, None] + torch.arange(8)) and found.trial is None

    @pytest.mark.parametrize("kind", ["file", "tensor", "generator"])
    @pytest.mark.parametrize("samples, trial, there", [(16, 2, 23), (16, 2, 11), (128, 16, 300), (30, 3, 17)])
    def test_that_are_cut_already_are_parted(self, tmp_path, kind, samples, trial, there):
        ids = torch.randperm(10_000)[: there * 3].view(there, 3)
        save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
        given_ids = {"file": str(tmp_path / "ids.safetensors"), "tensor": ids, "generator": iter(ids)}[kind]
        found, used = load(given_ids, samples, trial, None), min(samples + trial, there)
        assert len(found.trial) == min(trial, used // 5)
        parts = [[(ids == row).all(1).nonzero().item() for row in part] for part in (found.ids, found.trial)]
        assert parts == [sorted(part) for part in parts] and sorted(parts[0] + parts[1]) == list(range(used))
        assert torch.equal(load(ids, samples, 0, None).ids, ids[:samples])

    @pytest.mark.parametrize("samples", [1, 3, 4, 7])
    def test_few_samples_of_many_windows_are_as_many_as_asked_for(self, samples):
        trial = Recipe(model="m", samples=samples, target="stream").trial_windows
        assert len(load(torch.arange(200).view(50, 4), samples, trial, None).ids) == samples

    @pytest.mark.parametrize("kind", ["tokens", "4 windows"])
    def test_too_little_has_none(self, text, kind):
        ids, length = (text[0], text[1] // 5 + 1) if kind == "tokens" else (torch.ones(4, 9).long(), None)
        found = load(ids, 4, 2, length)
        assert found.trial is None and torch.equal(found.ids, load(ids, 4, 0, length).ids) and len(found.ids) == 4

    @pytest.mark.parametrize("samples", [1, 3])
    def test_too_little_gives_as_many_as_asked_for(self, samples):
        assert len(load(torch.ones(4, 9).long(), samples, 2, None).ids) == samples


BAD = {
    "--target dense": {"target": "dense"},
    "--alpha is for --target stream": {"target": "hidden", "alpha": 0.5},
    "--sweeps is for --target stream": {"target": "hidden", "sweeps": 2},
    "1; got 30 .0.3 for 30 %.": {"ratio": 30},
    "--memory 9999999999.*expected a size": {"memory": "9" * 400},
    "--memory 0: expected a size": {"memory": 0},
    "--sweeps must be a whole number, 1 or more; got 0": {"target": "stream", "sweeps": 0},
    "from 0 to 1, auto or search; got 1.01": {"target": "stream", "alpha": 1.01},
    "got nan": {"target": "stream", "alpha": float("nan")},
    "0 or more, or auto; got much": {"target": "stream", "ridge": "much"},
    "--ridge must be a finite number, 0 or more; got auto": {"target": "hidden", "ridge": "auto"},
}


@pytest.mark.parametrize("said", BAD)
def test_bad_options_are_refused(said):
    with pytest.raises(GrailError, match=said):
        Recipe(model="m", **BAD[said])


@pytest.mark.parametrize("alpha, code", [("1.5", 2), ("0.25", 0)])
def test_the_command_line_takes_numbers(source, tmp_path, alpha, code):
    ids, out = tiny_calibration(tmp_path / "ids.safetensors"), tmp_path / "out"
    flags = f"--model {source} --output {out} --calibration {ids} --ratio 0.3 --target stream --ridge 1e-2"
    ended = CliRunner().invoke(app, ["compress", *flags.split(), "--quiet", "--method", "gram", "--alpha", alpha])
    assert ended.exit_code == code and ("--alpha must be" in ended.stderr) == (not out.exists()) == (code > 0)
    if not code:
        written = json.loads((out / "grail.json").read_text())
        assert [written["recipe"][name] for name in ("target", "alpha", "ridge")] == ["stream", 0.25, 0.01]
        assert {site["alpha"] for site in written["sites"]} == {0.25} and written["calibration"]["trial_windows"] == 0


def test_how_many_windows_only_decide():
    asked = {"samples": 8}, {"samples": 999, "alpha": 0.5}, {"alpha": 0.5, "ridge": 0.1}, {"compensate": False}
    assert [Recipe(model="m", target="stream", **more).trial_windows for more in asked] == [2, 16, 0, 0]


def share_left(before_TD, after_TD, aim_TD) -> float:
    """Of the error of a compressed stream before a site, what is left after it; as the tokens count."""
    size = torch.maximum(before_TD.square().mean(1), aim_TD.square().mean(1))
    left, total = ((x.square().mean(1) / size).sum() for x in (aim_TD - after_TD, aim_TD - before_TD))
    return (left / total).item()


@pytest.mark.parametrize("method, bias", [("mag-sp", False), ("mag-sp", True), ("fold", False)])
def test_alpha_is_the_best_on_the_windows_that_only_decide_drawn_towards_a_half(tmp_path, method, bias):
    """From the written networks: what is left of t, each token weighed by 1 / mean(r²) of the larger stream."""
    source = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1, **BIASES)
    options = {"method": method, "bias": bias, "ratio": 0.2}

    def error(out) -> float:
        (_, before, after), (_, _, aim) = (streams(opened(f), windows()[TRIAL])[MLP] for f in (out, source))
        return share_left(before, after, aim)

    fixed, entry = [], compressed(source, tmp_path / "auto", **options)["sites"][1]
    for alpha in (0.0, 0.5, 1.0):
        compressed(source, tmp_path / str(alpha), windows()[REST], alpha=alpha, **options)
        fixed.append(error(tmp_path / str(alpha)))
    bend = 2 * (fixed[0] + fixed[2] - 2 * fixed[1])
    best = (fixed[0] - fixed[2] + bend) / (2 * bend)
    assert 0.1 < best < 1, "this network does not show a choice"
    assert entry["alpha"] == pytest.approx((2 * best + 16 * 0.5) / 18, abs=2e-4)
    assert entry["held_out_errors"] == pytest.approx([fixed[0], error(tmp_path / "auto")], rel=1e-4)


def test_the_ridge_is_the_best_of_the_candidates(source, tmp_path):
    """At the first site that is solved, which depends on no other."""
    runs = [compressed(source, tmp_path / str(r), attn_ratio=0.0, ridge=r)["sites"][1] for r in (*RIDGES, "auto")]
    *each, auto = ((entry["held_out_errors"][1], entry["lambda"]) for entry in runs)
    assert auto == min(each) and len({error for error, _ in each}) == len(RIDGES)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(source, tmp_path, method, bias):
    """α = 0 is as without the stream, but for training; the first site, where both streams are one, as for any α."""
    found = compressed(source, tmp_path / "auto", method=method, bias=bias, ridge=None)
    assert (found["calibration"]["windows"], found["calibration"]["trial_windows"]) == (11, 2)
    for site in found["sites"]:
        plain, chosen = site["held_out_errors"]
        assert (
            0 <= site["alpha"] <= 1
            and 0 < chosen <= plain * (1 + 1e-9)
            and 0 < site["error_after"] < site["error_before"]
        )
    if method == "wanda-pp-sp":
        dense, small = (list(streams(opened(f), windows()[REST]).values())[-1][2] for f in (source, tmp_path / "auto"))
        assert found["regional"][-1]["loss_after"] == pytest.approx((dense - small).square().mean().item(), rel=1e-3)
        return
    for name, more in {"h": {"target": "hidden"}, "0": {"alpha": 0.0}, "1": {"alpha": 1.0}}.items():
        compressed(source, tmp_path / name, method=method, bias=bias, **more)
    hidden, zero, one = (tensors_of(tmp_path / name) for name in "h01")
    for name, tensor in zero.items():
        assert off(tensor, hidden[name]) < 1e-5 if name in hidden else tensor.norm() < 1e-4
    assert off(one[f"{ATTENTION}.weight"], zero[f"{ATTENTION}.weight"]) < 1e-5
    assert off(one[f"{MLP}.weight"], zero[f"{MLP}.weight"]) > 1e-2


def test_alpha_0_leaves_a_site_without_removal_as_it_is_in_the_papers_form(source, tmp_path):
    compressed(source, tmp_path / "out", attn_ratio=0.0, alpha=0.0, ridge_form="paper")
    assert off(tensors_of(tmp_path / "out")[SECOND], tensors_of(source)[SECOND]) < 1e-6


@pytest.mark.parametrize("ratio, attn_ratio", [(0.0, None), (0.4, 0.0)])
def test_sites_before_the_first_removal_are_copied_and_those_after_it_solved_anew(source, tmp_path, ratio, attn_ratio):
    sites = compressed(source, tmp_path / "out", ridge=None, ratio=ratio, attn_ratio=attn_ratio)["sites"]
    dense, out = tensors_of(source), tensors_of(tmp_path / "out")
    changed = {name for name in dense if not torch.equal(dense[name], out[name])}
    assert dense.keys() == out.keys() and changed == {n for n in dense if ratio and (".mlp." in n or n == SECOND)}
    assert [site["alpha"] is None and site["held_out_errors"] is None for site in sites] == [True] + [not ratio] * 3
    if ratio:
        assert out[SECOND].shape == dense[SECOND].shape and off(out[SECOND], dense[SECOND]) > 1e-2
        assert sites[2]["before"] == sites[2]["after"] and sites[2]["error_after"] < sites[2]["error_before"]


def stopped(method: str, folder) -> Case:
    """A case of three layers whose run was stopped in the last one."""
    case = Case(method, folder / "case")
    with Events(3, False, interrupt, only=("write jsonl",)).watching(), pytest.raises(Interrupted):
        case.compress(folder / "out", **DISK)
    assert committed_layers(folder / "out.partial") == (1 if method == "flap" else 2)
    return case


@pytest.mark.parametrize("sweeps", [2, 5])
@pytest.mark.parametrize("method, bias", [("mag-sp", True), ("fold", False)])
def test_a_further_sweep_lowers_what_is_left_on_the_windows_that_only_decide(tmp_path, method, bias, sweeps):
    """From the written networks; what each sweep chose is in grail.json, and one that gains nothing is the last."""
    source = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1, **BIASES)
    options = {"method": method, "bias": bias, "ratio": 0.2, "ridge": 1.0}
    entry = compressed(source, tmp_path / "out", sweeps=sweeps, **options)["sites"][1]
    told = entry["sweeps"]
    assert 2 <= len(told) <= sweeps, "this network does not show a sweep"
    assert [told[0][name] for name in ("alpha", "lambda")] == [entry["alpha"], entry["lambda"]]
    errors = [one["held_out_error"] for one in told]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert entry["held_out_errors"][0] >= errors[0] and entry["held_out_errors"][1] == errors[-1]
    (_, before, after), (_, _, aim) = (streams(opened(f), windows()[TRIAL])[MLP] for f in (tmp_path / "out", source))
    assert errors[-1] == pytest.approx(share_left(before, after, aim), rel=1e-4)


def test_sweeps_of_a_given_alpha_end_where_they_lose(tmp_path, source):
    """With α = 1 each sweep fits calibration better, and the deciding windows at some time worse."""
    for site in compressed(source, tmp_path / "out", alpha=1.0, ridge=None, sweeps=20)["sites"]:
        errors = [one["held_out_error"] for one in site["sweeps"] or ()]
        assert len(errors) < 20 and all(later < earlier for earlier, later in itertools.pairwise(errors))


def test_sweeps_end_where_nothing_is_gained(source, tmp_path):
    """At the first site both streams are one: the own repair leaves no more than its ridge does."""
    first = compressed(source, tmp_path / "out", sweeps=50, ridge=1e-3)["sites"][0]
    assert len(first["sweeps"] or [0]) < 50


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "fold"])
def test_a_resumed_run_gives_the_same_bytes(tmp_path, method):
    case = stopped(method, tmp_path)
    for name, more in {"out": {"resume": True}, "undisturbed": {}}.items():
        case.compress(tmp_path / name, **DISK, **more)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_a_resumed_run_goes_on_after_the_last_committed_layer(tmp_path):
    assert stopped("wanda-sp", tmp_path).compress(tmp_path / "out", resume=True, **DISK)["first"] == 2


def test_the_first_of_two_passes_leaves_nothing_in_the_store(tmp_path):
    stopped("flap", tmp_path)
    assert not list(tmp_path.glob("out.partial/store/survey*/*"))


SHARED = {
    "wanda-sp": {"method": "wanda-sp", "chunks": [32, 32]},
    "fold": {"method": "fold", "bias": True, "chunks": [32, 32]},
    "one has nothing to try": {"method": "gram", "bias": True},
    "sweeps": {"method": "wanda-sp", "sweeps": 2, "chunks": [32, 32]},
    "training": {"method": "wanda-pp-sp", "set": {"windows": "7"}, "chunks": [32, 32]},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder with the outputs of every case in two processes."""
    work = tmp_path_factory.mktemp("shared")
    tiny_checkpoint(work / "source")
    tiny_calibration(work / "ids.safetensors", windows=12)
    cases = [case | {"target": "stream", "ratio": 0.4, "eval": "none"} for case in SHARED.values()]
    done = several(2, "tests.torchrun_script", str(work), json.dumps(cases))
    return work if done.returncode == 0 else pytest.fail(done.stderr[-3000:])


@pytest.mark.parametrize("case", SHARED)
def test_two_processes_give_what_one_gives(shared, tmp_path, case):
    options, ids = {k: v for k, v in SHARED[case].items() if k != "chunks"}, str(shared / "ids.safetensors")
    one = compressed(shared / "source", tmp_path / "out", ids, ridge=None, **options)
    two = json.loads((shared / f"out-2-{list(SHARED).index(case)}" / "grail.json").read_text())
    assert one["calibration"] == two["calibration"]
    for number, (site, other) in enumerate(zip(one["sites"], two["sites"], strict=True)):
        assert (site["name"], site["after"]) == (other["name"], other["after"])
        for figure in ("error_before", "error_after", "lambda", "held_out_errors", "alpha"):
            if figure != "alpha" or number > 0:  # at the first site both streams are one, and any α does
                assert other[figure] == pytest.approx(site[figure], rel=1e-2), figure
    losses, others = ([layer["loss_after"] for layer in found["regional"]] for found in (one, two))
    assert others == pytest.approx(losses, rel=1e-2)


def test_a_process_without_windows_helps_the_other(shared):
    case = {"method": "wanda-sp", "target": "stream", "samples": 1, "alpha": 0.5, "ridge": 0.05, "output": "few"}
    assert several(2, "tests.torchrun_script", str(shared), json.dumps([case | {"eval": "none"}])).returncode == 0
