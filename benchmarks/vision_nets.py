"""Small image classifiers, written plainly: the CIFAR form of ResNet, its pre-activation form, and a ViT of timm.

Shapes: B images, C channels, H and W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

LAYOUT_18 = (2, 2, 2, 2)
QUARTER = 16
"""Width of the first stage; the published ResNet-18 has 64."""
POSITION_BASE, POSITION_SCALE = 30.0, 2.0
"""Of a ViT's initial position embedding; tried by hand on the digits."""


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class BasicBlock(nn.Module):
    """conv1, bn1, ReLU, conv2, bn2; plus the input; ReLU. The shortcut is a 1 x 1 convolution where shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class PreActBlock(nn.Module):
    """bn1, ReLU, conv1, bn2, ReLU, conv2; plus the input, or a 1 x 1 convolution of what conv1 reads."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3x3(outputs, outputs)
        self.shortcut = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + shortcut


class ResNet(nn.Module):
    """Images [B, channels, H, W] to logits [B, classes]; stages of width, 2 width, 4 width, 8 width channels."""

    block: type[nn.Module] = BasicBlock

    def __init__(
        self, width: int = QUARTER, channels: int = 1, classes: int = 10, layout: tuple[int, int, int, int] = LAYOUT_18
    ):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels, width), nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, layout[0], stride=1)
        self.layer2 = self._stage(width, 2 * width, layout[1], stride=2)
        self.layer3 = self._stage(2 * width, 4 * width, layout[2], stride=2)
        self.layer4 = self._stage(4 * width, 8 * width, layout[3], stride=2)
        self.linear = nn.Linear(8 * width, classes)

    def _stage(self, inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        rest = (self.block(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(self.block(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(out.mean((2, 3)))


class PreActResNet(ResNet):
    """The same with pre-activation blocks; bn1 then normalises what the last stage gives."""

    block = PreActBlock

    def __init__(
        self, width: int = QUARTER, channels: int = 1, classes: int = 10, layout: tuple[int, int, int, int] = LAYOUT_18
    ):
        super().__init__(width, channels, classes, layout)
        self.bn1 = nn.BatchNorm2d(8 * width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn1(out)).mean((2, 3)))


def small_vit(dim: int = 96, depth: int = 6, heads: int = 4, classes: int = 10) -> VisionTransformer:
    """28 x 28 grey images in patches of 4 x 4: 49 tokens and the class token, whose output is classified.

    timm's initial weights have a deviation of 0.02 whatever the width, and positions start as noise: at this width such
    a network needs three times the epochs.
    """
    net = VisionTransformer(
        img_size=28, patch_size=4, in_chans=1, num_classes=classes, global_pool="token",
        embed_dim=dim, depth=depth, num_heads=heads,
    )  # fmt: skip
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    with torch.no_grad():
        net.pos_embed.zero_()[0, 1:] = POSITION_SCALE * positions(*net.patch_embed.grid_size, dim)
    return net


def positions(height: int, width: int, dim: int) -> Tensor:
    """float32 [height * width, dim]: sines and cosines of the row and of the column, dim / 4 wave lengths each."""
    rates = POSITION_BASE ** -(torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (row, column)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], 1)
