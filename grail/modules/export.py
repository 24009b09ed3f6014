"""`grail export`: a network in memory as ONNX or as a torch.export program, its outputs compared before it counts."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calibration.preprocessing import imported
from ..checkpoint.reader import read_json
from ..errors import GrailError
from ..evaluation.zero_shot import calls_of, features, is_clip
from ..families.network import IMAGES, TEXT
from ..replacing import refuse_part_of, replacing
from ..surroundings import undisturbed
from .folder import load, relative_difference
from .names import is_module_folder

KINDS = {"onnx": ".onnx", "torch-export": ".pt2"}
TOLERANCE = 1e-4
SMALL_ID = 100
"""Token ids of an example text are below this, and words of every larger vocabulary."""


def export(module: nn.Module, example: Tensor, to: str, file: Path, *, overwrite: bool = False) -> dict:
    """Write a file for one input shape, whose first axis may differ; {file, to, difference}. Raises GrailError where
    the outputs of what was written differ from the module's."""
    if to not in KINDS:
        raise GrailError(f"--to {to}: choose one of {', '.join(KINDS)}")
    if file.is_dir():
        raise GrailError(f"--output {file} is a folder; name a file, such as {file / ('net' + KINDS[to])}")
    if file.exists() and not overwrite:
        raise GrailError(f"--output {file} exists; choose another, or add --overwrite")
    with torch.no_grad():
        wanted = module(example)
        if not isinstance(wanted, Tensor):
            module = Answer(module)
            wanted = module(example)
    with replacing(file, KINDS[to]) as temporary:
        found = (_onnx if to == "onnx" else _program)(module, example, temporary)
        difference = relative_difference(found, wanted)
        if not difference <= TOLERANCE:
            raise GrailError(f"--to {to}: the exported network computes something else (relative {difference:.1e})")
    return {"file": str(file), "to": to, "difference": difference, "bytes": file.stat().st_size}


class Answer(nn.Module):
    """The one tensor of what a module of transformers gives: logits, else pooled features."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.train(module.training)
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] or features [B, E]."""
        found = self.module(x)
        logits = getattr(found, "logits", None)
        return features(found) if logits is None else logits


class Encoder(nn.Module):
    """One tower of a CLIP as a module of its own."""

    def __init__(self, module: nn.Module, reads: str):
        super().__init__()
        self.train(module.training)
        self.module, self.call = module, calls_of(module)[reads == TEXT]

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, E] of images [B, C, H, W] or token ids [B, L]."""
        return features(getattr(self.module, self.call)(x))


@undisturbed()
def export_folder(path: str, to: str, output: str, *, tower: str | None = None, overwrite: bool = False) -> dict:
    """The same in float32 for a folder that grail wrote, with an example of its recorded input size. tower: which of a
    CLIP's, images or text. Raises GrailError for another folder, or one that records no size."""
    if not is_module_folder(Path(path)):
        text = (Path(path) / "grail.json").exists()
        hint = "; of a language model --to gguf makes a file for llama.cpp" if text else ""
        raise GrailError(f"{path} is no folder of a compressed vision network{hint}")
    refuse_part_of(Path(path), Path(output), KINDS.get(to, ""))
    module = load(path).float()
    if is_clip(module) != (tower is not None):
        what = "has two towers: choose one with --tower" if tower is None else "has no towers: leave out --tower"
        raise GrailError(f"{path} {what}")
    if tower not in (None, IMAGES, TEXT):
        raise GrailError(f"--tower {tower}: choose {IMAGES} or {TEXT}")
    example = _example(Path(path) / "grail.json", module, tower or IMAGES)
    return export(Encoder(module, tower) if tower else module, example, to, Path(output), overwrite=overwrite)


def _example(file: Path, module: nn.Module, reads: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    key, size = ("calibration", "size") if reads == IMAGES else ("calibration_text", "length")
    told = read_json(file).get(key)
    found = told.get(size) if isinstance(told, dict) else None
    if not found:
        raise GrailError(f"{file} records no size of {reads} (this tower was compressed without any)")
    if reads == IMAGES:
        return torch.randn(1, *found, generator=random)
    vocabulary = min(inner.num_embeddings for inner in module.modules() if isinstance(inner, nn.Embedding))
    return torch.randint(1, min(vocabulary, SMALL_ID), (1, found), generator=random)


def _batch() -> dict:
    return {0: torch.export.Dim("batch", min=1, max=4096)}


def _onnx(module: nn.Module, example: Tensor, file: Path) -> Tensor:
    runtime = imported("onnxruntime")
    imported("onnxscript")
    wide = torch.cat([example, example])  # an axis of length one would be taken for a constant
    torch.onnx.export(
        module, (wide,), file, dynamo=True, dynamic_shapes=(_batch(),), external_data=False, verbose=False
    )
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    answer = session.run(None, {session.get_inputs()[0].name: example.numpy()})[0]
    return torch.from_numpy(answer)


def _program(module: nn.Module, example: Tensor, file: Path) -> Tensor:
    wide = torch.cat([example, example])
    # torch 2.6 would trace strictly unless told, which transformers' own decorators do not stand
    program = torch.export.export(module, (wide,), dynamic_shapes=(_batch(),), strict=False)
    content = io.BytesIO()  # a file of its own would abort the process where the disk is full
    torch.export.save(program, content)
    file.write_bytes(content.getbuffer())
    with torch.no_grad():
        return torch.export.load(file).module()(example)
