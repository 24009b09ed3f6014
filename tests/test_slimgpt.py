"""slimgpt: the elimination core against explicit OBS in float64 and against the anchored repair, then the method."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grail.compensation import compensate
from grail.errors import GrailError
from grail.reduction import Units, expand
from grail.selectors.elimination import BLOCK, Elimination, damped_inverse, greedy
from grail.selectors.slimgpt import SlimGPT
from grail.statistics import GRAM
from tests.test_selectors import PROPERTY, activations, channels, normal, view

NEEDS = frozenset({GRAM})


def mixed(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Activations whose channels predict each other, at different scales."""
    return activations(rows, width, seed=seed) @ (torch.eye(width) + 0.3 * normal(width, width, seed=seed + 1))


def gram_view(units, kept, **given):
    given.setdefault("x_NH", mixed(4 * units.width, units.width))
    return view(units, kept, needs=NEEDS, **given)


def hessian(site, damping=0.01) -> torch.Tensor:
    gram = site.statistics.gram.to_dense().double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def objective(h_HH, weight_OH, kept) -> float:
    """min over W' of tr((W − W'R) H (W − W'R)ᵀ), by a dense solve."""
    weight_OH = weight_OH.double()
    total = torch.sum((weight_OH @ h_HH) * weight_OH)
    if not len(kept):
        return total.item()
    target_OK = weight_OH @ h_HH[:, kept]
    return (total - torch.sum(torch.linalg.solve(h_HH[kept][:, kept], target_OK.mT).mT * target_OK)).item()


def explicit_obs(h_HH, weight_OH, units: Units, moves: int, batch: int) -> list[int]:
    """The publication's loop with nothing clever: one dense inverse per batch, weights updated by the block formula."""
    weight_OH, alive = weight_OH.double().clone(), list(range(units.count))
    order = []
    left = [moves] * units.groups
    while sum(left):
        rest = expand(torch.tensor(alive), units.size)
        inverse = torch.linalg.inv(h_HH[rest][:, rest])
        costs = {}
        for i, unit in enumerate(alive):
            own = slice(i * units.size, (i + 1) * units.size)
            w_OS = weight_OH[:, rest[own]]
            costs[unit] = torch.trace(w_OS @ torch.linalg.inv(inverse[own, own]) @ w_OS.mT).item()
        gone = []
        for unit in sorted(alive, key=costs.get):
            if left[unit // units.per_group] and len(gone) < batch:
                left[unit // units.per_group] -= 1
                gone.append(unit)
        at = torch.cat([torch.arange(units.size) + alive.index(unit) * units.size for unit in gone])
        update = weight_OH[:, rest[at]] @ torch.linalg.solve(inverse[at][:, at], inverse[at])
        weight_OH[:, rest] -= update
        alive = [unit for unit in alive if unit not in gone]
        order += gone
    return order


UNITS = [channels(12), Units(2, 6, 1), Units(1, 4, 3), Units(2, 3, 2)]
IDS = ["channels", "grouped", "heads", "gqa"]


class TestElimination:
    @pytest.mark.parametrize("units", UNITS, ids=IDS)
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_each_step_is_the_best_single_removal(self, units, seed):
        """Brute force: every unit that may still go is tried with a dense solve of what remains."""
        weight = normal(5, 12, seed=seed + 7)
        site = gram_view(units, 1, x_NH=mixed(50, 12, seed), weight_OH=weight)
        h_HH = hessian(site)
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), weight, units.size, "s")
        alive, left = set(range(units.count)), [units.per_group - 1] * units.groups
        for unit in greedy(work, units.groups, units.per_group - 1):
            error = {
                u: objective(h_HH, weight, expand(torch.tensor(sorted(alive - {u})), units.size))
                for u in alive
                if left[u // units.per_group]
            }
            assert unit == min(error, key=error.get)
            alive.remove(unit)
            left[unit // units.per_group] -= 1
        assert left == [0] * units.groups

    def test_the_costs_add_up_to_the_objective(self):
        site = gram_view(channels(12), 1, weight_OH=normal(5, 12, seed=7))
        h_HH = hessian(site)
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), site.weight_OH, 1, "s")
        spent = 0.0
        for unit in (3, 8, 0, 11):
            spent += work.costs()[unit].item()
            work.eliminate(unit)
            kept = work.alive.nonzero()[:, 0]
            assert spent == pytest.approx(objective(h_HH, site.weight_OH, kept), rel=1e-9)

    @pytest.mark.parametrize("size", [1, 3, 80])
    def test_across_block_updates(self, size):
        """More removals than one block holds, and units wider than a block: M is the inverse of what remains."""
        count = 240 // size
        units = Units(1, count, size)
        site = gram_view(units, 1, weight_OH=normal(9, 240, seed=7))
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), site.weight_OH, size, "s")
        for unit in range(0, count - 1, 2):
            work.eliminate(unit)
        assert int((~work.alive).sum()) * size > BLOCK
        kept = work.alive.repeat_interleave(size)
        want_CC = torch.linalg.inv(hessian(site)[kept][:, kept])
        torch.testing.assert_close(work.matrix(), want_CC, rtol=0, atol=1e-10 * want_CC.abs().max().item())

    def test_the_costs_are_current_inside_a_block(self):
        """Without reading the matrix, which would apply the block."""
        site = gram_view(channels(12), 1, weight_OH=normal(5, 12, seed=7))
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), site.weight_OH, 1, "s")
        for unit in (3, 8, 0, 11):
            work.eliminate(unit)
        lazy_U = work.costs()
        current_C = work.weight().square().sum(0) / work.matrix().diagonal()
        torch.testing.assert_close(lazy_U[work.alive], current_C, rtol=1e-9, atol=0)
        assert lazy_U[[0, 3, 8, 11]].isnan().all()

    def test_a_singular_block_names_the_site(self):
        work = Elimination(torch.ones(2, 2, dtype=torch.float64), torch.ones(1, 2), 1, "layers.3.mlp")
        work.eliminate(0)
        with pytest.raises(GrailError, match=r"layers\.3\.mlp.*singular"):
            work.costs()

    def test_a_singular_head_names_the_site(self):
        work = Elimination(torch.ones(4, 4, dtype=torch.float64), torch.ones(1, 4), 2, "layers.3.attn")
        with pytest.raises(GrailError, match=r"layers\.3\.attn.*singular"):
            work.eliminate(0)

    def test_a_weight_that_is_not_finite_names_the_site(self):
        weight = torch.ones(2, 3)
        weight[1, 1] = float("nan")
        work = Elimination(torch.eye(3, dtype=torch.float64), weight, 1, "layers.3.mlp")
        with pytest.raises(GrailError, match=r"layers\.3\.mlp.*weight"):
            work.costs()

    def test_a_gram_matrix_that_is_not_finite_names_the_site(self):
        x = torch.ones(3, 4)
        x[0, 0] = float("nan")
        site = gram_view(channels(4), 2, x_NH=x)
        with pytest.raises(GrailError, match=r"^site.*NaN"):
            SlimGPT().select(site)


