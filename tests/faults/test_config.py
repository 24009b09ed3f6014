"""config.json and what lies beside it: refused naming the file, or the network that transformers makes of it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grail.checkpoint.carried import without_code
from grail.evaluation.perplexity import logits
from grail.families import open_family
from grail.progress import Progress
from grail.recipe import Recipe
from grail.run import plan
from tests.faults.mutators import HOSTILE, Raw, mangled, rendered
from tests.faults.series import Series
from tests.killed_runs import small_runs
from tests.tiny import VOCABULARY, tiny_calibration, tiny_checkpoint

MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "smollm3")
VALUES = (
    *HOSTILE, 4, 6, 8, 10, 16, 40, 48, 64, 128, 4096, 10**5, 1e-6, 1e6, "llama", "qwen2", "gpt2", "evil", "silu",
    "gelu", "default", "linear", "dynamic", "yarn", "longrope", "llama3", "sdpa", "flash_attention_2",
    "sliding_attention", {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 10**12, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 10**12},
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4}, {"rope_theta": 0}, {"rope_theta": -1.0},
    {"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": 7},
    {"AutoConfig": "evil.Evil"}, {"AutoModelForCausalLM": "owner/name--evil.Evil"}, ["full_attention"],
    {"0": {"intermediate_size": 8}}, [["x"]], "owner/name",
)  # fmt: skip
FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "attention_bias", "mlp_bias", "sliding_window", "layer_types", "model_type",
    "architectures", "dtype", "torch_dtype", "quantization_config", "auto_map", "per_layer_config", "use_cache",
    "attention_dropout", "initializer_range", "pretraining_tp", "_attn_implementation", "attn_implementation",
    "partial_rotary_factor", "no_rope_layers", "use_sliding_window", "max_window_layers", "pad_token_id",
    "transformers_version", "_name_or_path", "num_labels", "id2label", "is_encoder_decoder", "torchscript",
    "base_model_tp_plan", "experts_implementation", "trust_remote_code", "gguf_file", "o_proj_bias",
)  # fmt: skip
"""Each may be in a config.json, or should not."""
PROBE = torch.arange(3, 19)[None] % VOCABULARY


SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings", "num_labels",
)  # fmt: skip
ABSURD = (0, -1, 5, 10**5, 10**9, 10**12, 2**63, 10**30, 1e308, 8.0, True, "8", None, Raw("9" * 5000))


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for model_type in MODEL_TYPES:
        home = tmp_path_factory.mktemp(model_type)
        folder = tiny_checkpoint(home / "model", model_type, num_hidden_layers=1)
        (folder / "evil.py").write_text("raise SystemExit('run')\n")
        tiny_calibration(home / "calibration.safetensors", windows=4)
        found[model_type] = home
    return found


def opened(case: Path, **flags: Any) -> torch.Tensor:
    """Plan a run, then the logits that it would stream."""
    flags = {"method": "wanda-sp", "calibration": str(case / "calibration.safetensors"), "eval": "none"} | flags
    with small_runs():
        plan(Recipe(model=str(case / "model"), output=str(case / "out"), **flags), Progress())
    return logits(open_family(case / "model"), PROBE)


def check(series: Series, how: str, case: Path, names: list[str]) -> None:
    ending = series.case(how, partial(opened, case), case, names=names)
    if ending is None or ending.refused is not None:
        return
    file = case / "model" / "config.json"
    file.write_text(json.dumps(without_code(json.loads(file.read_text()))))  # which a result has neither
    try:
        model = AutoModelForCausalLM.from_pretrained(
            case / "model", dtype=torch.float32, trust_remote_code=False, attn_implementation="sdpa"
        ).eval()
        with torch.no_grad():
            expected = model(PROBE).logits
    except Exception as error:
        series.wrong.append(f"{how}: taken, and transformers refuses it: {error!r}"[:500])
        return
    if not torch.allclose(ending.value, expected, rtol=1e-3, atol=1e-3, equal_nan=True):
        series.wrong.append(f"{how}: other logits than transformers' own")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_config(sound, tmp_path, model_type):
    with Series("config", tmp_path, sound[model_type]) as series:
        for chance in series.seeds(35):
            case = series.folder()
            file = case / "model" / "config.json"
            config = json.loads(file.read_text())
            if chance.random() < 0.5:
                field, value = chance.choice(FIELDS), chance.choice(VALUES)
                how, text = f"{field}={str(value)[:60]}", rendered(config | {field: value})
            else:
                how, text = mangled(config, chance, VALUES)
            file.write_bytes(text)
            check(series, f"{model_type} {how}", case, ["config.json", "model.safetensors", str(case / "model")])


@pytest.mark.parametrize("field", SIZES)
def test_sizes(sound, tmp_path, field):
    with Series("config sizes", tmp_path, sound["llama"]) as series:
        for value in ABSURD:
            case = series.folder()
            file = case / "model" / "config.json"
            file.write_bytes(rendered(json.loads(file.read_text()) | {field: value}))
            check(series, f"{field}={str(value)[:20]}", case, ["config.json", "model.safetensors", str(case / "model")])
