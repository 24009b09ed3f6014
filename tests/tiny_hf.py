"""Tiny networks of transformers' own vision classes, with random weights, and inputs for them.

Where the blocks lie and how wide they are comes from transformers' sources and the configurations here, not from
grail.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

import grail
from grail.families import describe
from grail.families.network import TEXT

WIDTH, HIDDEN, HEADS, SIZE, END, LENGTH = 32, 48, 4, 16, 61, 12
SHARED = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS}
IMAGES = SHARED | {"intermediate_size": HIDDEN, "image_size": SIZE, "patch_size": 8}
DINO = SHARED | {"image_size": SIZE, "patch_size": 8, "mlp_ratio": 2}
TOWER = IMAGES | {"projection_dim": 16}
WORDS = SHARED | {
    "intermediate_size": HIDDEN, "vocab_size": 62, "max_position_embeddings": LENGTH, "projection_dim": 16,
    "bos_token_id": 60, "eos_token_id": END,
}  # fmt: skip
BOTH = {"text_config": WORDS, "vision_config": TOWER, "projection_dim": 16}
LABELS = {"id2label": {number: str(number) for number in range(4)}}


@dataclass
class Kind:
    """A class with the options of its configuration, and where its blocks lie; inner: the module of the attention that
    holds the projections."""

    name: str
    options: dict
    blocks: str
    attention: str = "attention"
    mlp: tuple[str, ...] = ("fc1", "fc2")
    hidden: int = HIDDEN
    inner: str = ""
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    size: str = "head_dim"

    def build(self, seed: int = 0) -> nn.Module:
        made = getattr(transformers, self.name)
        return randomised(made(made.config_class(**self.options)), seed)


SWIGLU = {"mlp": ("gate_proj", "up_proj", "down_proj"), "hidden": 48}  # two thirds of 64, a multiple of 8
INNER: dict = {}
if Version(transformers.__version__) < Version("5.18"):  # where DINOv2 has other modules
    SWIGLU["mlp"] = ("weights_in", "weights_out")
    INNER = {"inner": ".attention", "projections": ("query", "key", "value"), "size": "attention_head_size"}
KINDS = {
    "vit": Kind("ViTModel", IMAGES, "layers"),
    "vit-classifier": Kind("ViTForImageClassification", IMAGES | LABELS, "vit.layers"),
    "deit": Kind("DeiTModel", IMAGES, "layers"),
    "deit-classifier": Kind("DeiTForImageClassification", IMAGES | LABELS, "deit.layers"),
    "deit-distilled": Kind("DeiTForImageClassificationWithTeacher", IMAGES | {"qkv_bias": False}, "deit.layers"),
    "dinov2": Kind("Dinov2Model", DINO, "encoder.layer", hidden=64, **INNER),
    "dinov2-swiglu": Kind(
        "Dinov2ForImageClassification", DINO | {"use_swiglu_ffn": True}, "dinov2.encoder.layer", **SWIGLU, **INNER
    ),
    "clip": Kind("CLIPModel", BOTH, "vision_model.encoder.layers", "self_attn"),
    "clip-classifier": Kind(
        "CLIPForImageClassification", BOTH | LABELS, "vision_model.encoder.layers", "self_attn"
    ),
    "clip-vision": Kind("CLIPVisionModel", TOWER, "encoder.layers", "self_attn"),
    "clip-vision-projected": Kind(
        "CLIPVisionModelWithProjection", TOWER, "vision_model.encoder.layers", "self_attn"
    ),
    "clip-text": Kind("CLIPTextModel", WORDS, "encoder.layers", "self_attn"),
    "clip-text-projected": Kind("CLIPTextModelWithProjection", WORDS, "text_model.encoder.layers", "self_attn"),
}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", list(KINDS))


@torch.no_grad()
def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases, positions and scales that are not trivial."""
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.dim() in (2, 4):
            nn.init.normal_(parameter, std=1.4 * parameter[0].numel() ** -0.5)
        elif ("norm" in name and name.endswith("weight")) or "lambda" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name != "logit_scale":
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def texts(count: int, seed: int = 1, length: int = LENGTH) -> Tensor:
    """Token ids of lengths that differ, filled up with the end itself as CLIP's tokenizer does."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (count, length), generator=random)
    ends = torch.arange(count) % 6 + 3
    return ids.masked_fill(torch.arange(length) >= ends[:, None], END)


def inputs_of(network, count: int, seed: int = 1) -> Tensor:
    return texts(count, seed) if network.reads == TEXT else images(count, seed)


def compress(module: nn.Module, count: int = 16, **flags):
    given = {network.reads: inputs_of(network, count) for network in describe(module)}
    calibration = {"calibration": given.get("images"), "calibration_text": given.get("text")}
    return grail.compress(module, samples=count, **calibration | flags)


@torch.no_grad()
def answers(module: nn.Module, count: int = 16, seed: int = 1) -> list[Tensor]:
    """Logits, else pooled features, of each tower."""
    found = []
    for network in describe(module):
        told = network.run(inputs_of(network, count, seed))
        names = ("logits", "image_embeds", "text_embeds", "pooler_output", "last_hidden_state")
        found.append(next(told[name] for name in names if name in told))
    return found


def errors(module: nn.Module, other: nn.Module, **asked) -> list[float]:
    pairs = zip(answers(module, **asked), answers(other, **asked), strict=True)
    return [(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item() for a, b in pairs]


def blocks_of(kind: str, module: nn.Module) -> list[str]:
    first = [f"{KINDS[kind].blocks}.{number}" for number in range(2)]
    return first + [name.replace("vision", "text") for name in first] if kind == "clip" else first


def tokenizer() -> transformers.CLIPTokenizer:
    """Letters, and some pairs of them."""
    letters = "abcdefghijklmnopqrstuvwxyz."
    merges = [("t", "h"), ("th", "e</w>")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "th", "the</w>"]
    ids = {word: number for number, word in enumerate(words)} | {"<|startoftext|>": 60, "<|endoftext|>": END}
    return transformers.CLIPTokenizer(vocab=ids, merges=merges)


PROCESSOR = {"size": {"height": SIZE, "width": SIZE}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
CAPTIONS = ["a photo of the cat.", "the dog", "a bird in the air", "two of the cats", "one", "the the the", "zero", "x"]
