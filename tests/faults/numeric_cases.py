"""Weights and text that make a repair hard, and what must hold of a run on them whatever comes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

import grail
from grail.checkpoint import reopen
from tests.faults.tally import count
from tests.killed_runs import small_runs

LAYER = "model.layers.1."
GATE, UP, DOWN = (f"{LAYER}mlp.{name}_proj" for name in ("gate", "up", "down"))
QUERY, KEY, VALUE, OUT = (f"{LAYER}self_attn.{name}_proj" for name in "qkvo")
Tensors = dict[str, torch.Tensor]
SLACK, ROUNDING = 1e-3, 1e-12
"""Of an error: both figures are computed in float32."""


def dead_channels(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"][::3] = 0
    tensors[f"{VALUE}.weight"][::3] = 0


def all_channels_dead(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"].zero_()
    tensors[f"{VALUE}.weight"].zero_()


def unread_channels(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"].zero_()
    tensors[f"{OUT}.weight"].zero_()


def duplicates(tensors: Tensors) -> None:
    for name in (GATE, UP):
        tensors[f"{name}.weight"][20:] = tensors[f"{name}.weight"][:20]
    for name in (QUERY, KEY, VALUE):
        tensors[f"{name}.weight"][8:16] = tensors[f"{name}.weight"][:8]


def nearly_duplicates(tensors: Tensors) -> None:
    """Their differences are below what a float32 Gram matrix can tell."""
    duplicates(tensors)
    tensors[f"{UP}.weight"][20:] *= 1 + 1e-6
    tensors[f"{VALUE}.weight"][8:16] *= 1 + 1e-6


def constant_channels(tensors: Tensors) -> None:
    """Of a model with biases: whatever the token, these channels say the same."""
    for name, value in ((GATE, 1.0), (UP, 3.0)):
        tensors[f"{name}.weight"][5:9] = 0
        tensors[f"{name}.bias"][5:9] = value
    tensors[f"{VALUE}.weight"][2:5] = 0
    tensors[f"{VALUE}.bias"][2:5] = 2.0


def massive(tensors: Tensors, factor: float = 1e4) -> None:
    """Some channels are so many times the rest."""
    tensors[f"{UP}.weight"][3] *= factor
    tensors[f"{VALUE}.weight"][1] *= factor


def scaled(tensors: Tensors, factor: float) -> None:
    """The producers so many times larger, the consumers as many times smaller."""
    for larger, smaller in ((UP, DOWN), (VALUE, OUT)):
        tensors[f"{larger}.weight"] *= factor
        tensors[f"{smaller}.weight"] /= factor


def nothing(tensors: Tensors) -> None:
    pass


EDITS: dict[str, Callable[[Tensors], None]] = {
    "plain": nothing,
    "dead": dead_channels,
    "all-dead": all_channels_dead,
    "unread": unread_channels,
    "duplicates": duplicates,
    "nearly-duplicates": nearly_duplicates,
    "massive": massive,
    "massive-1e8": partial(massive, factor=1e8),
    "tiny": partial(scaled, factor=1e-12),
    "huge": partial(scaled, factor=1e12),
    "vanishing": partial(scaled, factor=1e-25),
}


@contextmanager
def no_reopening() -> Iterator[None]:
    """Runs without the reopening check and without measuring the machine."""
    with ExitStack() as stack:
        stack.enter_context(small_runs())
        stack.enter_context(mock.patch.object(reopen, "verify", lambda *args, **kwargs: {"logit_difference": 0.0}))
        yield


def edited(source: Path, target: Path, edit: Callable[[Tensors], None], dtype: torch.dtype | None = None) -> Path:
    """A copy of a tiny checkpoint with other weights."""
    target.mkdir(exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        config["dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def outcome(source: Path, out: Path, **flags) -> dict | str:
    """grail.json of a run, after its numbers were looked at; or the sentence it was refused with."""
    try:
        report = grail.compress(source, output=out, overwrite=True, **flags)
    except grail.GrailError as error:
        count("numerics", "refused")
        said = str(error)
        assert "\n" not in said and "layers." in said, said
        return said
    for file in out.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert torch.isfinite(tensor).all(), name
    record = json.loads((out / "grail.json").read_text())
    assert record == json.loads(json.dumps(report.to_json()))
    promised = record["recipe"]["ridge_form"] == "anchored" and record["recipe"]["target"] == "hidden"
    for site in record["sites"]:
        judge(site, promised)
        if site["held_out_errors"] and flags.get("alpha", "auto") == "auto":
            plain, chosen = site["held_out_errors"]
            assert chosen <= plain * (1 + ROUNDING), site  # the same at twice the best alpha, which trials.py may take
    count("numerics", "finite")
    return record


def judge(site: dict, promised: bool) -> None:
    """A site's figures are numbers; promised: the repair is one that cannot be worse than none."""
    for key in ("lambda", "rcond", "error_before", "error_after", "effective_rank"):
        assert site[key] is None or (math.isfinite(site[key]) and site[key] >= 0), (key, site)
    if site["error_after"] is not None and promised:
        assert site["error_after"] <= site["error_before"] * (1 + SLACK) + 1e-12, site
    assert all(map(math.isfinite, site["held_out_errors"] or []))
    assert site["alpha"] is None or 0 <= site["alpha"] <= 1
