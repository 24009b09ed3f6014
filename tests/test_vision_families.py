"""ResNet and ViT families: sites, exact duplicates, families' own corners; small networks with random weights.

Names and order of the sites come from REFERENCE section 5, not from the code: `Kind` says for each network which
convolution's rows make a site's channels and which BatchNorm reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from timm.layers import BatchNormAct2d, LayerScale, SwiGLU, SwiGLUPacked, create_conv2d
from timm.models import resnet as timm_resnet
from timm.models.deit import VisionTransformerDistilled as Distilled
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import LayerScale as ScaleOfViT
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import grail
from grail.errors import GrailError
from grail.families import describe
from grail.modules.stream import chained


class BasicBlock(nn.Module):
    """CIFAR-style, after He et al. (2016)."""

    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(x))
        shortcut = self.shortcut(out)
        return self.conv2(torch.relu(self.bn2(self.conv1(out)))) + shortcut


class SmallResNet(nn.Module):
    """A stem, blocks one after another, pooling, a classifier."""

    def __init__(self, block: Callable[..., nn.Module], *extra: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(block(8, 8))
        self.layer2 = nn.Sequential(block(8, 16, 2), *extra)
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.linear(x.mean((2, 3)))


def cifar_resnet() -> nn.Module:
    return SmallResNet(BasicBlock)


def preact_resnet() -> nn.Module:
    return SmallResNet(PreActBlock)


def small_vit(**options) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    torch.manual_seed(0)  # positions and tokens before the patches are random from the start
    return VisionTransformer(**(sizes | options))


def dinov2(**options) -> nn.Module:
    """LayerScale, register tokens, positions for the patches alone."""
    return small_vit(init_values=1e-5, reg_tokens=4, no_embed_class=True, **options)


def timm_resnet_of(block: type, layers: tuple[int, ...]) -> nn.Module:
    return timm_resnet.ResNet(block, layers, num_classes=10, channels=(8, 8, 16, 16), stem_width=8)


def timm_preact(basic: bool) -> nn.Module:
    return ResNetV2(
        [1, 1],
        channels=(16, 32),
        basic=basic,
        bottle_ratio=1.0 if basic else 0.25,
        stem_chs=8,
        num_classes=10,
        norm_layer=BatchNormAct2d,
        conv_layer=create_conv2d,
    )


def bottlenecks() -> nn.Module:
    return torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=8
    )


@dataclass
class Kind:
    """How to build it; producers (a site each, or several that make one) and the norm that reads each; sections."""

    build: Callable[[], nn.Module]
    producers: list[tuple[str, ...]] = field(default_factory=lambda: [("mlp.fc1",)])
    norms: dict[str, str] = field(default_factory=dict)
    sections: int = 1
    size: int = 32

    @property
    def transformer(self) -> bool:
        return self.producers[0][0].startswith("mlp")


BASIC, BOTTLENECK = [("conv1",)], [("conv1",), ("conv2",)]
KINDS = {
    "torchvision-basic": Kind(
        partial(torchvision.models.resnet.ResNet, torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10),
        BASIC,
        {"conv1": "bn1"},
    ),
    "torchvision-bottleneck": Kind(bottlenecks, BOTTLENECK, {"conv1": "bn1", "conv2": "bn2"}),
    "timm-basic": Kind(partial(timm_resnet_of, timm_resnet.BasicBlock, (1, 1, 1, 1)), BASIC, {"conv1": "bn1"}),
    "timm-bottleneck": Kind(
        partial(timm_resnet_of, timm_resnet.Bottleneck, (1, 1, 1, 2)), BOTTLENECK, {"conv1": "bn1", "conv2": "bn2"}
    ),
    "cifar": Kind(cifar_resnet, BASIC, {"conv1": "bn1"}),
    "cifar-preact": Kind(preact_resnet, BASIC, {"conv1": "bn2"}),
    "timm-preact-basic": Kind(partial(timm_preact, True), BASIC, {"conv1": "norm2"}),
    "timm-preact-bottleneck": Kind(partial(timm_preact, False), BOTTLENECK, {"conv1": "norm2", "conv2": "norm3"}),
    "vit": Kind(small_vit),
    "deit-distilled": Kind(
        partial(Distilled, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=10)
    ),
    "dinov2": Kind(dinov2),
    "swiglu": Kind(partial(dinov2, mlp_layer=SwiGLU), [("mlp.fc1_g", "mlp.fc1_x")]),
    "swiglu-packed": Kind(partial(dinov2, mlp_layer=SwiGLUPacked), sections=2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
OLD_TIMM = Version(timm.__version__) < Version("1.0.23")
fewer_heads = pytest.mark.skipif(OLD_TIMM, reason="the attention of timm's ViT can have fewer heads from 1.0.23 on")


def kinds(*names: str):
    """These as parameters, for a test in which heads may go."""
    return pytest.mark.parametrize(
        "kind", [pytest.param(name, marks=fewer_heads if KINDS[name].transformer else ()) for name in names]
    )


def images(count: int = 12, size: int = 32, seed: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode; weights, biases, LayerScale and BatchNorms' four vectors at random, none of them trivial;
    statistics as after a thousand batches."""
    torch.manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            nn.init.normal_(layer.running_mean, std=0.3)
            layer.num_batches_tracked.fill_(1000)
            if layer.affine:
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.3)
        elif isinstance(layer, (nn.Linear, _ConvNd)):
            nn.init.normal_(layer.weight, std=1.4 * layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.2)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
        elif isinstance(layer, (LayerScale, ScaleOfViT)):  # two classes in timm 1.0.15
            nn.init.uniform_(layer.gamma, 0.5, 1.5)
    return module.eval()


