"""Networks in memory whose blocks are not what they seem, and what was refused, miscounted or let through of others."""

from __future__ import annotations

import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from grail.evaluation.macs import macs
from grail.modules import evaluate
from grail.modules.architecture import open_network
from grail.numbers import as_whole
from grail.soup import soup
from tests.tiny import tiny_checkpoint


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """What the ResNet family takes for a block. kept: what a list of the network's holds is read, and added to;
    shared: what the network has left there is read."""

    def __init__(self, width: int = 8, hidden: int = 12):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shared: dict[str, Tensor] = {}

    def forward(self, x: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        x = x * self.shared.get("gate", 1.0)
        if kept is not None:
            x = x + 2 * kept[-1]
            kept.append(x)
        return x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.stem = how, nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(8, 5)
        self.shared: dict[str, Tensor] = {}
        if how == "shared":
            for block in self.blocks:
                block.shared = self.shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        self.shared["gate"] = torch.sigmoid(x)
        kept = [(torch.sigmoid(x))]
        for block in self.blocks:
            x = block(x, kept) if self.how == "list" else block(x)
            if self.how == "in place":
                x.mul_(-1.5)
            elif self.how == "fresh":
                x = x * -1.5
        return self.head(x.mean((2, 3)))


def net(how: str) -> nn.Module:
    torch.manual_seed(0)
    made = Net(how).eval()
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return made


BY_HAND = [
    grail.channels(f"blocks.{i}.conv1", f"blocks.{i}.conv2", width=12, norms=[f"blocks.{i}.bn1"]) for i in range(3)
]


class TestBlocksThatAreNoChain:
    @pytest.mark.parametrize("how", ["in place", "list", "shared"])
    def test_are_seen_by_whole_forwards(self, how):
        asked = {"method": "wanda", "ratio": 0.5, "target": "dense", "calibration": rows(20, 3, 16, 16), "batch": 8}
        found, expected = (grail.compress(net(how), **asked, sites=sites) for sites in (None, BY_HAND))
        assert [s["error_after"] for s in found.sites] == pytest.approx([s["error_after"] for s in expected.sites])
        for name, tensor in expected.model.state_dict().items():
            torch.testing.assert_close(found.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)

    def test_in_place_work_between_blocks_gives_what_a_copy_gives(self):
        asked = {"method": "wanda", "ratio": 0.5, "calibration": rows(20, 3, 16, 16)}
        one, other = (grail.compress(net(how), **asked).model(rows(4, 3, 16, 16)) for how in ("in place", "fresh"))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Mlp(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, width), nn.Linear(width, 4)

    def forward(self, x: Tensor):
        return self.fc2(torch.relu(self.fc1(x)))


def mlp_site(width: int = 12) -> dict:
    return {"sites": [grail.channels("fc1", "fc2", width=width)], "calibration": rows(40, 16)}


class TestProofs:
    def test_an_output_that_is_nothing_but_rounding_disproves_nothing(self):
        class Balanced(Mlp):
            def forward(self, x):
                y = super().forward(x)
                return y, (y.mean(-1, keepdim=True) - y).sum(-1), 1 - y.softmax(-1).sum(-1)

        assert grail.compress(Balanced(), **mlp_site(), method="wanda", ratio=0.5).ratio == {"channels": 0.5}

    @pytest.mark.parametrize("wide", [64, 2048])
    def test_wide_layers_of_zeros_do_not_overflow(self, wide):
        class Gaussian(Mlp):
            def __init__(self):
                super().__init__()
                self.up, self.log, self.last = nn.Linear(4, wide), nn.Linear(wide, wide), nn.Linear(wide, 4)
                for layer in (self.log, self.last):
                    nn.init.zeros_(layer.weight)

            def forward(self, x):
                return torch.exp(self.last(torch.relu(self.log(torch.relu(self.up(super().forward(x)))))))

        assert grail.compress(Gaussian(), **mlp_site(), method="mag-l2", ratio=0.5).ratio == {"channels": 0.5}


class Queried(nn.Module):
    """A layer that is given a view of a parameter."""

    def __init__(self):
        super().__init__()
        self.query, self.inner = nn.Parameter(torch.ones(1, 1, 16)), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.query.expand(len(x), -1, -1)) + self.inner(x)


