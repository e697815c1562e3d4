"""The recipe: one frozen dataclass, where its values come from, and what they are made into."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import tyro
from torch import nn

from fastmp import amp, data, models, optim
from fastmp.data import Dataset
from fastmp.mixup import Mixup
from fastmp.nn import CrossEntropyLoss
from fastmp.schedule import Constant, OneCycle, Schedule, Warmup, scale_lr
from fastmp.trainer import Trainer

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


_LR_DEFAULT = (
    "4e-3 for Adam and AdamW, times the square root of batch-size x accumulate / 256; "
    "0.1 for SGD, times that ratio itself"
)


@dataclass(frozen=True)
class TrainConfig:
    """The whole recipe of ``fastmp train``: every field is a flag and a key of the config file."""

    data: str = "digits"
    """Data set: digits (1,797 images 8x8, in scikit-learn) or fashion-mnist (70,000, 28x28)."""

    model: str = "convnet"
    """mlp, convnet, vit, or package.module:factory, called with (in_shape, classes)."""

    epochs: Annotated[int | None, _hint("INT", "15 for digits, 8 for fashion-mnist")] = None
    """Passes over the training set."""

    batch_size: Annotated[int | None, _hint("INT", "64 for digits, 256 for fashion-mnist")] = None
    """Samples per batch."""

    accumulate: int = 1
    """Batches per optimizer step; their gradients are averaged."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Update rule. SGD uses Nesterov momentum."""

    lr: Annotated[float | None, _hint("FLOAT", _LR_DEFAULT)] = None
    """Peak learning rate."""

    schedule: Literal["one-cycle", "constant"] = "one-cycle"
    """Learning rate over the run: one-cycle climbs and falls to zero, constant stays."""

    warmup: float = 0.25
    """Share of all steps in which the learning rate climbs to its peak, 0 to 1."""

    momentum: float = 0.95
    """Momentum of SGD, beta1 of Adam; with one-cycle the value at its ends."""

    peak_momentum: float = 0.85
    """The same at the peak of one-cycle. The constant schedule does not use it."""

    beta2: float = 0.999
    """Adam's decay of the second moment. SGD does not use it."""

    weight_decay: float = 0.02
    """Weight decay of matrices and filters; biases and norms have none."""

    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; inf: do not clip."""

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

    threads: int = 0
    """CPU threads; 0: as many as PyTorch chooses."""

    seed: int = 0
    """Seed of the weights, the order of samples and the mixing."""

    out: Annotated[Path | None, _hint("PATH", "runs/<data>-<model>-<time>")] = None
    """Folder for everything the run writes; must be new or empty."""

    def __post_init__(self) -> None:
        if self.data not in data.DATASETS:
            known = ", ".join(data.DATASETS)
            raise ConfigError(f"data: expected one of {known}, got {self.data!r}")
        if self.model not in models.MODELS and ":" not in self.model:
            known = ", ".join(models.MODELS)
            raise ConfigError(
                f"model: expected {known} or package.module:factory, got {self.model!r}"
            )
        for name, (low, high, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: expected {expected}, got {value}")

    def resolved(self) -> TrainConfig:
        """The same with every default that depends on other fields filled in, ``out`` aside."""
        epochs, batch_size = _DEFAULTS[self.data]
        batch_size = batch_size if self.batch_size is None else self.batch_size
        base_lr, rule = _BASE_LR[self.optimizer]
        lr = scale_lr(base_lr, batch_size * self.accumulate, rule=rule)
        return dataclasses.replace(
            self,
            epochs=epochs if self.epochs is None else self.epochs,
            batch_size=batch_size,
            lr=lr if self.lr is None else self.lr,
        )


_DEFAULTS = {"digits": (15, 64), "fashion-mnist": (8, 256)}  # epochs, batch size

_BASE_LR: dict[str, tuple[float, Literal["linear", "sqrt"]]] = {  # at a batch of 256
    "adamw": (4e-3, "sqrt"),
    "adam": (4e-3, "sqrt"),
    "sgd": (0.1, "linear"),
}

_MOST = torch.finfo(torch.float32).max
_COUNT = (1, 2**31 - 1, "a whole number of at least 1")
_NOT_NEGATIVE = (0, _MOST, "a finite number of at least 0")
_SHARE = (0, 1, "a number from 0 to 1")
_DECAY = (0, math.nextafter(1, 0), "a number of at least 0 and below 1")
_RANGES: dict[str, tuple[float, float, str]] = {  # lowest, highest, in words
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "accumulate": _COUNT,
    "lr": _NOT_NEGATIVE,
    "warmup": _SHARE,
    "momentum": _DECAY,
    "peak_momentum": _DECAY,
    "beta2": _DECAY,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": (math.nextafter(0, 1), math.inf, "a number above 0"),
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "label_smoothing": _SHARE,
    "loss_scale": (1, _MOST, "a finite number of at least 1"),
    "scale_growth_interval": _COUNT,
    "threads": (0, 4096, "a whole number from 0 to 4096"),
    "seed": (0, 2**63 - 1, "a whole number from 0 to 2**63 - 1"),
}


# ---- the config file ----


def read_toml(path: Path) -> TrainConfig:
    """The recipe in a TOML file; fields that it does not name have their defaults.

    Raises:
        ConfigError: no such file, no TOML, an unknown key, or a value of a wrong type or range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: expected TOML, got: {error}") from error
    types = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(
                f"config file {path}: unknown key {key!r}; the known ones are {', '.join(types)}"
            )
        values[key] = _converted(value, types[key], f"config file {path}: {key}")
    return TrainConfig(**values)


