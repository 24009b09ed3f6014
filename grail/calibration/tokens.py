"""Token ids, and what each token counts, as they are given: pre-tokenised files, tensors and batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.reader import SafetensorsFolder
from ..errors import GrailError
from .sources import no_such_text

IDS, WEIGHTS, MASK = "input_ids", "weights", "attention_mask"
"""Names in pre-tokenised files and batches."""


def pretokenised(path: Path, vocabulary: int, option: str, seq_len: int | None) -> Tensor:
    """input_ids of a file, int64 [N, seq_len]. Raises GrailError naming it."""
    if not path.is_file():
        raise GrailError(no_such_text(str(path), option))
    folder = SafetensorsFolder(path)
    if IDS not in folder:
        raise GrailError(f"{path} holds no tensor input_ids [windows, length]")
    ids = checked(folder.get(IDS), vocabulary, str(path))
    if seq_len is not None and seq_len > ids.shape[1]:
        raise GrailError(f"{path} holds windows of {ids.shape[1]} tokens; --seq-len {seq_len} is longer")
    return ids[:, :seq_len]


def stored_length(path: Path) -> int | None:
    """Tokens of a window of a file; None where there is none, which `pretokenised` says."""
    if not path.is_file() or IDS not in (folder := SafetensorsFolder(path)):
        return None
    return folder.info(IDS).shape[-1] if folder.info(IDS).shape else None


def from_batches(source: Any, samples: int, seq_len: int | None) -> tuple[Tensor, Tensor | None]:
    """Token ids, and the weights of those batches that have them (1 in the others; None: none has)."""
    found: list[Tensor] = []
    weights: list[Tensor | None] = []
    try:
        for batch in [source] if isinstance(source, Tensor) or hasattr(source, "keys") else source:
            if isinstance(batch, (list, tuple)) and len(batch) == 1 and isinstance(batch[0], Tensor):
                (batch,) = batch  # of a TensorDataset
            named = batch if hasattr(batch, "keys") else {IDS: batch}
            ids, own = (None if t is None else torch.atleast_2d(torch.as_tensor(t)) for t in _parts(named))
            found += list(ids)
            weights += [None] * len(ids) if own is None else list(own)
            if len(found) >= samples:
                break
        ids = torch.stack(found[:samples])[:, :seq_len].cpu()
        if seq_len is not None and ids.shape[1] < seq_len:
            raise GrailError(f"calibration holds windows of {ids.shape[1]} tokens; --seq-len {seq_len} is longer")
        if all(own is None for own in weights):
            return ids, None
        ones = torch.ones(len(found[0]))
        stacked = torch.stack([ones if own is None else own.float().cpu() for own in weights[:samples]])
        return ids, stacked[:, :seq_len]
    except GrailError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, RuntimeError, AttributeError) as error:
        raise GrailError(
            "calibration: expected token ids [windows, length]: a tensor, a list of tensors of one length, or batches "
            f"with input_ids, and with weights of the same shape if any ({type(error).__name__}: {error})"
        ) from error


def stored_weights(path: Path) -> Tensor | None:
    """weights of a file, if it has any."""
    folder = SafetensorsFolder(path)
    return _parts({name: folder.get(name) for name in (IDS, WEIGHTS, MASK) if name in folder}, str(path))[1]


def _parts(named: Any, where: str = "calibration") -> tuple[Any, Any]:
    """Token ids, and how much they count: what a mask hides counts nothing. Raises GrailError for weights or a mask of
    another shape than the ids, and for a mask that hides what others look back at."""
    weights, mask = (named.get(name) for name in (WEIGHTS, MASK))
    for name, given in ((WEIGHTS, weights), (MASK, mask)):
        if given is None:
            continue
        shape, wanted = (list(torch.atleast_2d(torch.as_tensor(tensor)).shape) for tensor in (given, named[IDS]))
        if shape != wanted:
            raise GrailError(f"{where}: {name} {shape} do not fit input_ids {wanted}")
    if mask is not None:
        seen = torch.atleast_2d(torch.as_tensor(mask)).bool()
        if bool((seen[:, 1:] & ~seen[:, :-1]).any()):
            raise GrailError(f"{where}: {MASK} hides tokens before others; pad at the right")
        if not bool(seen.all()):
            weights = seen.float() if weights is None else torch.atleast_2d(torch.as_tensor(weights)) * seen
    return named[IDS], weights


def weigh(weights: Tensor | None, ids_NL: Tensor, where: str) -> Tensor | None:
    """How much each of these tokens counts, float32 [N, L] and 1 in the mean; None where all count the same. weights:
    of these windows and of those after them. Raises GrailError naming where they come from when they are none."""
    if weights is None:
        return None
    weights_NL = weights[: ids_NL.shape[0], : ids_NL.shape[1]].float().contiguous()
    if not bool(torch.isfinite(weights_NL).all()) or bool((weights_NL < 0).any()) or not bool(weights_NL.any()):
        raise GrailError(f"{where}: weights must be finite numbers, 0 or more, and not all 0")
    return (weights_NL / weights_NL.double().mean()).float()


def checked(ids: Tensor, vocabulary: int, where: str) -> Tensor:
    """The same as int64; raises GrailError naming where they come from when they are no token ids [N, L]."""
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool or ids.shape[1] < 2 or not len(ids):
        found = f"{ids.dtype} {list(ids.shape)}"
        raise GrailError(f"{where}: input_ids must be integers [windows, length >= 2]; got {found}")
    return within(ids.long(), vocabulary, where)


def within(ids: Tensor, vocabulary: int, where: str) -> Tensor:
    """The same; raises GrailError for an id outside of the vocabulary."""
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise GrailError(f"{where}: token id {int(outside[0])} is not within the model's vocabulary of {vocabulary}")
    return ids
