"""--target stream, from its formulas: on rows of numbers, and on what transformers computes with the networks that were
written. The choice of alpha and ridge, and whole runs: test_trials.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import grail
from grail.compensation import compensate
from grail.moments import CrossMoments, PairStatistics
from grail.reduction import Selection
from grail.session import Session
from grail.stream_repair import StreamSolution, StreamSystem, pair_errors, selection_errors
from grail_kernels import GramAccumulator
from tests.killed_runs import files_of
from tests.test_compensation import correlated, explicit, normal
from tests.tiny import HIDDEN, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
FORMS, SEEDS, ALL = st.sampled_from(["anchored", "paper"]), st.integers(0, 99), slice(None)
BIASES = {"attention_bias": True, "mlp_bias": True}


def off(found: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in norm."""
    return ((found.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)).item()


def centred(*rows: torch.Tensor, affine: bool) -> list[torch.Tensor]:
    return [x.double() - x.double().mean(0) if affine else x.double() for x in rows]


def wanted(h_TH, t_TO, weight_OH, bias_O, reduction, alpha, ridge, form="anchored", affine=False, sweeps=1):
    """(W', b') of the issue's formula, from the rows themselves with explicit R and B0 in float64; more sweeps go on
    from there, each taking α of what the ridge regression makes of what is left."""
    h, t, w, b = (x.double() for x in (h_TH, t_TO, weight_OH, bias_O))
    d = t - h @ w.mT - b
    moved_h, moved_d = centred(h, d, affine=affine)
    gram, cross = moved_h.mT @ moved_h, moved_h.mT @ moved_d
    r, lift = explicit(reduction)
    a = r @ gram @ r.mT
    anchor = w @ lift if form == "anchored" else torch.zeros(len(w), len(a), dtype=torch.float64)
    right = w @ gram @ r.mT + alpha * cross.mT @ r.mT - anchor @ a
    shrunk = a + ridge * a.diagonal().mean() * torch.eye(len(a))
    new, taken, moved_t = anchor + torch.linalg.solve(shrunk, right.mT).mT, alpha, moved_h @ w.mT + moved_d
    for _ in range(sweeps - 1):
        left = moved_t - moved_h @ r.mT @ new.mT
        new, taken = new + alpha * torch.linalg.solve(shrunk, r @ moved_h.mT @ left).mT, taken + alpha * (1 - taken)
    return new, b + affine * (w @ h.mean(0) + taken * d.mean(0) - new @ r @ h.mean(0))


class Rows:
    """Hidden vectors h [T, H], a consumer, and a difference D [T, O] that h partly explains; and their moments."""

    def __init__(self, width: int, outputs: int, seed: int, affine: bool = False, silent: bool = False):
        self.h, self.weight = correlated(30 * width, width, seed=seed), normal(outputs, width, seed=seed).float()
        noise, mix = normal(len(self.h), outputs, seed=seed + 1), normal(outputs, width, seed=seed + 2)
        self.d = (self.h @ mix.mT.float() + noise.float() + 0.7) * (not silent)
        self.t, self.affine = self.h @ self.weight.mT + self.d, affine
        gram = GramAccumulator(width, centred=affine)
        self.stream = CrossMoments(gram, outputs, affine=affine)
        for h, t, d in zip(self.h.split(50), self.t.split(50), self.d.split(50)):
            gram.update(h)
            self.stream.update(h, t, d)
        self.gram = gram.packed

    def system(self, reduction, form="anchored") -> StreamSystem:
        return StreamSystem.of_selection(self.weight, self.gram, self.stream.cross, reduction, form=form, name="site")

    def error(self, z_TK: torch.Tensor, weight_OK: torch.Tensor) -> float:
        """Σ‖t − W' z − b'‖² / Σ‖t‖², with affine of the best b' and about the mean."""
        t, left = centred(self.t, self.t.double() - z_TK.double() @ weight_OK.double().mT, affine=self.affine)
        return (left.square().sum() / t.square().sum()).item()


@st.composite
def selections(draw):
    """Channels or heads of several channels; sometimes all of them."""
    size, units = draw(st.sampled_from([(1, 7), (1, 13), (2, 5), (3, 4)]))
    kept = draw(st.sets(st.integers(0, units - 1), min_size=1, max_size=units))
    return Selection(torch.tensor(sorted(kept)), size, size * units)


