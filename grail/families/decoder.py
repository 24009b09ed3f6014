"""Run a transformers decoder one layer at a time, each layer in phases, never the whole model in memory.

The blocks are transformers' own layer classes, built on the meta device with their tensors assigned. Rotary
embeddings, masks and keyword arguments come from the model's own forward, run once per batch shape with recorders in
the layers' places. Shapes: B windows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from grail_kernels.inputs import all_finite

from ..checkpoint.reader import SafetensorsFolder
from ..errors import GrailError
from ..reduction import Reduction
from .base import OutputFormat, Site
from .block import Block, Part

ROOT, LAYERS = "model.", "model.layers."
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LOGIT_ROWS = 512
SHAPES = 2
"""Chunks come in so many shapes: full ones, and a last one."""


class _Recorder(nn.Module):
    """Stands for a layer while the model's forward is asked what it passes to each."""

    def __init__(self):
        super().__init__()
        self.kwargs: dict = {}

    def forward(self, hidden: Tensor, **kwargs) -> Tensor:
        self.kwargs = kwargs
        return hidden


class Decoder(ABC):
    """A causal language model in a folder: embeds, gives out blocks, and computes logits, reading what is needed.

    dtype is the compute dtype; `written_as` (or None) the dtype that weights are rounded to first, so that a run which
    writes another dtype than it reads sees the network it writes.
    """

    def __init__(
        self,
        source: SafetensorsFolder,
        config: PreTrainedConfig,
        parts: dict[str, Part],
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        written_as: torch.dtype | None = None,
    ):
        self.source, self.config, self.parts = source, config, parts
        self.device, self.dtype, self.written_as = torch.device(device), dtype, written_as
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        self._check_tensors(skeleton)
        self.left_out: list[str] = []
        """Stored tensors that the class does not ask for, and that count as not there."""
        self._layers = skeleton.model.layers
        self._norm = skeleton.model.norm
        self.tied = self._is_tied(skeleton)
        self._shell = skeleton.model
        self._recorders = [_Recorder() for _ in self._layers]
        self._shell.layers = nn.ModuleList(self._recorders)
        self._shell.norm = nn.Identity()
        rotary = self._shell.rotary_emb  # its own configuration: with widths by layer, one layer's
        self._new_rotary = lambda: type(rotary)(config=rotary.config).to(self.device)
        self._shell.rotary_emb = self._new_rotary()
        self._recorded: dict[tuple[int, int], list[dict]] = {}

    @property
    def layer_count(self) -> int:
        return len(self._layers)

    @staticmethod
    def layer_of(name: str) -> int | None:
        """The layer a tensor belongs to; None for embedding, final norm and head."""
        number = name.removeprefix(LAYERS).split(".", 1)[0]
        return int(number) if name.startswith(LAYERS) and number.isdecimal() else None

    @staticmethod
    def prefix(layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"{LAYERS}{layer}."

    @abstractmethod
    def sites(self, gqa: str = "query") -> list[Site]:
        """Every site in execution order."""

    @abstractmethod
    def part_of(self, site: Site) -> str:
        """The residual branch a site lies in: a key of `parts`."""

    @abstractmethod
    def narrow(
        self, site: Site, reduction: Reduction, consumer_OK: Tensor, bias_O: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The site's tensors after the reduction, in their stored dtypes: producers narrowed, consumer replaced.

        bias_O: the consumer's whole new bias; None leaves it as it is.
        """

    @abstractmethod
    def output_format(
        self, sites: list[Site], kept: dict[str, int], *, given_bias: Collection[str] = (), asked: str = "auto"
    ) -> OutputFormat:
        """How the result will be written when each site keeps kept[site.name] units per group; decided before work.

        given_bias: names of the sites whose consumers get one; asked: auto, uniform, grail or
        padded. Raises GrailError, saying what to choose, where the format asked for cannot be.
        """

    def embed(self, ids_BL: Tensor) -> Tensor:
        """[B, L, D]; only the rows that occur are read."""
        unique, position = ids_BL.unique(return_inverse=True)
        rows = self._as_written(EMBEDDING, self.source.rows(EMBEDDING, unique))
        return rows[position.to(self.device)]

    def block(self, index: int) -> Block:
        """Layer `index`; its tensors are read as they are needed, in the compute dtype. Reading raises GrailError
        naming a tensor with a NaN."""
        module = copy.deepcopy(self._layers[index]).requires_grad_(False)
        prefix = self.prefix(index)
        return Block(
            module, self.parts, lambda name: self._tensor(prefix + name), lambda b, n: self._layer_kwargs(index, b, n)
        )

    def tail(self) -> Callable[[Tensor], Tensor]:
        """hidden [..., D] -> logits [..., V] in float32; final norm and head are read once."""
        norm = copy.deepcopy(self._norm)
        norm.load_state_dict({name: self._tensor(f"{ROOT}norm.{name}") for name in norm.state_dict()}, assign=True)
        head_VD = self._tensor(EMBEDDING if self.tied else HEAD)
        return lambda hidden: nn.functional.linear(norm(hidden), head_VD).float()

    def stored(self, name: str) -> Tensor:
        """A tensor in its stored dtype, on the compute device. Raises GrailError naming it when it holds a NaN."""
        return self._finite(name, self.source.get(name)).to(self.device)

    def _tensor(self, name: str) -> Tensor:
        return self._as_written(name, self.source.get(name))

    def _as_written(self, name: str, tensor: Tensor) -> Tensor:
        """In the compute dtype, after rounding to what will be written; refuses NaN and infinity, naming the tensor."""
        return self._finite(name, tensor.to(self.written_as or tensor.dtype)).to(self.device, self.dtype)

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not all_finite(tensor):
            raise GrailError(
                f"{self.source.path}: {name} holds NaN or infinite weights (as {tensor.dtype}); fetch or save it again"
            )
        return tensor

    def _layer_kwargs(self, index: int, batch: int, length: int) -> dict:
        if (batch, length) not in self._recorded:
            if len(self._recorded) == SHAPES:
                self._recorded.pop(next(iter(self._recorded)))
            # a fresh module for every shape: with dynamic rope a longer window would leave its frequencies behind
            self._shell.rotary_emb = self._new_rotary()
            blank = torch.zeros(1, device=self.device, dtype=self.dtype)
            with torch.no_grad():
                self._shell(inputs_embeds=blank.expand(batch, length, self.config.hidden_size), use_cache=False)
            self._recorded[batch, length] = [recorder.kwargs for recorder in self._recorders]
        return self._recorded[batch, length][index]

    def _is_tied(self, skeleton: nn.Module) -> bool:
        """Whether the head is the embedding. Like transformers: not when both are stored and differ."""
        if skeleton.get_input_embeddings().weight is not skeleton.get_output_embeddings().weight:
            return False
        return HEAD not in self.source or torch.equal(self.source.get(HEAD), self.source.get(EMBEDDING))

    def _check_tensors(self, skeleton: nn.Module) -> None:
        """Every tensor the class needs is there, in its shape and in a floating-point dtype."""
        tied = set(getattr(skeleton, "_tied_weights_keys", None) or ()) if self.config.tie_word_embeddings else set()
        if len(skeleton.model.layers) < 1:
            raise GrailError(f"{self.source.path / 'config.json'} asks for no layers at all (num_hidden_layers)")
        for name in self.source.names():
            if (self.layer_of(name) or 0) >= len(skeleton.model.layers):
                raise GrailError(f"{self.source.path} holds {name}, but config.json ends before that layer")
        for name, tensor in skeleton.state_dict().items():
            if name in tied and name not in self.source:
                continue
            info = self.source.info(name)
            if info.shape != tuple(tensor.shape):
                raise GrailError(
                    f"{info.file}: {name} has shape {list(info.shape)}, but config.json asks for {list(tensor.shape)}"
                )
            if info.dtype.itemsize < 2 or not info.dtype.is_floating_point:
                raise GrailError(f"{info.file}: {name} is stored as {info.dtype}; only float weights can be compressed")
