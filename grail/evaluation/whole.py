"""Networks of families that GRAIL cannot compress, opened whole by transformers, to be compared with those it can."""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..calibration.lengths import longest_of
from ..checkpoint.reader import SafetensorsFolder
from ..documents import check_counts, read_json
from ..errors import GrailError, first_line
from .perplexity import counted_targets

AT_ONCE = 2**13
"""Tokens of one forward."""


def load_whole(folder: Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """A causal language model of transformers in evaluation mode; dtype None: as stored. Only safetensors, no code of
    the folder. Raises GrailError naming the folder where transformers refuses."""
    from transformers import AutoModelForCausalLM

    if (file := folder / "config.json").is_file():
        check_counts(read_json(file), file, len(SafetensorsFolder(folder).names()))
    options = {"dtype": dtype or "auto", "trust_remote_code": False, "use_safetensors": True}
    try:
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval().to(device)
    except Exception as error:
        raise GrailError(f"{folder} cannot be opened by transformers: {first_line(error)}") from error


class WholeModel:
    """What evaluation asks of a network: source, vocabulary size, perplexity of windows."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype | None):
        self.source = SafetensorsFolder(folder)
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else None)
        self.device = device

    @cached_property
    def model(self) -> Any:
        """Loaded when it is first used."""
        return load_whole(self.source.path, self.dtype, self.device)

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return self.model.get_input_embeddings().num_embeddings

    @cached_property
    def config(self) -> Any:
        """As transformers reads config.json."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.source.path, trust_remote_code=False)

    @property
    def positions(self) -> int | None:
        """The longest text that it takes, from its config.json; None where rotations know no end."""
        return None if getattr(self.config, "rope_parameters", None) else longest_of(self.config)

    @torch.no_grad()
    def perplexity(self, windows_NL: Tensor, weights_NL: Tensor | None = None) -> float:
        """exp of the mean negative log-likelihood, as evaluation.perplexity has it. weights_NL: how much each token
        counts as a target, float32. Raises GrailError when it is not finite."""
        loss, length = 0.0, windows_NL.shape[1]
        weights_NL = torch.ones(windows_NL.shape) if weights_NL is None else weights_NL
        targets = counted_targets(windows_NL, weights_NL)
        if self.positions and length > self.positions:
            raise GrailError(
                f"{self.source.path} knows {self.positions} positions; {length} tokens need a smaller --seq-len"
            )
        at_once = max(1, AT_ONCE // length)
        for ids, weights in zip(windows_NL.split(at_once), weights_NL.split(at_once), strict=True):
            ids, counts = ids.to(self.device), weights[:, 1:].flatten().to(self.device)
            logits = self.model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss += (cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="none") @ counts).item()
        mean = loss / targets
        if not math.isfinite(mean):
            raise GrailError(f"{self.source.path}: the evaluation loss is not finite; try --dtype float32")
        return math.exp(min(mean, 700.0))
