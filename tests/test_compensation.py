"""The repair, from its formulas: W' = W B with B of DESIGN section 1, and the error that it reports."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grail.compensation import compensate, reconstruction_errors
from grail.errors import GrailError
from grail.reduction import Folding, Selection
from grail_kernels import GramAccumulator, PackedSymmetric

FORMS = ("anchored", "paper")
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


def reconstruction_error(weight_OH, weight_OK, reduction, gram):
    return reconstruction_errors(weight_OH, [weight_OK], reduction, gram)[0]


def normal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlated(rows: int, width: int, *, seed: int = 0) -> torch.Tensor:
    """Activations X [N, H] as in networks: correlated, of uneven size, with a mean; float32."""
    mix = normal(width, width, seed=seed + 1000) / width**0.5 + 0.5 * torch.eye(width, dtype=torch.float64)
    scale = torch.exp(normal(width, seed=seed + 2000))
    return ((normal(rows, width, seed=seed) @ mix + 0.3) * scale).float()


def gram_of(x_NH: torch.Tensor) -> PackedSymmetric:
    return GramAccumulator(x_NH.shape[-1]).update(x_NH).packed


def plain_error(weight, narrow, reduction, x_NH) -> float:
    """Σ‖W x − W' R x‖² / Σ‖W x‖², straight from the data in float64."""
    want = x_NH.double() @ weight.double().mT
    got = reduction.reduce(x_NH.double()) @ narrow.double().mT
    return ((want - got).square().sum() / want.square().sum()).item()


def dense_formula(weight, gram_HH, r_KH, b0_HK, ridge, form) -> torch.Tensor:
    """W' written as in DESIGN section 1, with explicit R and B0 in float64."""
    a_KK = r_KH @ gram_HH @ r_KH.mT
    lam = ridge * a_KK.diagonal().mean()
    inverse = torch.linalg.inv(a_KK + lam * torch.eye(len(a_KK), dtype=torch.float64))
    if form == "paper":
        return weight @ gram_HH @ r_KH.mT @ inverse
    return weight @ (b0_HK + (gram_HH @ r_KH.mT - b0_HK @ a_KK) @ inverse)


def explicit(reduction) -> tuple[torch.Tensor, torch.Tensor]:
    """R and B0 as matrices."""
    eye = torch.eye(reduction.width, dtype=torch.float64)
    if isinstance(reduction, Selection):
        return eye[reduction.channels], eye[:, reduction.channels]
    members = torch.nn.functional.one_hot(reduction.cluster).double()
    return (members / members.sum(0)).mT, members


REDUCTIONS = {
    "channels": Selection(torch.tensor([0, 3, 4, 8, 10]), 1, 12),
    "most-channels": Selection(torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11]), 1, 12),
    "heads": Selection(torch.tensor([0, 2]), 3, 12),
    "one-channel": Selection(torch.tensor([5]), 1, 12),
    "fold": Folding(torch.tensor([0, 1, 2, 2, 3, 0, 4, 4, 4, 1, 0, 3])),
    "fold-to-one": Folding(torch.zeros(12, dtype=torch.int64)),
}
EVERY_REDUCTION = pytest.mark.parametrize("reduction", list(REDUCTIONS.values()), ids=list(REDUCTIONS))


@st.composite
def reductions(draw, width: int):
    """A selection of channels or heads, or a folding, that really removes something."""
    kind = draw(st.sampled_from(["channels", "heads", "fold"]))
    if kind == "fold":
        cluster = draw(st.lists(st.integers(0, width - 2), min_size=width, max_size=width))
        return Folding(torch.unique(torch.tensor(cluster), return_inverse=True)[1])
    size = 1 if kind == "channels" else 2
    units = width // size
    kept = draw(st.sets(st.integers(0, units - 1), min_size=1, max_size=units - 1))
    return Selection(torch.tensor(sorted(kept)), size, width)


WIDTHS = st.sampled_from([4, 8, 14])
RIDGES = st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 1.0, 30.0])


