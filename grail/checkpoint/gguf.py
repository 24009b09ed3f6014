"""GGUF in: dequantise once into a cached safetensors folder, which is then streamed like any other."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from ..bars import without_bars, without_warnings
from ..documents import read_json
from ..errors import Circumstance, GrailError, circumstance
from .disk import locked

log = logging.getLogger(__name__)

RECORD, LOCK = "contents.json", "lock"
"""Names and bytes of all other files of a converted folder; and what is locked while it is made."""
STATED = {
    "license": "license", "license.name": "license_name", "license.link": "license_link", "languages": "language",
}  # fmt: skip
"""Keys of GGUF under `general.`, and of a model card."""


SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
CONVERSION = b"4"
"""Counts up where the same file gives another folder than before."""
LEAST_LAYER = 256
"""Bytes, of the names of its tensors alone."""


def cache_folder() -> Path:
    """GRAIL_CACHE, or XDG_CACHE_HOME/grail, or ~/.cache/grail."""
    own = os.environ.get("GRAIL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) if own else Path(base) / "grail"


def converted(file: Path) -> Path:
    """A safetensors folder (float32, tokenizer included) with the content of a GGUF file; made once per content, and
    anew where something of it is missing or cut off.

    Raises GrailError naming the file when transformers cannot read it, or would make another network of it; and naming
    the place of such folders where the system refuses to write.
    """
    target = cache_folder() / f"{file.stem}-{_fingerprint(file)}"
    if _is_whole(target):
        return target
    if target.exists():
        log.warning("%s is damaged, and is made anew from %s", target, file.name)
    log.info("converting %s to safetensors, once, into %s", file.name, target)
    try:
        _make(file, target)
    except Exception as error:
        if (sentence := circumstance(error)) is None:
            raise
        raise Circumstance(
            f"{file} cannot be converted in {target.parent}, which GRAIL_CACHE names another place for: {sentence}"
        ) from error
    return target


def _make(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f"{glob.escape(target.name)}.*/{LOCK}"):
        if lock := locked(left):  # of a process that was killed
            shutil.rmtree(left.parent)
            lock.close()
    work = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
    lock = locked(work / LOCK)
    try:
        _convert(file, work)
        _write_card(file, work)
        (work / LOCK).unlink()
        (work / RECORD).write_text(json.dumps({made.name: made.stat().st_size for made in work.iterdir()}))
        if target.exists() and not _is_whole(target):
            shutil.rmtree(target)
        try:
            os.replace(work, target)
        except OSError:
            if not _is_whole(target):  # else another process was quicker
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock:
            lock.close()


def _is_whole(folder: Path) -> bool:
    """Whether all files are there that were written, with all their bytes."""
    try:
        written = json.loads((folder / RECORD).read_text())
        return all((folder / name).stat().st_size == size for name, size in written.items())
    except (OSError, ValueError, AttributeError):
        return False


def _convert(file: Path, work: Path) -> None:
    from transformers.utils import logging as transformers_logging

    with without_bars(transformers_logging), without_warnings():
        _write_converted(file, work)


def _write_converted(file: Path, work: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .gguf_contents import Contents

    try:
        asked = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        _check_sizes(file, asked.to_dict())
        contents = Contents(file, asked)
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=asked,
            dtype=torch.float32,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except Exception as error:
        if isinstance(error, GrailError) or circumstance(error):
            raise
        raise GrailError(f"{file} cannot be read as a GGUF language model: {error}") from error
    absent = set(info["missing_keys"])
    if missing := sorted(name for name in absent if not contents.optional(name)):  # which would be random numbers
        raise GrailError(f"{file} lacks {missing[0]} ({len(missing)} such tensors); fetch it again")
    for name in absent:
        model.get_parameter(name).data.zero_()
    contents.check_read(model)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # the loaded model is marked as quantised and refuses to be saved: give its tensors to one that is not
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(work)
    tokenizer.save_pretrained(work)
    _forget_words_beyond(work, config.vocab_size)


def _forget_words_beyond(folder: Path, vocabulary: int) -> None:
    """Without the words that transformers adds of its own accord and that the network has no embedding for."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    found = read_json(file)
    words = found.get("added_tokens") or []
    within = [word for word in words if word["id"] < vocabulary]
    if len(within) < len(words):
        file.write_text(json.dumps(found | {"added_tokens": within}, ensure_ascii=False), encoding="utf-8")


def _check_sizes(file: Path, config: dict) -> None:
    """Raises GrailError for numbers beyond the bytes there are: a model made of them would take all memory."""
    size = file.stat().st_size
    for key in SIZES:
        most = size // LEAST_LAYER if key == "num_hidden_layers" else size
        if isinstance(config.get(key), int) and config[key] > most:
            raise GrailError(f"{file} has {size:,} bytes, and says {key} is {config[key]}; fetch it again")


def _write_card(file: Path, folder: Path) -> None:
    """README.md with the licence and languages that the file states, which whatever is made from it has to carry."""
    import yaml
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    found = {name: fields[f"general.{key}"].contents() for key, name in STATED.items() if f"general.{key}" in fields}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(found) if found else ''}---\n", encoding="utf-8")


def _fingerprint(file: Path) -> str:
    """Content hash, so that a changed file is converted anew; and all files where they are converted otherwise."""
    digest = hashlib.sha256(CONVERSION)
    with open(file, "rb") as handle:
        while block := handle.read(16 * 2**20):
            digest.update(block)
    return digest.hexdigest()[:12]
