"""The Hugging Face hub: asked once, and where it cannot be reached its libraries do not try for half a minute."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

SECONDS = 10
SWITCHES = ("huggingface_hub.constants", "datasets.config")
"""Modules that keep HF_HUB_OFFLINE, each for itself."""


@contextmanager
def at_once(repository: str, *, dataset: bool = False) -> Iterator[None]:
    """Where the hub does not answer, all within is as with HF_HUB_OFFLINE=1: only its cache is looked at."""
    with ExitStack() as stack:
        if not _answers(repository, dataset):
            for name in SWITCHES:
                if name in sys.modules:
                    stack.enter_context(_offline(sys.modules[name]))
        yield


def _answers(repository: str, dataset: bool) -> bool:
    from huggingface_hub import HfApi

    try:
        (HfApi().dataset_info if dataset else HfApi().model_info)(repository, timeout=SECONDS)
    except Exception as error:  # httpx, requests, OSError: which one depends on how the network is missing
        # a refusal is an answer, and so is a name that is not even asked for
        return getattr(error, "response", None) is not None or type(error).__name__ == "HFValidationError"
    return True


@contextmanager
def _offline(module: Any) -> Iterator[None]:
    before = module.HF_HUB_OFFLINE
    module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        module.HF_HUB_OFFLINE = before
