"""What was found in networks in memory by looking for trouble once more: how they are called, read, proven and handed
back."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import grail
import grail.modules.run
from grail.errors import GrailError
from grail.selectors import selector_class


def rows(count: int = 40, width: int = 16) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


MLP_SITES = [grail.channels("fc1", "fc2", width=12)]


def net(make: Callable[[], nn.Module] = MLP) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def compressed(module: nn.Module, x: object = None, **flags):
    given = {"method": "wanda", "ratio": 0.5, "sites": MLP_SITES, "calibration": rows() if x is None else x}
    return grail.compress(module, **given | flags)


def refuse(match: str, module: nn.Module | None = None, x: object = None, **flags) -> None:
    """In one sentence that holds `match`."""
    with pytest.raises(GrailError, match=match) as caught:
        compressed(net() if module is None else module, x, **flags)
    assert "\n" not in str(caught.value)


class TestAllocationByErrors:
    def test_is_refused_before_work(self):
        refuse("--allocation error.*language models.*uniform, log or global", calibration=[], allocation="error")

    def test_is_refused_as_a_methods_own(self, monkeypatch):
        monkeypatch.setattr(selector_class("wanda"), "allocation", "error")
        refuse("--allocation error.*language models")


class ByKeyword(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(input=torch.relu(self.fc1(input=x)))


class ConvByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.norm(input=self.a(x))))


class TestLayersCalledByKeyword:
    @pytest.mark.parametrize("flags", [{}, {"bias": True}, {"target": "own"}, {"one_shot": True}], ids=str)
    def test_a_consumer(self, flags):
        """As where it is called by position, to the last bit."""
        found, wanted = (compressed(net(kind), **flags).model(rows(3)) for kind in (ByKeyword, MLP))
        assert torch.equal(found, wanted)

    def test_a_batchnorm(self):
        given = {"method": "fold", "sites": [grail.channels("a", "b", width=12, norms=["norm"])]}
        assert compressed(net(ConvByKeyword), torch.randn(20, 3, 8, 8), **given).ratio == {"channels": 0.5}


class Residual(nn.Module):
    def __init__(self, scale: nn.Module | None = None):
        super().__init__()
        self.stem, self.up, self.down, self.head = (nn.Linear(*n) for n in ((16, 8), (8, 20), (20, 8), (8, 3)))
        self.scale = scale or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.scale(self.down(torch.relu(self.up(x)))))


def normed() -> nn.Module:
    norm = nn.BatchNorm1d(8).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


class TestStreamsOfSingleRows:
    """[batch, features]: no axis of tokens."""

    SITE: ClassVar[dict] = {"width": 20, "stream": ("up", "input")}

    def test_as_with_an_axis_of_tokens(self):
        flags = {"target": "stream", "sites": [grail.channels("up", "down", **self.SITE)]}
        single, tokens = (compressed(net(Residual), x, **flags) for x in (rows(), rows()[:, None]))
        assert single.sites[0]["alpha"] == tokens.sites[0]["alpha"] is not None
        assert single.sites[0]["error_after"] == pytest.approx(tokens.sites[0]["error_after"], rel=1e-5)

    def test_scaled_by_a_batchnorm(self):
        """Which takes rows, and tokens only where these are its channels."""
        module = net(lambda: Residual(normed()))
        site = grail.channels("up", "down", **self.SITE, scales=["scale"])
        assert compressed(module, target="stream", sites=[site]).sites[0]["alpha"] is not None

    def test_another_sum_is_still_refused(self):
        refuse("is not added", net(Residual), target="stream",
               sites=[grail.channels("up", "down", width=20, stream=("down", "input"))])  # fmt: skip


class Unbatched(nn.Module):
    """Its batch is a sequence, and a convolution reads that as one map [C, L]."""

    def __init__(self, batched: bool = False):
        super().__init__()
        self.a, self.b, self.batched = nn.Conv1d(16, 12, 1), nn.Conv1d(12, 12, 1), batched

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(torch.relu(self.a(x.T[None] if self.batched else x.T)))
        return hidden.squeeze(0).T


class Picture(nn.Module):
    """The same in two dimensions, with a residual stream and a bias to fit: one map [C, H, W]."""

    def __init__(self, batched: bool):
        super().__init__()
        self.a, self.b, self.batched = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1), batched

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 12, 2).transpose(0, 1)
        x = x[None] if self.batched else x
        return (x + self.b(torch.relu(self.a(x)))).reshape(12, -1).T


class TestUnbatchedMaps:
    @pytest.mark.parametrize("count", [12, 40])
    @pytest.mark.parametrize("bias", [False, True])
    def test_of_one_dimension(self, count, bias):
        flags = {"sites": [grail.channels("a", "b", width=12)], "bias": bias}
        found, wanted = (compressed(net(lambda b=b: Unbatched(b)), rows(count), **flags) for b in (False, True))
        assert torch.equal(found.model.b.weight, wanted.model.b.weight)
        assert found.sites == wanted.sites

    @pytest.mark.parametrize("target", ["dense", "stream"])
    def test_of_two(self, target):
        sites = [grail.channels("a", "b", width=12, stream=("a", "input"))]
        flags = {"sites": sites, "target": target, "bias": True}
        found, wanted = (compressed(net(lambda b=b: Picture(b)), rows(40, 24), **flags) for b in (False, True))
        assert torch.allclose(found.model.b.weight, wanted.model.b.weight, rtol=1e-5, atol=1e-7)


class Force(MLP):
    """Its forces are gradients, which torch's counter does not follow."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(super().forward(x).square().sum(), x)[0]


