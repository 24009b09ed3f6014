"""What was found in descriptions of networks and their proofs, and in networks that are loaded into given modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from grail.families.network import Network
from grail.modules.verify import verify
from tests.faults.test_mended_networks import MLP, MLP_SITES, compressed, net, refuse, rows


class Turned(MLP):
    """Turns its input by a matrix that no file holds."""

    def __init__(self):
        super().__init__()
        turn = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
        self.register_buffer("turn", turn, persistent=False)
        self.register_buffer("steps", torch.arange(16), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.turn)


class TestBuffersThatAreNotStored:
    def test_go_with_stored_weights_of_16_bits(self, tmp_path):
        report = compressed(net(Turned).half(), output=tmp_path / "out")
        loaded = grail.load(tmp_path / "out", module=Turned())
        assert (loaded.turn.dtype, loaded.steps.dtype) == (torch.float16, torch.int64)
        assert torch.equal(loaded(rows().half()), report.model(rows().half()))

    def test_stay_float32_beside_16_bits_where_they_are_so_in_the_module(self, tmp_path):
        module = net(Turned).half()
        module.turn = module.turn.float()
        compressed(net(Turned).half(), output=tmp_path / "out")
        assert grail.load(tmp_path / "out", module=module).turn.dtype == torch.float32

    def test_without_data_are_refused(self, tmp_path):
        compressed(net(Turned), output=tmp_path / "out")
        module = Turned().to("meta")
        with pytest.raises(GrailError, match=r"buffer turn holds no data.*make the module on the CPU"):
            grail.load(tmp_path / "out", module=module)

    def test_a_module_on_meta_without_any_is_filled(self, tmp_path):
        report = compressed(net(), output=tmp_path / "out", sites=MLP_SITES)
        assert torch.equal(grail.load(tmp_path / "out", module=MLP().to("meta"))(rows()), report.model(rows()))


class Answers(MLP):
    """Gives its output in some form."""

    def __init__(self, form: Callable[[Tensor], object]):
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> object:
        return self.form(super().forward(x))


class Mixing(MLP):
    """Mixes units of the site unseen (in what `mixed` makes of them), beside something else in one output."""

    def __init__(self, combine: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.combine, self.aside = combine, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.layer_norm(torch.relu(self.fc1(x)), self.fc1.weight.shape[:1])
        return self.combine(self.aside(x), self.fc2(hidden))


class TestForms:
    @pytest.mark.parametrize(
        ("kind", "form"),
        {
            "sparse": lambda y: y.to_sparse(),
            "nested": lambda y: torch.nested.nested_tensor(list(y)),
        }.items(),
    )
    @pytest.mark.filterwarnings("ignore:.*prototype:UserWarning")
    def test_that_cannot_be_compared_are_refused(self, kind, form):
        refuse(f"output holds a {kind} tensor.*return dense ones", net(lambda: Answers(form)))

    @pytest.mark.parametrize("form", [lambda y: torch.complex(y, y), lambda y: torch.complex(y, y).conj().sum()])
    def test_complex_ones_are_taken(self, form):
        assert compressed(net(lambda: Answers(form))).ratio == {"channels": 0.5}


class TestWrongDescriptionsAreSeen:
    def test_in_the_imaginary_part(self):
        refuse("^fc1: units that are removed are missed", net(lambda: Mixing(torch.complex)))

    def test_beside_much_larger_numbers_of_the_same_output(self):
        boxes = net(lambda: Mixing(lambda a, b: torch.cat([300 + 300 * a.sigmoid(), b.sigmoid()], -1)))
        refuse("^fc1: units that are removed are missed", boxes)

    def test_of_right_ones_among_such_numbers_nothing_is_said(self):
        boxes = net(lambda: Answers(lambda y: torch.cat([300 + 300 * y.sigmoid(), y.sigmoid() / 100, 0 * y], -1)))
        assert compressed(boxes).ratio == {"channels": 0.5}


class Dropping(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.3))


class Averaging(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return super().forward(x - self.seen)


class Counting(MLP):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


@pytest.mark.parametrize("make", [Dropping, Averaging, Counting])
def test_networks_that_answer_otherwise_each_time_are_refused_as_such(make):
    refuse("answers the same inputs otherwise when it is run again", net(make))


class TestRemedies:
    @pytest.mark.parametrize(("kind", "option"), [("heads", "--attn-ratio"), ("channels", "--mlp-ratio")])
    def test_of_a_familys_site_are_its_kinds_ratio(self, kind, option):
        network, site = Network(net(lambda: Mixing(torch.add)), []), replace(MLP_SITES[0], kind=kind)
        with pytest.raises(GrailError, match=f"; {option} 0 leaves all {kind} as they are$"):
            verify(network, [site], rows(), by_hand=False)

    def test_of_one_described_by_hand_is_its_description(self):
        refuse("; describe the site anew or leave it out$", net(lambda: Mixing(torch.add)))
