"""Every model type of the family, end to end on tiny random models: compress, reload plainly, generate."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import grail
from grail.checkpoint.reader import SafetensorsFolder
from grail.families import open_family
from grail.families.llama import MODEL_TYPES
from grail.selectors import methods
from tests.tiny import tiny_calibration, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here")

VARIANTS = {
    "mha": {"num_key_value_heads": 6},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 12},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
        }
    },
    "attention-bias": {"attention_bias": True},
    "mlp-bias": {"mlp_bias": True},
    "all-biases-mha": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 6},
}  # fmt: skip
SLIDING = {
    "mistral": {"sliding_window": 8},
    "ministral": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "smollm3": {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0]},
}


def compress_tiny(tmp_path, source, **flags):
    flags = {"method": "wanda-sp", "ratio": 0.3, "samples": 8} | flags
    calibration = tiny_calibration(tmp_path / "calibration.safetensors")
    return grail.compress(str(source), output=str(tmp_path / "out"), calibration=str(calibration), **flags)


def generated_with_and_without_cache(model):
    ids = torch.tensor([[5, 9, 3, 7]])
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return [model.generate(ids, use_cache=cached, **settings).tolist() for cached in (True, False)]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_model_type_compresses_reloads_and_generates(tmp_path, model_type):
    source = tiny_checkpoint(tmp_path / "source", model_type)
    report = compress_tiny(tmp_path, source)
    assert report.reopened["logit_difference"] < 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == model_type, "4 of 6 heads divide the hidden size: the class must stay"
    assert (config["num_attention_heads"], config["intermediate_size"]) == (4, 28)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with_cache, without = generated_with_and_without_cache(model)
    assert with_cache == without


@pytest.mark.parametrize("model_type", SLIDING)
def test_sliding_windows_are_the_class_own(tmp_path, model_type):
    source = tiny_checkpoint(tmp_path / "source", model_type, **SLIDING[model_type])
    assert compress_tiny(tmp_path, source).reopened["logit_difference"] < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_variants(tmp_path, variant):
    source = tiny_checkpoint(tmp_path / "source", "llama", **VARIANTS[variant])
    report = compress_tiny(tmp_path, source)
    assert report.reopened["logit_difference"] < 1e-5
    assert all(site["error_after"] <= site["error_before"] for site in report.sites)


@pytest.mark.parametrize(
    ("biases", "carrier"), [({}, "mistral"), ({"attention_bias": True}, "seed_oss"), ({"mlp_bias": True}, "seed_oss")]
)
def test_head_count_that_llama_refuses_goes_to_a_carrier(tmp_path, biases, carrier):
    source = tiny_checkpoint(tmp_path / "source", "llama", num_key_value_heads=6, **biases)
    report = compress_tiny(tmp_path, source, attn_ratio=1 / 6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == (carrier, 5)
    assert report.reopened["logit_difference"] < 1e-5
    assert "llama refuses 5 heads" in report.class_changed


@pytest.mark.parametrize("gqa", ["query", "group"])
def test_gqa_modes(tmp_path, gqa):
    source = tiny_checkpoint(tmp_path / "source", "qwen2", num_attention_heads=8, num_key_value_heads=4)
    report = compress_tiny(tmp_path, source, attn_ratio=0.5, gqa=gqa)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kv_heads = {"query": 4, "group": 2}[gqa]
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, kv_heads)
    assert report.reopened["logit_difference"] < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_shards_stay_in_their_dtype(tmp_path, dtype):
    source = tiny_checkpoint(tmp_path / "source", "llama", dtype=dtype, shard="20KB")
    report = compress_tiny(tmp_path, source)
    held = SafetensorsFolder(tmp_path / "out")
    assert {held.info(name).dtype for name in held.names()} == {dtype}
    assert all(site["error_after"] <= site["error_before"] for site in report.sites)


def test_output_dtype_converts_every_tensor(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    compress_tiny(tmp_path, source, output_dtype="bfloat16")
    held = SafetensorsFolder(tmp_path / "out")
    assert {held.info(name).dtype for name in held.names()} == {torch.bfloat16}
    assert (
        next(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").parameters()).dtype is torch.bfloat16
    )


@pytest.mark.parametrize("compensate", [True, False], ids=["compensated", "pruned"])
@pytest.mark.parametrize("method", sorted(methods()))
def test_ratio_0_reproduces_every_tensor_byte_for_byte(tmp_path, method, compensate):
    source = tiny_checkpoint(tmp_path / "source", "llama", dtype=torch.bfloat16, shard="20KB", attention_bias=True)
    compress_tiny(tmp_path, source, method=method, ratio=0.0, compensate=compensate)
    before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / "out")
    assert set(before.names()) == set(after.names())
    for name in before.names():
        assert before.info(name).dtype == after.info(name).dtype
        assert torch.equal(before.get(name).view(torch.uint8), after.get(name).view(torch.uint8)), name


def test_pruned_only_equals_slicing_by_hand(tmp_path):
    source = tiny_checkpoint(tmp_path / "source")
    report = compress_tiny(tmp_path, source, compensate=False, method="mag-sp")
    before, after = SafetensorsFolder(source), SafetensorsFolder(tmp_path / "out")
    mlp = report.results[1]
    kept = mlp.reduction.channels
    prefix = "model.layers.0.mlp."
    assert torch.equal(after.get(prefix + "gate_proj.weight"), before.get(prefix + "gate_proj.weight")[kept])
    assert torch.equal(after.get(prefix + "down_proj.weight"), before.get(prefix + "down_proj.weight")[:, kept])
    scores = before.get(prefix + "down_proj.weight").norm(dim=0)
    assert set(kept.tolist()) == set(scores.topk(28).indices.tolist())


def test_mlp_statistics_are_taken_after_the_attention_was_compressed(tmp_path):
    """REFERENCE section 4: the reference takes the MLP's Gram while the same layer's attention is still dense."""
    source = tiny_checkpoint(tmp_path / "source", num_hidden_layers=1)
    report = compress_tiny(tmp_path, source, compensate=False)
    attention, mlp = report.results
    model = AutoModelForCausalLM.from_pretrained(source)
    gone = attention.reduction.removed_channels
    model.model.layers[0].self_attn.o_proj.weight.data[:, gone] = 0
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(SafetensorsFolder(tmp_path / "calibration.safetensors").get("input_ids"))
    rms = torch.cat(seen).double().square().mean((0, 1)).sqrt()
    scores = model.model.layers[0].mlp.down_proj.weight.double().abs().mean(0) * rms
    assert set(mlp.reduction.channels.tolist()) == set(scores.topk(28).indices.tolist())


def test_later_layers_see_the_compressed_earlier_ones(tmp_path):
    """The Gram of layer 1's attention comes from the written layer 0, not from the dense one."""
    source = tiny_checkpoint(tmp_path / "source")
    report = compress_tiny(tmp_path, source, target="hidden")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    dense = AutoModelForCausalLM.from_pretrained(source)
    small.model.layers[1] = dense.model.layers[1]
    seen = []
    small.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        small(SafetensorsFolder(tmp_path / "calibration.safetensors").get("input_ids"))
    rows = torch.cat(seen).flatten(0, 1).double()
    weight = dense.model.layers[1].self_attn.o_proj.weight.double()
    difference = (
        rows @ weight.T
        - report.results[2].reduction.reduce(rows)
        @ SafetensorsFolder(tmp_path / "out").get("model.layers.1.self_attn.o_proj.weight").double().T
    )
    error = (difference.square().sum() / (rows @ weight.T).square().sum()).item()
    assert error == pytest.approx(report.sites[2]["error_after"], rel=1e-3)