class TestFormula:
    @EVERY_FORM
    @EVERY_REDUCTION
    @pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
    @pytest.mark.parametrize("outputs", [1, 3, 40], ids="O={}".format)
    def test_equals_the_dense_formula(self, reduction, form, ridge, outputs):
        """Narrow and wide consumers: fewer and more outputs than removed channels."""
        gram = gram_of(correlated(400, 12))
        weight = normal(outputs, 12, seed=1)
        want = dense_formula(weight, gram.to_dense().double(), *explicit(reduction), ridge, form)
        got = compensate(weight, gram, reduction, ridge=ridge, form=form)
        assert got.weight.shape == want.shape
        assert ((got.weight - want).norm() / want.norm()).item() < 1e-5
        a_KK = reduction.normal_matrix(gram).double()
        assert got.lam == pytest.approx(ridge * a_KK.diagonal().mean().item(), rel=1e-6)
        assert (got.retries, got.info) == (0, 0)
        assert 0 < got.rcond <= 1.0 + 1e-12

    def test_anchored_is_the_default_with_ridge_a_thousandth(self):
        gram, weight = gram_of(correlated(400, 12)), normal(3, 12, seed=1)
        plain = compensate(weight, gram, REDUCTIONS["channels"])
        spelled = compensate(weight, gram, REDUCTIONS["channels"], ridge=1e-3, form="anchored")
        assert torch.equal(plain.weight, spelled.weight)

    def test_by_hand(self):
        """h = (a, b) with E[a²] = 1, E[ab] = 0.5: removing b gives w_a + 0.5 w_b."""
        gram = PackedSymmetric.from_dense(torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
        got = compensate(torch.tensor([[2.0, 4.0]]), gram, Selection(torch.tensor([0]), 1, 2), ridge=0.0)
        assert got.weight.tolist() == [[4.0]]
        # W x = 2a + 4b has energy 4 + 8 + 16; before, 4b is lost (16), after, 4(b − a/2), (12)
        assert got.error_before == pytest.approx(16 / 28, rel=1e-6)
        assert got.error_after == pytest.approx(12 / 28, rel=1e-6)


class TestLimits:
    @PROPERTY
    @given(data=st.data(), width=WIDTHS, ridge=RIDGES, scale=st.sampled_from([1e-6, 1.0, 3.7e5]))
    def test_white_activations_give_classic_pruning_and_folding(self, data, width, ridge, scale):
        """G = c I: the anchored answer is the plain lift for every λ."""
        reduction = data.draw(reductions(width))
        gram = PackedSymmetric.from_dense(scale * torch.eye(width))
        weight = normal(5, width, seed=2, dtype=torch.float32)
        got = compensate(weight, gram, reduction, ridge=ridge)
        want = reduction.lift_consumer(weight.double())
        if isinstance(reduction, Selection):
            assert torch.equal(got.weight, want.float())
        else:
            torch.testing.assert_close(got.weight.double(), want, rtol=2e-7, atol=1e-6)

    @PROPERTY
    @given(data=st.data(), width=WIDTHS, seed=st.integers(0, 99))
    def test_paper_is_anchored_at_vanishing_ridge(self, data, width, seed):
        reduction = data.draw(reductions(width))
        gram, weight = gram_of(correlated(60 * width, width, seed=seed)), normal(5, width, seed=seed)
        paper, anchored = (compensate(weight, gram, reduction, ridge=0.0, form=form).weight for form in FORMS)
        torch.testing.assert_close(paper, anchored, rtol=1e-7, atol=1e-7)
        for form in FORMS:
            near = compensate(weight, gram, reduction, ridge=1e-9, form=form).weight
            assert ((near - anchored).norm() / anchored.norm()).item() < 1e-4

    @PROPERTY
    @given(data=st.data(), width=WIDTHS, seed=st.integers(0, 99))
    def test_huge_ridge(self, data, width, seed):
        """Anchored: the plain lift. Paper: shrunk to nothing."""
        reduction = data.draw(reductions(width))
        gram, weight = gram_of(correlated(60 * width, width, seed=seed)), normal(5, width, seed=seed)
        lifted = reduction.lift_consumer(weight)
        anchored = compensate(weight, gram, reduction, ridge=1e12)
        torch.testing.assert_close(anchored.weight, lifted, rtol=1e-8, atol=1e-8)
        assert anchored.error_after == pytest.approx(anchored.error_before, rel=1e-5, abs=1e-6)
        assert compensate(weight, gram, reduction, ridge=1e12, form="paper").weight.abs().max() < 1e-8


class TestDuplicates:
    @PROPERTY
    @given(data=st.data(), distinct=st.integers(1, 6), copies=st.integers(2, 3), seed=st.integers(0, 99))
    def test_selection_that_keeps_one_of_each_recovers_the_output(self, data, distinct, copies, seed):
        source = torch.arange(distinct).repeat(copies)
        x = correlated(300, distinct, seed=seed)[:, source]
        kept = sorted(k + distinct * data.draw(st.integers(0, copies - 1)) for k in range(distinct))
        reduction, weight = Selection(torch.tensor(kept), 1, len(source)), normal(4, len(source), seed=seed)
        got = compensate(weight, gram_of(x), reduction, ridge=1e-9)
        assert got.error_after <= 1e-6
        assert plain_error(weight, got.weight, reduction, x) <= 1e-6

    @PROPERTY
    @given(distinct=st.integers(1, 6), copies=st.integers(2, 3), ridge=RIDGES, seed=st.integers(0, 99))
    def test_folding_is_exact_before_and_after(self, distinct, copies, ridge, seed):
        source = torch.arange(distinct).repeat(copies)
        x, weight = correlated(300, distinct, seed=seed)[:, source], normal(4, len(source), seed=seed)
        reduction = Folding(source)
        got = compensate(weight, gram_of(x), reduction, ridge=ridge)
        assert got.error_before <= 1e-6
        assert got.error_after <= 1e-6
        assert plain_error(weight, got.weight, reduction, x) <= 1e-6


class TestError:
    @PROPERTY
    @given(data=st.data(), width=WIDTHS, ridge=RIDGES, form=st.sampled_from(FORMS), seed=st.integers(0, 99))
    def test_reported_errors_are_those_of_the_data(self, data, width, ridge, form, seed):
        reduction = data.draw(reductions(width))
        x, weight = correlated(30 * width, width, seed=seed), normal(5, width, seed=seed, dtype=torch.float32)
        got = compensate(weight, gram_of(x), reduction, ridge=ridge, form=form)
        before = plain_error(weight, reduction.lift_consumer(weight), reduction, x)
        assert got.error_before == pytest.approx(before, rel=1e-4, abs=1e-5)
        assert got.error_after == pytest.approx(plain_error(weight, got.weight, reduction, x), rel=1e-4, abs=1e-5)

    @PROPERTY
    @given(data=st.data(), width=WIDTHS, ridge=RIDGES, seed=st.integers(0, 99), rows=st.integers(1, 60))
    def test_compensation_never_hurts_on_its_own_data(self, data, width, ridge, seed, rows):
        """Anchored, whatever λ and however few rows."""
        reduction = data.draw(reductions(width))
        x, weight = correlated(rows, width, seed=seed), normal(5, width, seed=seed)
        got = compensate(weight, gram_of(x), reduction, ridge=ridge)
        assert got.error_after <= got.error_before * (1 + 1e-5) + 1e-6
        after = plain_error(weight, got.weight, reduction, x)
        assert after <= plain_error(weight, reduction.lift_consumer(weight), reduction, x) * (1 + 1e-5) + 1e-6

    @PROPERTY
    @given(data=st.data(), seed=st.integers(0, 99))
    def test_no_ridge_is_the_least_squares_optimum(self, data, seed):
        """Any step away from W' makes the output worse."""
        reduction = data.draw(reductions(8))
        x, weight = correlated(300, 8, seed=seed), normal(3, 8, seed=seed)
        best = compensate(weight, gram_of(x), reduction, ridge=0.0).weight
        optimum = plain_error(weight, best, reduction, x)
        for step in range(5):
            moved = best + 0.1 * normal(*best.shape, seed=step)
            assert plain_error(weight, moved, reduction, x) >= optimum

    @EVERY_REDUCTION
    def test_reconstruction_error_of_any_narrow_weight(self, reduction):
        x, weight = correlated(200, 12), normal(6, 12, seed=1)
        narrow = normal(6, reduction.kept_width, seed=2)
        got = reconstruction_error(weight, narrow, reduction, gram_of(x))
        assert got == pytest.approx(plain_error(weight, narrow, reduction, x), rel=1e-5)

    def test_a_silent_consumer_has_no_error(self):
        got = compensate(torch.zeros(3, 12), gram_of(correlated(100, 12)), REDUCTIONS["channels"])
        assert (got.error_before, got.error_after) == (0.0, 0.0)
        assert not got.weight.any()

    def test_errors_are_those_of_the_rounded_weight(self):
        """What is reported belongs to the weight that is written, after its rounding."""
        x = correlated(300, 12).repeat_interleave(2, dim=1)
        reduction, weight = Selection(torch.arange(0, 24, 2), 1, 24), normal(6, 24, seed=1)
        got = compensate(weight, gram_of(x), reduction, ridge=1e-9, dtype=torch.bfloat16)
        assert got.weight.dtype == torch.bfloat16
        actual = plain_error(weight, got.weight, reduction, x)
        assert actual > 1e-7
        assert got.error_after == pytest.approx(actual, rel=0.1)


class TestResult:
    @EVERY_FORM
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_weight_keeps_its_dtype(self, dtype, form):
        weight = normal(6, 12, seed=1).to(dtype)
        got = compensate(weight, gram_of(correlated(300, 12)), REDUCTIONS["channels"], form=form)
        assert got.weight.dtype == dtype
        assert got.weight.is_contiguous()
        exact = compensate(weight.double(), gram_of(correlated(300, 12)), REDUCTIONS["channels"], form=form)
        torch.testing.assert_close(got.weight, exact.weight.to(dtype), rtol=0, atol=0)

    @EVERY_FORM
    @pytest.mark.parametrize("name", ["channels", "fold"])
    def test_nothing_removed_is_byte_for_byte(self, name, form):
        nothing = {"channels": Selection(torch.arange(12), 1, 12), "fold": Folding(torch.arange(12))}[name]
        weight = normal(6, 12, seed=1).bfloat16()
        got = compensate(weight, gram_of(correlated(300, 12)), nothing, ridge=0.1, form=form)
        assert torch.equal(got.weight, weight)
        assert (got.error_before, got.error_after, got.retries) == (0.0, 0.0, 0)

    def test_a_folding_that_only_reorders_reorders_the_consumer(self):
        """K = H, yet R is not I: W' R x must still be W x."""
        folding, x, weight = Folding(torch.tensor([1, 2, 0])), correlated(50, 3), normal(4, 3)
        got = compensate(weight, gram_of(x), folding, ridge=0.0)
        assert plain_error(weight, got.weight, folding, x) <= 1e-9

    @EVERY_REDUCTION
    @EVERY_FORM
    def test_inputs_are_only_read(self, reduction, form):
        weight, gram = normal(6, 12, seed=1), gram_of(correlated(300, 12))
        before = gram.data.clone()
        compensate(weight, gram, reduction, ridge=0.0, form=form)
        assert torch.equal(weight, normal(6, 12, seed=1))
        assert torch.equal(gram.data, before)

    @EVERY_FORM
    def test_strided_weight(self, form):
        wide, gram = normal(12, 10, seed=1), gram_of(correlated(300, 12))
        got = compensate(wide.mT[::2], gram, REDUCTIONS["heads"], form=form)
        want = compensate(wide.mT[::2].contiguous(), gram, REDUCTIONS["heads"], form=form)
        torch.testing.assert_close(got.weight, want.weight, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("name", ["channels", "fold"])
    def test_permuting_the_channels_changes_nothing(self, name):
        """Only names change: the narrow weight stays, up to the order of its columns."""
        x, weight, reduction = correlated(300, 12), normal(6, 12, seed=1), REDUCTIONS[name]
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))  # new channel i is old order[i]
        if name == "fold":
            moved, columns = Folding(reduction.cluster[order]), torch.arange(5)
        else:
            kept = torch.isin(order, reduction.kept).nonzero()[:, 0]
            moved, columns = Selection(kept, 1, 12), torch.searchsorted(reduction.kept, order[kept])
        want = compensate(weight, gram_of(x), reduction)
        got = compensate(weight[:, order], gram_of(x[:, order]), moved)
        torch.testing.assert_close(got.weight, want.weight[:, columns], rtol=1e-4, atol=1e-4)
        assert got.error_after == pytest.approx(want.error_after, rel=1e-4)

    @pytest.mark.parametrize("factor", [1e-6, 1e6], ids=["small", "large"])
    def test_scale_of_the_activations_does_not_matter(self, factor):
        """λ is relative: quiet and loud layers are treated alike."""
        x, weight = correlated(300, 12), normal(6, 12, seed=1)
        want = compensate(weight, gram_of(x), REDUCTIONS["channels"])
        got = compensate(weight, gram_of(x * factor), REDUCTIONS["channels"])
        torch.testing.assert_close(got.weight, want.weight, rtol=1e-4, atol=1e-4)