def built(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomised(KINDS[kind].build(), seed)


def blocks_of(module: nn.Module, child: str) -> list[str]:
    """Names of the modules that have such a child, the network itself apart."""
    return [name for name, _ in module.named_modules() if name and has(module.get_submodule(name), child)]


def has(module: nn.Module, child: str) -> bool:
    try:
        module.get_submodule(child)
    except AttributeError:
        return False
    return True


@torch.no_grad()
def duplicated(kind: str, seed: int = 0) -> nn.Module:
    """Each producer's first half of rows over again in another order: rows, biases, BatchNorms' four vectors."""
    module, of = built(kind, seed), KINDS[kind]
    for block in blocks_of(module, "mlp.fc2" if of.transformer else "conv2"):
        for producers in of.producers:
            if has(module, f"{block}.{producers[0]}"):
                layers = [module.get_submodule(f"{block}.{name}") for name in producers]
                half = len(layers[0].weight) // of.sections // 2
                order = torch.cat([torch.arange(half), torch.randperm(half)])
                for name, layer in zip(producers, layers):
                    _reorder(layer, order, of.sections)
                    if name in of.norms:
                        _reorder(module.get_submodule(f"{block}.{of.norms[name]}"), order)
    return module


def _reorder(layer: nn.Module, order: Tensor, sections: int = 1) -> None:
    for tensor in (layer.weight, layer.bias, getattr(layer, "running_mean", None), getattr(layer, "running_var", None)):
        if tensor is not None:
            tensor.copy_(torch.cat([part[order] for part in tensor.chunk(sections)]))


@torch.no_grad()
def output(module: nn.Module, x: Tensor) -> Tensor:
    found = module(x)
    return found if isinstance(found, Tensor) else torch.cat(found)


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    return (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()


def compress(module: nn.Module, x: Tensor, **flags):
    return grail.compress(module, calibration=x, samples=len(x), **flags)


def same_bits(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class TestDuplicates:
    @each_kind
    @pytest.mark.parametrize("compensate", [False, True], ids=["folded", "compensated"])
    def test_folding_away_duplicates_loses_nothing(self, kind, compensate):
        module, x, unseen = duplicated(kind), images(8), images(4, seed=2)
        report = compress(module, x, method="fold", ratio=0.5, attn_ratio=0, compensate=compensate)
        channels = [entry for entry in report.sites if not entry["name"].endswith("attn")]
        assert channels and all(entry["after"] == entry["before"] // 2 for entry in channels)
        assert relative(output(report.model, unseen), output(module, unseen)) < 1e-5

    def test_folding_keeps_the_precision_of_float64(self):
        module, x = duplicated("cifar").double(), images(8).double()
        report = compress(module, x, method="fold", ratio=0.5, compensate=False)
        assert relative(output(report.model, x), output(module, x)) < 1e-12

    @each_kind
    def test_without_duplicates_folding_loses_something(self, kind):
        """Else the test above could not fail."""
        module, x = built(kind), images(8)
        report = compress(module, x, method="fold", ratio=0.5, attn_ratio=0, compensate=False)
        assert relative(output(report.model, x), output(module, x)) > 1e-2


class TestSites:
    @each_kind
    def test_in_execution_order_with_the_widths_of_the_reference(self, kind):
        module, of = built(kind), KINDS[kind]
        expected = []
        for block in blocks_of(module, "mlp.fc2" if of.transformer else "conv2"):
            if of.transformer:
                expected += [
                    (f"{block}.attn", 48),
                    (f"{block}.mlp", module.get_submodule(f"{block}.mlp.fc2").in_features),
                ]
                continue
            for (producer,) in of.producers:
                name = f"{block}.{producer}"
                expected.append((name, module.get_submodule(name).out_channels))
        report = compress(module, images(4), method="random", ratio=0)
        assert [(entry["name"], entry["before"]) for entry in report.sites] == expected

    @pytest.mark.parametrize("depth, sites", [(18, 8), (34, 16), (50, 32), (101, 66), (152, 100)])
    @pytest.mark.parametrize("library", ["timm", "torchvision"])
    def test_depths_from_18_to_152(self, depth, sites, library):
        with torch.device("meta"):
            make = timm.create_model if library == "timm" else torchvision.models.get_model
            module = make(f"resnet{depth}")
        assert len(describe(module)[0].sites) == sites

    @kinds(*KINDS)
    def test_blocks_are_run_one_by_one(self, kind):
        """Else each site would cost forwards of the whole network."""
        (network,) = describe(built(kind))
        assert network.blocks and chained(network, [images(2)])

    def test_sites_stand_in_the_order_of_execution_not_of_registration(self):
        class Backwards(SmallResNet):
            def __init__(self):
                super().__init__(BasicBlock)
                self.layer1 = self._modules.pop("layer1")  # registered again, at the end

        report = compress(randomised(Backwards()), images(4), method="random", ratio=0.5)
        assert [entry["name"] for entry in report.sites] == ["layer1.0.conv1", "layer2.0.conv1"]


class TestResNet:
    @pytest.mark.parametrize("method", ["mag-l1", "mag-l2", "wanda", "gram", "fold", "random"])
    def test_methods_on_every_kind_of_block(self, method):
        for kind in ("cifar", "torchvision-bottleneck", "cifar-preact", "timm-preact-bottleneck"):
            module, x = built(kind), images(16)
            expected, errors = output(module, x), []
            for compensate in (False, True):
                model = compress(module, x, method=method, ratio=0.5, compensate=compensate).model
                errors.append(relative(output(model, x), expected))
            assert errors[1] < errors[0], kind

    def test_shortcuts_and_outputs_of_blocks_keep_their_widths(self):
        report = compress(built("timm-bottleneck"), images(4), method="wanda", ratio=0.5)
        for name in blocks_of(report.model, "conv3"):
            block = report.model.get_submodule(name)
            assert block.conv3.out_channels == block.bn3.num_features == block.conv3.weight.shape[0]
            assert block.conv1.in_channels in (8, 32, 64)
            assert block.conv3.out_channels in (32, 64)

    def test_attributes_follow_the_widths(self):
        model = compress(built("timm-bottleneck"), images(4), method="wanda", ratio=0.5).model
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                assert (layer.out_channels, layer.in_channels) == layer.weight.shape[:2]
            if isinstance(layer, nn.BatchNorm2d):
                assert layer.num_features == len(layer.running_mean) == len(layer.weight)

    def test_grouped_convolutions_are_refused(self):
        module = torchvision.models.resnet.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4
        )
        with pytest.raises(GrailError, match=r"layer1\.0\.conv1.*groups"):
            compress(module, images(2), method="random", ratio=0.5)

    def test_group_norm_in_between_is_refused(self):
        module = torchvision.models.resnet.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=partial(nn.GroupNorm, 4)
        )
        with pytest.raises(GrailError, match=r"layer1\.0.*GroupNorm"):
            compress(module, images(2), method="random", ratio=0.5)

    def test_weight_standardised_convolutions_are_refused(self):
        """Their weight is not what they multiply with: neither rows nor columns can be cut or averaged."""
        module = randomised(ResNetV2([1], channels=(16,), basic=True, bottle_ratio=1.0, norm_layer=BatchNormAct2d))
        with pytest.raises(GrailError, match=r"stages\.0\.blocks\.0\.conv1.*"):
            compress(module, images(4), method="wanda", ratio=0.5)


class TestViT:
    @fewer_heads
    def test_heads_go_whole_with_queries_keys_and_values(self):
        module, x = built("vit"), images(6)
        report = compress(module, x, method="wanda", attn_ratio=0.34, mlp_ratio=0, compensate=False)
        for before, after in zip(module.blocks, report.model.blocks):
            old, new = before.attn, after.attn
            assert (new.num_heads, new.attn_dim, new.head_dim) == (2, 32, 16)
            assert (new.qkv.out_features, new.proj.in_features) == (96, 32)
            rows = old.qkv.weight.view(3, 3, 16, 48)
            kept = [h for h in range(3) if any(torch.equal(rows[0, h], part) for part in new.qkv.weight[:32].split(16))]
            assert len(kept) == 2
            torch.testing.assert_close(new.qkv.weight, rows[:, kept].reshape(96, 48), rtol=0, atol=0)
            torch.testing.assert_close(new.qkv.bias, old.qkv.bias.view(3, 3, 16)[:, kept].flatten(), rtol=0, atol=0)

    @kinds("vit", "deit-distilled", "dinov2", "swiglu", "swiglu-packed")
    @pytest.mark.parametrize("method", ["mag-l2", "wanda", "gram", "fold"])
    def test_compensation_helps_with_heads_too(self, kind, method):
        module, x = built(kind), images(12)
        pruned, repaired = (compress(module, x, method=method, ratio=0.34, compensate=c).model for c in (False, True))
        assert relative(output(repaired, x), output(module, x)) < relative(output(pruned, x), output(module, x))

    @fewer_heads
    def test_tokens_before_the_patches_stay(self):
        module = built("dinov2")
        model = compress(module, images(4), method="wanda", ratio=0.34).model
        assert torch.equal(model.cls_token, module.cls_token) and torch.equal(model.reg_token, module.reg_token)
        assert model.forward_features(images(1)).shape == (1, 1 + 4 + 16, 48)

    @fewer_heads
    def test_small_layer_scale_does_not_hide_a_site(self):
        """Fresh DINOv2 layouts scale by 1e-5: the repair looks at the consumer's input, whatever comes behind."""
        module = dinov2().eval()
        report = compress(module, images(4), method="wanda", ratio=0.34)
        assert all(entry["error_after"] < entry["error_before"] for entry in report.sites)

    @fewer_heads
    def test_a_norm_over_all_heads_is_refused_and_its_advice_works(self):
        module = randomised(small_vit(scale_attn_norm=True))
        with pytest.raises(GrailError, match=r"blocks\.0\.attn.*attn.ratio 0"):
            compress(module, images(4), method="wanda", ratio=0.5)
        report = compress(module, images(4), method="wanda", ratio=0.5, attn_ratio=0)
        assert report.model.blocks[0].mlp.fc1.out_features == 96
        assert report.model.blocks[0].attn.qkv.out_features == 144

    def test_sites_that_stay_as_they_are_need_not_be_understood(self):
        """Swin's heads have a table of positions of their own; without them its MLPs go like any other's."""
        sizes = {"img_size": 32, "patch_size": 4, "window_size": 4, "num_classes": 10}
        module = randomised(
            timm.models.swin_transformer.SwinTransformer(embed_dim=16, depths=(1, 1), num_heads=(2, 4), **sizes)
        )
        for block in blocks_of(module, "attn.qkv"):
            nn.init.normal_(module.get_submodule(block).attn.relative_position_bias_table)
        with pytest.raises(GrailError, match="attn"):
            compress(module, images(4), method="wanda", ratio=0.5)
        report = compress(module, images(4), method="wanda", ratio=0.5, attn_ratio=0)
        assert report.model.layers[0].blocks[0].mlp.fc1.out_features == 32

    @fewer_heads
    def test_a_norm_over_the_hidden_channels_is_refused(self):
        module = randomised(small_vit(scale_mlp_norm=True))
        with pytest.raises(GrailError, match=r"blocks\.0\.mlp.*norm"):
            compress(module, images(4), method="wanda", ratio=0.5)
        report = compress(module, images(4), method="wanda", ratio=0.34, mlp_ratio=0)
        assert report.model.blocks[0].attn.num_heads == 2

    @fewer_heads
    def test_norms_of_queries_and_keys_within_a_head_are_carried(self):
        module, x = randomised(small_vit(qk_norm=True)), images(4)
        report = compress(module, x, method="wanda", ratio=0.34)
        assert report.model.blocks[0].attn.num_heads == 2
        assert torch.equal(report.model.blocks[0].attn.q_norm.weight, module.blocks[0].attn.q_norm.weight)

    @fewer_heads
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_the_modules_dtype_stays(self, dtype):
        """Twelve blocks: what half precision rounds off must not look like a wrong description."""
        module, x = randomised(small_vit(depth=12)).to(dtype), images(4)
        model = compress(module, x, method="wanda", ratio=0.34).model
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(x.to(dtype)).isfinite().all()

    @pytest.mark.skipif(not OLD_TIMM, reason="timm before 1.0.23 alone")
    def test_heads_that_an_old_timm_cannot_remove_are_refused_and_the_advice_works(self):
        with pytest.raises(GrailError, match=r"blocks\.0\.attn.*timm 1\.0\.23.*attn.ratio 0"):
            compress(built("vit"), images(4), method="wanda", ratio=0.5)
        report = compress(built("vit"), images(4), method="wanda", ratio=0.5, attn_ratio=0)
        assert report.model.blocks[0].mlp.fc1.out_features == 96


class TestUnknown:
    def test_a_network_without_known_blocks_is_told_how(self):
        with pytest.raises(GrailError, match="by hand"):
            compress(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), images(2, 2), method="wanda", ratio=0.5)

    def test_what_the_family_may_not_touch_stays(self):
        """Everything but producers, their norms and consumers: the bits of the original."""
        module = built("timm-basic")
        changed = compress(module, images(4), method="fold", ratio=0.5).model.state_dict()
        touched = [f"{b}.{c}." for b in blocks_of(module, "conv2") for c in ("conv1", "bn1", "conv2")]
        for name, tensor in copy.deepcopy(module).state_dict().items():
            if not name.startswith(tuple(touched)):
                assert torch.equal(changed[name], tensor), name
