"""transformers' own vision networks from a folder or a module to an output, and back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import grail
from grail.calibration.processor import preprocessing_of
from grail.cli import app
from grail.errors import GrailError
from grail.modules.evaluate import evaluate_folders
from grail.modules.hf import Tokenizer, tokenizer_of
from tests.tiny_hf import (
    CAPTIONS,
    END,
    HEADS,
    HIDDEN,
    IMAGES,
    KINDS,
    LENGTH,
    PROCESSOR,
    SIZE,
    TOWER,
    Kind,
    answers,
    compress,
    each_kind,
    images,
    randomised,
    tokenizer,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A ViT's and a CLIP's folder as transformers writes them, labelled images, captions."""
    folder = tmp_path_factory.mktemp("hf")
    KINDS["vit-classifier"].build().save_pretrained(folder / "vit")
    KINDS["clip"].build().save_pretrained(folder / "clip")
    tokenizer().save_pretrained(folder / "clip")
    for name in ("vit", "clip"):
        (folder / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "vit" / "LICENSE").write_text("terms")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (24, SIZE, SIZE), dtype=np.uint8)
    np.savez(folder / "images.npz", x_train=pixels, x_test=pixels[:12], y_test=np.arange(12) % 4)
    (folder / "captions.txt").write_text("\n".join(CAPTIONS))
    return folder


def run(*arguments, code=0):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def reopened_here(monkeypatch):
    """The check of what was written, without six seconds for a fresh process."""
    from grail.modules import run as of_run

    monkeypatch.setattr(
        of_run, "reopen", lambda folder, expected, examples: of_run.reopen_here(folder, expected, examples, None)
    )


