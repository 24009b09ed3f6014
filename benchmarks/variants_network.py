"""SmolLM2 for benchmarks/variants.py: transformers' own modules, a residual branch at a time, and the texts.

Shapes: B windows, L tokens, D hidden size, H a site's width, K kept, O outputs; streams are [B, L, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from quality_smollm2 import multi_head_form
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from grail.calibration import evaluation_windows, load_calibration
from grail.checkpoint.locate import SMOLLM2, locate

LENGTH, SAMPLES, TRIALS, JUDGED = 512, 32, 4, 40
SIZES = {"heads": 64, "channels": 1}


class Place(NamedTuple):
    """A site."""

    layer: int
    kind: str


def each(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A few windows at a time."""
    return torch.cat([function(part) for part in x.split(8)])


class Network:
    """The dense network; what is compressed comes in as arguments."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.config = model, tokenizer, model.config
        self.layers = len(model.model.layers)
        self.rotary = model.model.rotary_emb(torch.zeros(1, LENGTH, 1), torch.arange(LENGTH)[None])

    @classmethod
    def of_smollm2(cls) -> Network:
        folder = multi_head_form(locate(SMOLLM2).folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model, AutoTokenizer.from_pretrained(folder))

    def embed(self, ids: Tensor) -> Tensor:
        return each(ids, self.model.model.embed_tokens)

    def norm(self, place: Place) -> torch.nn.Module:
        layer = self.model.model.layers[place.layer]
        return layer.input_layernorm if place.kind == "heads" else layer.post_attention_layernorm

    def consumer(self, place: Place) -> Tensor:
        layer = self.model.model.layers[place.layer]
        return (layer.self_attn.o_proj if place.kind == "heads" else layer.mlp.down_proj).weight

    def readers(self, place: Place) -> Tensor:
        """All weights that read the branch's input, [.., D]."""
        layer = self.model.model.layers[place.layer]
        names = ("q_proj", "k_proj", "v_proj") if place.kind == "heads" else ("gate_proj", "up_proj")
        part = layer.self_attn if place.kind == "heads" else layer.mlp
        return torch.cat([getattr(part, name).weight for name in names])

    def hidden(self, place: Place, x: Tensor, reader: Tensor | None = None) -> Tensor:
        """What the site's consumer reads, [B, L, H]; reader [D, D]: a map that its readers have taken on."""
        return each(x, partial(self._hidden, place, reader=reader))

    def advance(
        self,
        place: Place,
        x: Tensor,
        kept: Tensor | None = None,
        weight: Tensor | None = None,
        reader: Tensor | None = None,
    ) -> Tensor:
        """The stream after the site."""
        weight = self.consumer(place) if weight is None else weight

        def after(part: Tensor) -> Tensor:
            h = self._hidden(place, part, reader)
            return part + (h if kept is None else h[..., kept]) @ weight.mT

        return each(x, after)

    def _hidden(self, place: Place, x: Tensor, reader: Tensor | None) -> Tensor:
        layer, read = self.model.model.layers[place.layer], self.norm(place)(x)
        read = read if reader is None else read @ reader.mT
        if place.kind == "channels":
            return layer.mlp.act_fn(layer.mlp.gate_proj(read)) * layer.mlp.up_proj(read)
        part = layer.self_attn
        q, k, v = (
            project(read).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
            for project in (part.q_proj, part.k_proj, part.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.rotary)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)

    def loss(self, x: Tensor, ids: Tensor) -> float:
        """Mean negative log-likelihood of the tokens from the stream after the last layer."""
        total, count = 0.0, 0
        for stream, window in zip(x.split(2), ids.split(2), strict=True):
            logits = self.model.lm_head(self.model.model.norm(stream))[:, :-1]
            asked = logits.flatten(0, 1), window[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(*asked, reduction="sum").item()
            count += len(asked[1])
        return total / count


@dataclass
class Texts:
    """Token ids: calibration and deciding windows, and evaluation windows by the text's name."""

    calibration: Tensor
    trial: Tensor
    evaluation: dict[str, Tensor]

    @classmethod
    def of(cls, network: Network) -> Texts:
        vocabulary, asked = network.config.vocab_size, {"seq_len": LENGTH}
        tokenizer = lambda: network.tokenizer  # noqa: E731
        found = load_calibration("builtin", tokenizer, vocabulary, samples=SAMPLES, trial=TRIALS, seed=0, **asked)
        evaluation = {
            name: evaluation_windows(name, tokenizer, vocabulary, samples=JUDGED, **asked).ids
            for name in ("builtin", "docstrings")
        }
        return cls(found.ids, found.trial, evaluation)