class TestFormulas:
    @PROPERTY
    @given(
        reduction=selections(),
        form=FORMS,
        alpha=st.sampled_from([0.0, 0.3, 1.0]),
        ridge=st.sampled_from([1e-3, 0.1, 2.0]),
        outputs=st.sampled_from([1, 5, 21]),
        affine=st.booleans(),
        seed=SEEDS,
    )
    def test_a_selection_is_the_formula_of_the_issue(self, reduction, form, alpha, ridge, outputs, affine, seed):
        rows = Rows(reduction.width, outputs, seed, affine)
        solved_as = "anchored" if reduction.is_identity else form  # what loses nothing is not shrunk
        want, _ = wanted(rows.h, rows.t, rows.weight, torch.zeros(outputs), reduction, alpha, ridge, solved_as, affine)
        system = rows.system(reduction, form)
        both, one = (StreamSolution(system, ridge * system.scale, asked) for asked in (None, alpha))
        assert off(both.weight(alpha, torch.float64), want) < 1e-4
        assert off(one.weight(alpha, torch.float64), want) < 1e-4
        parts = both.own(ALL) + alpha * both.stream(ALL)
        assert off(both.weight(alpha, torch.float64), parts) < 1e-12
        assert off(one.weight(alpha, torch.float64), parts) < 1e-9
        if reduction.is_identity:
            assert torch.equal(both.own(ALL), rows.weight.double())

    @PROPERTY
    @given(reduction=selections(), form=FORMS, outputs=st.sampled_from([2, 21]), seed=SEEDS)
    def test_equal_streams_give_plain_grail(self, reduction, form, outputs, seed):
        rows = Rows(reduction.width, outputs, seed, silent=True)
        system = rows.system(reduction, form)
        solution = StreamSolution(system, 0.01 * system.scale)
        assert not solution.stream(ALL).any()
        if not reduction.is_identity:
            plain = compensate(rows.weight, rows.gram, reduction, ridge=0.01, form=form, dtype=torch.float64)
            assert solution.solved.lam == plain.lam
            assert off(solution.own(ALL), plain.weight) < 1e-9

    @PROPERTY
    @given(alpha=st.sampled_from([0.0, 0.4, 1.0]), form=FORMS, affine=st.booleans(), seed=SEEDS)
    def test_pairs_are_ridge_regression_on_the_target(self, alpha, form, affine, seed):
        """z is no slice of h: min Σ‖W h + α D − W' z‖² + λ‖W' − W_a‖², by QR of the rows; and both errors."""
        rows, kept = Rows(12, 5, seed, affine), 7
        z = torch.tanh(rows.h[:, :kept]) + 0.3 * correlated(len(rows.h), kept, seed=seed + 7)
        anchor, own = normal(5, kept, seed=seed + 8).float(), rows.h @ rows.weight.mT
        pairs = PairStatistics(kept, 5, affine=affine)
        stream, folding = CrossMoments(pairs.accumulator, 5, affine=affine), own - z @ anchor.mT
        for part in torch.arange(len(z)).split(60):
            pairs.update(z[part], own[part], folding[part])
            stream.update(z[part], rows.t[part], rows.d[part])
        system = StreamSystem.of_pairs(anchor, pairs, stream, form=form, name="site")
        found = StreamSolution(system, 0.05 * system.scale).weight(alpha, torch.float64)
        moved_z, y = centred(z, own.double() + alpha * rows.d.double(), affine=affine)
        root = (0.05 * moved_z.square().sum(0).mean()).sqrt()
        start = root * anchor.double() * (form == "anchored")
        padded = torch.cat([moved_z, root * torch.eye(kept)]), torch.cat([y, start.mT])
        assert off(found, torch.linalg.lstsq(*padded).solution.mT) < 1e-4
        mixed = torch.mul(*centred(folding, rows.d, affine=affine)).sum().item()
        errors = pair_errors(anchor, [anchor, found], pairs, stream, mixed)
        assert errors == pytest.approx([rows.error(z, anchor), rows.error(z, found)], rel=1e-3)

    @PROPERTY
    @given(reduction=selections(), affine=st.booleans(), seed=SEEDS)
    def test_errors_are_those_of_the_data(self, reduction, affine, seed):
        rows = Rows(reduction.width, 5, seed, affine)
        system = rows.system(reduction)
        solution = StreamSolution(system, 1e-3 * system.scale)
        candidates = [reduction.lift_consumer(rows.weight), solution.weight(0.0, torch.float32)]
        candidates += [solution.weight(1.0, torch.float32), normal(5, reduction.kept_width, seed=seed).bfloat16()]
        found = selection_errors(rows.weight, candidates, reduction, rows.gram, rows.stream)
        assert found == pytest.approx([rows.error(reduction.reduce(rows.h), w) for w in candidates], rel=1e-3)
        assert found[2] < found[0] and found[2] < found[1], "the target itself is what this one is solved for"


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Tiny networks, each made once."""
    made = {}

    def folder(model_type: str = "llama", **options) -> Path:
        key = model_type, *options.items()
        if key not in made:
            made[key] = tiny_checkpoint(tmp_path_factory.mktemp("source") / "model", model_type, **options)
        return made[key]

    return folder


def windows(count: int = 13) -> torch.Tensor:
    return torch.randint(64, (count, 29), generator=torch.Generator().manual_seed(1))


def compressed(source: Path, out: Path, ids: torch.Tensor | None = None, **options) -> dict:
    """grail.json of a run, by default with a fixed ridge."""
    options = {"target": "stream", "ridge": 0.05, "ratio": 0.4, "eval": "none"} | options
    grail.compress(source, output=out, calibration=windows() if ids is None else ids, **options)
    return json.loads((out / "grail.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def opened(folder: Path):
    return grail.load(folder).double().eval()


@torch.no_grad()
def streams(model, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    """By consumer: its input [T, K], and the residual stream [T, D] before it and after it."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0].flatten(0, 1)}))
        for name, module in model.named_modules()
        if name.endswith(("norm", "o_proj", "down_proj"))
    ]
    model.model(ids)
    for hook in hooks:
        hook.remove()
    order = list(seen)  # every norm reads the stream, and a consumer lies between any two of them
    return {order[i]: tuple(seen[order[i + step]] for step in (0, -1, 1)) for i in range(1, len(order), 2)}