@pytest.fixture(scope="module")
def narrow_clip(home):
    """Written by a real process."""
    asked = ["--model", home / "clip", "--method", "wanda", "--ratio", "0.5", "--calibration", home / "images.npz"]
    asked += ["--calibration-text", home / "captions.txt", "--samples", "16", "-o", home / "narrow-clip", "--json"]
    command = [sys.executable, "-m", "grail", "compress", *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return home / "narrow-clip", json.loads(done.stdout)


@pytest.fixture(scope="module")
def narrow_vit(home):
    asked = ["--model", home / "vit", "--method", "wanda", "--ratio", "0.5", "--calibration", home / "images.npz"]
    run("compress", *asked, "--samples", "16", "-o", home / "narrow-vit", "-q")
    return home / "narrow-vit"


class TestFolder:
    def test_clip_from_the_command_line(self, home, narrow_clip):
        folder, told = narrow_clip
        assert told["parameters"]["after"] < told["parameters"]["before"]
        assert set(told["evaluation"]["accuracy"]) == {"dense", "compressed"}
        assert told["calibration_text"]["captions"] == len(CAPTIONS)
        assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= {f.name for f in folder.iterdir()}
        stored, module = load_file(folder / "model.safetensors"), grail.load(folder)
        assert type(module) is transformers.CLIPModel and not module.training
        assert stored.keys() == KINDS["clip"].build().state_dict().keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())
        assert module.text_model.encoder.layers[0].self_attn.num_heads == HEADS // 2

    def test_similarities_of_the_reopened_are_the_same_to_the_last_bit(self, home, tmp_path):
        module = KINDS["clip"].build()
        words = {"calibration_text": CAPTIONS, "tokenizer": tokenizer()}
        report = grail.compress(
            module, calibration=images(16), samples=16, method="gram", ratio=0.5, output=tmp_path / "out", **words
        )
        assert report.output == str(tmp_path / "out") and type(report.model) is transformers.CLIPModel
        ids, x = Tokenizer(tokenizer(), LENGTH)(CAPTIONS), images(4)
        with torch.no_grad():
            expected, found = (m(ids, x).logits_per_image for m in (report.model, grail.load(tmp_path / "out")))
        assert torch.equal(found, expected)
        assert (tmp_path / "out" / "tokenizer.json").is_file()

    def test_zero_shot_of_the_written_folder(self, home, narrow_clip):
        folder, told = narrow_clip
        asked = {"data": str(home / "images.npz"), "samples": None, "against": str(home / "clip"), "speed": False}
        found = evaluate_folders(str(folder), **asked)["models"]
        assert found[str(folder)]["top1"] == told["evaluation"]["accuracy"]["compressed"]["top1"]
        assert found[str(home / "clip")]["top1"] == told["evaluation"]["accuracy"]["dense"]["top1"]
        assert 0 < found[str(folder)]["macs"] < found[str(home / "clip")]["macs"]

    def test_vit_from_the_command_line_and_its_accuracy(self, home, narrow_vit, reopened_here):
        told = json.loads((narrow_vit / "grail.json").read_text())
        found = json.loads(run("eval", narrow_vit, "--data", home / "images.npz", "--json").stdout)
        top1 = found["models"][str(narrow_vit)]["top1"]
        assert top1 == told["evaluation"]["accuracy"]["compressed"]["top1"]
        assert (narrow_vit / "LICENSE").read_text() == "terms"
        module = KINDS["vit-classifier"].build()
        dense = grail.compress(str(home / "vit"), calibration=images(4), samples=4, ratio=0.0, method="wanda",
                               output=str(home / "same"), eval="none").model  # fmt: skip
        assert all(
            torch.equal(a, b) for a, b in zip(module.state_dict().values(), dense.state_dict().values(), strict=True)
        )

    def test_a_text_tower_alone(self, home, tmp_path, reopened_here):
        KINDS["clip-text"].build().save_pretrained(tmp_path / "text")
        tokenizer().save_pretrained(tmp_path / "text")
        asked = ["--model", tmp_path / "text", "--calibration-text", home / "captions.txt", "-o", tmp_path / "out"]
        assert "captions" in run("compress", *asked, "--method", "wanda", "--ratio", "0.5").stdout
        assert type(grail.load(tmp_path / "out")) is transformers.CLIPTextModel

    def test_equal_runs_write_equal_bytes(self, home, narrow_vit, reopened_here, tmp_path):
        grail.compress(
            str(home / "vit"), calibration=str(home / "images.npz"), samples=16, method="wanda", ratio=0.5,
            output=str(tmp_path / "again"),
        )  # fmt: skip
        for name in ("config.json", "grail.json", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (narrow_vit / name).read_bytes()


@pytest.mark.usefixtures("reopened_here")
class TestModules:
    """What a configuration does not say of a module that is given in Python."""

    def written(self, module, folder, **flags):
        report = compress(module, method="wanda", ratio=0.5, output=str(folder), **flags)
        loaded = grail.load(folder)
        assert type(loaded) is type(module)
        assert all(map(torch.equal, answers(report.model), answers(loaded)))
        return loaded

    @each_kind
    def test_of_every_class_the_reopened_is_the_same_to_the_last_bit(self, kind, tmp_path):
        self.written(KINDS[kind].build(), tmp_path / "out")

    def test_without_a_pooler(self, tmp_path):
        config = transformers.ViTConfig(**IMAGES)
        assert (
            self.written(randomised(transformers.ViTModel(config, add_pooling_layer=False)), tmp_path / "out").pooler
            is None
        )

    def test_plain_attention_stays_plain(self, tmp_path):
        config = transformers.CLIPVisionConfig(**TOWER)
        module = randomised(transformers.CLIPVisionModel._from_config(config, attn_implementation="eager"))
        assert self.written(module, tmp_path / "out").config._attn_implementation == "eager"

    def test_hidden_states_that_are_asked_for_are_given(self, tmp_path):
        module = Kind("ViTModel", IMAGES | {"output_hidden_states": True}, "layers").build()
        assert len(self.written(module, tmp_path / "out")(images(1)).hidden_states) == 3

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_the_dtype_stays(self, dtype, tmp_path):
        module = KINDS["vit-classifier"].build().to(dtype)
        assert {p.dtype for p in self.written(module, tmp_path / "out").parameters()} == {dtype}

    def test_a_narrow_module_again_is_a_class_of_ones_own(self, tmp_path):
        narrow = compress(KINDS["vit"].build(), method="wanda", ratio=0.5).model
        again = compress(narrow, method="wanda", mlp_ratio=0.5, attn_ratio=0, output=str(tmp_path / "out"))
        loaded = grail.load(tmp_path / "out", module=narrow)
        assert loaded.layers[0].mlp.fc1.out_features == HIDDEN // 4
        assert all(map(torch.equal, answers(again.model), answers(loaded)))
        with pytest.raises(GrailError, match="user's own class"):
            grail.load(tmp_path / "out")

    def test_features_are_not_judged_by_labels(self, home):
        assert compress(KINDS["clip-vision"].build(), method="random", ratio=0.5, compensate=False).evaluation is None
        asked = {"method": "wanda", "ratio": 0.5, "samples": 8, "preprocessing": preprocessing_of(home / "vit", 3)}
        data = str(home / "images.npz")
        assert grail.compress(KINDS["vit"].build(), calibration=data, **asked).evaluation is None
        assert grail.compress(KINDS["vit-classifier"].build(), calibration=data, **asked).evaluation is not None


def copied(home, target, name="vit", **config):
    """A folder with another configuration; None takes a field away."""
    shutil.copytree(home / name, target)
    found = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return target


class TestRefused:
    def said(self, folder, tmp_path, *more):
        done = run("compress", "--model", folder, "--calibration", "none", "-o", tmp_path / "out", *more, "-q", code=2)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
        return " ".join(done.stderr.split())

    @pytest.mark.parametrize(
        ("config", "why"),
        [
            ({"model_type": "swin"}, "model type 'swin' is not supported; supported: llama"),
            (
                {"architectures": ["ViTForMaskedImageModeling"]},
                "architecture ViTForMaskedImageModeling is not supported",
            ),
            ({"architectures": ["PreTrainedModel"]}, "architecture PreTrainedModel is not supported"),
            ({"architectures": None}, "architecture None is not supported; supported: ViTModel"),
            ({"architectures": [{"a": 1}]}, "is not supported; supported: ViTModel"),
            ({"architectures": ["CLIPVisionModel"]}, "CLIPVisionModel has the model type clip_vision_model, not vit"),
            ({"hidden_size": "wide"}, "does not hold together"),
            ({"hidden_act": "no-such"}, "its configuration"),
            ({"intermediate_size": 40}, "holds another vit.layers.0.mlp.fc1"),
            ({"num_hidden_layers": 3}, "lacks vit.layers.2."),
            ({"num_hidden_layers": 1}, "holds another vit."),
            ({"patch_size": 0}, "its configuration makes no network"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_configurations(self, home, tmp_path, config, why):
        assert why in self.said(copied(home, tmp_path / "bad", **config), tmp_path)

    @pytest.mark.parametrize("option", ["--weights", "--model-option"])
    def test_options_of_named_networks(self, home, tmp_path, option):
        value = {"--weights": home / "vit" / "model.safetensors", "--model-option": "img_size=8"}[option]
        assert f"{option} is for timm/NAME" in self.said(home / "vit", tmp_path, option, value)

    def test_pickled_weights(self, home, tmp_path):
        bad = copied(home, tmp_path / "bad")
        (bad / "model.safetensors").rename(bad / "pytorch_model.bin")
        assert "only pickled weights (pytorch_model.bin)" in self.said(bad, tmp_path)

    def test_code_is_named_in_vain(self, home, reopened_here, tmp_path):
        named = {
            "auto_map": {"AutoModel": "evil.Model"},
            "attn_implementation": "owner/kernels",
            "transformers_weights": "x",
        }
        evil = copied(home, tmp_path / "evil", "clip", **named, _name_or_path="owner/name")
        (evil / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').write('ran')")
        file = evil / "tokenizer_config.json"
        told = {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
        file.write_text(json.dumps(json.loads(file.read_text()) | told))
        grail.compress(
            str(evil), calibration=images(8), calibration_text=CAPTIONS, samples=8, method="wanda", ratio=0.5,
            output=str(tmp_path / "out"), eval="none",
        )  # fmt: skip
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out" / "evil.py").exists()
        for name in ("config.json", "tokenizer_config.json"):
            text = (tmp_path / "out" / name).read_text()
            assert not any(word in text for word in ("auto_map", "evil.", "owner/", "transformers_weights"))

    @pytest.mark.parametrize(
        ("architecture", "why"),
        [
            ({"name": "AutoModel"}, "AutoModel is not supported"),
            ({"options": {}}, "configuration is missing"),
            ({"options": {"config": [1]}}, "option config"),
            ({"options": {"config": {}, "trust_remote_code": True}}, "trust_remote_code"),
            ({"options": {"config": {}, "attention": "owner/kernels"}}, "option attention"),
            ({"options": {"config": {"hidden_size": -1}}}, "makes no network|hold together"),
        ],
    )
    def test_hostile_outputs(self, narrow_vit, tmp_path, architecture, why):
        bad = tmp_path / "bad"
        shutil.copytree(narrow_vit, bad)
        config = json.loads((bad / "config.json").read_text())
        config["architecture"] |= architecture
        (bad / "config.json").write_text(json.dumps(config))
        with pytest.raises(GrailError, match=why):
            grail.load(bad)

    def test_images_without_a_word_on_their_preparation(self, home, tmp_path):
        bad = copied(home, tmp_path / "bad")
        (bad / "preprocessor_config.json").unlink()
        assert "preprocessor_config.json" in self.said(bad, tmp_path, "--calibration", home / "images.npz")


class TestFiles:
    def test_vocabulary_and_merges_make_the_same_tokenizer(self, home, tmp_path):
        tokenizer().backend_tokenizer.model.save(str(tmp_path))
        assert {file.name for file in tmp_path.iterdir()} == {"vocab.json", "merges.txt"}
        found = [tokenizer_of(folder, LENGTH)([*CAPTIONS, "long " * 9]) for folder in (tmp_path, home / "clip")]
        assert torch.equal(*found) and found[0].shape == (len(CAPTIONS) + 1, LENGTH)
        assert found[0][-1, -1] == END and found[0][:, 0].tolist() == [60] * len(found[0])
        assert tokenizer_of(home / "vit", LENGTH) is None

    @pytest.mark.parametrize(
        ("found", "size", "crop", "how"),
        [
            ({"size": 224}, (224, 224), 1.0, "bilinear"),
            ({"size": {"height": 32, "width": 48}, "resample": 3}, (32, 48), 1.0, "bicubic"),
            (
                {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
                (224, 224),
                0.875,
                "bilinear",
            ),
            ({"size": 256, "crop_size": 224, "do_center_crop": False}, (256, 256), 1.0, "bilinear"),
            ({"size": {"shortest_edge": 224}, "crop_size": 224, "resample": 3}, (224, 224), 1.0, "bicubic"),
        ],
    )
    @pytest.mark.parametrize("nested", [False, True])
    def test_preprocessing(self, tmp_path, found, size, crop, how, nested):
        told = PROCESSOR | {"resample": 2} | found
        name, told = (
            ("processor_config.json", {"image_processor": told}) if nested else ("preprocessor_config.json", told)
        )
        (tmp_path / name).write_text(json.dumps(told))
        made = preprocessing_of(tmp_path, 3)
        assert (made.size, made.crop, made.interpolation) == (size, crop, how)
        assert (made.mean, made.std) == ((0.5,) * 3, (0.25,) * 3)

    @pytest.mark.parametrize(
        ("found", "why"),
        [
            ({"do_rescale": False}, "1/255"), ({"rescale_factor": 1.0}, "1/255"), ({"size": "big"}, "no size"),
            ({"image_mean": None}, "mean or std"), ({"image_std": [0, 1, 1]}, "std"), ({"size": {}}, "no size"),
        ],
    )  # fmt: skip
    def test_preparation_that_is_not_read_is_refused(self, tmp_path, found, why):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | found))
        with pytest.raises(GrailError, match=rf"preprocessor_config\.json.*{why}"):
            preprocessing_of(tmp_path, 3)

    def test_pixels_are_those_of_transformers(self, home):
        from torchvision.transforms.v2.functional import to_pil_image

        told = {"size": {"shortest_edge": 20}, "crop_size": {"height": SIZE, "width": SIZE}, "resample": 3}
        processor = transformers.CLIPImageProcessor(**PROCESSOR | told)
        folder = home / "processor"
        processor.save_pretrained(folder)
        pixels = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        expected = processor(to_pil_image(pixels), return_tensors="pt").pixel_values[0]
        assert (preprocessing_of(folder, 3)(pixels) - expected).abs().max() < 0.05
