"""Vision networks whose folder, images, captions or weights are unsound through a whole run: compressed, written,
opened again and measured."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import grail
from grail.modules.evaluate import evaluate_folders
from tests import tiny_hf
from tests.faults.mutators import damaged, mangled, misencoded
from tests.faults.series import Series
from tests.faults.test_images import linked, picture
from tests.faults.test_vision import VALUES
from tests.test_hf_folder import CAPTIONS, PROCESSOR, tokenizer

SIDE, TIMM = tiny_hf.SIZE, "timm/test_resnet"
CAPTIONED = "\n".join(CAPTIONS)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """What a whole run reads: folders of transformers, weights for timm, images and captions."""
    home = tmp_path_factory.mktemp("runs")
    for name, kind in (("vit", "vit-classifier"), ("clip", "clip")):
        tiny_hf.KINDS[kind].build().save_pretrained(home / name)
        (home / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    tokenizer().save_pretrained(home / "clip")
    (home / "vit" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), home / "weights.safetensors")
    for number in range(12):
        folder = home / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture("png", size=SIDE))
    pixels = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(home / "images.npz", images=pixels, labels=np.arange(12) % 4)
    (home / "captions.txt").write_text(CAPTIONED)
    return home


Spoil = Callable[[Path, Random], str]


def json_of(*names: str) -> Spoil:
    def spoil(case: Path, chance: Random) -> str:
        file = case / chance.choice(names)
        how, content = mangled(json.loads(file.read_text()), chance, VALUES)
        file.write_bytes(content)
        return f"{file.name} {how}"

    return spoil


def bytes_of(name: str, most: int | None = None) -> Spoil:
    def spoil(case: Path, chance: Random) -> str:
        file = case / name
        how, content = damaged(file.read_bytes(), chance, chance.choice((most, None)))
        file.write_bytes(content)
        return f"{name} {how}"

    return spoil


def numbers_of(name: str) -> Spoil:
    """Tensors that are sound as files, with numbers in them that nothing is to be made of, or of another kind."""

    def spoil(case: Path, chance: Random) -> str:
        tensors = load_file(case / name)
        key = chance.choice(sorted(tensors))
        tensor = tensors[key]
        how = chance.choice(("nan", "infinite", "huge", "nothing", "half", "whole", "shape", "missing", "more"))
        changes: dict[str, Callable[[], torch.Tensor]] = {
            "nan": lambda: tensor.float().masked_fill(torch.arange(tensor.numel()).view(tensor.shape) == 0, torch.nan),
            "infinite": lambda: tensor.float().masked_fill(tensor > 0, torch.inf),
            "huge": lambda: tensor.float() * 1e30,
            "nothing": lambda: torch.zeros_like(tensor),
            "half": lambda: tensor.half(),
            "whole": lambda: tensor.long(),
            "shape": lambda: tensor.reshape(-1)[:-1].contiguous(),
        }
        if how in changes:
            tensors[key] = changes[how]()
        elif how == "missing":
            del tensors[key]
        else:
            tensors["x." + key] = tensor.clone()
        save_file(tensors, case / name)
        return f"{name} {how} {key}"

    return spoil


def an_image(case: Path, chance: Random) -> str:
    if chance.random() < 0.3:
        return linked(case / "images", chance)
    kind = chance.choice(("png", "jpeg", "gif", "bmp", "tiff", "webp"))
    how, content = damaged(picture(kind, size=SIDE), chance, chance.choice((40, None)))
    (case / "images" / "b" / f"2.{kind}").write_bytes(content)
    return f"{kind} {how}"


def arrays(case: Path, chance: Random) -> str:
    """Archives with what are no images, or labels of others."""
    images = np.zeros((12, SIDE, SIDE, 3), np.uint8)
    labels: np.ndarray = np.arange(12) % 4
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "nan": lambda: {"images": np.full(images.shape, np.nan, np.float32)},
        "complex": lambda: {"images": images.astype(np.complex64)},
        "text": lambda: {"images": np.array(["x"] * 12)},
        "flat": lambda: {"images": images.reshape(12, -1)},
        "one": lambda: {"images": images[:1], "labels": labels[:1]},
        "none": lambda: {"images": images[:0], "labels": labels[:0]},
        "black": lambda: {"images": images, "labels": labels},
        "five channels": lambda: {"images": np.zeros((12, SIDE, SIDE, 5), np.uint8)},
        "fewer labels": lambda: {"images": images, "labels": labels[:5]},
        "labels beyond": lambda: {"images": images, "labels": labels + 10**9},
        "labels below": lambda: {"images": images, "labels": labels - 5},
        "real labels": lambda: {"images": images, "labels": labels + 0.5},
        "other names": lambda: {"a": images, "b": images, "c": labels},
        "huge numbers": lambda: {"images": np.full(images.shape, 1e30, np.float32), "labels": labels},
    }
    how, content = chance.choice(sorted(kinds)), io.BytesIO()
    np.savez(content, **kinds[how]())
    (case / "images.npz").write_bytes(content.getvalue())
    return f"images.npz {how}"


def captioned(case: Path, chance: Random) -> str:
    how, content = misencoded(CAPTIONED, chance)
    (case / "captions.txt").write_bytes(content)
    return f"captions {how}"


SPOILT: dict[str, tuple[str, str, Spoil]] = {
    "vit: json": ("vit", "images", json_of("vit/config.json", "vit/preprocessor_config.json")),
    "vit: bytes": ("vit", "images", bytes_of("vit/model.safetensors", 4000)),
    "vit: numbers": ("vit", "images.npz", numbers_of("vit/model.safetensors")),
    "vit: images": ("vit", "images", an_image),
    "vit: arrays": ("vit", "images.npz", arrays),
    "vit: bytes of arrays": ("vit", "images.npz", bytes_of("images.npz")),
    "clip: json": ("clip", "images", json_of("clip/config.json", "clip/tokenizer.json", "clip/tokenizer_config.json")),
    "clip: numbers": ("clip", "images.npz", numbers_of("clip/model.safetensors")),
    "clip: captions": ("clip", "images.npz", captioned),
    "timm: bytes": (TIMM, "images", bytes_of("weights.safetensors", 4000)),
    "timm: numbers": (TIMM, "images.npz", numbers_of("weights.safetensors")),
}
"""By kind: the model, its calibration, and what is done to a folder of a case."""


def compressed(case: Path, model: str, calibration: str, chance: Random) -> None:
    """A whole run, and what it wrote: finite, the same when opened, no worse for the repair."""
    out = case / "out"
    options: dict[str, Any] = {
        "method": chance.choice(("wanda", "gram", "fold", "mag-l2")),
        "ratio": 0.4,
        "samples": 12,
    }
    if model == TIMM:
        options |= {"weights": str(case / "weights.safetensors"), "model_options": {"num_classes": 4}}
    elif model == "clip":
        options["calibration_text"] = str(case / "captions.txt")
    named = model if model == TIMM else str(case / model)
    report = grail.compress(named, calibration=str(case / calibration), output=str(out), **options)
    module = grail.load(out)
    kept, wrote = report.model.state_dict(), module.state_dict()
    assert kept.keys() == wrote.keys() and all(kept[name].equal(wrote[name]) or "num_batches" in name for name in kept)
    used = {name: t for name, t in wrote.items() if not name.endswith("num_batches_tracked")}
    assert all(t.isfinite().all() for t in used.values()), "not finite"
    told = json.loads((out / "grail.json").read_text())
    for site in told["sites"]:
        if site["error_after"] is not None:
            assert site["error_after"] <= site["error_before"] * (1 + 1e-3) + 1e-6, site
    if report.evaluation is not None:
        evaluate_folders(str(out), data=str(case / calibration), samples=4, against=None, speed=False)


@pytest.mark.parametrize("kind", SPOILT)
def test_whole_runs(home, tmp_path, monkeypatch, kind):
    from grail.modules import run as of_run

    again = of_run.reopen_here
    monkeypatch.setattr(of_run, "reopen", lambda folder, expected, examples: again(folder, expected, examples, None))
    model, calibration, spoil = SPOILT[kind]
    compressed(Path(shutil.copytree(home, tmp_path / "sound")), model, calibration, Random(0))
    with Series("whole runs", tmp_path, home) as series:
        for chance in series.seeds(8):
            case = series.folder()
            how = spoil(case, chance)
            names = [str(case), "--calibration", "tensor", "layer", "weights.safetensors", "2.png", "class"]
            run = partial(compressed, case, model, calibration, chance)
            series.case(f"{kind}: {how}", run, case, names=names, output=case / "out", memory=2**30)
