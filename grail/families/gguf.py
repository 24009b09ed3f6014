"""A checkpoint of this family as llama.cpp names it: its architecture `llama`, one entry of the file per tensor.

llama.cpp turns neighbouring numbers of a head (0 with 1, 2 with 3, ...) where transformers turns the two halves (0 with
d/2, ...), so that rows of queries and keys change places within each head.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..errors import GrailError
from .llama import LlamaFamily

log = logging.getLogger(__name__)

ARCHITECTURE = "llama"
MODEL_TYPES = ("llama", "mistral", "seed_oss", "qwen2")
"""Those that compute what llama.cpp's `llama` computes; biases are optional there."""
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
DERIVED = ".rotary_emb.inv_freq"
"""What old checkpoints store though it follows from config.json; nobody reads it."""
FREQUENCIES = "rope_freqs.weight"


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Entry:
    """name: in the file; shape: rows first; read: the tensor as it stands there, of the stored dtype; source: its name
    in the checkpoint, None for what comes from the configuration; back: from the file's order to the checkpoint's."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    source: str | None = None
    back: Callable[[Tensor], Tensor] = _as_it_is


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, ...]: halves of each head become neighbours."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def halved(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `interleaved`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def described(model: LlamaFamily) -> tuple[dict[str, Any], list[Entry]]:
    """The hyperparameters by key (without the prefix `llama.`) and the file's entries. Raises GrailError where
    llama.cpp's `llama` computes something else."""
    path, config = model.source.path, model.config
    if model.base_type not in MODEL_TYPES:
        raise GrailError(f"{path}: llama.cpp's `llama` is not a {model.base_type}; --to gguf is for {_listed()}")
    if model.in_grail_format and len(set(model.widths)) == 1:
        raise GrailError(
            f"{path} is in the format grail, for biases that a {model.base_type} has no place for; compress with "
            f"--no-bias"
        )
    if model.in_grail_format or len(set(model.widths)) > 1:
        raise GrailError(
            f"{path}: widths differ by layer, which llama.cpp's `llama` does not know; compress with "
            f"--allocation uniform, or `grail convert {path} --to padded` first"
        )
    if getattr(config, "hidden_act", "silu") != "silu":
        raise GrailError(f"{path}: llama.cpp's `llama` computes silu, not {config.hidden_act}")
    widths, rope = model.widths[0], getattr(config, "rope_parameters", None) or {}
    length = config.max_position_embeddings
    if window := getattr(config, "sliding_window", None):
        if not isinstance(window, int) or window < 1:
            raise GrailError(f"{path / 'config.json'}: sliding_window is {window!r}")
        if window < length:
            log.warning(
                "%s: llama.cpp's `llama` has no place for sliding_window %d; the file's context_length is %d instead "
                "of %d, as up to there attention to everything is the same",
                path,
                window,
                window,
                length,
            )
        length = min(length, window)
    fields = {
        "vocab_size": config.vocab_size,
        "context_length": length,
        "embedding_length": config.hidden_size,
        "block_count": model.layer_count,
        "feed_forward_length": widths.channels,
        "attention.head_count": widths.heads,
        "attention.head_count_kv": widths.kv_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
    }
    for key, value in fields.items():
        if not 0 < value < 2**32:
            raise GrailError(f"{path / 'config.json'}: {value} is no {key} that GGUF can hold")
    entries = [_entry(model, name) for name in model.source.names() if not name.endswith(DERIVED)]
    scaling, more = _scaling(model, rope)
    return fields | scaling, entries + more


def _listed() -> str:
    return ", ".join(MODEL_TYPES)


def _entry(model: LlamaFamily, name: str) -> Entry:
    info, heads = model.source.info(name), 0
    if name in OUTSIDE:
        called = OUTSIDE[name]
    else:
        layer = model.layer_of(name)
        inner = name.removeprefix(model.prefix(layer)) if layer is not None else name
        part, _, kind = inner.rpartition(".")
        if part not in INSIDE or kind not in ("weight", "bias"):
            raise GrailError(f"{model.source.path}: llama.cpp's `llama` has no place for {name}")
        called = f"blk.{layer}.{INSIDE[part]}.{kind}"
        heads = {"attn_q": model.widths[0].heads, "attn_k": model.widths[0].kv_heads}.get(INSIDE[part], 0)
    if not heads:
        return Entry(called, info.shape, lambda: model.source.get(name), name)
    return Entry(
        called,
        info.shape,
        lambda: interleaved(model.source.get(name), heads),
        name,
        lambda tensor: halved(tensor, heads),
    )


def _scaling(model: LlamaFamily, rope: dict) -> tuple[dict[str, Any], list[Entry]]:
    """What stretches the rotary frequencies: fields, or a tensor of divisors."""
    kind = rope.get("rope_type", "default")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise GrailError(f"{model.source.path}: --to gguf does not know a partial rotary embedding")
    if kind == "default":
        return {}, []
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, []
    if kind != "llama3":
        raise GrailError(f"{model.source.path}: --to gguf does not know the rotary embedding {kind!r}")
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float64) / model.head_dim
    plain = torch.exp(-exponents * math.log(rope["rope_theta"]))
    scaled, _ = ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"))
    divisors = (plain / scaled.double()).float()
    return {}, [Entry(FREQUENCIES, tuple(divisors.shape), lambda: divisors)]
