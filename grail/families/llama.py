"""The llama family: LLaMA in all but name. Adding a model of this shape means adding its model type here."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..checkpoint.reader import SafetensorsFolder, read_json
from ..errors import GrailError
from ..reduction import Reduction, Selection, Units
from .base import NarrowConfig, Producer, Site
from .decoder import Decoder, Part

MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "seed_oss")
ATTENTION, MLP = "self_attn", "mlp"
CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "hidden_act",
    "initializer_range", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    "attention_dropout",
)  # fmt: skip
PARTS = {
    ATTENTION: Part(ATTENTION, "input_layernorm", "o_proj", lambda value: (value, None)),
    MLP: Part(MLP, "post_attention_layernorm", "down_proj", lambda value: value),
}


class LlamaFamily(Decoder):
    """A checkpoint of this family: its sites in execution order, its narrow tensors and configuration."""

    def __init__(self, source: SafetensorsFolder, config: PreTrainedConfig, raw_config: dict, **precision):
        super().__init__(source, config, PARTS, **precision)
        self.raw_config = raw_config
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.mlp_width = config.intermediate_size

    def sites(self, gqa: str = "query") -> list[Site]:
        """Attention (units: heads) and MLP (units: channels) of every layer.

        gqa "query" removes equally many query heads per key/value head, "group" whole key/value groups.
        """
        return [make(i) for i in range(self.layer_count) for make in (self._attention_site(gqa), self._mlp_site)]

    def part_of(self, site: Site) -> str:
        return ATTENTION if site.kind == "heads" else MLP

    def _attention_site(self, gqa: str):
        shared, size = self.heads // self.kv_heads, self.head_dim
        if shared == 1:
            units, rows = Units(1, self.heads, size), {"q_proj": size, "k_proj": size, "v_proj": size}
        elif gqa == "query":
            units, rows = Units(self.kv_heads, shared, size), {"q_proj": size}
        else:
            units = Units(1, self.kv_heads, shared * size)
            rows = {"q_proj": shared * size, "k_proj": size, "v_proj": size}
        return lambda layer: self._site(layer, ATTENTION, "heads", rows, "o_proj", units)

    def _mlp_site(self, layer: int) -> Site:
        rows = {"gate_proj": 1, "up_proj": 1}
        return self._site(layer, MLP, "channels", rows, "down_proj", Units(1, self.mlp_width, 1))

    def _site(self, layer: int, part: str, kind: str, rows: dict[str, int], consumer: str, units: Units) -> Site:
        prefix = f"model.layers.{layer}.{part}."
        producers = tuple(Producer(prefix + name, count) for name, count in rows.items())
        return Site(prefix + consumer, kind, layer, producers, prefix + consumer, units)

    def narrow(self, site: Site, reduction: Reduction, consumer_OK: Tensor) -> dict[str, Tensor]:
        tensors = {f"{site.consumer}.weight": consumer_OK}
        for producer in site.producers:
            for name in (f"{producer.name}.weight", f"{producer.name}.bias"):
                if name in self.source:
                    tensors[name] = reduction.narrow_producer(self.source.get(name), producer.rows_per_unit)
        return tensors

    def narrow_config(self, reductions: dict[str, Reduction], sites: list[Site]) -> NarrowConfig:
        """As Decoder.narrow_config; widths must be the same in every layer."""
        counts = {self._counts(layer, reductions, sites) for layer in range(self.layer_count)}
        if len(counts) > 1:
            raise GrailError("widths that differ between layers cannot be written as a uniform checkpoint")
        heads, kv_heads, width = counts.pop()
        config = {key: value for key, value in self.raw_config.items() if key != "auto_map"}
        own = f"transformers {_class_of(self.raw_config)}"
        if (heads, width) == (self.heads, self.mlp_width):
            return NarrowConfig(config, own, None)
        config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": width}
        config["head_dim"] = self.head_dim
        if self.config.model_type != "llama" or self.config.hidden_size % heads == 0:
            return NarrowConfig(config, own, None)
        carrier = self._carrier(config)
        why = (
            f"llama refuses {heads} heads in a hidden size of {self.config.hidden_size}; {carrier['model_type']} is "
            f"the same computation. To keep llama, choose --attn-ratio so that the heads divide the hidden size"
        )
        return NarrowConfig(carrier, f"transformers {_class_of(carrier)}", why)

    def _counts(self, layer: int, reductions: dict[str, Reduction], sites: list[Site]) -> tuple[int, int, int]:
        heads, kv_heads, width = self.heads, self.kv_heads, self.mlp_width
        for site in sites:
            reduction = reductions.get(site.name)
            if site.layer != layer or reduction is None:
                continue
            if site.kind == "channels":
                width = reduction.kept_width
            elif isinstance(reduction, Selection):
                heads = reduction.kept_width // self.head_dim
                if any(producer.name.endswith("k_proj") for producer in site.producers):
                    kv_heads = len(reduction.kept)
        return heads, kv_heads, width

    def _carrier(self, config: dict) -> dict:
        """The same network under a class that takes any head count: mistral, or seed_oss where there are biases."""
        attention_bias, mlp_bias = self.config.attention_bias, self.config.mlp_bias
        dropped = {"attention_bias", "mlp_bias", "pretraining_tp", "rope_scaling"}
        known = self.config.to_dict()
        config = {key: value for key, value in config.items() if key not in dropped}
        # spelled out, since the carrier's defaults are others
        config |= {key: known[key] for key in CARRIED if config.get(key) is None and key in known}
        config["rope_parameters"] = known["rope_parameters"]
        if not (attention_bias or mlp_bias):
            return config | {
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "sliding_window": None,
            }
        return config | {
            "model_type": "seed_oss",
            "architectures": ["SeedOssForCausalLM"],
            "attention_bias": attention_bias,
            "attention_out_bias": attention_bias,
            "mlp_bias": mlp_bias,
            "attention_dropout": self.config.attention_dropout,
            "residual_dropout": 0.0,
        }


def open_folder(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    written_as: torch.dtype | None = None,
) -> LlamaFamily:
    """Open a checkpoint folder; dtype is the compute dtype (None: as stored on a GPU, float32 on CPU)."""
    raw = read_json(folder / "config.json")
    if raw.get("quantization_config"):
        raise GrailError(f"{folder / 'config.json'}: the checkpoint is quantised; GRAIL needs its float weights")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _unusable(folder, raw, error) from error
    source = SafetensorsFolder(folder)
    if dtype is None:
        stored = source.info("model.layers.0.mlp.down_proj.weight").dtype
        dtype = torch.float32 if torch.device(device).type == "cpu" else stored
    try:
        if config.max_position_embeddings < 1:
            raise ValueError("max_position_embeddings must be at least 1")
        return LlamaFamily(source, config, raw, device=device, dtype=dtype, written_as=written_as)
    except GrailError:
        raise
    except Exception as error:  # whatever the class makes of values that cannot be: heads 0, widths below 0, ...
        raise _unusable(folder, raw, error) from error


def _unusable(folder: Path, raw: dict, error: Exception) -> GrailError:
    return GrailError(f"{folder / 'config.json'} is not a usable {raw['model_type']} config: {error}")


def _class_of(config: dict) -> str:
    names = config.get("architectures") or ["AutoModelForCausalLM"]
    return names[0]
