"""What the cases of this folder found in images, vision networks and GGUF files, each by itself."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

import grail
from grail.calibration.image_files import decode
from grail.calibration.images import open_images
from grail.checkpoint.gguf import converted
from grail.checkpoint.reader import SINGLE
from grail.errors import GrailError
from grail.modules.architecture import open_network
from grail.modules.hf import tokenizer_of
from grail.page.source_card import SourceCard, source_card
from grail.serving.gguf import export_gguf
from tests import tiny_hf
from tests.test_gguf_export import VOCABULARY, byte_level, with_tokenizer
from tests.tiny import tiny_checkpoint


class TestImages:
    def test_postscript_is_not_given_to_ghostscript(self, tmp_path, monkeypatch):
        (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n")
        monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a process was started"))
        with pytest.raises(GrailError, match=r"x\.png cannot be read"):
            decode(tmp_path / "x.png")

    @pytest.mark.parametrize("how", ["pipe", "device"])
    def test_pipes_and_devices(self, tmp_path, how):
        if how == "pipe":
            os.mkfifo(tmp_path / "x.png")
        else:
            (tmp_path / "x.png").symlink_to("/dev/zero")
        for read in (lambda: decode(tmp_path / "x.png"), lambda: open_images(tmp_path).sha256()):
            with pytest.raises(GrailError, match=r"x\.png is a device or a pipe"):
                read()

    def test_more_pixels_than_can_be_held(self, tmp_path):
        Image.new("1", (2**14, 2**13)).save(tmp_path / "x.png")
        with pytest.raises(GrailError, match=r"x\.png.*16384 x 8192 pixels"):
            decode(tmp_path / "x.png")

    @pytest.mark.parametrize("sizes", [(2**32 - 1,) * 3, (1, 2**16, 2**32 - 1)], ids=str)
    def test_sizes_of_an_idx_file_beyond_all_memory(self, tmp_path, sizes):
        file = tmp_path / "train-images-idx3-ubyte"
        file.write_bytes(struct.pack(">IIII", 0x0803, *sizes) + bytes(9))
        with pytest.raises(GrailError, match="holds 9 bytes"):
            open_images(file)

    def test_a_packed_idx_file_is_read_no_further_than_its_sizes(self, tmp_path):
        file = tmp_path / "train-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(struct.pack(">IIII", 0x0803, 1, 8, 8)) + gzip.compress(bytes(2**24)) * 64)
        with pytest.raises(GrailError, match="holds more bytes"):
            open_images(file)


class TestVision:
    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls, tmp_path_factory):
        home = tmp_path_factory.mktemp("vision")
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        module = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
        module.save_pretrained(home / "vit")
        images = torch.rand(4, 3, 16, 16)
        grail.compress(module, output=str(home / "small"), calibration=images, method="wanda", eval="none")
        return home

    @pytest.fixture
    def small(self, sound, tmp_path):
        return Path(shutil.copytree(sound, tmp_path / "vision"))

    @pytest.mark.parametrize(
        ("place", "value"),
        [
            (("architecture", "options", "config", "hidden_size"), 10**5),
            (("architecture", "options", "config", "num_hidden_layers"), 10**6),
            (("architecture", "options", "config", "num_attention_heads"), -1),
            (("architecture", "options", "config", "num_labels"), 10**12),
            (("architecture", "options", "config", "output_hidden_states"), "yes"),
            (("architecture", "name"), "AutoModel"),
            (("sites", 0, "counts"), [["vit"]]),
            (("sites", 0, "counts"), [["vit", 7]]),
            (("sites", 0, "counts"), [["no-such", "num_heads"]]),
            (("sites", 0, "counts"), [["vit", "forward"]]),
            (("sites", 0, "producers", 0, "name"), ["x"]),
        ],
        ids=str,
    )
    def test_what_a_result_says_of_itself(self, small, place, value):
        file = small / "small" / "config.json"
        config = json.loads(file.read_text())
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        file.write_text(json.dumps(config))
        with pytest.raises(GrailError) as refusal:
            grail.load(small / "small")
        assert str(small / "small") in str(refusal.value)

    @pytest.mark.parametrize(("field", "value"), [("intermediate_size", 10**9), ("num_labels", 10**12)])
    def test_what_a_folder_of_transformers_says(self, small, field, value):
        file = small / "vit" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
        with pytest.raises(GrailError, match=r"vit/config\.json"):
            open_network(str(small / "vit"), None, {})


class TestOpening:
    def test_a_size_of_images_that_the_network_does_not_take(self, tmp_path):
        config = ViTConfig(**tiny_hf.IMAGES, id2label={0: "a", 1: "b"})
        ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        made = {"size": {"height": 24, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(made))
        asked = {"method": "wanda", "calibration": "builtin", "output": tmp_path / "out"}
        with pytest.raises(GrailError, match=r"not take .* 3, 24, 24\].*preprocessor_config\.json says this size"):
            grail.compress(str(tmp_path / "vit"), **asked)
        assert not (tmp_path / "out").exists()

    def test_one_whose_type_is_changed_is_no_vision_network(self, tmp_path):
        tiny_checkpoint(tmp_path / "clip")
        with pytest.raises(GrailError, match=r"no option calibration_text for a language model, and .*clip is no vis"):
            grail.compress(str(tmp_path / "clip"), calibration_text="x.txt", output=tmp_path / "out")

    def test_whole_numbers_are_no_weights(self, tmp_path):
        tensors = timm.create_model("test_resnet", num_classes=4).state_dict()
        save_file(tensors | {"bn1.weight": tensors["bn1.weight"].long()}, tmp_path / "w.safetensors")
        with pytest.raises(GrailError, match=r"w\.safetensors holds another bn1\.weight"):
            open_network("timm/test_resnet", str(tmp_path / "w.safetensors"), {})

    def test_a_tokenizer_that_cannot_fill_up_a_text(self, tmp_path):
        tiny_hf.tokenizer().save_pretrained(tmp_path)
        file = tmp_path / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": None}))
        with pytest.raises(GrailError, match=r"has no usable tokenizer .*pad"):
            tokenizer_of(tmp_path, 8)

    def test_load_opens_safetensors_only_and_says_what_is_wrong(self, tmp_path):
        model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=1)
        tensors = load_file(model / SINGLE)
        (model / SINGLE).unlink()
        torch.save(tensors, model / "pytorch_model.bin")
        with pytest.raises(GrailError, match="model"):
            grail.load(model)

    def test_a_readme_that_is_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "README.md")
        assert source_card(tmp_path) == SourceCard()


class TestGguf:
    @pytest.fixture
    def file(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))
        sizes = {"num_hidden_layers": 1, "num_key_value_heads": 6, "vocab_size": VOCABULARY}
        export_gguf(with_tokenizer(tiny_checkpoint(tmp_path / "m", **sizes), byte_level()), tmp_path / "m.gguf")
        return tmp_path / "m.gguf"

    def test_a_tensor_that_is_missing_is_no_random_numbers(self, file):
        file.write_bytes(file.read_bytes().replace(b"token_embd.weight", b"token_emXd.weight"))
        with pytest.raises(GrailError, match=r"m\.gguf lacks model\.embed_tokens\.weight"):
            converted(file)

    def test_a_size_beyond_the_file(self, file):
        key = b"llama.rope.dimension_count"
        content = file.read_bytes()
        at = content.index(key) + len(key) + 4
        file.write_bytes(content[:at] + (2**31).to_bytes(4, "little") + content[at + 4 :])
        with pytest.raises(GrailError, match=r"m\.gguf has .* bytes, and says head_dim"):
            converted(file)