def _converted(value: Any, expected: Any, name: str) -> Any:
    choices = getattr(expected, "__args__", (expected,))  # of a union, or of a Literal
    if Path in choices and isinstance(value, str):
        return Path(value)
    if float in choices and type(value) is int:
        return float(value)
    if type(value) in choices or value in choices:
        return value
    wanted = " or ".join(getattr(c, "__name__", str(c)) for c in choices if c is not type(None))
    raise ConfigError(f"{name}: expected {wanted}, got {value!r}")


def write_toml(config: TrainConfig, path: Path) -> None:
    """Write the recipe so that ``read_toml`` gives it back; fields that are None are left out."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is None:
            continue
        # a JSON string is a TOML string, and Python spells its numbers (inf too) as TOML does
        text = json.dumps(str(value)) if isinstance(value, str | Path) else repr(value)
        lines.append(f"{field.name} = {text}\n")
    path.write_text("".join(lines), encoding="utf-8")


# ---- what the recipe is made into ----


def device_of(config: TrainConfig) -> torch.device:
    """The device the recipe asks for.

    Raises:
        ConfigError: there is no such device here.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device: expected one that works here, got {config.device!r}: {reason}"
        ) from error
    return device


def build_model(config: TrainConfig, dataset: Dataset) -> nn.Module:
    """The model with its first weights, fp32 on the CPU, the same for the same seed.

    Raises:
        fastmp.models.ModelError: the name leads to no model.
    """
    torch.manual_seed(config.seed)
    return models.build(config.model, dataset.shape, len(dataset.classes))


def build_trainer(
    config: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    total_steps: int,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Trainer:
    """A trainer for a copy of ``model`` in ``dtype`` on ``device``.

    Args:
        config: resolved.
        dataset: gives the normalisation.
        model: fp32; left as it is.
        total_steps: optimizer steps of the whole run, the length of the schedule.
        folder, progress: as ``Trainer`` takes them.
    """
    trained = amp.convert(copy.deepcopy(model).to(device), dtype)
    generator = torch.Generator().manual_seed(config.seed)
    return Trainer(
        trained,
        _optimizer(config, trained),
        CrossEntropyLoss(label_smoothing=config.label_smoothing),
        schedule=_schedule(config, total_steps),
        scaler=amp.GradScaler(
            device.type,
            init_scale=config.loss_scale,
            growth_interval=config.scale_growth_interval,
            enabled=dtype == torch.float16,
        ),
        mixup=Mixup(
            config.mixup,
            config.cutmix,
            generator=generator,
            mean=dataset.mean,
            std=dataset.std,
            dtype=dtype,
        ),
        accumulate=config.accumulate,
        folder=folder,
        progress=progress,
    )


def _optimizer(config: TrainConfig, model: nn.Module) -> optim.AdamW | optim.Adam | optim.SGD:
    # Decay pulls weights towards zero; for a norm's scale or a bias there is no reason to be there.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [(n, p) for n, p in named if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [(n, p) for n, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert config.lr is not None, "the config must be resolved"
    clip = None if config.max_grad_norm == math.inf else config.max_grad_norm
    if config.optimizer == "sgd":
        return optim.SGD(
            groups,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            max_grad_norm=clip,
        )
    kind = optim.AdamW if config.optimizer == "adamw" else optim.Adam
    betas = (config.momentum, config.beta2)
    return kind(groups, lr=config.lr, betas=betas, max_grad_norm=clip)


def _schedule(config: TrainConfig, total_steps: int) -> Schedule:
    assert config.lr is not None, "the config must be resolved"
    if config.schedule == "constant":
        return Warmup(Constant(config.lr, config.momentum), round(config.warmup * total_steps))
    return OneCycle(
        config.lr,
        total_steps,
        pct_start=config.warmup,
        base_momentum=config.peak_momentum,
        max_momentum=config.momentum,
    )
