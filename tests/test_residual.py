"""Residual streams of ResNets: one shared reduction over all that write into one and all that read it."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import grail
from grail.families import resnet
from tests.test_vision_families import BasicBlock, SmallResNet, built, compress, images, output, relative, small_vit

KINDS = ["torchvision-basic", "torchvision-bottleneck", "timm-basic", "timm-bottleneck", "cifar"]
PREACT = ["cifar-preact", "timm-preact-basic", "timm-preact-bottleneck"]
each_kind = pytest.mark.parametrize("kind", KINDS)


def streams_of(module: nn.Module) -> list:
    return resnet.describe(module, still=frozenset()).residual


@torch.no_grad()
def duplicated(kind: str) -> nn.Module:
    """The second half of every stream's channels equals the first, in another order: rows of all writers, the four
    vectors of the BatchNorms behind them."""
    module = built(kind)
    for site in streams_of(module):
        half = site.units.count // 2
        order = torch.cat([torch.arange(half), torch.randperm(half)])
        for name in (*(producer.name for producer in site.producers), *site.norms):
            layer = module.get_submodule(name)
            for tensor in ("weight", "bias", "running_mean", "running_var"):
                if getattr(layer, tensor, None) is not None:
                    getattr(layer, tensor).copy_(getattr(layer, tensor)[order])
    return module


class TestDescription:
    @pytest.mark.parametrize(
        "kind, writers, readers",
        [
            # the stem and layer1 share a stream where layer1 has no convolution in its shortcut
            ("torchvision-basic", [2, 2, 2, 2], [3, 2, 2, 1]),
            ("torchvision-bottleneck", [1, 2, 2, 2, 2], [2, 2, 2, 2, 1]),
            ("cifar", [2, 2], [3, 1]),
        ],
    )
    def test_who_writes_and_who_reads(self, kind, writers, readers):
        found = streams_of(built(kind))
        assert [len(site.producers) for site in found] == writers
        assert [len(site.consumers) for site in found] == readers
        assert all(len(site.norms) == len(site.producers) for site in found)

    def test_a_stream_that_nothing_reads_at_the_end_stays(self):
        module = built("timm-basic")
        module.reset_classifier(0)
        assert len(streams_of(module)) == len(streams_of(built("timm-basic"))) - 1
        before = output(module, images(4))
        report = compress(module, images(8), method="wanda", ratio=0.25, residual_ratio=0.5)
        assert output(report.model, images(4)).shape == before.shape


class TestNarrowing:
    @pytest.mark.parametrize(
        ("kind", "method"),
        [(kind, method) for kind in KINDS + PREACT for method in ("wanda", "mag-l2", "gram", "random")]
        + [(kind, "fold") for kind in KINDS],
    )
    def test_every_writer_and_reader_gets_the_width(self, kind, method):
        module, x = built(kind), images(8)
        report = compress(module, x, method=method, ratio=0.25, residual_ratio=0.5)
        for site in streams_of(module):
            kept = site.units.count - site.units.count // 2
            for producer in site.producers:
                assert report.model.get_submodule(producer.name).out_channels == kept
            for norm in (*site.norms, *site.reader_norms):
                assert report.model.get_submodule(norm).num_features == kept
            for consumer in site.consumers:
                assert report.model.get_submodule(consumer).weight.shape[1] == kept
        entries = [entry for entry in report.sites if entry["name"].startswith("residual")]
        assert len(entries) == len(streams_of(module))
        assert all(0 <= entry["error_after"] < entry["error_before"] for entry in entries)
        assert report.ratio["residual"] == pytest.approx(0.5)
        # stem, blocks and classifier by more than a half in each direction
        assert report.parameters[1] < 0.5 * report.parameters[0]

    @pytest.mark.parametrize("kind", KINDS + PREACT)
    def test_repair_gives_back_some_of_what_pruning_takes(self, kind):
        module, x, unseen = built(kind), images(128), images(16, seed=2)
        options = {"method": "wanda", "ratio": 0, "residual_ratio": 0.25}
        plain, repaired = (compress(module, x, compensate=on, **options).model for on in (False, True))
        dense = output(module, unseen)
        assert relative(output(repaired, unseen), dense) < 0.9 * relative(output(plain, unseen), dense)

    @each_kind
    @pytest.mark.parametrize("compensate", [False, True], ids=["folded", "compensated"])
    def test_folding_away_duplicates_loses_nothing(self, kind, compensate):
        module, x, unseen = duplicated(kind), images(8), images(4, seed=2)
        options = {"method": "fold", "ratio": 0, "residual_ratio": 0.5, "compensate": compensate}
        found = compress(module, x, **options).model
        assert relative(output(found, unseen), output(module, unseen)) < 1e-5
        other = compress(built(kind), x, **options | {"compensate": False}).model
        assert relative(output(other, unseen), output(built(kind), unseen)) > 1e-2

    @pytest.mark.parametrize("target", ["dense", "own"])
    @pytest.mark.parametrize("bias", [False, True])
    def test_with_a_bias_and_both_targets(self, target, bias):
        module, x = built("cifar"), images(16)
        report = compress(module, x, method="wanda", ratio=0.25, residual_ratio=0.25, target=target, bias=bias)
        entries = [entry for entry in report.sites if entry["name"].startswith("residual")]
        assert all(entry["error_after"] <= entry["error_before"] for entry in entries)
        assert output(report.model, x).isfinite().all()

    def test_a_global_allocation_is_for_the_blocks_alone(self):
        report = compress(
            built("cifar"), images(8), method="wanda", ratio=0.5, residual_ratio=0.25, allocation="global"
        )
        assert report.ratio["residual"] == pytest.approx(0.25)

    def test_none_by_default(self):
        report = compress(built("cifar"), images(8), method="wanda", ratio=0.25)
        assert report.ratio.keys() == {"channels"}
        assert report.model.linear.in_features == 16

    def test_the_repairs_are_those_of_the_readers_one_by_one(self):
        """The first reader's new weight against the ridge solution written out: its target is what the dense network's
        reads, its input what the narrowed writers emit."""
        module, x = built("cifar"), images(8)
        report = compress(module, x, method="wanda", ratio=0, residual_ratio=0.5)
        reader = streams_of(module)[0].consumer
        seen: dict[str, Tensor] = {}
        for name, network in (("dense", module), ("narrow", report.model)):
            layer = network.get_submodule(reader)
            handle = layer.register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
            output(network, x)
            handle.remove()
        t, z = (seen[name].movedim(1, -1).flatten(0, -2).double() for name in ("dense", "narrow"))
        kept = torch.tensor([int((t - z[:, [k]]).abs().sum(0).argmin()) for k in range(z.shape[1])])
        assert torch.allclose(t[:, kept], z, atol=1e-5)
        a_KK = z.T @ z
        weight = module.get_submodule(reader).weight.detach().double().movedim(1, -1).flatten(0, -2)
        lifted = weight[:, kept]
        lam = 1e-3 * a_KK.diagonal().mean()
        change = (t @ weight.T - z @ lifted.T).T @ z @ torch.linalg.inv(a_KK + lam * torch.eye(len(a_KK)).double())
        found = report.model.get_submodule(reader).weight.double().movedim(1, -1).flatten(0, -2)
        assert relative(found, lifted + change) < 1e-4


class TestFolder:
    def test_halves_open_again_with_the_same_bits(self, tmp_path):
        """Kernels of one tap are contiguous with any strides; other strides take other kernels."""
        module = built("timm-bottleneck").bfloat16()
        x = images(8).bfloat16()
        report = compress(module, x, method="wanda", ratio=0.3, residual_ratio=0.25, output=str(tmp_path / "out"))
        again = grail.load(tmp_path / "out", module=module)
        assert torch.equal(output(again, x), output(report.model, x))

    def test_it_opens_again_with_the_narrow_streams(self, tmp_path):
        module = timm.create_model("resnet10t", num_classes=10).eval()
        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        report = grail.compress(
            "timm/resnet10t",
            weights=str(tmp_path / "weights.safetensors"),
            output=str(tmp_path / "out"),
            model_options={"num_classes": 10},
            calibration=images(8),
            samples=8,
            method="fold",
            ratio=0.25,
            residual_ratio=0.5,
        )
        again = grail.load(tmp_path / "out")
        assert again.fc.in_features == 256
        assert torch.equal(output(again, images(4)), output(report.model, images(4)))


class Doubled(nn.Module):
    """Two linear layers add to one vector, two read it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(6, 16)
        self.c, self.d = nn.Linear(16, 5), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x) + self.b(x.square()))
        return self.c(h) + self.d(h)


