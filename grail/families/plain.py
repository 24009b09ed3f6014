"""Which of transformers' own classes takes a network of given widths and biases (checked on transformers 5.24).

Every class of the family loads any head count but llama, which wants one that divides hidden_size. They differ in
where a bias may be. Where the source's own class does not do, a carrier may: another class with the same computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .layout import LayerWidths

QKV, OUT, GATED = frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"o_proj"}), frozenset({"gate_proj", "up_proj"})
DOWN = frozenset({"down_proj"})
NEVER, ALWAYS = None, True
BIASES: dict[str, dict[str | bool | None, frozenset[str]]] = {
    "llama": {"attention_bias": QKV | OUT, "mlp_bias": GATED | DOWN},
    "mistral": {NEVER: QKV | OUT | GATED | DOWN},
    "ministral": {NEVER: QKV | OUT | GATED | DOWN},
    "qwen2": {ALWAYS: QKV, NEVER: OUT | GATED | DOWN},
    "qwen3": {"attention_bias": QKV | OUT, NEVER: GATED | DOWN},
    "smollm3": {"attention_bias": QKV | OUT, "mlp_bias": GATED | DOWN},
    "seed_oss": {"attention_bias": QKV, "attention_out_bias": OUT, "mlp_bias": GATED | DOWN},
}
"""Per model type: the config field that gives these linear layers a bias."""
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "seed_oss": "SeedOssForCausalLM",
}  # fmt: skip
CARRIERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "seed_oss": {"residual_dropout": 0.0},
}
SPELLED_OUT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "attention_dropout",
)  # fmt: skip
"""Fields whose defaults differ between classes: a carrier's config names them all."""
NOT_CARRIED = {
    "attention_bias", "attention_out_bias", "mlp_bias", "pretraining_tp", "rope_scaling", "rope_theta",
    "residual_dropout", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval",
}  # fmt: skip


BIAS, HEADS, WIDTHS, ASKED = "bias", "heads", "widths", "asked"


@dataclass(frozen=True)
class Reason:
    """Why a network is not written in a class: a sentence, and what it is about, for those who know a remedy."""

    about: str
    text: str


def biased(model_type: str, config: PreTrainedConfig) -> frozenset[str]:
    """The linear layers that the plain class gives a bias under this configuration."""
    fields = BIASES[model_type].items()
    on = (linears for field, linears in fields if field is ALWAYS or (field and getattr(config, field)))
    return frozenset().union(*on)


def width_fields(widths: LayerWidths) -> dict[str, int]:
    """The widths under their names in config.json."""
    return {
        "num_attention_heads": widths.heads,
        "num_key_value_heads": widths.kv_heads,
        "intermediate_size": widths.channels,
    }


def never_biased(model_type: str) -> frozenset[str]:
    """The linear layers that the class of that type cannot give a bias."""
    return BIASES[model_type].get(NEVER, frozenset())


def refusal(model_type: str, hidden_size: int, widths: LayerWidths, needed: frozenset[str]) -> Reason | None:
    """Why the class of that type does not take the widths and the biases that are `needed`; None where it does."""
    without = never_biased(model_type) & needed
    if without:
        return Reason(BIAS, f"{model_type} has no bias in {' and '.join(sorted(without))}")
    if model_type == "llama" and hidden_size % widths.heads:
        return Reason(HEADS, f"llama refuses {widths.heads} heads in a hidden size of {hidden_size}")
    return None


def computes_like_llama(model_type: str, config: PreTrainedConfig) -> bool:
    """Whether the configuration asks for plain rotary causal attention and a gated MLP: what a carrier computes."""
    if model_type in ("llama", "seed_oss"):
        return True
    if model_type == "mistral":
        return config.sliding_window is None
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ["unknown"])
    if model_type == "smollm3":
        return full and all(config.no_rope_layers[: config.num_hidden_layers])
    return full and model_type in ("ministral", "qwen2")  # qwen3 normalises queries and keys


def plain_config(
    model_type: str, config: PreTrainedConfig, raw: dict, head_dim: int, widths: LayerWidths, needed: frozenset[str]
) -> tuple[dict | None, Reason | None]:
    """(config.json, why the class is another one or None); (None, why no class takes it) where none does.

    raw: the source's config.json as a plain one of `model_type`; needed: linear layers with a bias in any layer.
    """
    sized = raw | width_fields(widths) | {"head_dim": head_dim}
    why = refusal(model_type, config.hidden_size, widths, needed)
    if why is None:
        return sized | _bias_fields(model_type, needed, config), None
    if computes_like_llama(model_type, config):
        for carrier in CARRIERS:
            if refusal(carrier, config.hidden_size, widths, needed) is None:
                changed = Reason(why.about, f"{why.text}; {carrier} is the same computation")
                return _carried(carrier, config, sized) | _bias_fields(carrier, needed), changed
    return None, why


def _bias_fields(model_type: str, needed: frozenset[str], config: PreTrainedConfig | None = None) -> dict[str, bool]:
    """The fields that give the needed biases; with the source's configuration, only those it has otherwise."""
    fields = {field: bool(linears & needed) for field, linears in BIASES[model_type].items() if isinstance(field, str)}
    return {field: on for field, on in fields.items() if config is None or bool(getattr(config, field)) != on}


def _carried(carrier: str, config: PreTrainedConfig, sized: dict) -> dict:
    known = config.to_dict()
    carried = {key: value for key, value in sized.items() if key not in NOT_CARRIED}
    carried |= {key: known[key] for key in SPELLED_OUT if carried.get(key) is None and key in known}
    carried["rope_parameters"] = known["rope_parameters"]
    return carried | {"model_type": carrier, "architectures": [CLASSES[carrier]]} | CARRIERS[carrier]
