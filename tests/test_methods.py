"""Every method, end to end, on tiny networks of every shape and in every format: what comes out loads and is right."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import grail
from grail.progress import Progress
from grail.selectors import methods
from tests.tiny import tiny_calibration, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("reopen_here")
METHODS = sorted(methods().keys() - {"wanda", "mag-l2"})
"""All but those that share their code with another."""
BIASED = {"attention_bias": True, "mlp_bias": True}
NETWORKS = {
    "gqa": ("llama", {}),
    "mha-biases": ("llama", {"num_key_value_heads": 6, **BIASED}),
    "wide-heads-tied": ("llama", {"head_dim": 12, "tie_word_embeddings": True}),
    "bf16-shards": ("llama", {"dtype": torch.bfloat16, "shard": "20KB"}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}
FORMATS = ["auto", "grail", "padded"]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return tiny_calibration(tmp_path_factory.mktemp("calibration") / "ids.safetensors", windows=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each network once."""
    made = {}

    def folder(name: str):
        if name not in made:
            model_type, options = NETWORKS[name]
            made[name] = tiny_checkpoint(tmp_path_factory.mktemp(name), model_type, **options)
        return made[name]

    return folder


def compressed(source, output, calibration, **options):
    options = {"ratio": 0.4, "calibration": str(calibration), "overwrite": True} | options
    return grail.compress(source, output=str(output), **options)


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_repairs_every_network_in_some_format(tmp_path, folders, calibration, method, network):
    """The reopening check compares logits; here: generation with a cache, and the theorem of the anchored form."""
    form = FORMATS[(METHODS.index(method) + list(NETWORKS).index(network)) % len(FORMATS)]
    if form == "padded" and methods()[method].bias and network in ("qwen2", "qwen3"):
        with pytest.raises(grail.GrailError, match="--no-bias"):
            compressed(folders(network), tmp_path / "out", calibration, method=method, format=form)
        form = "grail"
    report = compressed(folders(network), tmp_path / "out", calibration, method=method, format=form)
    tolerance = 2e-3 if network == "bf16-shards" else 1e-6
    for site in report.sites:
        if site["error_after"] is not None:
            assert site["error_after"] <= site["error_before"] * (1 + tolerance), site["name"]
    assert report.ratio["overall"]["reached"] == pytest.approx(0.4, abs=0.1)
    model = grail.load(report.output)
    prompt = torch.tensor([[5, 9, 11]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached, plain = (model.generate(prompt, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("method", METHODS)
def test_formats_hold_the_same_network(tmp_path, folders, calibration, method):
    ids = torch.arange(3, 27)[None]
    found = {}
    for form in ("padded", "grail"):
        compressed(folders("gqa"), tmp_path / form, calibration, method=method, format=form, eval="none")
        with torch.no_grad():
            found[form] = grail.load(tmp_path / form)(ids).logits
    torch.testing.assert_close(found["padded"], found["grail"], rtol=1e-4, atol=1e-4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert plain.config.intermediate_size == 40


@pytest.mark.parametrize("method", METHODS)
def test_a_bias_never_hurts_on_the_calibration_data(tmp_path, folders, calibration, method):
    """Weights and bias together leave no more error than either alone, at the first site, whose input is the same.

    With --bias the figures are about the mean, so they are put back on one scale by the outputs' own energies."""
    runs = {}
    for name, options in {
        "weights": {"bias": False},
        "both": {"bias": True},
        "bias": {"bias": True, "compensate": False},
    }.items():
        settings = {"method": method, "allocation": "uniform", "format": "grail", "ridge": 1e-6}
        if method == "wanda-pp-sp":
            settings["set"] = {"regional": "none"}
        compressed(folders("mha-biases"), tmp_path / name, calibration, **settings, **options)
        runs[name] = first_layer_output_error(folders("mha-biases"), tmp_path / name, calibration)
    assert runs["both"] <= min(runs["weights"], runs["bias"]) * (1 + 1e-3)


def first_layer_output_error(source, folder, calibration) -> float:
    """Squared error of the first attention's output on the calibration windows."""
    ids = load_file(calibration)["input_ids"]
    outputs = []
    for path in (source, folder):
        model = grail.load(path)
        seen = []
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(ids)
        outputs.append(seen[0])
    return (outputs[0] - outputs[1]).square().sum().item()


@pytest.mark.parametrize("method", METHODS)
def test_nothing_removed_is_copied_byte_for_byte(tmp_path, folders, calibration, method):
    source = folders("gqa")
    for options in ({}, {"bias": True, "allocation": "log" if method == "fold" else "global"}):
        report = compressed(source, tmp_path / "out", calibration, method=method, ratio=0, **options)
        before, after = tensors_of(source), tensors_of(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert report.format.name == "uniform"
        assert report.parameters[0] == report.parameters[1]


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fold"])
@pytest.mark.parametrize("allocation", ["uniform", "log", "global"])
def test_any_score_with_any_allocation(tmp_path, folders, calibration, method, allocation):
    report = compressed(folders("gqa"), tmp_path / "out", calibration, method=method, allocation=allocation)
    written = json.loads((tmp_path / "out" / "grail.json").read_text())
    assert (written["allocation"], written["recipe"]["allocation"]) == (allocation, allocation)
    assert report.ratio["overall"]["reached"] == pytest.approx(0.4, abs=0.1)
    if allocation == "uniform":
        assert report.format.name == "uniform"


def test_folding_has_no_scores_to_compare(tmp_path, folders, calibration):
    with pytest.raises(grail.GrailError, match="--allocation"):
        compressed(folders("gqa"), tmp_path / "out", calibration, method="fold", allocation="global")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_obs_weights_are_the_anchored_solution_at_its_own_ridge(tmp_path, folders, calibration):
    """`--set obs=true --no-compensate` writes what `--ridge` at the same absolute λ writes, at the first site."""
    common = {"method": "slimgpt", "allocation": "uniform", "eval": "none"}
    obs = compressed(folders("gqa"), tmp_path / "a", calibration, **common, compensate=False, set={"obs": "true"})
    plain = compressed(folders("gqa"), tmp_path / "b", calibration, **common, compensate=False)
    assert all(site["error_after"] is None for site in plain.sites)
    lam, before = obs.sites[0]["lambda"], obs.sites[0]["error_before"]
    assert lam > 0 and obs.sites[0]["error_after"] < before
    # mean(diag A) of the kept channels, from λ of a run at ridge 1
    common["target"] = "hidden"
    one = compressed(folders("gqa"), tmp_path / "c", calibration, **common, ridge=1.0)
    same = compressed(folders("gqa"), tmp_path / "d", calibration, **common, ridge=lam / one.sites[0]["lambda"])
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(tensors_of(tmp_path / "a")[name], tensors_of(tmp_path / "d")[name])
    assert same.sites[0]["lambda"] == pytest.approx(lam, rel=1e-6)


def test_what_cannot_be_written_is_refused_before_the_network_is_scored(tmp_path, folders, calibration, monkeypatch):
    from grail import session

    monkeypatch.setattr(session, "score_survey", lambda *_: pytest.fail("the survey ran"))
    for network, options in (("qwen3", {"format": "padded"}), ("gqa", {"format": "uniform"})):
        with pytest.raises(grail.GrailError, match="--format"):
            compressed(folders(network), tmp_path / "out", calibration, method="flap", **options)


def test_obs_weights_and_compensation_exclude_each_other(tmp_path, folders, calibration):
    with pytest.raises(grail.GrailError, match="--no-compensate"):
        compressed(folders("gqa"), tmp_path / "out", calibration, method="slimgpt", set={"obs": "true"})


def test_a_ratio_that_whole_units_cannot_reach_is_said(tmp_path, calibration):
    said = []

    class Heard(Progress):
        def warn(self, line):
            said.append(line)

    source = tiny_checkpoint(tmp_path / "one-head", num_attention_heads=1, num_key_value_heads=1, head_dim=48)
    options = {"ratio": 0.6, "calibration": str(calibration), "progress": Heard()}
    grail.compress(source, output=str(tmp_path / "out"), method="mag-sp", **options)
    assert any("0.60 of the sites' parameters was asked for" in line for line in said)


def test_the_resolved_bias_is_in_the_report(tmp_path, folders, calibration):
    for method, bias in (("flap", True), ("mag-sp", False)):
        report = compressed(folders("gqa"), tmp_path / method, calibration, method=method, allocation="uniform")
        assert json.loads((tmp_path / method / "grail.json").read_text())["bias"] is bias
        assert report.recipe.bias is None
