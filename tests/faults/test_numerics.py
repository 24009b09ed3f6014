"""Language models whose Gram matrices are hard, end to end with every method: what is written is finite and its error
not worse than without the repair, or a sentence names the place."""

from __future__ import annotations

import itertools
import json
import os
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import grail
from grail.selectors import methods
from tests.faults.numeric_cases import (
    DOWN,
    EDITS,
    GATE,
    UP,
    VALUE,
    constant_channels,
    edited,
    massive,
    no_reopening,
    outcome,
)
from tests.faults.tally import count
from tests.tiny import tiny_calibration, tiny_checkpoint

FAULTS = int(os.environ.get("GRAIL_FAULTS", "1"))
CHOICES = {
    "ratio": (0.3, 0.6, 0.99),
    "ridge": (0.0, 1e-12, 1e-3, 10.0),
    "ridge_form": ("anchored", "anchored", "paper"),
    "bias": (None, True, False),
    "output_dtype": (None, "bfloat16", "float16"),
    "target": ("hidden", "hidden", "stream"),
}
TOWARDS = ({"alpha": "auto"}, {"alpha": 1.0}, {"alpha": "auto", "sweeps": 2})
STORED = (None, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with calibration files, in which runs are not opened again."""
    work = tmp_path_factory.mktemp("numerics")
    tiny_calibration(work / "many.safetensors")
    tiny_calibration(work / "few.safetensors", windows=6, length=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with no_reopening():
        yield work
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def source(place):
    return tiny_checkpoint(place / "source")


def options(chance: random.Random, place) -> dict:
    """Some of all that may be asked for."""
    found = {name: chance.choice(values) for name, values in CHOICES.items()}
    found["calibration"] = str(place / chance.choice(["many.safetensors", "few.safetensors"]))
    if found["target"] == "stream":
        found |= chance.choice(TOWARDS)
    return found | {"allocation": "uniform"}


@pytest.mark.parametrize("edit", EDITS)
def test_every_method_on_hard_weights(place, source, edit):
    for method, turn in itertools.product(methods(), range(FAULTS)):
        chance = random.Random(f"{edit} {method} {turn}")
        asked = options(chance, place)
        model = edited(source, place / "edited", EDITS[edit], chance.choice(STORED))
        outcome(model, place / "out", method=method, **asked)


@pytest.mark.parametrize("method", ["wanda-sp", "flap", "fold", "gram", "slimgpt"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_constant_channels(place, method, bias):
    biased = tiny_checkpoint(place / "biased", mlp_bias=True, attention_bias=True)
    model = edited(biased, place / "edited", constant_channels)
    flags = {"method": method, "bias": bias, "allocation": "uniform", "calibration": str(place / "many.safetensors")}
    for ridge in (0.0, 1e-3):
        assert isinstance(outcome(model, place / "out", ridge=ridge, **flags), dict)


SHAPES = {
    "one head": ({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 48}, {}),
    "one unit left": ({"num_key_value_heads": 6}, {"ratio": 0.99}),
    "one channel": ({"intermediate_size": 1}, {}),
    "nothing removed": ({}, {"ratio": 0.0}),
    "nothing removed, stream": ({}, {"ratio": 0.0, "target": "stream", "alpha": 1.0}),
    "only the first channel goes": ({}, {"attn_ratio": 0.0, "mlp_ratio": 0.025}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_narrow_shapes(place, shape):
    config, asked = SHAPES[shape]
    model = tiny_checkpoint(place / "shape", **config)
    data = str(place / "many.safetensors")
    for method in methods():
        found = outcome(
            model, place / "out", **{"method": method, "calibration": data, "allocation": "uniform"} | asked
        )
        if shape == "one unit left":
            assert [site["after"] for site in found["sites"]] == [8, 1, 8, 1]
        if shape == "nothing removed":
            written = {k: v for file in (place / "out").glob("*.safetensors") for k, v in load_file(file).items()}
            assert all(torch.equal(written[k], v) for k, v in load_file(model / "model.safetensors").items())


TEXTS = {
    "one token twice": torch.full((6, 2), 7),
    "one window of two": torch.tensor([[3, 9]]),
    "padding alone": torch.zeros(6, 16, dtype=torch.int64),
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("target", ["hidden", "stream"])
def test_next_to_no_text(place, source, text, target):
    ids = TEXTS[text] if target == "hidden" else TEXTS[text].expand(6, -1).contiguous()
    flags = {"ridge": 0.0, "target": target} | ({"alpha": 1.0} if target == "stream" else {})
    for method in methods():
        found = outcome(source, place / "out", method=method, calibration=ids, allocation="uniform", **flags)
        assert any(site["raised"] for site in found["sites"])


def test_windows_that_do_not_count(place, source):
    """Weights of 0 for all but one token."""
    ids = load_file(place / "many.safetensors")["input_ids"]
    weights = torch.zeros(ids.shape)
    weights[3, 5] = 1
    found = outcome(source, place / "out", ridge=0.0, calibration={"input_ids": ids, "weights": weights})
    assert any(site["retries"] for site in found["sites"])
    with pytest.raises(grail.GrailError, match="not all 0"):
        grail.compress(source, output=place / "none", calibration={"input_ids": ids, "weights": torch.zeros(ids.shape)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("name", [f"{GATE}.weight", f"{DOWN}.weight", "model.embed_tokens.weight"])
def test_one_number_or_one_sample_is_none(place, source, name, value):
    """A row of the embedding is one token's: 1e30 there overflows in that sample alone."""
    model = edited(source, place / "edited", lambda tensors: tensors[name][7, 3:4].fill_(value))
    try:
        report = grail.compress(
            model, output=place / "out", overwrite=True, calibration=str(place / "many.safetensors")
        )
    except grail.GrailError as error:
        assert name in str(error) or "layers." in str(error)
        count("numerics", "refused")
    else:
        assert value == 1e30
        assert all(
            torch.isfinite(t).all() for f in (place / "out").glob("*.safetensors") for t in load_file(f).values()
        )
        json.dumps(report.to_json(), allow_nan=False)
        count("numerics", "finite")


@pytest.mark.parametrize("factor", [1e6, 1e9])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("method", ["wanda-sp", "fold", "mag-sp"])
def test_a_result_that_overflows_float16_is_refused(place, method, bias, factor):
    """Of weights and of biases: whatever is written is finite."""
    biased = tiny_checkpoint(place / "biased", mlp_bias=True, attention_bias=True)

    def change(tensors) -> None:
        constant_channels(tensors)
        massive(tensors, factor)
        tensors[f"{UP}.bias"][5:9] *= factor
        tensors[f"{VALUE}.bias"][2:5] *= factor

    model = edited(biased, place / "edited", change)
    asked = {"output_dtype": "float16", "method": method, "bias": bias, "allocation": "uniform", "ratio": 0.6}
    try:
        outcome(model, place / "out", calibration=str(place / "many.safetensors"), **asked)
    except AssertionError as error:
        assert "holds NaN or infinite weights (as torch.float16)" in str(error)


@pytest.mark.parametrize("edit", ["plain", "dead", "duplicates", "massive", "unread"])
@pytest.mark.parametrize("form", ["anchored", "paper"])
def test_the_errors_of_a_site_are_those_of_the_written_network(place, source, edit, form):
    """Both figures of the last MLP, from the written checkpoint and the dense one in float64."""
    model = edited(source, place / "edited", EDITS[edit])
    ids = load_file(place / "many.safetensors")["input_ids"]
    flags = {"calibration": ids, "mlp_ratio": 0.4, "attn_ratio": 0.34, "ridge_form": form, "ridge": 1e-3}
    record = outcome(model, place / "out", target="hidden", **flags)
    narrow = grail.load(place / "out").double().model.layers[1].mlp
    dense = grail.load(model).double().model.layers[1].mlp
    seen = []
    loaded = grail.load(place / "out").double()
    loaded.model.layers[1].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        loaded(ids)
        wanted = dense(seen[0])
        hidden = dense.act_fn(dense.gate_proj(seen[0])) * dense.up_proj(seen[0])
        same = (narrow.up_proj.weight[:, None] == dense.up_proj.weight).all(2)
        same &= (narrow.gate_proj.weight[:, None] == dense.gate_proj.weight).all(2)
        kept = same.double().argmax(1)
        pruned = hidden[..., kept] @ dense.down_proj.weight[:, kept].mT
        energy = wanted.square().sum()
        errors = [
            ((wanted - found).square().sum() / energy).item() if energy else 0.0 for found in (pruned, narrow(seen[0]))
        ]
    site = record["sites"][-1]
    assert site["name"] == DOWN
    if edit != "duplicates":  # of which it cannot be told which one stayed
        assert errors[0] == pytest.approx(site["error_before"], rel=1e-3, abs=1e-9)
    assert errors[1] == pytest.approx(site["error_after"], rel=1e-3, abs=1e-9)


def test_every_figure_of_a_run_is_in_its_record(place, source):
    """λ by the ridge and the data, α and retries of each sweep."""
    flags = {"calibration": str(place / "many.safetensors"), "target": "stream", "sweeps": 2}
    record = outcome(source, place / "out", **flags)
    several = [site for site in record["sites"] if site["sweeps"]]
    assert several
    for site in record["sites"]:
        assert site["lambda"] is not None and site["alpha"] is not None
        for first in (site["sweeps"] or [])[:1]:
            assert (first["alpha"], first["lambda"]) == (site["alpha"], site["lambda"])
        assert site["retries"] == sum(sweep["retries"] for sweep in site["sweeps"] or []) or not site["sweeps"]


def test_weights_that_are_shared_stay_finite(place):
    """Tied embeddings, with one massive row."""
    model = tiny_checkpoint(place / "tied", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] *= 1e4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert isinstance(outcome(model, place / "out", calibration=str(place / "many.safetensors")), dict)
