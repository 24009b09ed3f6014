"""Which target a vision network takes where none was asked for: the stream from 16 inputs on, where it is known."""

from __future__ import annotations

import json

import pytest

import grail
from benchmarks.clip_digits import tiny_clip
from grail.errors import GrailError
from grail.modules.recipe import ModuleRecipe
from grail.page.command import recipe_text
from grail.page.run import Run
from grail.progress import Progress
from grail.recipes import batch
from tests.test_clip import compress as compress_clip
from tests.test_vision_families import built, compress, fewer_heads, images, kinds, randomised, same_bits
from tests.test_vision_stream import Maps, alphas


class Heard(Progress):
    """Keeps what is said and what is warned of."""

    def __init__(self):
        self.said: list[str] = []
        self.warned: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


@fewer_heads
@kinds("vit", "cifar")
def test_is_the_stream(kind):
    module, x = built(kind), images(16)
    default, asked = (compress(module, x, method="wanda", ratio=0.5, **t) for t in ({}, {"target": "stream"}))
    assert same_bits(default.model, asked.model) and default.sites == asked.sites
    assert all(alpha is not None for alpha in alphas(default))


@pytest.mark.parametrize("count", [1, 15])
def test_too_few_images_are_all_used_and_it_is_said(count):
    module, heard = built("cifar"), Heard()
    asked = {"method": "wanda", "ratio": 0.5}
    default = compress(module, images(count), progress=heard, **asked)
    dense = compress(module, images(count), target="dense", **asked)
    assert same_bits(default.model, dense.model)
    told, plain = default.to_json(), dense.to_json()
    assert told["recipe"] == plain["recipe"] and told["sites"] == plain["sites"]
    assert told["calibration"] == plain["calibration"] and told["calibration"]["scarce"] is True
    (warning,) = [text for text in heard.warned if "--target dense" in text]
    assert f"holds {count} inputs" in warning and "\n" not in warning


def test_of_two_towers_neither_aims_at_the_stream_where_one_has_too_few():
    module, heard = tiny_clip(), Heard()
    found = {
        target: compress_clip(module, ratio=0.5, calibration=images(3)[:, :1], progress=heard, **target_of)
        for target, target_of in (("default", {}), ("dense", {"target": "dense"}))
    }
    assert same_bits(found["default"].model, found["dense"].model) and len(heard.warned) == 1
    told = found["default"].to_json()
    assert (told["calibration"]["images"], told["calibration_text"]["captions"]) == (3, 30)


@pytest.mark.parametrize("flags", [{"alpha": 0.5}, {"ridge": "auto"}, {"target": "stream"}], ids=str)
def test_what_only_the_stream_has_asks_for_it(flags):
    with pytest.raises(GrailError, match="--target stream needs at least 4"):
        compress(built("cifar"), images(3), method="wanda", ratio=0.5, **flags)


def test_no_known_stream_gives_the_repair_towards_dense_vectors_with_all_images():
    module, heard = randomised(Maps()), Heard()
    sites = [grail.channels("conv1", "conv2", width=10, norms=["bn1"])]
    asked = {"calibration": images(8, 8), "ratio": 0.5, "method": "wanda", "sites": sites}
    default = grail.compress(module, progress=heard, **asked)
    dense = grail.compress(module, target="dense", **asked)
    assert same_bits(default.model, dense.model) and default.sites == dense.sites
    assert default.calibration == dense.calibration, "none is set aside"
    assert any("--target dense" in text and "conv1" in text for text in heard.said)


@pytest.mark.parametrize("scarce", [True, False])
@pytest.mark.parametrize("asked", [None, "stream", "dense"])
def test_a_result_is_known_again(scarce, asked):
    """By `grail run`: with too few images that towards dense vectors, and no other, is what nobody asked for."""
    recipe = ModuleRecipe(model="timm/resnet18", method="wanda", target=asked)
    found = {"calibration": None, "calibration_text": {"scarce": scarce}}
    wanted = asked or ("dense" if scarce else "stream")
    assert batch._recipe_of_result(recipe, found)["target"] == wanted


@pytest.mark.parametrize("target", ["stream", "dense"])
@pytest.mark.parametrize("scarce", [True, False])
def test_a_recipe_says_the_target_where_the_data_would_get_another(scarce, target):
    """That of a few images that was asked to aim at the stream would be given dense vectors."""
    recipe = ModuleRecipe(model="timm/resnet18", method="wanda", target=target)
    source = {"id": "timm/resnet18", "sha256": "ab"}
    found = {"recipe": recipe.to_json(), "source": source, "format": "module", "calibration": {"scarce": scarce}}
    said = f"target: {target}" in recipe_text(Run("out", json.loads(json.dumps(found))))
    assert said == (scarce or target == "dense")
