"""Random small language models x methods x options, whole: what is written opens to the same network, is counted right
and is no worse for the repair; and chunks, threads and a second run change nothing.

A case is a number: everything about it is drawn from it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

import grail
import grail.workspace
from grail.errors import GrailError
from grail.evaluate import evaluate
from grail.selectors import methods
from tests.faults.judge import blames_what_was_asked
from tests.faults.tally import count, times
from tests.killed_runs import files_of
from tests.test_stream_target import off, tensors_of
from tests.tiny import VOCABULARY, tiny_calibration, tiny_model

pytestmark = pytest.mark.usefixtures("reopen_here", "small_runs_on_one_thread")
METHODS = sorted(methods().keys() - {"wanda", "mag-l2"})
TYPES = ("llama", "llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss")
PAIRS = list(itertools.product(METHODS, ["hidden", "stream"]))
ONCE = 60
"""Cases, times GRAIL_FAULTS."""


def network(draw: random.Random) -> tuple[str, dict[str, Any]]:
    """A model type and its sizes."""
    groups, each, head_dim = draw.choice([1, 2, 3]), draw.choice([1, 2, 3]), draw.choice([4, 8])
    kind, biases = draw.choice(TYPES), draw.random() < 0.3
    sizes = {
        "hidden_size": draw.choice([36, 72]),
        "intermediate_size": draw.choice([8, 21, 40]),
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "num_attention_heads": groups * each,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
        "tie_word_embeddings": draw.random() < 0.5,
        "seed": draw.randrange(1000),
    }
    if kind == "llama" and biases:
        sizes |= {"attention_bias": True, "mlp_bias": True}
    return kind, sizes


def options(draw: random.Random) -> dict[str, Any]:
    """Of grail.compress. Those that go together badly are drawn too, and refused."""
    found: dict[str, Any] = {"method": draw.choice(METHODS), "ratio": draw.choice([0.0, 0.2, 0.45, 0.7])}
    maybe = {
        "attn_ratio": [0.0, 0.34, 0.8],
        "mlp_ratio": [0.0, 0.5, 0.9],
        "bias": [True, False],
        "target": ["stream"],
        "ridge": [1e-6, 1e-2, 1.0],
        "ridge_form": ["paper"],
        "allocation": ["uniform", "log", "global"],
        "format": ["uniform", "grail", "padded"],
        "gqa": ["group"],
        "output_dtype": ["bfloat16", "float16"],
        "compensate": [False],
        "round_to": [4],
        "head_multiple": [2],
        "store": ["disk"],
    }
    for name, values in maybe.items():
        if draw.random() < 0.25:
            found[name] = draw.choice(values)
    if found.get("target") == "stream" and draw.random() < 0.5:
        found["sweeps"] = 2
    if found["method"] == "wanda-pp-sp":
        found["set"] = {"passes": "1", "windows": "4", "learning_rate": "1e-3"}
    return found


def compressed(source: Path, ids: Path, out: Path, **asked: Any) -> grail.Report:
    return grail.compress(source, calibration=str(ids), eval="none", output=out, **asked)


@torch.no_grad()
def perplexity(folder: Path, ids: torch.Tensor) -> float:
    """By what opens the folder, all windows at once."""
    logits = grail.load(folder).float().eval()(ids).logits[:, :-1].flatten(0, 1)
    return math.exp(cross_entropy(logits, ids[:, 1:].flatten()).item())


@pytest.mark.parametrize("case", range(times(ONCE)))
def test_what_is_written_is_what_is_said(tmp_path, case):
    draw = random.Random(case)
    kind, sizes = network(draw)
    asked = options(draw)
    tiny_model(kind, **sizes).save_pretrained(tmp_path / "source")
    file = tiny_calibration(tmp_path / "ids.safetensors", windows=draw.choice([5, 9]), length=draw.choice([12, 33]))
    try:
        report = compressed(tmp_path / "source", file, tmp_path / "out", **asked)
    except GrailError as refusal:
        assert blames_what_was_asked(str(refusal), asked), refusal
        assert not (tmp_path / "out").exists()
        count("consistency", "refused")
        return
    told = json.loads((tmp_path / "out" / "grail.json").read_text())
    tensors, dense = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "source")
    assert all(t.isfinite().all() for t in tensors.values())
    assert told["parameters"]["before"] == sum(t.numel() for t in dense.values())
    if told["format"] == "padded":
        assert told["parameters"]["after"] <= sum(t.numel() for t in tensors.values())
    else:
        assert told["parameters"]["after"] == sum(t.numel() for t in tensors.values())
    for site in told["sites"]:
        width = tensors[f"{site['name']}.weight"].shape[1]
        assert width == site["after"] or (told["format"] == "padded" and width >= site["after"])
        if site["error_after"] is not None and asked.get("ridge_form") != "paper":
            assert site["error_after"] <= site["error_before"] * (1 + 1e-3) + 1e-6, site
    ids = torch.randint(VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(case))
    save_file({"input_ids": ids}, tmp_path / "held_out.safetensors")
    found = evaluate(str(tmp_path / "out"), data=str(tmp_path / "held_out.safetensors"), dtype="float32")
    (streamed,) = (each["perplexity"] for each in found["models"].values())
    assert streamed == pytest.approx(perplexity(tmp_path / "out", ids), rel=1e-4)
    if all(site["before"] == site["after"] for site in told["sites"]) and "output_dtype" not in asked:
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in dense.items())
    assert report.parameters == (told["parameters"]["before"], told["parameters"]["after"])
    count("consistency", "right")


PLAIN = {"llama": {}, "qwen2": {"num_key_value_heads": 3}}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two networks, and windows for them."""
    folder = tmp_path_factory.mktemp("sources")
    for kind, sizes in PLAIN.items():
        tiny_model(kind, **sizes).save_pretrained(folder / kind)
    tiny_calibration(folder / "ids.safetensors", windows=13, length=29)
    return folder


@pytest.mark.parametrize("method, target", PAIRS)
def test_a_second_run_gives_the_same_bytes(sources, tmp_path, method, target):
    for name in "ab":
        compressed(sources / "llama", sources / "ids.safetensors", tmp_path / name, method=method, target=target)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    count("consistency", "same bytes")


@pytest.mark.parametrize("case, method, target", [(i, *pair) for i, pair in enumerate(PAIRS)])
def test_chunks_and_threads_change_nothing_but_rounding(sources, tmp_path, monkeypatch, case, method, target):
    """Sums of float32 in another order: masks are equal, weights to a thousandth."""
    asked = {"method": method, "target": target, "ratio": 0.4, "ridge": 0.01}
    kind, runs = list(PLAIN)[case % 2], {}
    for name, chunk, threads in (("one", 29, 1), ("some", 80, 1), ("all", 10_000, 2)):
        monkeypatch.setattr(grail.workspace, "CHUNK_TOKENS", chunk)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            compressed(sources / kind, sources / "ids.safetensors", tmp_path / name, **asked)
        finally:
            torch.set_num_threads(before)
        runs[name] = tensors_of(tmp_path / name)
    for other in ("some", "all"):
        assert all(off(runs[other][name], tensor) < 1e-3 for name, tensor in runs["one"].items())
        count("consistency", "same but for rounding")