class TestAnchoredSolution:
    """REFERENCE section 1: OBS weights equal the anchored repair at the damping's λ, from the original weight."""

    @pytest.mark.parametrize("units", [channels(30), Units(3, 5, 2), channels(300)], ids=["channels", "gqa", "blocks"])
    @pytest.mark.parametrize("batch", [1, 4])
    def test_obs_weights_equal_the_anchored_formula(self, units, batch):
        site = gram_view(units, 1, weight_OH=normal(8, units.width, seed=7).double())
        gram_HH = site.statistics.gram.to_dense().double()
        lam = SlimGPT(obs=True).own_ridge(site)
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), site.weight_OH, units.size, "s")
        greedy(work, units.groups, units.per_group // 2, batch=batch)
        kept = work.alive.repeat_interleave(units.size)
        lifted_OK, normal_KK = site.weight_OH[:, kept], gram_HH[kept][:, kept]
        residual_OK = site.weight_OH @ gram_HH[:, kept] - lifted_OK @ normal_KK
        eye_KK = torch.eye(len(normal_KK), dtype=torch.float64)
        want_OK = lifted_OK + torch.linalg.solve(normal_KK + lam * eye_KK, residual_OK.mT).mT
        torch.testing.assert_close(work.weight(), want_OK, rtol=0, atol=1e-9)
        assert (want_OK - lifted_OK).abs().max() > 0.1  # the update is not nothing

    def test_obs_weights_equal_what_compensation_writes(self):
        site = gram_view(channels(30), 18, weight_OH=normal(8, 30, seed=7).double())
        method = SlimGPT(batch=1, obs=True)
        reduction = method.select(site)
        work = Elimination(damped_inverse(site.statistics.gram, 0.01, "s"), site.weight_OH, 1, "s")
        greedy(work, 1, 12)
        got = compensate(site.weight_OH, site.statistics.gram, reduction, lam=method.own_ridge(site))
        torch.testing.assert_close(work.weight(), got.weight, rtol=0, atol=1e-9)

    def test_own_ridge_is_none_unless_asked_for(self):
        site = gram_view(channels(12), 6)
        assert SlimGPT().own_ridge(site) is None
        assert not SlimGPT().updates_weights()
        assert SlimGPT(obs=True).updates_weights()
        mean = site.statistics.gram.diagonal().double().mean().item()
        assert SlimGPT(obs=True, damping=0.5).own_ridge(site) == pytest.approx(0.5 * mean, rel=1e-12)


class TestSelection:
    @pytest.mark.parametrize("units", UNITS, ids=IDS)
    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_batches_follow_explicit_obs(self, units, batch, seed):
        moves = units.per_group // 2
        weight = normal(5, 12, seed=seed + 7)
        site = gram_view(units, units.per_group - moves, x_NH=mixed(50, 12, seed), weight_OH=weight)
        gone = explicit_obs(hessian(site), weight, units, moves, batch)
        got = SlimGPT(batch=batch).select(site).kept.tolist()
        assert got == sorted(set(range(units.count)) - set(gone))

    @pytest.mark.parametrize("units", UNITS, ids=IDS)
    def test_the_plain_score_is_the_formula(self, units):
        """‖W_:j‖² / [H⁻¹]_jj, and tr(W_gᵀW_g ([H⁻¹]_gg)⁻¹), from the stored activations."""
        x, weight = mixed(50, 12), normal(5, 12, seed=7)
        kept = units.per_group // 2
        site = gram_view(units, kept, x_NH=x, weight_OH=weight)
        h_HH = x.double().mT @ x.double()
        h_HH += 0.01 * h_HH.diagonal().mean() * torch.eye(12)
        inverse, w_OH = torch.linalg.inv(h_HH), weight.double()
        score = torch.stack(
            [
                torch.trace(w_OH[:, g : g + units.size].mT @ w_OH[:, g : g + units.size] @ torch.linalg.inv(
                    inverse[g : g + units.size, g : g + units.size]))
                for g in range(0, 12, units.size)
            ]
        )  # fmt: skip
        best = score.view(units.groups, -1).topk(kept).indices + torch.arange(units.groups)[:, None] * units.per_group
        assert SlimGPT(greedy=False).select(site).kept.tolist() == best.flatten().sort().values.tolist()
        z = (score - score.mean()) / score.std(correction=0)
        torch.testing.assert_close(SlimGPT().global_scores(site), z, rtol=1e-4, atol=1e-4)

    def test_the_rule_for_batches(self):
        """A 32nd of the 80 channels that go, rounded up, is 3; heads go one at a time however many there are."""
        site = gram_view(channels(120), 40)
        rule, three = SlimGPT().select(site).kept, SlimGPT(batch=3).select(site).kept
        assert torch.equal(rule, three)
        assert not torch.equal(rule, SlimGPT(batch=1).select(site).kept)  # so the comparison means something
        as_heads = gram_view(channels(120), 40, kind="heads")
        assert torch.equal(SlimGPT().select(as_heads).kept, SlimGPT(batch=1).select(as_heads).kept)

    def test_of_two_equal_channels_one_stays(self):
        """Each alone is free to remove, so one-shot scores drop both and lose their sum."""
        x, weight = activations(60, 6).clone(), torch.ones(3, 6)
        x[:, 4] = x[:, 1] = 3 * normal(60, seed=5)
        site = gram_view(channels(6), 4, x_NH=x, weight_OH=weight)
        assert len({1, 4} & set(SlimGPT(batch=1, damping=1e-4).select(site).kept.tolist())) == 1
        assert not {1, 4} & set(SlimGPT(greedy=False, damping=1e-4).select(site).kept.tolist())

    def test_greedy_leaves_less_error_than_one_shot(self):
        site = gram_view(channels(60), 25, weight_OH=normal(9, 60, seed=7))
        h_HH = hessian(site)
        once, one_by_one = (
            objective(h_HH, site.weight_OH, m.select(site).kept) for m in (SlimGPT(greedy=False), SlimGPT(batch=1))
        )
        assert one_by_one < 0.95 * once

    def test_fewer_tokens_than_channels(self):
        site = gram_view(channels(40), 20, x_NH=mixed(7, 40))
        assert SlimGPT().select(site).kept_width == 20

    def test_bfloat16_weights_are_read_exactly(self):
        weight = normal(5, 24, seed=7).bfloat16()
        narrow, wide = (gram_view(channels(24), 9, weight_OH=w) for w in (weight, weight.double()))
        assert torch.equal(SlimGPT().select(narrow).kept, SlimGPT().select(wide).kept)

    def test_keeping_all_is_the_identity_and_needs_no_factorisation(self):
        x = torch.full((3, 4), float("inf"))
        assert SlimGPT().select(gram_view(channels(4), 4, x_NH=x)).is_identity

    def test_the_view_is_only_read(self):
        site = gram_view(channels(12), 5, weight_OH=normal(5, 12, seed=7).double())
        before = site.statistics.gram.to_dense()
        first = SlimGPT().select(site).kept
        assert torch.equal(site.weight_OH, normal(5, 12, seed=7).double())
        assert torch.equal(site.statistics.gram.to_dense(), before)
        assert torch.equal(SlimGPT().select(site).kept, first)

    @PROPERTY
    @given(groups=st.integers(1, 3), per_group=st.integers(1, 5), size=st.integers(1, 3), data=st.data(),
           seed=st.integers(0, 99), plain=st.booleans())  # fmt: skip
    def test_every_group_keeps_equally_many(self, groups, per_group, size, data, seed, plain):
        kept = data.draw(st.integers(1, per_group))
        units = Units(groups, per_group, size)
        site = gram_view(units, kept, x_NH=mixed(30, units.width, seed))
        method = SlimGPT(greedy=not plain, batch=data.draw(st.integers(0, 5)))
        got = method.select(site)
        assert torch.bincount(got.kept // per_group, minlength=groups).tolist() == [kept] * groups

    @PROPERTY
    @given(width=st.integers(2, 16), data=st.data(), seed=st.integers(0, 99), plain=st.booleans())
    def test_permuting_the_channels_permutes_the_selection(self, width, data, seed, plain):
        kept = data.draw(st.integers(1, width))
        order = torch.tensor(data.draw(st.permutations(range(width))))
        x, weight = mixed(40, width, seed), normal(6, width, seed=seed + 1)
        method = SlimGPT(greedy=not plain)
        before = method.select(gram_view(channels(width), kept, x_NH=x, weight_OH=weight))
        after = method.select(gram_view(channels(width), kept, x_NH=x[:, order], weight_OH=weight[:, order]))
        assert sorted(order[after.kept].tolist()) == before.kept.tolist()

    @PROPERTY
    @given(width=st.integers(1, 16), data=st.data(), seed=st.integers(0, 99), scale=st.sampled_from([1e-3, 1.0, 30.0]))
    def test_a_multiple_of_the_identity_gives_the_order_of_magnitude(self, width, data, seed, scale):
        kept = data.draw(st.integers(1, width))
        weight = normal(6, width, seed=seed)
        site = gram_view(channels(width), kept, x_NH=scale * torch.eye(width), weight_OH=weight)
        want = weight.norm(dim=0).topk(kept).indices.sort().values
        assert torch.equal(SlimGPT().select(site).kept, want)

    def test_among_equals_the_lower_number_stays(self):
        site = gram_view(channels(6), 2, x_NH=torch.eye(6), weight_OH=torch.ones(2, 6))
        assert SlimGPT().select(site).kept.tolist() == [0, 1]
        assert SlimGPT(greedy=False).select(site).kept.tolist() == [0, 1]


class TestOptions:
    def test_from_the_command_line(self):
        method = SlimGPT.from_options({"damping": "0.1", "greedy": "false", "batch": "7", "obs": "true"})
        assert method == SlimGPT(damping=0.1, greedy=False, batch=7, obs=True)
        assert (SlimGPT.allocation, SlimGPT.needs) == ("log", {GRAM})

    @pytest.mark.parametrize(("key", "value"), [("damping", "-1"), ("damping", "nan"), ("batch", "-2")])
    def test_values_out_of_range_are_refused_by_name(self, key, value):
        with pytest.raises(GrailError, match=f"--set {key}="):
            SlimGPT.from_options({key: value})