def dense_hidden(dense, ids: torch.Tensor, name: str, before_TD: torch.Tensor) -> torch.Tensor:
    """What the dense network's producers make of another stream: the consumer's input [T, H]."""
    norm = "input_layernorm" if name.endswith("o_proj") else "post_attention_layernorm"
    module = dense.get_submodule(f"{name.rsplit('.', 2)[0]}.{norm}")
    hook = module.register_forward_pre_hook(lambda *_: (before_TD.view(*ids.shape, -1),))
    found = streams(dense, ids)[name][0]
    hook.remove()
    return found


def kept_channels(dense, small, name: str) -> torch.Tensor:
    """Found by the rows of a producer, which selection only copies."""
    producer = name.replace("o_proj", "q_proj").replace("down_proj", "up_proj")
    wide, narrow = (model.get_submodule(producer).weight for model in (dense, small))
    return (narrow[:, None] == wide[None]).all(-1).int().argmax(1)


def bias_of(model, name: str) -> torch.Tensor:
    bias = model.get_submodule(name).bias
    return torch.zeros(HIDDEN, dtype=torch.float64) if bias is None else bias


WIRINGS = {
    "plain": ({}, {}),
    "a bias": ({}, {"bias": True}),
    "paper, own biases": (BIASES, {"ridge_form": "paper"}),
    "own biases and a bias": (BIASES, {"bias": True}),
    "seed_oss": ({"model_type": "seed_oss", "attention_out_bias": True}, {"bias": True}),
    "heads whole, a bias": ({}, {"attn_ratio": 0.0, "bias": True}),
    "MLP whole": ({"num_key_value_heads": 6}, {"mlp_ratio": 0.0, "method": "gram"}),
    "two sweeps": ({}, {"sweeps": 2}),
    "three sweeps, paper, own biases and a bias": (BIASES, {"sweeps": 3, "bias": True, "ridge_form": "paper"}),
}