class TestByHand:
    def test_a_stream_is_its_writers_and_readers(self):
        torch.manual_seed(0)
        module, x = Doubled(), torch.randn(64, 6)
        stream = grail.residual(["a", "b"], ["c", "d"], width=16, name="h")
        report = grail.compress(module, sites=[stream], calibration=x, method="wanda", residual_ratio=0.5)
        assert (report.model.a.out_features, report.model.d.in_features) == (8, 8)
        plain = grail.compress(
            module, sites=[stream], calibration=x, method="wanda", residual_ratio=0.5, compensate=False
        )
        dense = output(module, x)
        assert relative(output(report.model, x), dense) < relative(output(plain.model, x), dense)

    def test_a_reader_that_is_left_out_is_noticed(self):
        stream = grail.residual(["a", "b"], ["c"], width=16, name="h")
        with pytest.raises(grail.GrailError, match=r"^h: "):
            grail.compress(Doubled(), sites=[stream], calibration=torch.randn(64, 6), residual_ratio=0.5)

    def test_a_reader_of_another_width_is_named(self):
        class Other(Doubled):
            def __init__(self):
                super().__init__()
                self.d = nn.Linear(12, 5)

        stream = grail.residual(["a", "b"], ["c", "d"], width=16, name="h")
        with pytest.raises(grail.GrailError, match="h: d reads 12 channels, the site has 16"):
            grail.compress(Other(), sites=[stream], calibration=torch.randn(64, 6), residual_ratio=0.5)

    def test_without_a_ratio_it_is_said(self):
        stream = grail.residual(["a", "b"], ["c", "d"], width=16, name="h")
        with pytest.raises(grail.GrailError, match="give --residual-ratio"):
            grail.compress(Doubled(), sites=[stream], calibration=torch.randn(64, 6), ratio=0.5)

    @pytest.mark.parametrize(("writers", "readers"), [("a", ["c"]), (["a"], "c"), ([], ["c"]), (["a"], [])])
    def test_lists_are_needed(self, writers, readers):
        with pytest.raises(grail.GrailError, match="h: give lists"):
            grail.residual(writers, readers, width=16, name="h")


