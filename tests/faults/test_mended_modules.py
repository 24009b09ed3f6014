"""What was found in networks in memory by looking for trouble, each by itself."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import GrailError


class Net(nn.Module):
    """Two sites: a convolution behind a BatchNorm, and an MLP on a residual stream."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, 2, 1)
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        x = x + self.fc2(torch.relu(self.fc1(x)))
        return self.head(x.mean(1))


def sites(**mlp) -> list:
    return [
        grail.channels("conv1", "conv2", width=8, norms=["norm1"]),
        grail.channels("fc1", "fc2", **{"width": 12, "stream": ("fc1", "input")} | mlp),
    ]


def net(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def images(count: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compressed(module: nn.Module, x: object = None, **flags):
    given = {"method": "wanda", "ratio": 0.5, "sites": sites(), "calibration": images() if x is None else x}
    return grail.compress(module, **given | flags)


def refuse(match: str, module: nn.Module | None = None, x: object = None, **flags) -> None:
    """In one sentence that holds `match`."""
    with pytest.raises(GrailError, match=match) as caught:
        compressed(net() if module is None else module, x, **flags)
    assert "\n" not in str(caught.value)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 10 * super().forward(x)


class Activated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Activating(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class Early(Net):
    """What fc2 reads is activated by itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        return self.head((x + self.fc2(self.fc1(x))).mean(1))


class Repeated(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.norm1(self.conv1(x)))).flatten(2).transpose(1, 2)
        for scale in (0.01, 50):
            x = x + self.fc2(torch.relu(self.fc1(scale * x)))
        return self.head(x.mean(1))


def with_consumer(layer: Callable[[int, int], nn.Module], make: Callable[[], nn.Module] = Net) -> nn.Module:
    module = net(make)
    module.fc2 = layer(12, 8)
    return module


def hooked(change: Callable) -> nn.Module:
    module = net()
    module.fc2.register_forward_hook(lambda _, __, output: change(output))
    return module


MAKES = {
    "a hook": lambda: hooked(lambda y: -y),
    "a scale": lambda: with_consumer(Scaled),
    "an activation": lambda: with_consumer(Activated),
}


class TestConsumers:
    """A repair solves for W of W x + b, x being what the layer reads at its first call."""

    @pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
    def test_an_output_that_is_no_product_takes_no_stream(self, make):
        said = r"fc1: the output of fc2 is not its weight times its input.*sites="
        refuse(said, make())
        refuse(said, make(), target="stream")

    @pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
    @pytest.mark.parametrize("target", ["dense", "own"])
    def test_nor_a_bias(self, make, target):
        refuse("fc1: the output of fc2 is not its weight.*bias", make(), target=target, bias=True)
        report = compressed(make(), target=target)
        assert all(site["error_after"] < site["error_before"] for site in report.sites)

    def test_a_hook_on_what_the_consumer_reads_is_seen(self):
        module = net(Early)
        module.fc2.register_forward_pre_hook(lambda _, given: (given[0].relu(),))
        for target in ("stream", "dense"):
            report = compressed(module, target=target, bias=True)
            assert report.sites[1]["error_after"] < report.sites[1]["error_before"]

    @pytest.mark.parametrize("target", ["dense", "own", "stream", None])
    def test_an_input_that_is_changed_on_the_way(self, target):
        refuse("fc1: fc2 changes what it reads", with_consumer(Activating, Early), target=target)
        compressed(with_consumer(Activating, Early), compensate=False)

    @pytest.mark.parametrize("target", ["dense", "own", "stream", None])
    def test_a_layer_that_is_called_twice(self, target):
        refuse("fc1: fc2 is called 2 times", net(Repeated), target=target)
        compressed(net(Repeated), sites=sites()[:1])
        compressed(net(Repeated), mlp_ratio=0.5, sites=sites(), compensate=False)


class Dense(nn.Module):
    """A block as DenseNet has them: it is given a list, and what it makes is no summand of anything."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(width, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, given: list[Tensor]) -> Tensor:
        return self.conv2(torch.relu(self.norm(self.conv1(torch.cat(given, 1)))))


class Concatenating(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.fc = nn.ModuleList([Dense(3), Dense(7)]), nn.Linear(11, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for block in self.blocks:
            found.append(block(found))
        return self.fc(torch.cat(found, 1).mean((2, 3)))


class Basic(nn.Module):
    """A block as DLA has them: what it adds to is given to it from outside."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + shortcut)


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.blocks, self.fc = nn.Conv2d(3, 3, 1), nn.ModuleList([Basic(), Basic()]), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.project(x))
        return self.fc(x.mean((2, 3)))


class TestGuessedStreams:
    @pytest.mark.parametrize("make", [Concatenating, Tree])
    def test_one_that_is_none_gives_way_to_dense(self, make, tmp_path, caplog):
        module, flags = net(make), {"sites": None, "eval": "none"}
        report = compressed(module, output=str(tmp_path / "out"), **flags)
        assert "taking --target dense" in caplog.text
        told = json.loads((tmp_path / "out" / "grail.json").read_text())
        assert told["recipe"]["target"] == "dense" and told["calibration"]["images"] == 24
        asked = compressed(module, target="dense", **flags).model.state_dict()
        assert all(torch.equal(asked[name], tensor) for name, tensor in report.model.state_dict().items())

    @pytest.mark.parametrize("make", [Concatenating, Tree])
    def test_but_not_where_it_was_asked_for(self, make):
        for flags in ({"target": "stream"}, {"alpha": 0.5}):
            refuse("blocks.0.conv1.*is not added.*--target", net(make), sites=None, **flags)

    def test_one_that_was_described_is_refused(self):
        refuse("fc1: what fc2 makes is not added", sites=sites(stream=("fc2", "input")))
