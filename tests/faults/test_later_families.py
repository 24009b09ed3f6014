"""Networks of timm that families know in part: what they are refused with names a way that is there."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import LayerNormAct2d
from timm.models.xcit import Xcit
from torch import nn

import grail
from grail.errors import GrailError
from grail.families import describe

BY_HAND = r"describe the sites to narrow by hand, grail\.compress\(module, sites=\["


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_depthwise_convolutions_within_a_transformer_stay(images):
    torch.manual_seed(0)
    module = Xcit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, cls_attn_layers=1, num_classes=4)
    asked = {"method": "wanda", "ratio": 0.5, "calibration": images}
    report = grail.compress(module.eval(), attn_ratio=0, **asked)
    assert report.ratio == {"heads": 0, "channels": 0.5} and len(report.sites) == 4
    with pytest.raises(GrailError, match="--attn-ratio 0 leaves all heads as they are"):  # each has a temperature
        grail.compress(module, **asked)


def test_a_stem_with_another_norm_names_a_way():
    module = timm.create_model("test_vit", num_classes=0)
    module.stem = nn.Sequential()
    for name, layer in (("conv1", nn.Conv2d(3, 8, 3)), ("norm1", LayerNormAct2d(8)), ("conv2", nn.Conv2d(8, 8, 3))):
        module.stem.add_module(name, layer)
    with pytest.raises(GrailError, match=f"^stem: LayerNormAct2d between conv1 and conv2; .*; {BY_HAND}"):
        describe(module)


def test_convolutions_in_groups_name_a_way(images):
    module = timm.create_model("resnext50_32x4d", layers=(1, 1, 1, 1)).eval()
    with pytest.raises(GrailError, match=f"in 32 groups, which cannot be narrowed; {BY_HAND}"):
        grail.compress(module, method="wanda", ratio=0.5, calibration=images)


def test_attention_without_queries_of_its_own_names_a_way():
    module = timm.create_model("test_vit", num_classes=0)
    module.blocks[0].attn.qkv = nn.Linear(64, 128)
    with pytest.raises(GrailError, match=r"^blocks\.0\.attn\.qkv makes 128 channels, .* use --attn-ratio 0$"):
        describe(module)
    assert describe(module, frozenset({"heads", "residual"}))[0].sites