class TestRefused:
    @pytest.mark.parametrize("kind", PREACT)
    def test_folding_what_every_reader_normalises(self, kind):
        with pytest.raises(grail.GrailError, match="residual0: its readers normalise it"):
            compress(built(kind), images(4), method="fold", ratio=0.25, residual_ratio=0.5)
        compress(built(kind), images(4), method="fold", ratio=0.25)

    def test_networks_without_one(self):
        with pytest.raises(grail.GrailError, match="--residual-ratio: no residual stream"):
            compress(small_vit(), images(4), method="wanda", ratio=0.25, residual_ratio=0.5)

    @pytest.mark.parametrize(
        "flags", [{"one_shot": True, "method": "wanda"}, {"method": "slimgpt", "set": {"obs": "yes"}}]
    )
    def test_what_looks_at_single_readers(self, flags):
        with pytest.raises(grail.GrailError, match="not offered for residual streams"):
            compress(built("cifar"), images(4), ratio=0.25, residual_ratio=0.5, **flags)

    @pytest.mark.parametrize("ratio", [1, -0.1, True, "half", float("nan")])
    def test_ratios_out_of_range(self, ratio):
        with pytest.raises(grail.GrailError, match="--residual-ratio must be at least 0 and below 1"):
            compress(built("cifar"), images(4), method="wanda", ratio=0.25, residual_ratio=ratio)

    def test_a_block_that_reads_the_stream_twice(self):
        class Twice(BasicBlock):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x) + x.mean()

        with pytest.raises(grail.GrailError, match=r"^residual"):
            compress(SmallResNet(Twice), images(4), method="wanda", ratio=0.25, residual_ratio=0.5)

    def test_a_language_model(self, tmp_path):
        with pytest.raises(grail.GrailError, match="residual"):
            grail.compress(str(tmp_path), output=str(tmp_path / "out"), residual_ratio=0.5)
