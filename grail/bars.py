"""Progress bars and reports of other libraries, which are switched for the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_bars(library: Any) -> Iterator[None]:
    """Without those of a library (`datasets`, `transformers.utils.logging`); afterwards as they were. transformers
    switches huggingface_hub's along with its own."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    on, hub_on = library.is_progress_bar_enabled(), not are_progress_bars_disabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if on:
            library.enable_progress_bar()
        if hub_on == are_progress_bars_disabled():
            (enable_progress_bars if hub_on else disable_progress_bars)()


@contextmanager
def without_warnings() -> Iterator[None]:
    """Without transformers' warnings and reports of what was loaded, where that is judged here; then as before."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
