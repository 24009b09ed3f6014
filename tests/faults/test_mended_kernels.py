"""What was found wrong in the kernels' package, each by itself."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from grail_kernels import CrossAccumulator, GramAccumulator, PackedSymmetric, gram_reference, ridge_solve
from grail_kernels.gram_torch import cross_reference

CHAIN = 8192
CONSTANTS = (0.1, 7.3, 1 / 3, 0.7, 1.1, -0.9)


def rows(count: int = 50, width: int = 20) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def packing(width: int = 20, **layout) -> PackedSymmetric:
    return PackedSymmetric.from_dense(rows(width, width) + rows(width, width).mT, **layout)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))], ids=["copy", "pickle"])
class TestPackedPickles:
    @pytest.mark.parametrize("layout", [{"tile": 8}, {"tile": 8, "padded": True, "backend": "torch"}], ids=str)
    def test_the_same_in_the_same_layout(self, copied, layout):
        packed = packing(**layout)
        found = copied(packed)
        assert (found.tile, found.padded, found.backend.name) == (packed.tile, packed.padded, packed.backend.name)
        assert torch.equal(found.to_dense(), packed.to_dense())

    def test_what_is_added_is_in_its_clone_too(self, copied):
        found = copied(packing(tile=8))
        found.add_outer_(torch.ones(20), torch.ones(20))
        assert torch.equal(found.to_dense(), found.clone().to_dense())

    def test_it_takes_the_values_of_another(self, copied):
        found = copied(packing(tile=8)).copy_(PackedSymmetric(20, tile=8))
        assert not found.to_dense().any()


def test_a_pickle_holds_the_numbers_of_one_matrix_once():
    packed = GramAccumulator(300, tile=64, sites=4).update(rows(4 * 5, 300).view(4, 5, 300)).packed[1]
    assert len(pickle.dumps(packed)) < 1.1 * packed.data.numel() * 4


@pytest.fixture(params=["mode", "default"])
def elsewhere(request):
    """meta stands for a GPU: what lands there by mistake cannot be read."""
    if request.param == "mode":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


class TestDefaultDevice:
    """device=None is the CPU, whatever the script has made its default."""

    x, a, rhs = rows(), torch.eye(5) * 2, torch.ones(5, 2)

    @pytest.mark.parametrize("options", [{}, {"sites": 2}, {"centred": True}], ids=str)
    def test_gram(self, elsewhere, options):
        x = self.x.unflatten(0, (2, 25)) if "sites" in options else self.x
        gram = GramAccumulator(20, tile=8, **options).update(x, x[..., 0] > 0)
        again = pickle.loads(pickle.dumps(gram))
        for each in (gram, again):
            assert {t.device.type for t in (each.sum, each.mean, each.diagonal(), each.to_dense())} == {"cpu"}
        assert torch.equal(gram.gather([3, 1], [2]), again.gather([3, 1], [2]))

    def test_cross(self, elsewhere):
        cross = CrossAccumulator(20, 20).update(self.x, self.x)
        assert cross.count == 50
        assert error(cross.value, cross_reference(self.x, self.x)) < 1e-6

    def test_packed(self, elsewhere):
        packed = PackedSymmetric(20, tile=8)
        packed.copy_(PackedSymmetric(20, tile=7)).scatter_([1, 0], self.a[:2, :2])
        assert packed.to_dense()[0, 0] == 2 and packed.quadratic_trace(self.x) > 0 and packed.effective_rank() == 2

    @pytest.mark.parametrize("lam", [0.5, [0.5, 1.0]], ids=str)
    def test_ridge(self, elsewhere, lam):
        assert ridge_solve(self.a, self.rhs, lam, anchor=self.rhs).solution.device.type == "cpu"


class TestChains:
    """Rounding errors of equal rows all go in one direction: nothing else shows how long a chain of additions is."""

    @pytest.mark.parametrize("precise", [False, True])
    @pytest.mark.parametrize("width", [1, 2, 8, 15, 31])
    def test_narrow_products_of_equal_rows(self, width, precise):
        for value in CONSTANTS:
            x = torch.full((CHAIN, width), value)
            assert error(GramAccumulator(width, precise=precise).update(x).to_dense(), gram_reference(x)) < 1e-6

    def test_one_constant_channel_among_others(self):
        x = torch.cat([torch.full((CHAIN, 1), 7.3), rows(CHAIN, 7)], 1)
        assert error(GramAccumulator(8).update(x).to_dense(), gram_reference(x)) < 1e-6

    @pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000, CHAIN + 1])
    @pytest.mark.parametrize(("width", "columns"), [(3, 500), (500, 3), (2, 20_000)])
    def test_narrow_cross_moments(self, width, columns, count):
        x, y = torch.full((count, width), 0.7), torch.full((count, columns), 1.1)
        want = cross_reference(x, y)
        assert (CrossAccumulator(width, columns).update(x, y).value - want).norm() <= 1e-6 * want.norm()

    @pytest.mark.parametrize("width", [32, 130, 400])
    def test_wide_products_of_equal_rows(self, width):
        """What a BLAS makes of a chain of its own length."""
        x = torch.full((CHAIN, width), 0.1)
        assert error(GramAccumulator(width).update(x).to_dense(), gram_reference(x)) < 5e-6


class TestRefusals:
    @pytest.mark.parametrize(
        "out",
        [torch.zeros(1, 2).expand(4, 2), torch.zeros(4, 1).expand(4, 2), torch.zeros(8).as_strided((4, 2), (1, 3))],
        ids=["rows", "columns", "overlapping"],
    )
    def test_gather_into_shared_numbers(self, out):
        with pytest.raises(ValueError, match="share memory"):
            packing().gather(torch.arange(4), torch.arange(2), out=out)

    @pytest.mark.parametrize(
        "out",
        [torch.zeros(2, 4).mT, torch.zeros(9, 4)[::2, 1:3][:4], torch.zeros(40).as_strided((4, 2), (2, 9))],
        ids=["transposed", "sliced", "interleaved"],
    )
    def test_gather_into_any_other_strides(self, out):
        packed = packing()
        packed.gather(torch.arange(4), torch.arange(2), out=out)
        assert torch.equal(out, packed.to_dense()[:4, :2])

    def test_gather_of_one_number_into_an_expanded_one(self):
        packed = packing()
        assert packed.gather([3], [1], out=torch.zeros(1).expand(1, 1)) == packed.to_dense()[3, 1]

    def test_an_anchor_elsewhere(self):
        with pytest.raises(ValueError, match="devices"):
            ridge_solve(torch.eye(3), torch.ones(3, 1), 1.0, anchor=torch.ones(3, 1, device="meta"))

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
    def test_an_anchor_of_no_floats(self, dtype):
        with pytest.raises(TypeError, match="floating-point"):
            ridge_solve(torch.eye(3), torch.ones(3, 1), 1.0, anchor=torch.ones(3, 1, dtype=dtype))

    @pytest.mark.parametrize("data", [(7,), (101,), (10, 10)], ids=str)
    def test_data_of_another_size(self, data):
        with pytest.raises(ValueError, match="100"):
            PackedSymmetric(10, data=torch.zeros(data))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
    def test_a_matrix_of_no_floats(self, dtype):
        with pytest.raises(TypeError, match="floating-point"):
            PackedSymmetric.from_dense(torch.ones(4, 4, dtype=dtype))


@pytest.mark.parametrize("options", [{}, {"sites": 1}, {"centred": True}], ids=str)
def test_what_is_read_in_inference_mode_is_an_ordinary_tensor(options):
    x = rows()[None] if "sites" in options else rows()
    with torch.inference_mode():
        gram = GramAccumulator(20, **options).update(x)
        read = [gram.sum, gram.mean, gram.diagonal(), gram.to_dense(), gram.gather([0], [1])]
        held = gram.packed if isinstance(gram.packed, PackedSymmetric) else gram.packed[0]
        read += [held.diagonal(), held.to_dense()]
    assert not any(tensor.is_inference() for tensor in read)
