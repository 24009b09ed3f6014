"""The tokenizer of a checkpoint folder; its own code is never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import GrailError


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; raises GrailError naming the folder when there is none that works."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise GrailError(
            f"{folder} has no usable tokenizer ({type(error).__name__}); add its files, or give token ids in a "
            f".safetensors file"
        ) from error
