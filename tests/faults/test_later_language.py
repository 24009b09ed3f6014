"""Language models in memory and their options: kept as they were, taken as transformers takes them, or one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import grail
from grail import numbers
from grail.convert import convert
from grail.errors import GrailError
from grail.progress import Progress
from grail.recipe import Recipe
from grail.run import plan
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")
IDS = torch.arange(20)[None]


@pytest.fixture
def flags(tmp_path):
    """Of a small run."""
    calibration = str(tiny_calibration(tmp_path / "ids.safetensors", windows=4, length=16))
    return {"calibration": calibration, "eval": "none", "method": "mag-l2", "store": "disk"}


class Heard(Progress):
    def __init__(self):
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def test_parameters_that_were_frozen_stay_so(flags):
    model = tiny_model(num_hidden_layers=1)  # all frozen
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    found = grail.compress(model, bias=True, **flags).model
    trained = {name for name, parameter in found.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.layers.0.mlp.down_proj.{kind}" for kind in ("weight", "bias")}


def test_a_generation_config_that_transformers_would_not_save(flags):
    model = tiny_model(num_hidden_layers=1)
    model.generation_config.temperature = 0.5
    found = grail.compress(model, **flags).model
    assert found.generation_config.temperature == 0.5 == model.generation_config.temperature


def test_a_model_whose_saving_looks_something_up_in_vain(flags):
    class Odd(type(tiny_model())):
        def save_pretrained(self, folder, **options):
            raise KeyError("no such thing")

    model = tiny_model(num_hidden_layers=1)
    model.__class__ = Odd
    with pytest.raises(GrailError, match=r"^Odd cannot be saved by transformers: 'no such thing'"):
        grail.compress(model, **flags)


def test_a_tied_model_that_was_saved_without_its_head(tmp_path, flags):
    model = tiny_model(num_hidden_layers=1, tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "bare")
    model.save_pretrained(tmp_path / "whole")
    for name in ("bare", "whole"):
        grail.compress(tmp_path / name, output=tmp_path / f"{name}-out", **flags)
    bare, whole = (tmp_path / f"{name}-out" for name in ("bare", "whole"))
    assert json.loads((bare / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    logits = [AutoModelForCausalLM.from_pretrained(folder)(IDS).logits for folder in (bare, whole)]
    assert torch.equal(*logits)


def test_a_model_without_its_head_that_has_one_of_its_own(tmp_path, flags):
    tiny_model(num_hidden_layers=1).model.save_pretrained(tmp_path / "bare")
    with pytest.raises(GrailError, match=r"bare holds no tensor lm_head\.weight"):
        grail.compress(tmp_path / "bare", output=tmp_path / "out", **flags)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "load takes the folder of a model; got NoneType"),
        (5, "load takes the folder of a model; got int"),
        ("", "load takes the folder of a model; got an empty text"),
        ("ids.safetensors", "ids.safetensors is a file; give load the folder that it lies in"),
        ("/nowhere", "/nowhere: no such folder"),
    ],
)
def test_what_is_no_folder_is_not_loaded(tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    tiny_calibration(tmp_path / "ids.safetensors")
    with pytest.raises(GrailError, match=f"^{said}"):
        grail.load(given)


@pytest.mark.parametrize(
    ("option", "text"), [("ratio", "0.3"), ("samples", "8"), ("ridge", "0.1"), ("alpha", "0.5"), ("seed", "1")]
)
def test_a_text_in_place_of_a_number_is_quoted(option, text):
    with pytest.raises(GrailError, match=f"^--{option} must be .*; got the text '{text}'"):
        Recipe(model=None, **{option: text})


@pytest.mark.parametrize(
    ("count", "said"), [(512, "512 B"), (1000, "1.00 kB"), (2_500_000, "2.50 MB"), (6 * 10**9, "6.00 GB")]
)
def test_a_number_of_bytes_is_never_none(count, said):
    assert numbers.bytes_of(count) == said


def test_a_small_budget_is_told_as_it_is(tmp_path, flags):
    source = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=1)
    with pytest.raises(GrailError, match=r"^--memory 1.00 kB cannot be kept: .* needs .* [MG]B"):
        plan(Recipe(model=str(source), output=str(tmp_path / "out"), memory=1000, **flags), Progress())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ridge": 0.5}, ["--ridge"]),
        ({"target": "hidden", "ridge_form": "paper"}, ["--target", "--ridge-form"]),
        ({"ridge": 0.5, "target": "hidden", "allocation": "error"}, ["--target"]),
        ({}, []),
    ],
    ids=str,
)
def test_options_of_a_repair_that_is_left_out(tmp_path, flags, options, said):
    source, heard = tiny_checkpoint(tmp_path / "dense", num_hidden_layers=1), Heard()
    asked = {"model": str(source), "output": str(tmp_path / "out"), **flags, **options}
    plan(Recipe(**asked, compensate=False), heard)
    found = [line for line in heard.said if "changes nothing" in line]
    why = "changes nothing: it is for the repair, which --no-compensate leaves out"
    assert found == [f"{option} {why}" for option in said]
    heard.said.clear()
    plan(Recipe(**asked), heard)
    assert not any("changes nothing" in line for line in heard.said)


def test_a_tokenizer_that_is_none(flags):
    with pytest.raises(GrailError, match=r"^tokenizer must be one of transformers; got int$"):
        grail.compress(tiny_model(num_hidden_layers=1), tokenizer=5, **flags)


def test_a_folder_in_the_format_grail_is_not_told_to_become_that(tmp_path, flags):
    source = tiny_checkpoint(tmp_path / "dense", "qwen3", num_hidden_layers=1)
    grail.compress(source, output=tmp_path / "biased", bias=True, **flags)
    with pytest.raises(GrailError) as refused:
        convert(tmp_path / "biased", tmp_path / "padded", to="padded")
    assert str(refused.value).endswith("leave the folder in the format grail, or compress again with --no-bias")
    assert "--to grail" not in str(refused.value)
