"""A tokenizer as a GGUF file holds it, from tokenizer.json: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

llama.cpp splits text with regular expressions of its own, chosen by a name (`pre`); which one does what the tokenizer
does is read from its pre-tokenizer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..calibration.tokenizer import load_tokenizer
from ..documents import read_json
from ..errors import GrailError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _LETTERS + r"|\p{N}" + _REST: "qwen2",
}
"""Regular expressions of Split, and llama.cpp's name for each."""
DEFAULT = "default"
WHOLE_WORDS = "llama-bpe"
"""The one where llama.cpp takes a word that is a token as it is (ignore_merges)."""
SPACE = "▁"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass
class Vocabulary:
    """model: `gpt2` or `llama`; tokens, types and (of `llama`) scores by id; special: ids by role; adds: whether text
    begins with bos and ends with eos, as transformers tokenises it."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    space_prefix: bool = False
    chat_template: str | None = None


def vocabulary(folder: Path, size: int) -> Vocabulary:
    """Of a checkpoint folder whose embedding has `size` rows. Raises GrailError where there is no tokenizer that
    llama.cpp knows."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise GrailError(f"{folder} has no tokenizer.json, without which llama.cpp cannot read text")
    described = read_json(file)
    model = described.get("model")
    loaded = load_tokenizer(folder)
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise GrailError(f"{file}: --to gguf knows tokenizers of the type BPE only")
    spm = bool(model.get("byte_fallback"))
    try:  # first of all: told to describe itself, the library takes memory for as many words as the largest id says
        tokens, types = _tokens(file, described, size, spm)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    except (KeyError, TypeError, AttributeError) as error:
        raise GrailError(f"{file}: its words cannot be read ({type(error).__name__}: {error})") from error
    backend = getattr(loaded, "backend_tokenizer", None)
    used = described if backend is None else json.loads(backend.to_str())  # a class may split otherwise than its file
    _check_unchanged(file, used, spm)
    pre = DEFAULT
    if spm:
        _check_whole(file, used.get("pre_tokenizer"))
    else:
        pre = _pre(file, used.get("pre_tokenizer"))
    if model.get("ignore_merges") and pre != WHOLE_WORDS:
        raise GrailError(f"{file}: llama.cpp merges words that its vocabulary holds too, against ignore_merges")
    found = Vocabulary(
        model="llama" if spm else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if spm else [],
        merges=[] if spm else merges,
        special=_special(loaded, size),
        adds=_adds(loaded),
        space_prefix=spm and "".join(loaded.tokenize("a")).startswith(SPACE),
    )
    template = getattr(loaded, "chat_template", None)
    found.chat_template = template if isinstance(template, str) else None
    return found


def _check_unchanged(file: Path, described: dict, spm: bool) -> None:
    """Raises GrailError where text or words are changed before they are merged, which llama.cpp would not do."""
    normalizer = described.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        changed = step.get("pattern"), step.get("content")
        spaces = step.get("type") == "Replace" and changed == ({"String": " "}, SPACE)
        in_front = step.get("type") == "Prepend" and step.get("prepend") == SPACE
        known = spaces or in_front if spm else step.get("type") == "NFC"
        if step and not known:
            raise GrailError(f"{file}: llama.cpp does not change text as {step.get('type')} does, its normalizer")
    for key in ("end_of_word_suffix", "continuing_subword_prefix"):
        if described["model"].get(key):
            raise GrailError(f"{file}: --to gguf does not know the {key} of its words")


def _tokens(file: Path, described: dict, size: int, spm: bool) -> tuple[list[str], list[int]]:
    """By id; ids that no token has are filled up."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    added = {entry["content"]: entry for entry in described.get("added_tokens") or []}
    ids = described["model"]["vocab"] | {content: entry["id"] for content, entry in added.items()}
    for number in range(size):
        while tokens[number] in ids:
            tokens[number] = f"[{tokens[number]}]"
    unknown = described["model"].get("unk_token")
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < size:
            raise GrailError(f"{file}: {token!r} has the id {number}, the embedding has {size} rows")
        tokens[number] = token
        if token in added:
            types[number] = CONTROL if added[token].get("special") else USER_DEFINED
        else:
            types[number] = BYTE if spm and _BYTE.fullmatch(token) else NORMAL
        if spm and token == unknown:
            types[number] = UNKNOWN
    return tokens, types


def _steps(described: Any) -> list[dict]:
    """Those of a pre-tokenizer."""
    return described.get("pretokenizers", [described]) if isinstance(described, dict) else []


def _check_whole(file: Path, described: Any) -> None:
    """Raises GrailError where text is split or put in other characters before it is merged, which SentencePiece does
    not do."""
    for step in _steps(described):
        spaces = step.get("type") == "Metaspace" and step.get("replacement", SPACE) == SPACE
        if not spaces or step.get("split", True):
            raise GrailError(
                f"{file}: llama.cpp merges text with byte_fallback as a whole, and {step.get('type')} splits it before"
            )


def _pre(file: Path, described: Any) -> str:
    """llama.cpp's name for how text is split before merging."""
    steps = _steps(described)
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and steps[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
            pattern = (steps[0].get("pattern") or {}).get("Regex")
            if pattern in SPLITS and steps[0].get("behavior") == "Isolated" and not steps[0].get("invert"):
                return SPLITS[pattern]
    raise GrailError(
        f"{file}: how it splits text is none of what --to gguf knows (gpt-2, smollm, llama-bpe, qwen2); llama.cpp's "
        f"own convert_hf_to_gguf.py knows more"
    )


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges the pair whose result scores highest: minus the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    last = float(-len(merges) - 1)
    return [-float(ranks[token]) if token in ranks else last for token in tokens]


def _special(loaded: Any, size: int) -> dict[str, int]:
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {role: getattr(loaded, f"{name}_token_id", None) for role, name in roles.items()}
    return {role: number for role, number in found.items() if isinstance(number, int) and 0 <= number < size}


def _adds(loaded: Any) -> dict[str, bool]:
    ids = loaded("a").input_ids
    bos, eos = loaded.bos_token_id, loaded.eos_token_id
    return {"bos": bos is not None and ids[:1] == [bos], "eos": eos is not None and len(ids) > 1 and ids[-1] == eos}
