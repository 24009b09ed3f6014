"""The checkpoints of a soup, opened, and refused where they cannot be averaged. Only headers are read here."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig

from ..checkpoint.carried import check_carried
from ..checkpoint.reader import PICKLES, SafetensorsFolder, TensorInfo, read_json
from ..documents import check_regular, check_writable
from ..errors import GrailError
from ..modeling_grail import PREFIX
from ..modules.names import KEY
from ..progress import Progress

SUFFIX = ".safetensors"
ONE = "a soup is made of checkpoints of one architecture"
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
HARMLESS = frozenset({
    "_name_or_path", "architectures", "attention_dropout", "attn_pdrop", "auto_map", "bos_token_id", "custom_pipelines",
    "dtype", "embd_pdrop", "eos_token_id", "hidden_dropout", "initializer_range", "pad_token_id", "resid_pdrop",
    "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Fields of config.json that do not change what the weights compute; of these the soup has the first one's."""


@dataclass(frozen=True)
class Ingredient:
    """One checkpoint: a .safetensors file, or a Hugging Face folder, of which config.json was read."""

    path: Path
    tensors: SafetensorsFolder
    config: dict[str, Any] | None = None

    @property
    def is_folder(self) -> bool:
        return self.config is not None

    def info(self, name: str) -> TensorInfo:
        return self.tensors.info(name)

    @property
    def files(self) -> set[Path]:
        """The weight files."""
        return {self.info(name).file for name in self.tensors.names()}


def open_inputs(paths: list[str], progress: Progress) -> list[Ingredient]:
    """The checkpoints in the order given. Raises GrailError naming the file and the tensor or field that does not fit;
    what can be averaged but may surprise (several float dtypes, several tokenizers) is a warning."""
    if len(paths) < 2:
        raise GrailError(f"grail soup averages two checkpoints or more; got {len(paths)}: name the others too")
    opened = [_opened(Path(path)) for path in paths]
    first = opened[0]
    for number, other in enumerate(opened):
        if other.is_folder != first.is_folder:
            folder, file = (first, other) if first.is_folder else (other, first)
            raise GrailError(f"{file.path} is a file and {folder.path} a folder: give files alone or folders alone")
        for earlier in opened[:number]:
            _distinct(earlier, other)
    for other in opened[1:]:
        if first.is_folder:
            _same_config(first, other)
        _same_tensors(first, other)
    _float_dtypes(opened, progress)
    _tokenizers(opened, progress)
    return opened


def _opened(path: Path) -> Ingredient:
    if not path.exists():
        raise GrailError(f"{path}: no such file or folder")
    if any(path.match(pattern) for pattern in PICKLES) and path.is_file():
        raise GrailError(f"{path}: weights are read only from safetensors; save the state dict with safetensors.torch")
    if path.is_file():
        if path.suffix != SUFFIX:
            raise GrailError(f"{path} is no {SUFFIX} file; name one, or a Hugging Face folder")
        found = Ingredient(path, SafetensorsFolder(path))
    else:
        config = _config(path)
        check_carried(path)
        found = Ingredient(path, SafetensorsFolder(path), config)
    if not found.tensors.names():
        raise GrailError(f"{path} holds no tensors")
    return found


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        raise GrailError(f"{folder} has no config.json: it is no Hugging Face folder; name its {SUFFIX} file instead")
    config = read_json(file)
    kind = config.get("model_type")
    if KEY in config or (folder / "grail.json").exists() or str(kind).startswith(PREFIX):
        raise GrailError(
            f"{folder} is compressed already, and other compressed networks have other channels in the same place: "
            f"make the soup of the originals, then compress it"
        )
    if not isinstance(kind, str):
        raise GrailError(f"{file} names no model_type: of a timm network name the {SUFFIX} file instead of its folder")
    check_writable(config, file)
    return config


def _distinct(one: Ingredient, other: Ingredient) -> None:
    """The same weights twice would be counted twice, which is a slip more often than an intention."""
    if {os.path.realpath(file) for file in one.files} == {os.path.realpath(file) for file in other.files}:
        raise GrailError(f"{one.path} and {other.path} are the same weights; name each checkpoint once")


def _same_config(first: Ingredient, other: Ingredient) -> None:
    found = _difference(first.config, other.config) and _difference(_settled(first), _settled(other))
    if found is None:
        return
    name, *values = found
    value, another = (json.dumps(value, default=str) for value in values)
    raise GrailError(f"{other.path / 'config.json'}: {name} is {another}, but {value} in {first.path}; {ONE}")


def _difference(config: dict, other: dict) -> tuple[str, Any, Any] | None:
    """The first field that differs, the model type before all others."""
    names = sorted((config.keys() | other.keys()) - HARMLESS, key=lambda name: (name != "model_type", name))
    return next(((n, config.get(n), other.get(n)) for n in names if config.get(n) != other.get(n)), None)


def _settled(one: Ingredient) -> dict:
    """config.json with the defaults of transformers: one version of it writes a field that another leaves out."""
    kind = one.config["model_type"]
    if kind not in CONFIG_MAPPING:
        return one.config
    fields = {name: value for name, value in one.config.items() if name not in HARMLESS | {"model_type"}}
    try:
        return AutoConfig.for_model(kind, **fields).to_dict()
    except Exception as error:  # its checks raise what they like
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise GrailError(f"{one.path / 'config.json'} is not accepted by transformers: {reason}") from error


def _same_tensors(first: Ingredient, other: Ingredient) -> None:
    for one, two in ((first, other), (other, first)):
        missing = [name for name in one.tensors.names() if name not in two.tensors]
        if missing:
            more = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
            raise GrailError(f"{one.path} holds {missing[0]}{more}, which {two.path} lacks; {ONE}")
    for name in first.tensors.names():
        one, two = first.info(name), other.info(name)
        if one.shape != two.shape:
            raise GrailError(
                f"{name} is {list(one.shape)} in {first.path} and {list(two.shape)} in {other.path}; {ONE}"
            )
        if one.dtype != two.dtype and not (one.dtype.is_floating_point and two.dtype.is_floating_point):
            dtypes = f"{_plain(one.dtype)} in {first.path} and {_plain(two.dtype)} in {other.path}"
            raise GrailError(f"{name} is {dtypes}: whole numbers and floats are not averaged; write them alike")


def _float_dtypes(opened: list[Ingredient], progress: Progress) -> None:
    first = opened[0]
    mixed = {}
    for name in first.tensors.names():
        dtypes = [one.info(name).dtype for one in opened]
        eight = next((i for i, d in enumerate(dtypes) if d.is_floating_point and d.itemsize == 1), None)
        if eight is not None:
            raise GrailError(
                f"{opened[eight].path}: {name} is {_plain(dtypes[eight])}, which means something only with its "
                f"scales; convert the checkpoint to bfloat16 first"
            )
        if len(set(dtypes)) > 1:
            mixed[name] = " and ".join(dict.fromkeys(map(_plain, dtypes)))
    if mixed:
        name, kinds = next(iter(mixed.items()))
        progress.warn(
            f"{len(mixed)} tensors differ in dtype among the inputs ({name}: {kinds}); the soup has those of the "
            f"checkpoint first in it"
        )


def _tokenizers(opened: list[Ingredient], progress: Progress) -> None:
    for name in TOKENIZERS if opened[0].is_folder else ():
        if len({_content(one.path / name) for one in opened}) > 1:
            progress.warn(f"{name} differs among the inputs; the soup has that of the checkpoint first in it")


def _content(file: Path) -> bytes | None:
    if not file.exists():
        return None
    check_regular(file)
    return file.read_bytes()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
