"""The recipe: one frozen dataclass, its defaults and the ranges of its values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from fastmp import data, models
from fastmp.schedule import scale_lr

DtypeName = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


class ConfigError(ValueError):
    """A setting that cannot be: its name, what was expected, what came."""


def _hint(metavar: str, default: str) -> Any:
    """How --help shows a field whose default depends on others."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


@dataclass(frozen=True)
class TrainConfig:
    """The whole recipe of ``fastmp train``: every field is a flag and a key of the config file."""

    data: str = "digits"
    """digits (1,797 images), fashion-mnist (70,000), a folder of train/CLASS/*.jpg, or hf:NAME."""

    image_size: Annotated[int | None, _hint("INT", "that of the images, at most 224")] = None
    """Height and width that images from files are cut to."""

    workers: int = 4
    """Processes that decode images from files; 0: the training process does it."""

    model: str = "convnet"
    """mlp, convnet, vit, or package.module:factory, called with (in_shape, classes)."""

    epochs: Annotated[int | None, _hint("INT", "15 for digits, else 8")] = None
    """Passes over the training set."""

    batch_size: Annotated[int | None, _hint("INT", "64 for digits, else 256")] = None
    """Samples per batch and device."""

    accumulate: int = 1
    """Batches per optimizer step and device; their gradients are summed in fp32 and averaged."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule. SGD uses Nesterov momentum."""

    base_lr: Annotated[float | None, _hint("FLOAT", "4e-3 for Adam and AdamW, 0.1 for SGD")] = None
    """Peak learning rate at a global batch of 256, scaled to the real one; Adam: by its root."""

    lr: Annotated[float | None, _hint("FLOAT", "base-lr, scaled")] = None
    """Peak learning rate as it is, instead of base-lr."""

    schedule: Literal["one-cycle", "cosine", "cyclic", "constant"] = "one-cycle"
    """Of the learning rate. cosine climbs straight, cyclic halves its peaks, constant stays."""

    cycles: int = 3
    """How often the cyclic schedule goes up and down."""

    warmup: float = 0.25
    """Share of all steps in which the learning rate climbs to its peak, 0 to 1; not for cyclic."""

    momentum: float = 0.95
    """Momentum of SGD, beta1 of Adam; with one-cycle and cyclic the value at the foot."""

    peak_momentum: float = 0.85
    """The same at the peak of one-cycle and cyclic. Other schedules do not use it."""

    beta2: float = 0.999
    """Adam's decay of the second moment. SGD does not use it."""

    weight_decay: float = 0.02
    """Weight decay of matrices and filters; biases and norms have none."""

    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; inf: do not clip."""

    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then evaluated; 0: none."""

    init_from: Annotated[Path | None, _hint("PATH", "random weights")] = None
    """Pretrained weights: .safetensors, a state_dict or a run; what does not fit starts anew."""

    freeze: tuple[str, ...] = ()
    """Parameters that do not train: names of them or of modules, or patterns such as 'blocks.*'."""

    unfreeze_every: int = 0
    """Train the head first, after every so many epochs one more layer; 0: all from the start."""

    layer_decay: float = 1.0
    """Learning rate of a layer as a share of that of the layer above it, such as 0.7."""

    mixup: float = 0.2
    """Mixup strength: lambda ~ Beta(mixup, mixup); 0: off."""

    cutmix: float = 0.0
    """Cutmix strength, likewise; with both on, every batch gets one of them by a coin flip."""

    label_smoothing: float = 0.1
    """Share of the target spread evenly over all classes, 0 to 1."""

    dtype: DtypeName = "auto"
    """Type of the weights; 16-bit ones have fp32 masters. auto: measures which type is fastest."""

    loss_scale: float = 65536.0
    """First loss scale; fp16 only."""

    scale_growth_interval: int = 2000
    """Steps without an overflow after which the loss scale doubles; fp16 only."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto: cuda if there is one."""

    cuda_graph: bool = False
    """Record a training step as one CUDA graph and replay it; needs static shapes."""

    shard: bool = False
    """Split weights and optimizer state over the devices (FSDP2), for models too large for one."""

    threads: int = 0
    """CPU threads; 0: as many as PyTorch chooses."""

    seed: int = 0
    """Seed of the weights, the order of samples and the mixing."""

    save_every: int = 0
    """Steps between checkpoints, besides those after every epoch; 0: only those."""

    keep: int = 2
    """How many of the newest checkpoints to keep, besides the best one."""

    telemetry: bool = False
    """Count gradients that were flushed to zero and updates that were lost to rounding."""

    out: Annotated[Path | None, _hint("PATH", "runs/<data>-<model>-<time>")] = None
    """Folder for everything the run writes; must be new or empty, unless --resume is given."""

    def __post_init__(self) -> None:
        if not data.is_known(self.data):
            known = ", ".join(data.DATASETS)
            raise ConfigError(
                f"data: expected {known}, an existing folder or hf:NAME, got {self.data!r}"
            )
        if self.model not in models.MODELS and ":" not in self.model:
            known = ", ".join(models.MODELS)
            raise ConfigError(
                f"model: expected {known} or package.module:factory, got {self.model!r}"
            )
        for name, (low, high, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: expected {expected}, got {value}")
        if self.unfreeze_every and self.freeze:
            raise ConfigError(
                "unfreeze_every, freeze: expected one of them; unfreeze_every decides for every "
                "layer whether it trains"
            )

        if self.shard and (self.ema or self.cuda_graph or self.telemetry or self.unfreeze_every):
            raise ConfigError(
                "shard: expected none of ema, cuda_graph, telemetry, unfreeze_every with it; they "
                "need whole parameters"
            )

    def one_lr(self, defaults: TrainConfig) -> TrainConfig:
        """The same, where a flag with one of lr and base_lr outdoes the other in ``defaults``."""
        if self.lr is None or self.base_lr is None:
            return self
        if defaults.base_lr is not None and defaults.lr is None:
            return dataclasses.replace(self, base_lr=None)
        if defaults.lr is not None and defaults.base_lr is None:
            return dataclasses.replace(self, lr=None)
        return self

    def resolved(self, devices: int = 1) -> TrainConfig:
        """The same with every default that depends on other fields filled in, ``out`` aside.

        Args:
            devices: how many train together; the learning rate is scaled to the global batch.

        Raises:
            ConfigError: both a learning rate and one to scale, or ``shard`` on one device.
        """
        if self.shard and devices == 1:
            raise ConfigError(
                "shard: expected several processes, got one; start them with "
                "torchrun --nproc-per-node=N -m fastmp train --shard ..."
            )
        if self.lr is not None and self.base_lr is not None:
            raise ConfigError(
                f"lr, base_lr: expected one of them, got {self.lr:g} and {self.base_lr:g}; "
                "lr is used as it is, base_lr is scaled to the global batch"
            )
        epochs, batch_size = _DEFAULTS.get(self.data, (8, 256))
        batch_size = batch_size if self.batch_size is None else self.batch_size
        usual, rule = _BASE_LR[self.optimizer]
        base_lr = usual if self.base_lr is None else self.base_lr
        lr = scale_lr(base_lr, batch_size * self.accumulate * devices, rule=rule)
        return dataclasses.replace(
            self,
            epochs=epochs if self.epochs is None else self.epochs,
            batch_size=batch_size,
            base_lr=base_lr if self.lr is None else None,
            lr=lr if self.lr is None else self.lr,
        )


_DEFAULTS = {"digits": (15, 64)}  # epochs, batch size

_BASE_LR: dict[str, tuple[float, Literal["linear", "sqrt"]]] = {  # at a batch of 256
    "adamw": (4e-3, "sqrt"),
    "adam": (4e-3, "sqrt"),
    "sgd": (0.1, "linear"),
}

_MOST = torch.finfo(torch.float32).max
_COUNT = (1, 2**31 - 1, "a whole number of at least 1")
_WHOLE = (0, 2**31 - 1, "a whole number of at least 0")
_NOT_NEGATIVE = (0, _MOST, "a finite number of at least 0")
_SHARE = (0, 1, "a number from 0 to 1")
_DECAY = (0, math.nextafter(1, 0), "a number of at least 0 and below 1")
_RANGES: dict[str, tuple[float, float, str]] = {  # lowest, highest, in words
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "image_size": _COUNT,
    "workers": (0, 4096, "a whole number from 0 to 4096"),
    "base_lr": _NOT_NEGATIVE,
    "lr": _NOT_NEGATIVE,
    "cycles": _COUNT,
    "warmup": _SHARE,
    "momentum": _DECAY,
    "peak_momentum": _DECAY,
    "beta2": _DECAY,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": (math.nextafter(0, 1), math.inf, "a number above 0"),
    "ema": _DECAY,
    "unfreeze_every": _WHOLE,
    "layer_decay": (math.nextafter(0, 1), 1, "a number above 0 and at most 1"),
    "save_every": _WHOLE,
    "keep": _COUNT,
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "label_smoothing": _SHARE,
    "loss_scale": (1, _MOST, "a finite number of at least 1"),
    "scale_growth_interval": _COUNT,
    "threads": (0, 4096, "a whole number from 0 to 4096"),
    "seed": (0, 2**63 - 1, "a whole number from 0 to 2**63 - 1"),
}