@pytest.mark.parametrize("wiring", WIRINGS)
def test_every_site_is_the_formula_of_both_streams(folders, tmp_path, wiring):
    """Streams, hidden vectors and biases as transformers computes them in float64, dense and compressed."""
    (network, options), ids = WIRINGS[wiring], windows()
    entries = compressed(folders(**network), tmp_path / "out", alpha=0.6, **options)["sites"]
    dense, small = opened(folders(**network)), opened(tmp_path / "out")
    aims, ways = streams(dense, ids), streams(small, ids)
    touched = {entry["name"]: entry for entry in entries if entry["alpha"] is not None}
    assert len(touched) == (3 if "heads whole" in wiring else 4)
    for name, entry in touched.items():
        z, before, after = ways[name]
        h, channels = dense_hidden(dense, ids, name, before), kept_channels(dense, small, name)
        assert off(h[:, channels], z) < 1e-6
        reduction, form = Selection(channels, 1, h.shape[1]), options.get("ridge_form", "anchored")
        weight, own, t = dense.get_submodule(name).weight, bias_of(dense, name), aims[name][2] - before
        affine, sweeps = options.get("bias", False), options.get("sweeps", 1)
        new, bias = wanted(h, t, weight, own, reduction, 0.6, 0.05, form, affine, sweeps)
        assert off(small.get_submodule(name).weight, new) < 1e-5
        assert (bias_of(small, name) - bias).norm() <= 1e-5 * bias.norm()
        assert entry["alpha"] == 0.6 and entry["held_out_errors"] is None
        left, total = centred(t - (after - before), t, affine=affine)
        assert entry["error_after"] == pytest.approx((left.square().sum() / total.square().sum()).item(), rel=1e-3)


@pytest.mark.parametrize("bias, sweeps", [(False, 1), (True, 1), (True, 2)])
def test_folded_sites_are_least_squares_of_both_streams(folders, tmp_path, bias, sweeps):
    """At vanishing ridge W' z (+ b') is the regression of (1 − α)(W h + b) + α (r_d − r_c) on z; a second sweep takes
    α of what is left again."""
    ids, source, taken = windows(), folders(**BIASES), 1 - 0.4**sweeps
    options = {"method": "fold", "alpha": 0.6, "ridge": 1e-8, "bias": bias, "sweeps": sweeps}
    sites = compressed(source, tmp_path / "out", **options)["sites"]
    dense, small = opened(source), opened(tmp_path / "out")
    aims, ways = streams(dense, ids), streams(small, ids)
    for entry, (name, (z, before, after)) in zip(sites, ways.items(), strict=True):
        weight, own = dense.get_submodule(name).weight, bias_of(dense, name)
        plain = dense_hidden(dense, ids, name, before) @ weight.mT + own
        target = (1 - taken) * plain + taken * (aims[name][2] - before) - own * (not bias)
        design = torch.cat([z, torch.ones(len(z), int(bias), dtype=torch.float64)], 1)
        want = torch.linalg.lstsq(design, target).solution.mT
        assert off(small.get_submodule(name).weight, want[:, : z.shape[1]]) < 1e-3
        assert off(bias_of(small, name), want[:, -1] if bias else own) < 1e-3
        left, total = centred(aims[name][2] - after, aims[name][2] - before, affine=bias)
        assert entry["error_after"] == pytest.approx((left.square().sum() / total.square().sum()).item(), rel=1e-3)


def test_the_stream_after_the_last_layer_is_nearer_to_the_dense_one(folders, tmp_path):
    ids, last, left = windows(), "model.layers.1.mlp.down_proj", {}
    for target, options in {"hidden": {}, "stream": {"alpha": 1.0}}.items():
        compressed(folders(), tmp_path / target, target=target, ridge=1e-6, **options)
        left[target] = off(*(streams(opened(f), ids)[last][2] for f in (tmp_path / target, folders())))
    assert left["stream"] < 0.95 * left["hidden"], left


@pytest.mark.parametrize("method", ["wanda-sp", "fold"])
def test_hidden_vectors_that_are_computed_twice_change_no_bit(folders, tmp_path, monkeypatch, method):
    """As on a GPU, where nothing is spilled."""
    for spill in (True, False):
        monkeypatch.setattr(Session, "spill", spill)
        compressed(folders(), tmp_path / str(spill), method=method, ridge=None)
    assert files_of(tmp_path / "True") == files_of(tmp_path / "False")
