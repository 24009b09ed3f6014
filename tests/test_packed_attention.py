"""Blocks around nn.MultiheadAttention outside a CLIP: torchvision's vision transformers, open_clip's image tower."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionViT

import grail
from grail.families.attention import Attention
from tests.test_vision_families import images, output, randomised, relative


def torchvision_vit() -> nn.Module:
    return TorchvisionViT(32, 8, num_layers=2, num_heads=4, hidden_dim=48, mlp_dim=96, num_classes=10)


def open_clip_vit() -> nn.Module:
    return VisionTransformer(32, 8, width=48, layers=2, heads=4, mlp_ratio=2.0, output_dim=10)


KINDS = {"torchvision": torchvision_vit, "open_clip": open_clip_vit}
each_kind = pytest.mark.parametrize("kind", KINDS)


def built(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomised(KINDS[kind]())


def attentions(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (Attention, nn.MultiheadAttention))]


def compress(module: nn.Module, **flags):
    return grail.compress(module, calibration=images(32), samples=32, **flags)


@each_kind
@pytest.mark.parametrize("method", ["wanda", "gram", "mag-l2", "random"])
def test_heads_and_channels_go_and_repair_helps(kind, method):
    module = built(kind)
    plain, repaired = (compress(module, ratio=0.5, method=method, compensate=on) for on in (False, True))
    assert repaired.ratio == {"heads": 0.5, "channels": 0.5}
    assert [attention.num_heads for attention in attentions(repaired.model)] == [2, 2]
    assert repaired.model.state_dict().keys() == module.state_dict().keys()
    dense = output(module, images(32))
    assert relative(output(repaired.model, images(32)), dense) < relative(output(plain.model, images(32)), dense)


@each_kind
@torch.no_grad()
def test_duplicated_channels_fold_without_loss(kind):
    module = built(kind)
    for _, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer.out_features == 96:
            order = torch.cat([torch.arange(48), torch.randperm(48)])
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
    found = compress(module, method="fold", ratio=0.5, attn_ratio=0).model
    assert relative(output(found, images(4, seed=2)), output(module, images(4, seed=2))) < 1e-5


@each_kind
def test_what_is_not_asked_for_keeps_its_class(kind):
    module = built(kind)
    found = compress(module, ratio=0.5, method="wanda", attn_ratio=0).model
    assert all(isinstance(attention, nn.MultiheadAttention) for attention in attentions(found))
    same: list[Tensor] = [attention.in_proj_weight for attention in attentions(found)]
    assert all(torch.equal(a, b.in_proj_weight) for a, b in zip(same, attentions(module), strict=True))


@each_kind
def test_folders_open_again(kind, tmp_path):
    module = built(kind)
    report = compress(module, ratio=0.5, method="wanda", output=str(tmp_path / "out"))
    again = grail.load(tmp_path / "out", module=copy.deepcopy(module))
    assert torch.equal(output(again, images(4)), output(report.model, images(4)))
