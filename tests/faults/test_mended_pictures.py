"""Vision: networks of several kinds of blocks, images of any shape in folders of any order, evaluation side by side."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.hiera import Hiera
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block
from torch import nn
from typer.testing import CliRunner

import grail
from grail.calibration.image_files import decode
from grail.calibration.images import open_images
from grail.cli import app
from grail.errors import GrailError
from grail.families import describe
from grail.modules.evaluate import evaluate_folders
from grail.page.card import _inline


class Hybrid(nn.Module):
    """Images [B, 8, H, W] -> [B, outputs]: residual blocks of convolutions, then one of a vision transformer."""

    def __init__(self, outputs: int = 4, block: nn.Module | None = None):
        super().__init__()
        self.stem = BasicBlock(8, 8)
        self.block = Block(8, num_heads=4) if block is None else block
        self.head = nn.Linear(8, outputs)

    def forward(self, x):
        tokens_BLC = self.stem(x).flatten(2).transpose(1, 2)
        return self.head(self.block(tokens_BLC).mean(1))


class Uncounted(nn.Module):
    """An attention of one head that says so nowhere."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, **_):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


def hybrid(**options) -> Hybrid:
    torch.manual_seed(0)
    return Hybrid(**options).eval()


def compressed(module: nn.Module, x: torch.Tensor, **asked) -> grail.ModuleReport:
    return grail.compress(module, calibration=x, **{"method": "wanda", "ratio": 0.5, "target": "dense"} | asked)


class TestNetworksOfSeveralKindsOfBlocks:
    def test_the_sites_of_all_of_them_are_compressed(self):
        report = compressed(hybrid(), torch.randn(16, 8, 4, 4))
        assert [site["name"] for site in report.sites] == ["stem.conv1", "block.attn", "block.mlp"]
        assert all(site["after"] == site["before"] / 2 for site in report.sites)
        assert [result.site.layer for result in report.results] == [0, 1, 1]

    @staticmethod
    def mostly_others(count: int) -> nn.Module:
        class Other(nn.Sequential):
            pass

        return Other(BasicBlock(8, 8), *(nn.Conv2d(8, 8, 1) for _ in range(count)), nn.Flatten(), nn.Linear(128, 3))

    def test_one_of_which_little_is_known_is_refused_by_what_was_found(self):
        with pytest.raises(GrailError, match=r"Other: the blocks that a family knows \(0\) hold 8\.7% of .* by hand"):
            compressed(self.mostly_others(20), torch.randn(4, 8, 4, 4))

    def test_one_of_which_less_than_half_is_known_is_told_of(self, caplog):
        with caplog.at_level(logging.WARNING, logger="grail"):
            describe(self.mostly_others(3))
        assert "Other: the blocks that a family knows (0) hold 33.3% of its weights" in caplog.text

    def test_a_head_for_many_classes_is_one_layer(self, caplog):
        with caplog.at_level(logging.WARNING, logger="grail"):
            describe(hybrid(outputs=100_000))
        assert not caplog.text

    def test_sites_by_hand_need_no_share(self):
        network = self.mostly_others(20)
        site = grail.channels("0.conv1", "0.conv2", width=8, norms=["0.bn1"])
        assert compressed(network, torch.randn(4, 8, 4, 4), sites=[site]).ratio == {"channels": 0.5}


