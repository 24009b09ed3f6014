"""What the kernels' package is given that is no plain tensor of numbers: a sentence, or the right answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grail_kernels import CrossAccumulator, GramAccumulator, MatrixRows, PackedSymmetric, ridge_solve, ridge_solve_

WIDTH = 8


def rows(count: int = 20) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(0)) + 2


def lazily_negated(numbers: Tensor) -> Tensor:
    """-numbers, whose sign is a bit of the view, as of z.conj().imag."""
    found = torch._neg_view(numbers)
    assert found.is_neg() and found.is_contiguous()
    return found


def positive_definite() -> Tensor:
    return rows().mT @ rows() + torch.eye(WIDTH)


def near(found: Tensor, expected: Tensor) -> bool:
    return bool((found.double() - expected.double()).norm() <= 1e-4 * expected.double().norm())


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
class TestASignThatTorchKeepsAsABit:
    def test_column_sums_have_it(self, backend):
        assert near(GramAccumulator(WIDTH, backend=backend).update(lazily_negated(rows())).sum, -rows().sum(0))

    def test_cross_moments_have_it(self, backend):
        found = CrossAccumulator(WIDTH, WIDTH, backend=backend).update(lazily_negated(rows()), rows()).value
        assert near(found, -rows().mT @ rows())
        found = CrossAccumulator(WIDTH, WIDTH, backend=backend).update(rows(), lazily_negated(rows())).value
        assert near(found, -rows().mT @ rows())

    def test_the_centred_matrix_keeps_its_digits(self, backend):
        found = GramAccumulator(WIDTH, centred=True, backend=backend).update(lazily_negated(rows() + 300)).to_dense()
        about = (rows() + 300).double()
        about = about - about.mean(0)
        assert near(found, about.mT @ about)


class TestPackedMatricesOfNegatedViews:
    def layout(self) -> dict:
        return {"tile": 32, "padded": True, "backend": "triton"}

    def test_products(self):
        packed, factor = PackedSymmetric.from_dense(positive_definite(), **self.layout()), rows(WIDTH)
        assert near(packed.matmul(lazily_negated(factor)), -positive_definite() @ factor)

    def test_data(self):
        data = lazily_negated(PackedSymmetric.from_dense(positive_definite(), **self.layout()).data)
        everything = torch.arange(WIDTH)
        found = PackedSymmetric(WIDTH, data=data, **self.layout()).gather(everything, everything)
        assert near(found, -positive_definite())

    def test_values_that_are_written(self):
        packed = PackedSymmetric(WIDTH, **self.layout())
        assert near(
            packed.scatter_(torch.arange(WIDTH), lazily_negated(positive_definite())).to_dense(), -positive_definite()
        )

    def test_a_place_that_is_written_to(self):
        out, everything = lazily_negated(torch.zeros(WIDTH, WIDTH)), torch.arange(WIDTH)
        PackedSymmetric.from_dense(positive_definite(), **self.layout()).gather(everything, everything, out=out)
        assert near(out, positive_definite())


NO_TENSOR = {
    "numpy": (lambda: rows().numpy(), TypeError, "is a ndarray; give a torch.Tensor"),
    "list": (lambda: rows().tolist(), TypeError, "is a list; give a torch.Tensor"),
    "sparse": (lambda: rows().to_sparse(), TypeError, "is stored as torch.sparse_coo; give a dense tensor"),
    "nested": (lambda: torch.nested.nested_tensor([rows(), rows()]), TypeError, "is nested; give a dense tensor"),
    "meta": (lambda: rows().to("meta"), ValueError, "holds no data"),
}


@pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
@pytest.mark.parametrize(("make", "kind", "said"), NO_TENSOR.values(), ids=NO_TENSOR)
class TestNoPlainTensors:
    def test_rows_of_a_gram_matrix(self, make, kind, said):
        found = GramAccumulator(WIDTH)
        with pytest.raises(kind, match=f"^x {said}"):
            found.update(make())
        assert found.count == 0

    def test_rows_of_a_cross_moment(self, make, kind, said):
        with pytest.raises(kind, match=f"^y {said}"):
            CrossAccumulator(WIDTH, WIDTH).update(rows(), make())

    def test_masks(self, make, kind, said):
        with pytest.raises(kind, match=f"^the mask {said}"):
            GramAccumulator(WIDTH).update(rows(), make())

    def test_operands_of_a_product(self, make, kind, said):
        with pytest.raises(kind, match=f"^the operand {said}"):
            PackedSymmetric.from_dense(positive_definite()).matmul(make())

    def test_ridge_systems(self, make, kind, said):
        with pytest.raises(kind, match=f"^A {said}"):
            ridge_solve(make(), make(), 1.0)


class TestRidge:
    def test_a_matrix_of_eight_bits_is_refused(self):
        with pytest.raises(TypeError, match=r"A is torch.float8_e4m3fn.*at least 16 bits"):
            ridge_solve(positive_definite().to(torch.float8_e4m3fn), rows(WIDTH), 1.0)

    def test_a_right_hand_side_that_is_one_column_many_times_is_refused_where_it_is_written_over(self):
        expanded = torch.ones(WIDTH, 1, dtype=torch.float64).expand(WIDTH, 3)
        with pytest.raises(ValueError, match="share memory"):
            ridge_solve_(MatrixRows.of(positive_definite().double()), expanded, 1.0)
        assert ridge_solve(positive_definite(), expanded, 1.0).solution.shape == (WIDTH, 3)


class TestStates:
    @pytest.mark.parametrize(
        "make", [lambda: GramAccumulator(WIDTH), lambda: CrossAccumulator(WIDTH, 3)], ids=["gram", "cross"]
    )
    def test_an_incomplete_one_is_refused_by_what_it_lacks(self, make):
        with pytest.raises(ValueError, match=r"the state lacks .*count, precise; give what state_dict"):
            make().load_state_dict({})
        state = make().state_dict()
        del state["count"]
        with pytest.raises(ValueError, match="the state lacks count;"):
            make().load_state_dict(state)
