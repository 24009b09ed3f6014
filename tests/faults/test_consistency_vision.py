"""Random small vision networks x methods x options, whole: what is written opens to the same network, is counted right
and is no worse for the repair; how many images go at once changes nothing.

A case is a number: everything about it is drawn from it.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import grail
from grail.errors import GrailError
from tests import tiny_hf
from tests.faults.judge import blames_what_was_asked
from tests.faults.tally import count, times
from tests.test_vision_families import BasicBlock, PreActBlock, SmallResNet, randomised, small_vit

METHODS = ("mag-l1", "mag-l2", "wanda", "gram", "fold", "random", "flap")
ONCE = 48
"""Cases, times GRAIL_FAULTS."""


def network(draw: random.Random) -> nn.Module:
    """A ResNet, a ViT, or a class of transformers (ViT, DeiT, DINOv2, CLIP)."""
    kind, seed = draw.choice(["resnet", "vit", "hf", "hf"]), draw.randrange(1000)
    if kind == "resnet":
        return randomised(SmallResNet(draw.choice([BasicBlock, PreActBlock])), seed)
    if kind == "vit":
        heads = draw.choice([2, 3])
        sizes = {
            "embed_dim": heads * draw.choice([4, 8]),
            "num_heads": heads,
            "depth": draw.choice([1, 2]),
            "mlp_ratio": draw.choice([1.5, 4.0]),
            "qkv_bias": draw.random() < 0.7,
            "init_values": draw.choice([None, 0.1]),
            "class_token": True,
        }
        return randomised(small_vit(**sizes), seed)
    return tiny_hf.KINDS[draw.choice(list(tiny_hf.KINDS))].build(seed)


def options(draw: random.Random) -> dict[str, Any]:
    """Of grail.compress. Those that go together badly are drawn too, and refused."""
    found: dict[str, Any] = {"method": draw.choice(METHODS), "ratio": draw.choice([0.0, 0.25, 0.5, 0.8])}
    maybe = {
        "target": ["own", "stream"],
        "bias": [True, False],
        "ridge": [1e-6, 1.0],
        "compensate": [False],
        "repair": [True],
        "one_shot": [True],
        "attn_ratio": [0.0, 0.5],
        "allocation": ["log", "global"],
    }
    for name, values in maybe.items():
        if draw.random() < 0.25:
            found[name] = draw.choice(values)
    return found


def inputs(module: nn.Module) -> dict[str, Tensor]:
    """Calibration for each of its towers."""
    if hasattr(module, "save_pretrained"):
        given = {network.reads: tiny_hf.inputs_of(network, 14) for network in grail.families.describe(module)}
        return {"calibration": given.get("images"), "calibration_text": given.get("text")}
    return {"calibration": torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def answers(module: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """What it makes of them."""
    if hasattr(module, "save_pretrained"):
        return tiny_hf.answers(module, 14)
    return [module(given["calibration"])]


@pytest.mark.parametrize("case", range(times(ONCE)))
def test_what_is_written_is_what_is_said(tmp_path, monkeypatch, case):
    from grail.modules import run as of_run

    again = of_run.reopen_here
    monkeypatch.setattr(of_run, "reopen", lambda folder, expected, examples: again(folder, expected, examples, None))
    draw = random.Random(case)
    module, asked = network(draw), options(draw)
    before, given = copy.deepcopy(module.state_dict()), inputs(module)
    try:
        report = grail.compress(module, output=tmp_path / "out", samples=14, **given, **asked)
    except GrailError as refusal:
        assert blames_what_was_asked(str(refusal), asked), refusal
        assert not (tmp_path / "out").exists()
        count("consistency", "refused")
        return
    assert all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in before.items())
    ours = hasattr(module, "save_pretrained")
    opened = grail.load(tmp_path / "out", None if ours else module)
    found, wanted = answers(opened, given), answers(report.model, given)
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(found, wanted, strict=True))
    assert report.parameters == tuple(sum(p.numel() for p in m.parameters()) for m in (module, opened))
    told = json.loads((tmp_path / "out" / "grail.json").read_text())
    assert told["parameters"] == dict(zip(("before", "after"), report.parameters, strict=True))
    for site in told["sites"]:
        if site["error_after"] is not None:
            assert site["error_after"] <= site["error_before"] * (1 + 1e-3) + 1e-6, site
    if not asked["ratio"] and not asked.get("attn_ratio") and not asked.get("repair"):
        assert all(torch.equal(a, b) for a, b in zip(found, answers(module, given), strict=True))
    count("consistency", "right")


@pytest.mark.parametrize("target", ["dense", "own", "stream"])
@pytest.mark.parametrize("method", ["wanda", "gram", "fold", "flap"])
def test_how_many_at_once_changes_nothing_but_rounding(method, target):
    module = randomised(small_vit(), 3)
    asked = {"method": method, "target": target, "ratio": 0.5, "samples": 14, "ridge": 0.01}
    first, *others = (
        grail.compress(module, batch=batch, **inputs(module), **asked).model.state_dict() for batch in (1, 5, 64)
    )
    for other in others:
        assert all((t - other[name]).norm() <= 1e-3 * t.norm() + 1e-6 for name, t in first.items())
        count("consistency", "same but for rounding")
