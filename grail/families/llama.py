"""The llama family: LLaMA in all but name. Adding a model of this shape means adding its model type here."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from ..calibration.tokenizer import has_tokenizer, load_tokenizer
from ..checkpoint.carried import TOKENIZER_CONFIG, without_code
from ..checkpoint.reader import SafetensorsFolder, read_json
from ..documents import check_counts, check_writable
from ..errors import GrailError
from ..modeling_grail import BASES, PREFIX
from ..numbers import as_whole
from ..reduction import Reduction, Units
from ..registration import register
from .base import OutputFormat, Producer, Site
from .block import Part
from .decoder import EMBEDDING, HEAD, ROOT, Decoder
from .formats import output_format
from .layout import ATTENTION, LINEARS, MLP, LayerWidths
from .plain import CLASSES

MODEL_TYPES = tuple(BASES)
GRAIL_FIELDS = ("per_layer_config", "o_proj_bias", "down_proj_bias")
PARTS = {
    ATTENTION: Part(ATTENTION, "input_layernorm", "o_proj", lambda value: (value, None)),
    MLP: Part(MLP, "post_attention_layernorm", "down_proj", lambda value: value),
}


class LlamaFamily(Decoder):
    """A checkpoint of this family, plain or in the format `grail`: its sites, its narrow tensors, its output formats.

    widths and biases (linear layers that the class gives one) are per layer; `original` the widths in the fields of
    config.json, which in the format `grail` are those before anything was removed; `plain_raw` config.json as a plain
    one.
    """

    def __init__(self, source: SafetensorsFolder, config: PreTrainedConfig, raw_config: dict, **precision):
        super().__init__(source, config, PARTS, **precision)
        self.base_type = config.model_type.removeprefix(PREFIX)
        self.in_grail_format = config.model_type != self.base_type
        self.plain_raw = _as_plain(raw_config, self.base_type)
        layers = [config.per_layer_config[i] for i in range(self.layer_count)]
        self.head_dim = getattr(layers[0], "head_dim", None) or config.hidden_size // layers[0].num_attention_heads
        self.widths = [LayerWidths(c.num_attention_heads, c.num_key_value_heads, c.intermediate_size) for c in layers]
        self.original = _named_widths(raw_config) if self.in_grail_format else self.widths[0]
        self.biases = [
            frozenset(name for name in LINEARS if made.get_submodule(f"{LINEARS[name]}.{name}").bias is not None)
            for made in self._layers
        ]
        self.left_out = self._unasked_biases()
        source.leave_out(self.left_out)

    def _unasked_biases(self) -> list[str]:
        """Stored biases that the class does not ask for, and that transformers does not load."""
        found = []
        for layer, asked in enumerate(self.biases):
            found += [f"{self._module(layer, name)}.bias" for name in LINEARS if name not in asked]
        return [name for name in found if name in self.source]

    @property
    def class_name(self) -> str:
        """The source's own class, as a plain one with a language model's head, whatever config.json names."""
        return CLASSES[self.base_type]

    @cached_property
    def tokenizer_files(self) -> dict[str, str]:
        """What another model type needs beside it for the source's token ids: its tokenizer's class, by name.

        AutoTokenizer goes by the model type first: qwen2 takes Qwen2Tokenizer whatever tokenizer_config.json says.
        """
        folder = self.source.path
        file = folder / TOKENIZER_CONFIG
        if not has_tokenizer(folder):
            return {}
        named = without_code(read_json(file)) if file.exists() else {}
        pinned = named | {"tokenizer_class": type(load_tokenizer(folder)).__name__}
        return {} if pinned == named else {file.name: json.dumps(pinned, indent=2, ensure_ascii=False) + "\n"}

    def sites(self, gqa: str = "query") -> list[Site]:
        """Attention (units: heads) and MLP (units: channels) of every layer.

        gqa "query" removes equally many query heads per key/value head, "group" whole key/value groups.
        """
        return [site for i in range(self.layer_count) for site in (self._attention_site(i, gqa), self._mlp_site(i))]

    def part_of(self, site: Site) -> str:
        return ATTENTION if site.kind == "heads" else MLP

    def _attention_site(self, layer: int, gqa: str) -> Site:
        widths, size = self.widths[layer], self.head_dim
        shared = widths.shared
        if shared == 1:
            units, rows = Units(1, widths.heads, size), {"q_proj": size, "k_proj": size, "v_proj": size}
        elif gqa == "query":
            units, rows = Units(widths.kv_heads, shared, size), {"q_proj": size}
        else:
            units = Units(1, widths.kv_heads, shared * size)
            rows = {"q_proj": shared * size, "k_proj": size, "v_proj": size}
        return self._site(layer, "heads", rows, "o_proj", units)

    def _mlp_site(self, layer: int) -> Site:
        rows = {"gate_proj": 1, "up_proj": 1}
        return self._site(layer, "channels", rows, "down_proj", Units(1, self.widths[layer].channels, 1))

    def _site(self, layer: int, kind: str, rows: dict[str, int], consumer: str, units: Units) -> Site:
        producers = tuple(Producer(self._module(layer, name), count) for name, count in rows.items())
        consumer = self._module(layer, consumer)
        return Site(consumer, kind, layer, producers, consumer, units)

    def _module(self, layer: int, name: str) -> str:
        return f"{self.prefix(layer)}{LINEARS[name]}.{name}"

    def narrow(
        self, site: Site, reduction: Reduction, consumer_OK: Tensor, bias_O: Tensor | None = None
    ) -> dict[str, Tensor]:
        tensors = {f"{site.consumer}.weight": consumer_OK}
        if bias_O is not None:
            tensors[f"{site.consumer}.bias"] = bias_O.to(consumer_OK.dtype)
        for producer in site.producers:
            for name in (f"{producer.name}.weight", f"{producer.name}.bias"):
                if name in self.source:
                    tensors[name] = reduction.narrow_producer(self.source.get(name), producer.rows_per_unit)
        return tensors

    def linear_tensors(self, layer: int) -> dict[str, Tensor]:
        """The stored weights and biases of a layer's linear layers, by full name."""
        modules = (self._module(layer, name) for name in LINEARS)
        names = (f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
        return {name: self.source.get(name) for name in names if name in self.source}

    def output_format(
        self, sites: list[Site], kept: dict[str, int], *, given_bias: Collection[str] = (), asked: str = "auto"
    ) -> OutputFormat:
        return output_format(self, sites, kept, given_bias=given_bias, asked=asked)


def _named_widths(raw: dict) -> LayerWidths:
    """The widths that config.json names for all layers."""
    named = [raw.get(key) for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")]
    if not all(type(width) is int and width > 0 for width in named):
        raise ValueError("it must name num_attention_heads, num_key_value_heads and intermediate_size")
    return LayerWidths(*named)


def _as_plain(raw: dict, base_type: str) -> dict:
    """config.json without what the format `grail` adds, and without what names code in the folder."""
    raw = without_code(raw)
    if not raw["model_type"].startswith(PREFIX):
        return raw
    plain = {key: value for key, value in raw.items() if key not in GRAIL_FIELDS}
    return plain | {"model_type": base_type, "architectures": [CLASSES[base_type]]}


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
    if not raw.get("return_dict", True):
        raise GrailError(f"{folder / 'config.json'}: transformers runs no network with return_dict false; take it out")
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise GrailError(f"{folder / 'config.json'}: architectures must be a list of class names; correct it")
    source = SafetensorsFolder(folder)
    bare = EMBEDDING.removeprefix(ROOT) in source and HEAD not in source
    if bare and raw["model_type"] in CLASSES:  # saved without a head, which transformers takes the embedding for
        source.add_prefix(ROOT)
        raw = raw | {"architectures": [CLASSES[raw["model_type"]]]}
    check_counts(raw, folder / "config.json", len(source.names()))
    check_writable(raw, folder / "config.json")
    register()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise _unusable(folder, raw, error) from error
    if dtype is None:
        stored = source.info("model.layers.0.mlp.down_proj.weight").dtype
        dtype = torch.float32 if torch.device(device).type == "cpu" else stored
    try:
        if config.max_position_embeddings < 1:
            raise ValueError("max_position_embeddings must be at least 1")
        window = getattr(config, "sliding_window", None)
        if window is not None and (as_whole(window) or 0) < 1:
            raise GrailError(
                f"{folder / 'config.json'}: sliding_window must be null or a whole number, 1 or more, not {window!r}"
            )
        return LlamaFamily(source, config, raw, device=device, dtype=dtype, written_as=written_as)
    except GrailError:
        raise
    except Exception as error:  # whatever the class makes of values that cannot be: heads 0, widths below 0, ...
        raise _unusable(folder, raw, error) from error


def _unusable(folder: Path, raw: dict, error: Exception) -> GrailError:
    return GrailError(f"{folder / 'config.json'} is not a usable {raw['model_type']} config: {error}")