class TestSingular:
    CASES = {  # noqa: RUF012
        "dead-channels": correlated(300, 12) * (torch.arange(12) % 3 > 0),
        "few-rows": correlated(3, 12),
        "duplicates": correlated(300, 6)[:, torch.arange(12) % 6],
        "all-dead": torch.zeros(5, 12),
    }

    @EVERY_FORM
    @pytest.mark.parametrize("case", list(CASES))
    def test_ridge_is_raised_and_reported(self, case, form):
        x, weight = self.CASES[case], normal(6, 12, seed=1)
        reduction = Selection(torch.tensor([0, 1, 3, 4, 6, 7, 9, 10]), 1, 12)
        got = compensate(weight, gram_of(x), reduction, ridge=0.0, form=form)
        assert got.retries >= 1
        assert got.info != 0
        assert got.lam > 0
        assert torch.isfinite(got.weight).all()
        assert got.error_after <= got.error_before * (1 + 1e-5) + 1e-6

    def test_dead_channels_keep_their_columns(self):
        """A kept channel that never fired on the calibration data says nothing: anchored leaves it as it was."""
        x, weight = self.CASES["dead-channels"], normal(6, 12, seed=1)
        got = compensate(weight, gram_of(x), Selection(torch.tensor([0, 1, 3, 4]), 1, 12))
        torch.testing.assert_close(got.weight[:, [0, 2]], weight[:, [0, 3]], rtol=1e-9, atol=1e-9)

    @EVERY_FORM
    @pytest.mark.parametrize("channel", [0, 1], ids=["kept", "removed"])
    def test_nan_names_the_site(self, channel, form):
        gram = PackedSymmetric.from_dense(torch.eye(12))
        gram.data[0] = float("nan")  # G[0, 0]
        kept = torch.tensor([0, 2] if channel == 0 else [1, 2])
        if channel:  # a removed channel meets kept ones only off the diagonal
            dense = torch.eye(12)
            dense[0, 2] = dense[2, 0] = float("nan")
            gram = PackedSymmetric.from_dense(dense)
        with pytest.raises(GrailError, match=r"layers\.5\.mlp\.down_proj"):
            compensate(normal(3, 12), gram, Selection(kept, 1, 12), form=form, name="layers.5.mlp.down_proj")


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match="lasso"):
        compensate(normal(3, 12), gram_of(correlated(50, 12)), REDUCTIONS["channels"], form="lasso")