def test_a_module_is_compressed_and_left_as_it_was(tmp_path):
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = torch.randint(64, (8, 32), generator=torch.Generator().manual_seed(0))
    report = grail.compress(model, method="wanda-sp", ratio=0.5, calibration=windows)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert report.model.config.intermediate_size == 20
    assert report.output is None
    with torch.no_grad():
        assert torch.isfinite(report.model(windows).logits).all()
    same = grail.compress(model, method="wanda-sp", ratio=0.5, calibration=list(windows), output=str(tmp_path / "out"))
    for name, tensor in grail.load(same.output).state_dict().items():
        assert torch.equal(tensor, report.model.state_dict()[name])


def test_extra_tensors_are_copied_through(tmp_path):
    """Old LLaMA checkpoints carry rotary_emb.inv_freq buffers that no class knows."""
    from safetensors.torch import load_file, save_file

    source = tiny_checkpoint(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {extra: torch.arange(4.0)}, source / "model.safetensors")
    compress_tiny(tmp_path, source)
    assert torch.equal(SafetensorsFolder(tmp_path / "out").get(extra), torch.arange(4.0))


def test_what_layers_are_passed_is_asked_once_for_full_chunks_and_once_for_the_last(tmp_path, monkeypatch):
    """Full chunks and a shorter last one alternate twice in every layer; asking anew each time cost 2 % of a run."""
    model = open_family(tiny_checkpoint(tmp_path / "source", num_key_value_heads=2))
    asked, original = [], model._shell.forward

    def forward(*arguments, **options):
        asked.append(options["inputs_embeds"].shape[0])
        return original(*arguments, **options)

    monkeypatch.setattr(model._shell, "forward", forward)
    states = torch.randn(3, 16, model.config.hidden_size)
    for layer in range(2):
        block = model.block(layer)
        for rows in (2, 1, 2, 1):
            fresh = open_family(tmp_path / "source").block(layer)
            assert torch.equal(block.output(states[:rows], {}), fresh.output(states[:rows], {}))
    assert asked == [2, 1]
