"""A CLIP that learns rendered digits and their captions in seconds: zero-shot accuracy pruned and repaired.

    python benchmarks/clip_digits.py        # a few minutes; the table goes to benchmarks/results/clip_digits.md

Three networks, trained from other seeds. 256 unlabelled images and 30 captions as calibration, 1,000 other digits; both
towers, heads and MLP channels.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch: threads that spin fight with other programs

import open_clip
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

sys.path.append(str(Path(__file__).parents[1]))  # run as a script, only this folder is on the path

import grail
from grail.evaluation.zero_shot import ZeroShot

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ("a photo of the digit {}", "the number {}", "{}")
CAPTIONS = [template.format(name) for template in TEMPLATES for name in CLASSES]
LENGTH, SIZE, BATCH = 12, 28, 100
METHODS, RATIOS, SEEDS = ("wanda", "mag-l2", "gram", "fold"), (0.3, 0.5), (0, 1, 2)
WAYS = {"pruned": {"compensate": False}, "dense": {"target": "dense"}, "stream": {"target": "stream"}}
TABLE = Path(__file__).parent / "results" / "clip_digits.md"
tokenizer = open_clip.SimpleTokenizer(context_length=LENGTH)


def digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Drawn digits, a little moved, turned and noisy: float32 [count, 1, 28, 28], and which they are."""
    random = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * torch.rand((), generator=random).item()

    labels = torch.randint(10, (count,), generator=random)
    drawn = []
    for digit in labels.tolist():
        image = Image.new("L", (SIZE, SIZE))
        place = SIZE / 2 + between(-1, 1), SIZE / 2 + between(-1, 1)
        font = ImageFont.load_default(round(between(20, 24)))
        ImageDraw.Draw(image).text(place, str(digit), fill=255, font=font, anchor="mm")
        pixels = bytearray(image.rotate(between(-8, 8)).tobytes())
        drawn.append(torch.frombuffer(pixels, dtype=torch.uint8).view(1, SIZE, SIZE))
    images = torch.stack(drawn).float() / 255
    return (images + 0.1 * torch.randn(images.shape, generator=random) - 0.15) / 0.35, labels


def tiny_clip(seed: int = 0) -> nn.Module:
    """Untrained: three image blocks of four heads, two text blocks of four heads."""
    torch.manual_seed(seed)
    vision = CLIPVisionCfg(layers=3, width=48, head_width=12, patch_size=7, image_size=SIZE)
    text = CLIPTextCfg(context_length=LENGTH, vocab_size=49408, width=32, heads=4, layers=2)
    module = CLIP(32, vision, text)
    module.visual.conv1 = nn.Conv2d(1, 48, 7, 7, bias=False)
    return module.eval()


def trained(module: nn.Module, epochs: int, rate: float, seed: int) -> nn.Module:
    """A copy after some epochs on 2,000 digits."""
    module = copy.deepcopy(module).train()
    torch.manual_seed(seed)
    images, labels = digits(2000, seed=0)
    texts = torch.stack([tokenizer([t.format(name) for t in TEMPLATES]) for name in CLASSES])
    optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=0.01)
    steps = epochs * len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            image = normalize(module.encode_image(images[chosen]), dim=-1)
            text = normalize(module.encode_text(texts[:, int(torch.randint(len(TEMPLATES), ()))]), dim=-1)
            loss = cross_entropy(module.logit_scale.exp() * image @ text.T, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return module.eval()


@torch.no_grad()
def zero_shot(module: nn.Module) -> float:
    """Share of 1,000 other digits that are closest to their own captions."""
    images, labels = digits(1000, seed=1)
    return (ZeroShot(module, tokenizer, CLASSES, TEMPLATES)(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    inputs = {"calibration": digits(256, seed=2)[0], "samples": 256, "calibration_text": tokenizer(CAPTIONS)}
    networks = [trained(tiny_clip(seed), epochs=14, rate=3e-3, seed=seed) for seed in SEEDS]

    def shares(**asked: object) -> str:
        return mean(zero_shot(grail.compress(module, **inputs, **asked).model) for module in networks)

    lines = [
        f"Zero-shot accuracy, mean of three networks, dense {mean(map(zero_shot, networks))} %; {' / '.join(WAYS)}.",
        "",
    ]
    lines += [f"| method |{''.join(f' {ratio:g} |' for ratio in RATIOS)}", "|---|" + "---|" * len(RATIOS)]
    for method in METHODS:
        cells = [" / ".join(shares(method=method, ratio=r, **way) for way in WAYS.values()) for r in RATIOS]
        lines.append(f"| {method} |{''.join(f' {cell} |' for cell in cells)}")
    TABLE.write_text("\n".join(lines) + "\n")
    sys.stdout.write(TABLE.read_text())


def mean(shares: Iterable[float]) -> str:
    """In percent."""
    return f"{100 * statistics.fmean(shares):.1f}"


if __name__ == "__main__":
    main()
