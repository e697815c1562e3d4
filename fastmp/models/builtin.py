"""Built-in models of ``fastmp train``, and the import of models by package.module:factory.

Every builder takes ``(in_shape, classes)``, the (C, H, W) of one image and the number of classes,
and returns a module from (N, C, H, W) to logits (N, classes). Weights are drawn from torch's global
generator.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, int, int]


class ModelError(ValueError):
    """An unknown model name, or a factory that makes no classifier."""


def build(name: str, in_shape: Shape, classes: int) -> nn.Module:
    """A model of ``MODELS``, or the result of a factory ``package.module:factory``.

    Modules may lie in the current folder, as for ``python -m``.

    Raises:
        ModelError: an unknown name, a module or attribute that does not exist, or a factory that
            cannot be called with (in_shape, classes), or returns no ``torch.nn.Module`` with logits
            as output; an error in the module, the factory or the model, with its file and line.
    """
    if name in MODELS:
        return MODELS[name](in_shape, classes)
    model = made_by(name, in_shape=in_shape, classes=classes)
    _check_logits(name, model, in_shape, classes)
    return model


def made_by(name: str, **arguments: object) -> nn.Module:
    """The result of a factory ``package.module:factory``, called with values by position.

    Raises:
        ModelError: as ``build``, without a look at the logits.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ModelError(
            f"unknown model {name!r}; expected {', '.join(MODELS)}, or package.module:factory"
        )
    factory = _factory(name, module_name, attribute, arguments)
    try:
        model = factory(*arguments.values())
    except (Exception, SystemExit) as error:
        raise ModelError(f"model {name!r}: {attribute} raised {_described(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


@torch.no_grad()
def _check_logits(name: str, model: nn.Module, in_shape: Shape, classes: int) -> None:
    """Run the model on two blank images, which also initialises lazy modules."""
    try:
        logits = model.eval()(torch.zeros(2, *in_shape))
    except Exception as error:
        raise ModelError(
            f"{name} cannot be given two images of shape {in_shape}: {_described(error)}"
        ) from error
    model.train()
    got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if got != (2, classes):
        raise ModelError(
            f"{name} must map images of shape (N, *{in_shape}) to logits (N, {classes}); "
            f"for N = 2 it returned {got}"
        )


def _factory(
    name: str, module_name: str, attribute: str, arguments: Mapping[str, object]
) -> Callable[..., object]:
    sys.path.insert(0, os.getcwd())  # noqa: PTH109 - sys.path holds strings
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModelError(
            f"model {name!r}: there is no module {error.name!r}; install it or run in its folder"
        ) from error
    except (Exception, SystemExit) as error:
        raise ModelError(
            f"model {name!r}: the import of {module_name} raised {_described(error)}"
        ) from error
    finally:
        sys.path.pop(0)
    factory = getattr(module, attribute, None)
    found = _factory_error(factory, list(arguments.values()))
    if found:
        raise ModelError(
            f"model {name!r}: expected {attribute!r} in {module_name} to be a function of "
            f"({', '.join(arguments)}), found {found}"
        )
    return cast(Callable[..., object], factory)


def _described(error: BaseException) -> str:
    """The error in one line, with the place where it was raised; a SyntaxError has its own."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = "" if isinstance(error, SyntaxError) else f" ({last.filename}, line {last.lineno})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _factory_error(factory: object, arguments: Sequence[object]) -> str | None:
    """Why ``factory(*arguments)`` cannot be called; None if it can."""
    if factory is None:
        return "no such attribute"
    if not callable(factory):
        return f"an object of type {type(factory).__name__}"
    try:
        inspect.signature(factory).bind(*arguments)
    except TypeError as error:
        return f"one that takes other arguments ({error})"
    except ValueError:
        pass  # some built-in functions have no signature
    return None


def mlp(in_shape: Shape, classes: int) -> nn.Module:
    """Two hidden layers with ReLU: 2,048 wide at 28x28, 256 at 8x8."""
    pixels = math.prod(in_shape)
    width = min(2048, max(64, 4 * 2 ** math.ceil(math.log2(pixels))))
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def convnet(in_shape: Shape, classes: int) -> nn.Module:
    """Four 3x3 convolutions (32, 64, 128, 128), batch norm, ReLU, two poolings; 0.24 M parameters.

    Weights are channels_last: a training step of 256 28x28 images in bf16 took 80 ms that way and
    125 ms contiguously (2 cores of an AMD EPYC with AVX512-BF16, 2026-11).
    """
    layers: list[nn.Module] = []
    channels = in_shape[0]
    for width, pool in ((32, True), (64, True), (128, False), (128, False)):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        if pool:
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    model = nn.Sequential(*layers)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention, on a CPU in fp32: torch's bf16 backward takes 5.7 times as long.

    263 ms against 46 of a step of 256 images (AMD EPYC Zen 4, 2 threads).
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = _attend(q, k, v)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return y


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width, expansion * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class VisionTransformer(nn.Module):
    """A pre-norm vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929), mean-pooled."""

    def __init__(
        self,
        in_shape: Shape,
        classes: int,
        *,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        expansion: int = 2,
    ) -> None:
        super().__init__()
        channels, height, width_px = in_shape
        tokens = math.ceil(height / patch) * math.ceil(width_px / patch)
        self.padding = (0, -width_px % patch, 0, -height % patch)
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W)."""
        patches = self.embed(F.pad(x, self.padding)).flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.norm(self.blocks(patches + self.position)).mean(1))
        return logits


def vit(in_shape: Shape, classes: int) -> nn.Module:
    """A small vision transformer: 4 blocks, 128 wide, 4 heads, at most 49 patches (7 a side)."""
    patch = max(2, math.ceil(max(in_shape[1:]) / 7))
    return VisionTransformer(in_shape, classes, patch=patch, width=128, depth=4, heads=4)


#: Built-in models by name.
MODELS: dict[str, Callable[[Shape, int], nn.Module]] = {"mlp": mlp, "convnet": convnet, "vit": vit}