class TestAttentionThatCountsItsHeadsElsewhere:
    def test_hiera_loses_heads_and_channels(self):
        torch.manual_seed(0)
        sizes = {"embed_dim": 16, "num_heads": 2, "stages": (1, 1), "q_pool": 1}
        network = Hiera(img_size=(32, 32), num_classes=3, mask_unit_size=(4, 4), mask_unit_attn=(True, False), **sizes)
        report = compressed(network.eval(), torch.randn(16, 3, 32, 32))
        assert report.ratio == {"channels": 0.5, "heads": 0.5}
        assert [block.attn.heads for block in report.model.blocks] == [1, 2]
        assert report.model(torch.randn(2, 3, 32, 32)).shape == (2, 3)

    def test_one_that_says_it_nowhere_is_refused_and_stays_with_attn_ratio_0(self):
        block = Block(8, num_heads=4)
        block.attn = Uncounted()
        with pytest.raises(GrailError, match=r"block\.attn says its number of heads nowhere .* --attn-ratio 0"):
            compressed(hybrid(block=block), torch.randn(16, 8, 4, 4))
        report = compressed(hybrid(block=block), torch.randn(16, 8, 4, 4), attn_ratio=0.0)
        assert report.ratio == {"channels": 0.5}


VIT = {"depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": 3}


def vision_folder(tmp_path: Path, name: str, **options) -> str:
    """A folder of a ViT that is half as wide, without a process of its own to open it again."""
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", **VIT, **options)
    save_file(module.state_dict(), tmp_path / f"{name}.safetensors")
    asked = {"method": "mag-l1", "compensate": False, "calibration": None, "output": str(tmp_path / name)}
    weights = str(tmp_path / f"{name}.safetensors")
    grail.compress("timm/vit_tiny_patch16_224", weights=weights, model_options=VIT | options, **asked)
    return str(tmp_path / name)


def pictures(folder: Path, *, size: tuple[int, int] = (40, 30), count: int = 3) -> None:
    """Sub-folders of three classes with noise that differs from image to image."""
    random = np.random.default_rng(len(folder.parts) + count)
    for label in "abc":
        (folder / label).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 255, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")


def called(*arguments: str):
    return CliRunner().invoke(app, arguments)


def evaluated(path: str, **asked) -> dict:
    return evaluate_folders(path, **{"data": None, "samples": None, "against": None, "speed": False} | asked)


class TestNetworksSideBySide:
    @pytest.fixture
    def small(self, tmp_path):
        return vision_folder(tmp_path, "small", img_size=32)

    @pytest.mark.parametrize("options", [{"img_size": 64}, {"img_size": 32, "in_chans": 1}], ids=str)
    def test_each_reads_the_images_as_it_was_made_for(self, tmp_path, small, options):
        other = vision_folder(tmp_path, "other", **options)
        for part in ("train", "test"):
            pictures(tmp_path / "images" / part)
        asked = {"data": str(tmp_path / "images"), "probe": True}
        alone = {path: evaluated(path, **asked)["models"][path] for path in (small, other)}
        assert evaluated(small, against=other, **asked)["models"] == alone
        assert evaluated(other, against=small, **asked)["models"] == alone

    def test_without_data_and_by_time(self, tmp_path, small):
        other = vision_folder(tmp_path, "other", img_size=64)
        alone = {path: evaluated(path, data="none")["models"][path] for path in (small, other)}
        found = evaluated(small, data="none", against=other, speed=True)["models"]
        assert all(found[path].pop("milliseconds")["p50"] > 0 for path in found)
        assert found == alone

    def test_floats_that_fit_the_first_alone_are_refused_by_the_name_of_the_second(self, tmp_path, small):
        other = vision_folder(tmp_path, "other", img_size=64)
        np.savez(tmp_path / "x.npz", images=np.zeros((3, 3, 32, 32), np.float32), labels=np.arange(3))
        with pytest.raises(GrailError, match=r"other: .*x\.npz: floats are taken as preprocessed"):
            evaluated(small, against=other, data=str(tmp_path / "x.npz"))

    def test_floats_of_another_size_where_no_preprocessing_is_recorded(self, tmp_path, small):
        file = Path(small) / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocessing": None}))
        np.savez(tmp_path / "x.npz", images=np.zeros((3, 3, 48, 48), np.float32), labels=np.arange(3))
        with pytest.raises(GrailError, match=r"x\.npz: the network does not take images \[3, 48, 48\]"):
            evaluated(small, data=str(tmp_path / "x.npz"))

    def test_what_was_compressed_with_model_options_is_judged_beside_its_original(self, tmp_path, small):
        pairs = (f"{key}={value}" for key, value in (VIT | {"img_size": 32}).items())
        options = [part for pair in pairs for part in ("--model-option", pair)]
        given = ["--weights", str(tmp_path / "small.safetensors"), "--data", "none", "--json", *options]
        done = called("eval", small, "--against", "timm/vit_tiny_patch16_224", *given)
        found = json.loads(done.stdout)["models"]
        assert found[small]["parameters"] < found["timm/vit_tiny_patch16_224"]["parameters"]

    def test_model_options_for_a_folder(self, small):
        done = called("eval", small, "--data", "none", "--model-option", "img_size=32")
        assert done.exit_code == 2 and "--model-option" in done.stderr


class TestPartsOfAFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        for part in ("train", "test"):
            pictures(tmp_path / "images" / part, count=1)
        return tmp_path / "images"

    @pytest.mark.parametrize("split", ["calibration", "test"])
    @pytest.mark.parametrize(("odd", "said"), [("masks/0.png", "the folder masks"), ("x.png", "the image x.png")])
    def test_images_beside_them_are_refused(self, folder, odd, said, split):
        (folder / odd).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(folder / odd)
        with pytest.raises(GrailError, match=f"images holds {said} beside test, the name of a part"):
            open_images(folder, split=split)

    def test_what_is_no_image_or_hidden_does_not_matter(self, folder):
        for name in ("README.md", "labels.csv", ".DS_Store", "__MACOSX/train/._0.png", ".cache/0.png", "notes/a.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        assert open_images(folder).name == str(folder / "train")

    def test_their_names_may_have_capitals(self, folder):
        (folder / "train").rename(folder / "Train")
        (folder / "test").rename(folder / "TEST")
        train, test = open_images(folder), open_images(folder, split="test")
        assert (train.name, test.name) == (str(folder / "Train"), str(folder / "TEST"))
        assert (train.held_out, test.held_out) == (False, True)
        assert train.classes == test.classes == ["a", "b", "c"]

    def test_two_of_one_name(self, folder):
        pictures(folder / "Train", count=1)
        with pytest.raises(GrailError, match="images holds both Train and train; name the sub-folder"):
            open_images(folder)


class TestPixels:
    def test_an_image_that_would_be_resized_beyond_bounds_is_refused_by_name(self, tmp_path):
        Image.new("L", (60000, 1)).save(tmp_path / "strip.png")
        prepared = grail.Preprocessing((224, 224), 3, (0.5,) * 3, (0.5,) * 3, 0.875)
        with pytest.raises(GrailError, match=r"strip\.png: an image of 60000 x 1 pixels, so thin, .* 15360000 x 256"):
            next(open_images(tmp_path).batches(prepared, 1))

    @pytest.mark.parametrize("value", [65536, -1])
    def test_integers_of_32_bits_beyond_white(self, tmp_path, value):
        Image.fromarray(np.array([[0, value]], dtype=np.int32)).save(tmp_path / "x.tif")
        with pytest.raises(GrailError, match=r"x\.tif.* pixels run from .* 65535 being white; save them with 8 or 16"):
            decode(tmp_path / "x.tif")

    def test_integers_of_32_bits_up_to_white(self, tmp_path):
        Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "x.tif")
        assert decode(tmp_path / "x.tif").tolist() == [[[0, 255]]]


class TestWords:
    def test_converting_a_vision_network_says_what_convert_is_for(self, tmp_path):
        done = called(
            "convert",
            vision_folder(tmp_path, "small", img_size=32),
            "--to",
            "padded",
            "--output",
            str(tmp_path / "out"),
        )
        assert done.exit_code == 2
        assert "holds a vision network, and this command is for language" in " ".join(done.stderr.split())

    def test_an_entity_in_the_name_of_a_folder_is_not_one_in_the_model_card(self):
        assert _inline("a &amp; b") == r"a \&amp; b"
