"""Networks described by hand: parameters that hold no floats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grail
from benchmarks.clip_digits import CAPTIONS, digits, tiny_clip, tokenizer
from grail.errors import GrailError
from grail.modules.verify import unlike
from tests.faults.test_mended_networks import MLP, compressed, net, rows


def whole(numbers: Tensor) -> nn.Parameter:
    return nn.Parameter(numbers, requires_grad=False)


class Ordered(MLP):
    """Reads its inputs in an order, without some: parameters that stand before all others."""

    def __init__(self):
        nn.Module.__init__(self)
        self.order, self.mask = whole(torch.arange(16).flip(0)), whole(torch.arange(16) > 2)
        self.zero = whole(torch.zeros((), dtype=torch.int32))
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, self.order] * self.mask + self.zero)


class TestParametersThatAreNoFloats:
    @pytest.mark.parametrize("flags", [{}, {"method": "fold"}, {"bias": True}], ids=str)
    def test_stay_as_they_are(self, tmp_path, flags):
        report = compressed(net(Ordered), output=tmp_path / "out", **flags)
        loaded = grail.load(tmp_path / "out", module=Ordered())
        assert report.model.fc1.weight.shape == (6, 16)
        for module in (report.model, loaded):
            assert torch.equal(module.order, torch.arange(16).flip(0)) and module.mask.dtype == torch.bool
        assert torch.equal(loaded(rows()), report.model(rows()))

    def test_a_wrong_description_beside_them_is_seen(self):
        class Mixing(Ordered):
            def forward(self, x: Tensor) -> Tensor:
                return self.fc2(torch.softmax(self.fc1(x[:, self.order]), -1))

        with pytest.raises(GrailError, match=r"^fc1: units that are removed are missed"):
            compressed(net(Mixing))

    def test_in_16_bits(self):
        assert compressed(net(Ordered).bfloat16(), rows().bfloat16()).model.fc2.weight.dtype == torch.bfloat16

    def test_are_not_named_where_a_network_fails_over_dtypes(self):
        assert not unlike(Ordered())
        assert "its tensor fc2.weight is torch.float16" in unlike(Ordered().requires_grad_(False).apply(_half_of_fc2))

    def test_before_all_others_of_a_clip(self):
        module = tiny_clip()
        module._parameters = {"steps": whole(torch.tensor(3)), **module._parameters}
        given = {"calibration": digits(16, seed=2)[0], "calibration_text": tokenizer(CAPTIONS), "samples": 16}
        report = grail.compress(module, method="wanda", **given)
        assert report.model.steps == 3 and report.macs[1] < report.macs[0]


def _half_of_fc2(module: nn.Module) -> None:
    if isinstance(module, nn.Linear) and module.out_features == 4:
        module.weight.data = module.weight.data.half()


class Renamed(MLP):
    """Each layer under two names, the consumer's module too."""

    def __init__(self):
        super().__init__()
        self.up, self.parts = self.fc1, nn.ModuleDict({"down": self.fc2})


class TestLayersWithTwoNames:
    @pytest.mark.parametrize("names", [("fc1", "fc2"), ("up", "parts.down"), ("fc1", "parts.down")], ids="-".join)
    def test_are_found_by_either(self, tmp_path, names):
        sites = [grail.channels(*names, width=12)]
        report = compressed(net(Renamed), sites=sites, output=tmp_path / "out")
        loaded = grail.load(tmp_path / "out", module=Renamed())
        assert torch.equal(report.model(rows()), compressed(net()).model(rows()))
        for module in (report.model, loaded):
            assert module.up is module.fc1 and module.parts.down.weight.shape == (4, 6)
            assert torch.equal(module(rows()), report.model(rows()))
        assert report.sites[0]["name"] == names[0]

    @pytest.mark.parametrize("name", ["fc2", "parts.down"])
    def test_another_layer_with_the_same_weight_is_still_a_tie(self, name):
        class Tied(Renamed):
            def __init__(self):
                super().__init__()
                self.other = nn.Linear(12, 4)
                self.other.weight = self.fc2.weight

        with pytest.raises(GrailError, match=f"^fc1: {name} shares its weight with other, a tie"):
            compressed(net(Tied), sites=[grail.channels("fc1", name, width=12)])


class Mapping(nn.Module):
    """Images [B, 3, H, W] -> [B, 4]: convolutions of several sizes."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 8, 1, bias=False)
        self.c, self.head = nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.b(torch.relu(self.norm(self.a(x))))
        return self.head(torch.relu(self.c(torch.relu(made))).mean((2, 3)))


class TestMemoryFormat:
    SITES = (grail.channels("a", "b", width=12, norms=["norm"]), grail.channels("b", "c", width=8))

    @pytest.mark.parametrize("method", ["wanda", "fold"])
    @pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format], ids=str)
    def test_of_weights_stays_also_in_a_folder(self, tmp_path, order, method):
        module = net(Mapping).to(memory_format=order)
        x = torch.randn(16, 3, 9, 9).to(memory_format=order)
        report = compressed(module, x, sites=self.SITES, method=method, output=tmp_path / "out")
        loaded = grail.load(tmp_path / "out", module=Mapping().to(memory_format=order))
        for layer in ("a", "b", "c"):
            weights = [m.get_submodule(layer).weight for m in (report.model, loaded)]
            assert all(w.stride() == torch.empty_like(w, memory_format=order).stride() for w in weights)
        assert torch.equal(loaded(x), report.model(x))
