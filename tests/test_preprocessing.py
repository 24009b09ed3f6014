"""Preprocessing against timm's own evaluation transform, known answers, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from grail.calibration.image_files import pixels
from grail.calibration.preprocessing import Preprocessing
from grail.errors import GrailError

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def photograph(width: int, height: int) -> Image.Image:
    """A smooth coloured picture with some noise."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 7), np.sin(y / 5), np.cos((x + y) / 11) * 2], -1)
    noise = np.random.default_rng(0).normal(0, 0.1, waves.shape)
    return Image.fromarray(((waves + noise) * 50 + 128).clip(0, 255).astype(np.uint8))


def identity(size: int, channels: int, **options) -> Preprocessing:
    return Preprocessing((size, size), channels, (0.0,) * channels, (1.0,) * channels, **options)


@pytest.mark.parametrize("shape", [(97, 61), (61, 97), (224, 224), (40, 300)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", [0.875, 0.95, 1.0])
def test_equals_timms_evaluation(shape, interpolation, crop):
    image = photograph(*shape)
    theirs = create_transform((3, 56, 56), interpolation=interpolation, crop_pct=crop, **IMAGENET)(image)
    ours = Preprocessing((56, 56), 3, **IMAGENET, crop=crop, interpolation=interpolation)(pixels(image))
    assert ours.shape == (3, 56, 56) and ours.dtype == torch.float32
    assert (ours - theirs).abs().max() <= 1.01 / 255 / min(IMAGENET["std"]), "one grey level at most"
    assert (ours - theirs).abs().mean() <= 0.1 / 255 / min(IMAGENET["std"])


def test_non_square_size_is_covered_without_distortion():
    image = torch.zeros(1, 40, 100, dtype=torch.uint8)
    image[:, :, 50:] = 255
    found = Preprocessing((20, 10), 1, (0.0,), (1.0,), interpolation="bilinear")(image)
    assert found.shape == (1, 20, 10)
    assert found[0, :, :3].max() < 0.01 and found[0, :, 7:].min() > 0.99, "the centre, at half the size"


def test_normalises_and_converts_colours():
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 255
    assert torch.allclose(identity(4, 1)(red), torch.tensor(0.299))
    grey = torch.full((1, 4, 4), 51, dtype=torch.uint8)
    found = Preprocessing((4, 4), 3, (0.1, 0.2, 0.3), (1.0, 0.5, 0.1))(grey)
    assert torch.allclose(found[:, 0, 0], torch.tensor([0.1, 0.0, -1.0]), atol=1e-6)


def test_floats_in_0_to_1_equal_bytes_and_batches_equal_images():
    image = pixels(photograph(30, 20))
    resize = identity(12, 1)
    assert (resize(image.float() / 255) - resize(image)).abs().max() < 1.01 / 255
    batch = torch.stack([image, image.flip(-1)])
    assert torch.equal(resize(batch), torch.stack([resize(one) for one in batch]))
    edges = (image > 128).float()
    assert resize(edges).min() >= 0 and resize(edges).max() <= 1, "bicubic overshoots"


def test_right_size_is_not_touched_and_needs_no_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.transforms.v2.functional", None)
    image = pixels(photograph(16, 16))
    assert torch.equal(identity(16, 3, crop=0.5)(image), image.float() / 255)
    with pytest.raises(GrailError, match=r"pip install 'grail-compress\[vision\]'"):
        identity(8, 3)(image)


def test_importing_takes_no_optional_package():
    code = (
        "import sys, grail.calibration.images; print([m for m in ('torchvision', 'PIL', 'timm') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


class TestFromTimm:
    def test_equals_timms_configuration(self):
        model = timm.create_model("resnet18", pretrained=False)
        found = resolve_model_data_config(model)
        ours = Preprocessing.from_timm(model)
        assert ours == Preprocessing((224, 224), 3, found["mean"], found["std"], found["crop_pct"], "bicubic")

    def test_size_and_channels_are_those_that_were_built(self):
        vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=1)
        assert Preprocessing.from_timm(vit).size == (64, 64)
        grey = Preprocessing.from_timm(timm.create_model("resnet18", pretrained=False, in_chans=1))
        assert grey.channels == 1 and grey.mean == pytest.approx((0.449,)) and grey.std == pytest.approx((0.226,))

    def test_squashing_is_warned_about(self, caplog):
        model = timm.create_model("resnet18", pretrained=False, pretrained_cfg_overlay={"crop_mode": "squash"})
        with caplog.at_level(logging.WARNING, "grail"):
            Preprocessing.from_timm(model)
        assert "crops their centre instead" in caplog.text


def test_json_round_trip():
    made = Preprocessing((56, 48), 3, **IMAGENET, crop=0.9, interpolation="bilinear")
    assert Preprocessing.from_json(json.loads(json.dumps(made.to_json()))) == made


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"size": (0, 8)}, "two positive integers"),
        ({"size": (8,)}, "two positive integers"),
        ({"channels": 4}, "1 or 3 channels, not 4"),
        ({"mean": (0.5,)}, "need 3 values each"),
        ({"std": (1.0, 0.0, 1.0)}, "above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "must be finite"),
        ({"crop": 1.5}, "at most 1, not 1.5"),
        ({"interpolation": "nearest"}, "bicubic or bilinear, not nearest"),
        ({"sizes": 3}, "a field is missing, unknown"),
        ({"size": 8}, "a field is missing, unknown"),
        ({"mean": ("a", "b", "c")}, "a field is missing, unknown"),
    ],
    ids=str,
)
def test_senseless_values_are_refused(change, sentence):
    with pytest.raises(GrailError, match=sentence):
        Preprocessing.from_json(identity(8, 3).to_json() | change)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.zeros(4, 8, 8, dtype=torch.uint8), r"1 or 3 channels, not \[4, 8, 8\]"),
        (torch.zeros(8, 8), "1 or 3 channels"),
        (torch.zeros(1, 0, 8), "1 or 3 channels"),
        (torch.zeros(1, 8, 8, dtype=torch.int32), "must be uint8, or floats in 0..1, not torch.int32"),
        (torch.full((1, 8, 8), 2.0), "must lie in 0..1"),
        (torch.full((1, 8, 8), torch.nan), "must lie in 0..1"),
    ],
    ids=["four channels", "two dimensions", "empty", "int32", "too bright", "NaN"],
)
def test_unfit_images_are_refused(image, sentence):
    with pytest.raises(GrailError, match=sentence):
        identity(8, 1)(image)