class Contrast(MLP):
    """Normalised over the batch, so that no batch of one can be taken."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Counting(MLP):
    def __init__(self):
        super().__init__()
        self.register_buffer("peak", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        self.peak.copy_(torch.maximum(self.peak, found.max()))
        self.last = found.detach().clone()
        return found


class TestWhatIsHandedBack:
    @pytest.mark.parametrize("kind", [Force, Contrast])
    def test_a_forward_that_cannot_be_counted_costs_no_work(self, kind, tmp_path, capsys):
        report = compressed(net(kind), output=tmp_path / "out")
        assert report.macs is None and report.ratio == {"channels": 0.5}
        assert json.loads((tmp_path / "out" / "grail.json").read_text())["macs"] is None

    def test_an_interruption_of_the_count_is_one(self, monkeypatch):
        def interrupted(*_: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(grail.modules.run, "macs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compressed(net())

    def test_nothing_is_estimated_anew_where_nothing_went(self):
        module, x = net(ConvByKeyword), torch.randn(20, 3, 8, 8)
        module.norm.running_mean.normal_()
        sites = [grail.channels("a", "b", width=12, norms=["norm"])]
        report = compressed(module, x, ratio=0.0, repair=True, sites=sites)
        assert torch.equal(report.model(x), module(x)) and report.repaired_norms == 0

    @pytest.mark.parametrize("ratio", [0.0, 0.5])
    def test_buffers_that_forwards_write_are_as_given(self, ratio, tmp_path):
        module = net(Counting)
        report = compressed(module, ratio=ratio, output=tmp_path / "out")
        for found in (module, report.model, grail.load(tmp_path / "out", module=module)):
            assert found.peak == 0 and found.last is None

    @pytest.mark.parametrize("flags", [{}, {"method": "fold"}, {"bias": True}], ids=str)
    def test_parameters_are_trained_where_those_given_were(self, flags, tmp_path):
        module = net()
        module.fc2 = nn.Linear(12, 4, bias=False)
        module.fc1.weight.requires_grad_(False)
        report = compressed(module, output=tmp_path / "out", **flags)
        for found in (report.model, grail.load(tmp_path / "out", module=module)):
            assert [n for n, p in found.named_parameters() if not p.requires_grad] == ["fc1.weight"]
            found(rows(3)).sum().backward()
            assert found.fc2.weight.grad is not None and found.fc1.weight.grad is None

    def test_calibration_keeps_no_graph(self):
        seen = []

        class Watched(MLP):
            def forward(self, x: Tensor) -> Tensor:
                found = super().forward(x)
                seen.append(found.requires_grad)
                return found

        compressed(net(Watched))
        assert seen and not any(seen)

    def test_an_example_holds_no_more_than_itself(self):
        example = compressed(net(), iter([rows(300)]), samples=300).examples[""]
        assert example.untyped_storage().nbytes() == example.nbytes

    @pytest.mark.parametrize("method", ["wanda", "fold"])
    def test_a_norm_keeps_its_dtype(self, method):
        """Wider than the convolution before it."""
        module = net(ConvByKeyword).bfloat16()
        module.norm.float()
        given = {"method": method, "sites": [grail.channels("a", "b", width=12, norms=["norm"])]}
        report = compressed(module, torch.randn(20, 3, 8, 8).bfloat16(), **given)
        state = {name: tensor.dtype for name, tensor in report.model.state_dict().items()}
        assert state == {name: tensor.dtype for name, tensor in module.state_dict().items()}

    @pytest.mark.parametrize(("given", "said"), [(MLP, "the class MLP"), ("x", "a str"), (5, "a int")])
    def test_a_folder_is_opened_with_a_network_only(self, given, said, tmp_path):
        compressed(net(), output=tmp_path / "out")
        with pytest.raises(GrailError, match=f"original widths; got {said}"):
            grail.load(tmp_path / "out", module=given)
