"""What is proven of a description by example, as found by looking for descriptions that are wrong and pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import grail
from tests.faults.test_mended_networks import MLP, MLP_SITES, compressed, net, refuse, rows


def with_statistics(*norms: nn.Module) -> None:
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 5)
        norm.weight.data.uniform_(0.5, 1.5)


class Normed(nn.Module):
    def __init__(self, behind: bool):
        super().__init__()
        self.a, self.norm, self.b, self.behind = nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 4), behind
        with_statistics(self.norm)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return self.b(self.norm(torch.relu(hidden)) if self.behind else torch.relu(self.norm(hidden)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 12), nn.Linear(16, 12), nn.Linear(12, 4)
        self.norm_a, self.norm_b = nn.BatchNorm1d(12), nn.BatchNorm1d(12)
        with_statistics(self.norm_a, self.norm_b)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.norm_a(self.a(x))) * torch.sigmoid(self.norm_b(self.b(x))))


class TestFolding:
    SITES = (grail.channels("a", "b", width=12, norms=["norm"]),)

    def test_a_norm_behind_the_activation_is_refused(self):
        refuse("^a: units that are copies.*directly behind", net(lambda: Normed(True)), method="fold", sites=self.SITES)

    def test_such_a_norm_may_be_sliced(self):
        assert compressed(net(lambda: Normed(True)), sites=self.SITES).ratio == {"channels": 0.5}

    def test_copies_fold_without_loss(self):
        module = net(lambda: Normed(False))
        with torch.no_grad():
            for tensor in (*module.a.parameters(), *module.norm.parameters(), *module.norm.buffers()):
                if tensor.dim():
                    tensor[6:] = tensor[:6]
        found = compressed(module, method="fold", compensate=False, sites=self.SITES).model(rows())
        assert torch.allclose(found, module(rows()), atol=1e-5)

    @pytest.mark.parametrize("norms", [("norm_a", "norm_b"), ("norm_b", "norm_a")])
    def test_norms_stand_in_the_order_of_producers(self, norms):
        given = {"method": "fold", "sites": [grail.channels(["a", "b"], "c", width=12, norms=norms)]}
        if norms[0] == "norm_a":
            assert compressed(net(Gate), **given).ratio == {"channels": 0.5}
        else:
            refuse("^a: units that are copies.*in their order", net(Gate), **given)


class Mixing(MLP):
    """Units are divided by their norm, and another output is large, or the head is not trained yet."""

    def __init__(self, factor: float = 1.0, head: float = 1.0):
        super().__init__()
        self.factor, self.head = factor, nn.Linear(4, 4, bias=False)
        self.head.weight.data *= head

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.fc1(x))
        hidden = hidden / hidden.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return {"logits": self.head(self.fc2(hidden)), "image": x * self.factor}


class Headed(MLP):
    def __init__(self, head: float):
        super().__init__()
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight.data *= head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(super().forward(x))


class TestWrongDescriptions:
    @pytest.mark.parametrize("factor", [1.0, 1e3, 1e9])
    @pytest.mark.parametrize("head", [1.0, 1e-5, 0.0])
    def test_are_not_hidden_by_scales(self, factor, head):
        refuse("^fc1: units that are removed", net(lambda: Mixing(factor, head)))

    @pytest.mark.parametrize("head", [1.0, 1e-5, 0.0])
    def test_right_ones_pass_and_weights_stay(self, head):
        module = net(lambda: Headed(head))
        assert torch.equal(compressed(module).model.head.weight, module.head.weight)

    def test_nothing_but_zeros_proves_nothing(self):
        module = net()
        for layer in (module.fc1, module.fc2):
            layer.bias.data.zero_()
        refuse("zeros alone", module, torch.zeros(20, 16))


class Masked(MLP):
    def __init__(self, value: float = float("-inf")):
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).masked_fill(torch.tensor([False, True, False, False]), self.value)


class Mapped(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(super().forward)(x)


class TestUnusualForwards:
    def test_masked_logits(self, tmp_path):
        module = net(Masked)
        report = compressed(module, output=tmp_path / "out")
        assert torch.equal(report.model(rows()).isneginf(), module(rows()).isneginf())

    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_other_infinities(self, value):
        refuse("NaN or infinity", net(lambda: Masked(value)))

    def test_layers_within_vmap(self):
        refuse("^fc2 is called inside torch.vmap.*whole batches", net(Mapped))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(16, n) for n in (16, 16, 16, 4))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.d(x)


class TestTiedWeights:
    @pytest.mark.parametrize(
        ("layers", "said"),
        [
            (("a", "b"), "a: a shares its weight with c"),
            (("b", "c"), "b: c shares its weight with a"),
            (("c", "d"), "c: c shares its weight with a"),
        ],
    )
    def test_are_refused_where_a_site_needs_one(self, layers, said):
        refuse(f"^{said}, a tie", net(Tied), sites=[grail.channels(*layers, width=16)])

    def test_stay_where_nothing_goes(self):
        module = compressed(net(Tied), ratio=0.0, sites=[grail.channels("c", "d", width=16)]).model
        assert module.c.weight is module.a.weight

    def test_one_layer_of_two_names_is_no_tie(self):
        module = net()
        module.again = module.fc1
        report = compressed(module, sites=MLP_SITES)
        assert report.model.again is report.model.fc1
