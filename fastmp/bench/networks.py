"""ResNet-50 and ViT-B/16, for images of 224x224: the common benchmark networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmp.models import Shape, VisionTransformer


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions around a shortcut; the 3x3 has the stride (ResNet v1.5)."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.body = nn.Sequential(
            *_layer(in_channels, width, 1), nn.ReLU(),
            *_layer(width, width, 3, stride), nn.ReLU(),
            *_layer(width, out_channels, 1),
        )  # fmt: skip
        is_same = in_channels == out_channels and stride == 1
        projection = [] if is_same else _layer(in_channels, out_channels, 1, stride)
        self.shortcut = nn.Sequential(*projection)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.body(x) + self.shortcut(x))
        return y


def _layer(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels)]


def resnet50(in_shape: Shape, classes: int) -> nn.Module:
    """He et al. 2015 (arXiv:1512.03385), channels_last; 25.6 M parameters for 1,000 classes."""
    layers: list[nn.Module] = [*_layer(in_shape[0], 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    in_channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers.append(_Bottleneck(in_channels, width, 2 if block == 0 and width > 64 else 1))
            in_channels = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(in_channels, classes)]
    model = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def vit_b16(in_shape: Shape, classes: int) -> nn.Module:
    """Dosovitskiy et al. 2021 (arXiv:2010.11929), mean-pooled; 86 M parameters."""
    return VisionTransformer(
        in_shape, classes, patch=16, width=768, depth=12, heads=12, expansion=4
    )
