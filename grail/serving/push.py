"""`grail push`: a compressed checkpoint to the Hugging Face hub, behind the hub's own login."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..checkpoint.writer import CANDIDATES, REPLACED, STORE
from ..errors import GrailError, first_line
from ..page.card import card
from ..page.run import RAN, read_run
from ..page.source_card import HUB_ID, README, source_card

LEFT_OUT = (RAN, "lock", "journal.jsonl")
"""run.json tells of the machine; the others are there while a run works."""
WORKING = (STORE, CANDIDATES, REPLACED)
"""Folders left by a run that was cut off as it finished: hidden states of the calibration data, an older result."""


def push(
    path: str | Path, repo: str, *, private: bool = False, message: str | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Upload an output folder as the repository `repo` (OWNER/NAME), which is created where it is missing, in one
    commit. In README.md, unless somebody edited it, the name on the hub takes the place of the folder's.

    Returns {schema_version, repo, url, files: [{name, bytes}], dry_run}. dry_run: nothing is sent. Raises GrailError
    for bad input, without a login, and where the hub refuses or cannot be reached.
    """
    _check_name(repo)
    folder = Path(path)
    run = read_run(folder)
    if not list(folder.glob("*.safetensors")):
        raise GrailError(f"{folder} holds no weights (*.safetensors)")
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if _goes(folder, file)}
    contents: dict[str, Path | bytes] = dict(files) | {README: _card(folder, run, repo)}
    told = {
        "schema_version": 1,
        "repo": repo,
        "url": f"https://huggingface.co/{repo}",
        "files": [{"name": name, "bytes": _size(contents[name])} for name in sorted(contents)],
        "dry_run": dry_run,
    }
    if not dry_run:
        method = run.recipe.get("method", "grail")
        told["url"] = _upload(repo, contents, private, message or f"Upload a network compressed with {method}")
    return told


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not HUB_ID.fullmatch(repo) or ".." in repo or not repo.isascii():
        raise GrailError(f"{repo} is no name for the hub; it is OWNER/NAME, such as me/llama-2-5b")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise GrailError(f"{repo} is no name for the hub: {first_line(error)}") from error


def _goes(folder: Path, file: Path) -> bool:
    """Raises GrailError for a link out of the folder: what it leads to was never meant for the hub."""
    parts = file.relative_to(folder).parts
    hidden = any(part.startswith(".") or part.endswith((".partial", ".tmp")) for part in parts)
    if hidden or parts[0] in WORKING or file.name in LEFT_OUT:
        return False
    real = Path(os.path.realpath(file))  # unlike resolve, without an error where a link leads back to itself
    if not real.is_relative_to(folder.resolve()):
        raise GrailError(f"{file} is a link out of the folder; put the file itself there, or take the link away")
    return file.is_file()


def _card(folder: Path, run: Any, repo: str) -> bytes:
    """That of the folder with its name on the hub; one that is not as it was written is sent as it is."""
    file = folder / README
    source = source_card(folder)
    if file.is_file() and (there := file.read_bytes()) != card(run, source, folder).encode(errors="replace"):
        return there
    return card(type(run)(repo, run.grail, run.ran), source, folder).encode(errors="replace")


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _upload(repo: str, contents: dict[str, Path | bytes], private: bool, message: str) -> str:
    """The address of the repository."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    api = HfApi()
    try:
        api.whoami()
    except errors.LocalTokenNotFoundError as error:
        raise GrailError("grail push needs a login: run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:
        raise GrailError(_refusal("the hub does not take this login", error)) from error
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        sent = [CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in contents.items()]  # fmt: skip
        api.create_commit(repo, operations=sent, commit_message=message)
    except Exception as error:
        raise GrailError(_refusal(f"{repo} could not be uploaded", error)) from error
    return str(address)


def _refusal(what: str, error: Exception) -> str:
    """With the hub's own words, or that it was not reached."""
    if getattr(error, "response", None) is None:
        return f"{what}: the hub cannot be reached ({type(error).__name__}: {first_line(error)})"
    return f"{what}: {first_line(error)}"
