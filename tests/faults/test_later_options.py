"""Networks in memory: options that change nothing are told of, once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn

import grail
from tests.faults.test_mended_networks import ConvByKeyword, compressed, net
from tests.test_vision_families import built, images

LEFT_OUT = "it is for the repair, which --no-compensate leaves out"


@pytest.fixture
def told(caplog) -> Callable[[], list[str]]:
    """Gives the sentences so far about options that change nothing."""
    caplog.set_level(logging.WARNING, "grail")
    return lambda: [line for line in caplog.messages if "changes nothing" in line]


class TestWithoutRepair:
    @pytest.mark.parametrize(
        ("option", "value"), [("ridge", 1e-2), ("ridge_form", "paper"), ("target", "own"), ("target", "stream")]
    )
    def test_options_of_the_repair(self, told, option, value):
        report = compressed(net(), compensate=False, **{option: value})
        assert told() == [f"--{option.replace('_', '-')} changes nothing: {LEFT_OUT}"]
        for name, tensor in compressed(net(), compensate=False).model.state_dict().items():
            assert torch.equal(report.model.state_dict()[name], tensor)

    def test_a_bias_is_fitted_to_a_target(self, told):
        for target in ("own", "dense"):
            compressed(net(), compensate=False, bias=True, target=target)
        assert not told()
        compressed(net(), compensate=False, bias=True, target="stream")
        assert told() == [f"--target changes nothing: {LEFT_OUT}"]

    def test_an_update_of_the_methods_own_has_a_form(self, told):
        compressed(net(), method="slimgpt", set={"obs": True}, compensate=False, ridge_form="paper")
        assert not told()

    def test_nothing_is_said_of_what_is_not_given(self, told):
        compressed(net(), compensate=False)
        compressed(net(), ridge=1e-2, ridge_form="paper", target="own", compare_pruned=True)
        assert not told()


class TestWithoutLayers:
    def test_statistics_of_no_batchnorm(self, told):
        compressed(net(), repair=True)
        assert told() == ["--repair changes nothing: MLP has no BatchNorm that keeps statistics"]

    def test_statistics_of_one(self, told):
        sites = [grail.channels("a", "b", width=12, norms=["norm"])]
        compressed(net(ConvByKeyword), torch.randn(8, 3, 8, 8), repair=True, sites=sites)
        assert not told()

    @pytest.mark.parametrize(("kind", "ratio"), [("cifar", 0.5), ("cifar", 0), ("vit", 0.5)])
    def test_heads_of_a_network_without_any(self, told, kind, ratio):
        flags = {"method": "mag-l1", "compensate": False, "calibration": images(2)}
        module = built(kind)
        grail.compress(module, attn_ratio=ratio, **flags)
        said = f"--attn-ratio changes nothing: no site of {type(module).__name__} is one of heads"
        assert told() == ([said] if kind == "cifar" and ratio else [])

    def test_channels_of_attention_alone(self, told):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

            def forward(self, x):
                q, k, v = self.qkv(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
                return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

        sites = [grail.heads("qkv", "proj", count=4, size=4, sections=3)]
        compressed(net(Attention), torch.randn(8, 5, 16), sites=sites, mlp_ratio=0.25)
        assert told() == ["--mlp-ratio changes nothing: no site of Attention is one of channels"]
