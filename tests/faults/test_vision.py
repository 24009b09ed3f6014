"""Vision networks: config.json of a result, from which `grail.load` builds a module, and folders of transformers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, ViTConfig, ViTForImageClassification

import grail
from grail.errors import GrailError
from grail.modules.architecture import open_network
from grail.modules.evaluate import evaluate_folders
from grail.modules.names import is_network
from tests.faults.mutators import HOSTILE, damaged, mangled, rendered
from tests.faults.series import Series

TINY = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8, "num_labels": 3,
}  # fmt: skip
VALUES = (
    *HOSTILE, 2, 4, 8, 16, 24, "ViTModel", "CLIPModel", "AutoModel", "PreTrainedModel", "timm", "torchvision",
    "open_clip", "transformers", "os.system", "vit", "resnet18", "hf-hub:owner/name", "local-dir:/etc", "vgg11",
    "eager", "vit.encoder.layer.0", "__class__", "forward", "weight", "classifier", "gelu", "silu", ["classifier"],
    [["vit", "training"]], [["vit", "__class__"]], [["vit", "forward"]], {"pretrained": True},
    {"checkpoint_path": "/x"}, {"pretrained_cfg": {"file": "/x"}}, {"num_classes": 10**12}, {"img_size": 10**6},
    {"config": {}},
)  # fmt: skip
X = torch.linspace(0, 1, 3 * 16 * 16).view(1, 3, 16, 16)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Folders as transformers and as GRAIL write them."""
    home = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    module = ViTForImageClassification(ViTConfig(**TINY)).eval()
    module.save_pretrained(home / "vit")
    images = torch.rand(8, 3, 16, 16)
    options = {"calibration": images, "method": "wanda", "ratio": 0.4, "eval": "none"}
    grail.compress(module, output=str(home / "small"), **options)
    return home


def named(case: Path) -> list[str]:
    return ["config.json", "model.safetensors", "preprocessor_config.json", str(case / "vit"), str(case / "small")]


def loaded(folder: Path) -> tuple[torch.nn.Module, torch.Tensor | None]:
    """The network, and its answer where it reads such images."""
    module = grail.load(folder)
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(module.state_dict()[name], tensor), f"{name} is not what is stored"
    with torch.no_grad():
        return module, None if isinstance(module, CLIPModel) else module(X).logits


@pytest.fixture(scope="module")
def answer(home):
    return loaded(home / "small")[1]


FREE = (
    "classes",
    "preprocessing",
    "id2label",
    "label2id",
    "dropout",
    "initializer_range",
    "layer_norm_eps",
    "hidden_act",
)
"""What may be another thing without the answers or with other ones being wrong."""


def test_load(home, answer, tmp_path):
    with Series("vision result", tmp_path, home) as series:
        for chance in series.seeds(200):
            case = series.folder()
            file = case / "small" / "config.json"
            how, text = mangled(json.loads(file.read_text()), chance, VALUES)
            file.write_bytes(text)
            ending = series.case(how, partial(loaded, case / "small"), case, names=named(case))
            judged = ending and ending.refused is None and not any(word in how for word in FREE)
            if judged and not torch.allclose(ending.value[1], answer, atol=1e-5):
                series.wrong.append(f"{how}: it loads and gives another answer")


ABSURD = (0, -1, 7, 10**5, 10**9, 10**12, 2**63, 1e308, "8", None, True)


@pytest.mark.parametrize("field", [*TINY, "num_channels", "encoder_stride"])
@pytest.mark.parametrize("which", ["small", "vit"])
def test_sizes(home, answer, tmp_path, field, which):
    with Series("vision sizes", tmp_path, home) as series:
        for value in ABSURD:
            case = series.folder()
            file = case / which / "config.json"
            config = json.loads(file.read_text())
            (config["architecture"]["options"]["config"] if which == "small" else config)[field] = value
            file.write_bytes(rendered(config))
            run = partial(loaded, case / which) if which == "small" else partial(opened, case / which)
            series.case(f"{which} {field}={value}", run, case, names=named(case), seconds=10)


def opened(folder: Path) -> Any:
    if not is_network(str(folder)):  # as every command asks first
        raise GrailError(f"{folder} is no vision network")
    module, architecture, _ = open_network(str(folder), None, {})
    with torch.no_grad():
        found = module(X).logits
    return architecture.preprocessing(module), found


def test_folders_of_transformers(home, tmp_path):
    with torch.no_grad():
        expected = ViTForImageClassification.from_pretrained(home / "vit").eval()(X).logits
    with Series("vision folder", tmp_path, home) as series:
        for chance in series.seeds(100):
            case = series.folder()
            file = case / "vit" / chance.choice(("config.json", "config.json", "model.safetensors"))
            if file.suffix == ".json":
                how, content = mangled(json.loads(file.read_text()), chance, VALUES)
            else:
                how, content = damaged(file.read_bytes(), chance, 4000)
            file.write_bytes(content)
            ending = series.case(f"{file.name} {how}", partial(opened, case / "vit"), case, names=named(case))
            judged = ending and ending.refused is None and not any(word in how for word in FREE)
            if judged and file.suffix == ".json" and not torch.allclose(ending.value[1], expected, atol=1e-5):
                series.wrong.append(f"{file.name} {how}: another answer")


PROCESSOR = {
    "do_resize": True, "size": {"height": 16, "width": 16}, "resample": 2, "do_rescale": True, "do_normalize": True,
    "rescale_factor": 1 / 255, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "do_center_crop": False,
    "crop_size": {"height": 16, "width": 16}, "image_processor_type": "ViTImageProcessor",
}  # fmt: skip


def test_how_images_become_inputs(home, tmp_path):
    with Series("vision preprocessing", tmp_path, home) as series:
        for chance in series.seeds(60):
            case = series.folder()
            how, text = mangled(PROCESSOR, chance, (*VALUES, {"shortest_edge": 16}, [0.5, -1, 0.5], [0.5, 0, 0.5]))
            (case / "vit" / "preprocessor_config.json").write_bytes(text)
            series.case(how, partial(opened, case / "vit"), case, names=named(case))


def test_eval_of_what_a_result_records(home, tmp_path):
    with Series("vision eval", tmp_path, home) as series:
        for chance in series.seeds(8):
            case = series.folder()
            file = case / "small" / chance.choice(("grail.json", "config.json"))
            how, text = mangled(json.loads(file.read_text()), chance, VALUES)
            file.write_bytes(text)
            options = {"data": None, "samples": 4, "against": None, "speed": False}
            run = partial(evaluate_folders, str(case / "small"), **options)
            told = [*named(case), "grail.json", "--data", "preprocessing", "images", "builtin", "class"]
            series.case(f"{file.name} {how}", run, case, names=told)
