"""LLaMA-shaped checkpoints with random bf16 weights: the sizes of real networks without downloading one.

    python benchmarks/shapes.py --shape llama-2-7b --layers 2 --output /tmp/dense
    python benchmarks/shapes.py --shape tiny --output /tmp/tiny --windows 8 --seq-len 64

One shard per layer, one for embedding, final norm and head, an index and a config.json; no tokenizer. With --windows
also calibration.safetensors, random token ids. Every tensor depends on the seed and its own name alone, so that the
first layers of a deeper checkpoint are those of a shallower one. Shapes: D hidden size, O rows, I columns.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from grail.checkpoint.pieces import Piece
from grail.checkpoint.writer import OutputFolder
from grail.errors import GrailError

BANK = 2**22
CHUNK = 4 * 2**20
SPREAD = 0.5
CALIBRATION = "calibration.safetensors"
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
WRITE_STREAM = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Shape:
    """The sizes of a network; `layers` is how many the real one has, `tied` whether the head is the embedding."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 32000
    context: int = 4096
    theta: float = 10000.0
    tied: bool = False

    def config(self, layers: int) -> dict:
        """config.json for so many layers."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.theta,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one layer by full name."""
        kv = self.kv_heads * (self.hidden // self.heads)
        named = {
            "input_layernorm": (self.hidden,),
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "post_attention_layernorm": (self.hidden,),
            "mlp.gate_proj": (self.mlp, self.hidden),
            "mlp.up_proj": (self.mlp, self.hidden),
            "mlp.down_proj": (self.hidden, self.mlp),
        }
        return {f"model.layers.{layer}.{name}.weight": shape for name, shape in named.items()}

    def other_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that belong to no layer, by full name."""
        outer = {EMBEDDING: (self.vocabulary, self.hidden), NORM: (self.hidden,)}
        return outer if self.tied else outer | {HEAD: (self.vocabulary, self.hidden)}

    def parameters(self, layers: int) -> int:
        """How many numbers a checkpoint of so many layers holds."""
        count = lambda shapes: sum(torch.Size(shape).numel() for shape in shapes.values())  # noqa: E731
        return count(self.other_shapes()) + layers * count(self.layer_shapes(0))


SHAPES = {
    "tiny": Shape(64, 176, 8, 2, 2, vocabulary=256, context=256),
    "smollm2-135m": Shape(576, 1536, 9, 3, 30, vocabulary=49152, context=8192, theta=1e5, tied=True),
    "tinyllama-1.1b": Shape(2048, 5632, 32, 4, 22, context=2048),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-2-70b": Shape(8192, 28672, 64, 8, 80),
    "llama-3-8b": Shape(4096, 14336, 32, 8, 32, vocabulary=128256, context=8192, theta=5e5),
}


class RandomWeights:
    """bf16 tensors as raw chunks. Drawing every number would take minutes for a large network: each row is a different
    cut of one bank of normal numbers, times a scale of its row and one of its column.

    A matrix [O, I] has standard deviation 1/sqrt(I) times its scales, so that a normalised input gives outputs near 1
    and a stream over any number of layers stays finite. The scales are lognormal: channels differ in size as they do
    in trained networks. All that writes into the residual stream shares the stream's scales.
    """

    def __init__(self, shape: Shape, seed: int):
        self.seed = seed
        widest = max(shape.hidden, shape.mlp)
        numbers = torch.randn(BANK, generator=self._generator("bank"))
        self._bank = torch.cat([numbers, numbers[:widest]])
        self._stream_D = self._lognormal("stream", shape.hidden, SPREAD)

    def piece(self, name: str, shape: tuple[int, ...]) -> Piece:
        """The tensor of this name, made while it is written."""
        if len(shape) == 1:
            return Piece.of(name, self._lognormal(name, shape[0], SPREAD / 2).bfloat16())
        return Piece(name, torch.bfloat16, shape, self._chunks(name, *shape))

    def _chunks(self, name: str, rows: int, columns: int) -> Iterator[Tensor]:
        """Raw uint8 of a matrix [O, I], some rows at a time."""
        written = name.endswith(WRITE_STREAM)
        row_scale_O = self._stream_D if written else self._lognormal(name, rows, SPREAD)
        column_scale_I = self._stream_D if name == EMBEDDING else torch.ones(columns)
        column_scale_I = column_scale_I / columns**0.5
        # an odd step is coprime to the bank's size: no two rows begin at the same number
        start, step = torch.randint(BANK // 2, (2,), generator=self._generator(name)).tolist()
        offsets_O = (start + (2 * step + 1) * torch.arange(rows)) % BANK
        cuts = self._bank.unfold(0, columns, 1)
        count = max(CHUNK // columns, 1)
        for offsets, scale in zip(offsets_O.split(count), row_scale_O.split(count), strict=True):
            part = cuts.index_select(0, offsets).mul_(column_scale_I).mul_(scale[:, None])
            yield part.bfloat16().view(-1).view(torch.uint8)

    def _lognormal(self, name: str, count: int, spread: float) -> Tensor:
        return torch.randn(count, generator=self._generator(f"{name} scale")).mul_(spread).exp_()

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {purpose}".encode()))


def write_checkpoint(
    shape: str,
    output: Path | str,
    *,
    layers: int | None = None,
    seed: int = 0,
    windows: int | None = None,
    seq_len: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint of a shape in SHAPES with so many layers (None: as the real one has), and calibration ids
    int64 [windows, seq_len] when both are given. Returns the folder. Raises GrailError for what cannot be written."""
    if shape not in SHAPES:
        raise GrailError(f"--shape {shape}: choose one of {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    layers = sizes.layers if layers is None else layers
    if layers < 1:
        raise GrailError(f"--layers must be at least 1; got {layers}")
    if (windows is None) != (seq_len is None):
        raise GrailError("--windows and --seq-len go together: give both or neither")
    if windows is not None and (windows < 1 or seq_len < 2):
        raise GrailError(f"calibration needs --windows of 1 and --seq-len of 2 or more; got {windows} and {seq_len}")
    weights = RandomWeights(sizes, seed)
    groups = [*(sizes.layer_shapes(layer) for layer in range(layers)), sizes.other_shapes()]
    with OutputFolder(output, overwrite=overwrite) as out:
        for number, group in enumerate(groups, 1):
            shard = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            out.write_shard(shard, [weights.piece(name, size) for name, size in group.items()])
        out.write_json("config.json", sizes.config(layers))
        if windows is not None:
            save_file({"input_ids": token_ids(sizes, windows, seq_len, seed)}, out.partial / CALIBRATION)
        out.write_index()
        return out.finish()


def token_ids(shape: Shape, windows: int, seq_len: int, seed: int = 0) -> Tensor:
    """Random ids, int64 [windows, seq_len]; fewer windows are the first ones of more."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(shape.vocabulary, (windows, seq_len), generator=generator)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=list(SHAPES))
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--layers", type=int, help="as many as the real network has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, help="calibration windows; with --seq-len")
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--overwrite", action="store_true")
    asked = parser.parse_args()
    try:
        folder = write_checkpoint(**vars(asked))
    except GrailError as error:
        parser.error(str(error))
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