class TestMultiplyAccumulates:
    def test_of_a_layer_that_reads_a_view_of_a_parameter(self):
        module = Queried()
        assert macs(module, rows(2, 1, 16)) == 2 * (16 * 12 + 12 * 4)
        assert all(parameter.requires_grad for parameter in module.parameters())

    def test_that_cannot_be_counted_are_left_out_of_an_evaluation(self, monkeypatch, caplog):
        def fails(*_):
            raise AssertionError("no counter")

        monkeypatch.setattr(evaluate, "macs", fails)
        assert evaluate._sizes(Mlp(), rows(1, 16)) == {"parameters": 17 * 12 + 13 * 4}
        assert "multiply-accumulates are not counted: no counter" in caplog.text

    def test_frozen_parameters_stay_frozen(self):
        module = Queried().requires_grad_(False)
        macs(module, rows(2, 1, 16))
        assert not any(parameter.requires_grad for parameter in module.parameters())


class TestTiedWeights:
    def test_are_one_when_a_result_is_loaded(self, tmp_path):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.inner, self.last = (nn.Linear(16, 16), Mlp(), nn.Linear(16, 16))
                self.last.weight = self.first.weight

            def forward(self, x):
                return self.inner(self.last(self.first(x)))

        sites = [grail.channels("inner.fc1", "inner.fc2", width=12)]
        asked = {"method": "wanda", "ratio": 0.5, "calibration": rows(40, 16), "sites": sites}
        report = grail.compress(Tied(), **asked, output=tmp_path / "out")
        loaded = grail.load(tmp_path / "out", module=Tied())
        assert loaded.last.weight is loaded.first.weight and loaded.last.weight.requires_grad
        assert sum(p.numel() for p in loaded.parameters()) == report.parameters[1]


class TestWeightsFiles:
    def test_counters_of_batches_may_be_cast(self, tmp_path):
        module = timm.create_model("resnet10t", num_classes=2)
        save_file({name: tensor.float() for name, tensor in module.state_dict().items()}, tmp_path / "w.safetensors")
        opened = open_network("timm/resnet10t", str(tmp_path / "w.safetensors"), {})[0]
        assert opened.bn1.num_batches_tracked.dtype == torch.int64

    def test_a_soup_of_folders_that_transformers_could_not_open(self, tmp_path):
        for name in ("a", "b"):
            folder = tiny_checkpoint(tmp_path / name, num_hidden_layers=1)
            (folder / "generation_config.json").write_text('{"max_new_tokens": -5}')
        with pytest.raises(GrailError, match=r"generation_config\.json: transformers cannot use it"):
            soup([tmp_path / "a", tmp_path / "b"], tmp_path / "soup")


@pytest.fixture
def clip() -> nn.Module:
    """With an image tower that no family knows."""
    image = {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "", "image_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    return CustomTextCLIP(8, image | {"timm_proj": "linear"}, text).eval()


class TestTowers:
    def test_images_for_one_that_no_family_knows_are_refused(self, clip):
        given = {"calibration": rows(4, 3, 32, 32), "calibration_text": torch.randint(1, 64, (4, 8))}
        with pytest.raises(GrailError, match="--calibration: CustomTextCLIP has no image tower that a family knows"):
            grail.compress(clip, **given)
        assert grail.compress(clip, calibration_text=given["calibration_text"]).calibration is None

    @pytest.mark.parametrize("calibration", [None, "none", "builtin"])
    def test_nothing_for_the_other_one(self, clip, calibration):
        with pytest.raises(GrailError, match="only a text tower that a family knows: give --calibration-text"):
            grail.compress(clip, calibration=calibration)


def test_a_truth_value_of_torch_is_no_number():
    assert as_whole(torch.tensor(True)) is None and as_whole(torch.tensor(3)) == 3
