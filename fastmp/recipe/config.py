"""The recipe: one frozen dataclass with the defaults and ranges of all settings."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

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
    """A setting that is not valid: its name, what was expected, what came."""


def shown_default(metavar: str, default: str) -> Any:
    """How --help shows a field with a default that depends on others."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _optional(kind: type[int] | type[float]) -> Any:
    """How a flag of a number or None is read: tyro's own message is about both types."""

    def read(words: list[str]) -> int | float | None:
        if words[0] == "None":
            return None
        try:
            return kind(words[0])
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"expected {number}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT" if kind is int else "FLOAT",
        instance_from_str=read,
        is_instance=lambda value: value is None or isinstance(value, int | float),
        str_from_instance=lambda value: [str(value)],
    )


OPTIONAL_INT, OPTIONAL_FLOAT = _optional(int), _optional(float)


@dataclass(frozen=True)
class Range:
    """Limits of a setting, both included, in the annotation of its field.

    Checked by ``TrainConfig`` itself: importing pydantic would add 0.25 s to every command.
    """

    low: float
    high: float
    expected: str  # for the message

    def check(self, name: str, value: float) -> None:
        """Raise ``ConfigError`` for a value outside, with its name."""
        if not self.low <= value <= self.high:
            raise ConfigError(f"{name}: expected {self.expected}, got {value}")


_MAX_FLOAT = torch.finfo(torch.float32).max
COUNT = Range(1, 2**31 - 1, "a whole number of at least 1")
WHOLE = Range(0, 2**31 - 1, "a whole number of at least 0")
PROCESSES = Range(0, 4096, "a whole number from 0 to 4096")
SIDE = Range(1, 10_000, "a whole number from 1 to 10000")  # squared: what one image may have
SEED = Range(0, 2**63 - 1, "a whole number from 0 to 2**63 - 1")
NOT_NEGATIVE = Range(0, _MAX_FLOAT, "a finite number of at least 0")
POSITIVE = Range(math.nextafter(0, 1), math.inf, "a number above 0")
FRACTION = Range(0, 1, "a number from 0 to 1")
DECAY = Range(0, math.nextafter(1, 0), "a number of at least 0 and below 1")
LAYER_DECAY = Range(math.nextafter(0, 1), 1, "a number above 0 and at most 1")
LOSS_SCALE = Range(1, _MAX_FLOAT, "a finite number of at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """The whole recipe of ``fastmp train``: every field is a flag and a key of the config file."""

    data: str = "digits"
    """digits (1,797 images), fashion-mnist (70,000), a folder of train/CLASS/*.jpg, or hf:NAME."""

    image_size: Annotated[
        int | None, OPTIONAL_INT, SIDE, shown_default("INT", "that of the images, at most 224")
    ] = None
    """Height and width that images from files are cut to."""

    workers: Annotated[int, PROCESSES] = 4
    """Processes that decode images from files, at most one a core; 0: the training process."""

    model: str = "convnet"
    """mlp, convnet, vit, or package.module:factory, called with (in_shape, classes)."""

    epochs: Annotated[
        int | None, OPTIONAL_INT, COUNT, shown_default("INT", "15 for digits, else 8")
    ] = None
    """Passes over the training set."""

    batch_size: Annotated[
        int | None, OPTIONAL_INT, COUNT, shown_default("INT", "256; less for 20 steps an epoch")
    ] = None
    """Samples per batch and device."""

    accumulate: Annotated[int, COUNT] = 1
    """Batches per optimizer step and device; their gradients are summed in fp32 and averaged."""

    optimizer: Literal["adamw", "adam", "sgd", "lion", "muon"] = "adamw"
    """Update rule. SGD uses Nesterov momentum; muon takes AdamW for vectors, embeddings, head."""

    base_lr: Annotated[
        float | None,
        OPTIONAL_FLOAT,
        NOT_NEGATIVE,
        shown_default("FLOAT", "4e-3 for Adam, AdamW and Muon, 4e-4 for Lion, 0.1 for SGD"),
    ] = None
    """Peak learning rate at a global batch of 256, scaled to the real one; not SGD: its root."""

    lr: Annotated[
        float | None, OPTIONAL_FLOAT, NOT_NEGATIVE, shown_default("FLOAT", "base-lr, scaled")
    ] = None
    """Peak learning rate as it is, instead of base-lr."""

    schedule: Literal["one-cycle", "cosine", "cyclic", "constant"] = "one-cycle"
    """Of the learning rate. cosine climbs straight, cyclic halves its peaks, constant stays."""

    cycles: Annotated[int, COUNT] = 3
    """How often the cyclic schedule goes up and down."""

    warmup: Annotated[float, FRACTION] = 0.25
    """Share of all steps in which the learning rate climbs to its peak, 0 to 1; not for cyclic."""

    momentum: Annotated[float, DECAY] = 0.95
    """Momentum of SGD and Muon, beta1 of the rest; with one-cycle and cyclic that at the foot."""

    peak_momentum: Annotated[float, DECAY] = 0.85
    """The same at the peak of one-cycle and cyclic. Other schedules do not use it."""

    beta2: Annotated[float, DECAY] = 0.999
    """Decay of Adam's and AdamW's second moment, with Muon too. SGD and Lion do not use it."""

    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.02
    """Weight decay of matrices and filters; biases and norms have none."""

    max_grad_norm: Annotated[float, POSITIVE] = 1.0
    """Clip the global gradient norm to this; inf: do not clip."""

    ema: Annotated[float, DECAY] = 0.0
    """Decay of a moving average of the weights, such as 0.999, which is then evaluated; 0: none."""

    state_dtype: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How the optimizer keeps its moments: 4, 2 or 1 byte each."""

    master: Literal["auto", "split"] = "auto"
    """Beside fp16 weights: an fp32 master, or the 16 bits that they lack (split)."""

    init_from: Annotated[Path | None, shown_default("PATH", "random weights")] = None
    """Pretrained weights: .safetensors, a state_dict or a run, whose best checkpoint it is."""

    freeze: tuple[str, ...] = ()
    """Parameters that do not train: names of them or of modules, or patterns such as 'blocks.*'."""

    unfreeze_every: Annotated[int, WHOLE] = 0
    """Train the head first, after every so many epochs one more layer; 0: all from the start."""

    layer_decay: Annotated[float, LAYER_DECAY] = 1.0
    """Learning rate of a layer as a share of that of the layer above it, such as 0.7."""

    mixup: Annotated[float, NOT_NEGATIVE] = 0.2
    """Mixup strength: lambda ~ Beta(mixup, mixup); 0: off."""

    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Cutmix strength, likewise; with both on, every batch gets one of them by a coin flip."""

    label_smoothing: Annotated[float, FRACTION] = 0.1
    """Share of the target spread evenly over all classes, 0 to 1."""

    dtype: DtypeName = "auto"
    """Type of the weights; 16-bit ones have fp32 masters. auto: measures which type is fastest."""

    loss_scale: Annotated[float, LOSS_SCALE] = 65536.0
    """First loss scale; fp16 only."""

    scale_growth_interval: Annotated[int, COUNT] = 2000
    """Steps without an overflow after which the loss scale doubles; fp16 only."""

    device: str = "auto"
    """Where to train: cpu, cuda, cuda:1, ...; auto: cuda if there is one."""

    cuda_graph: bool = False
    """Record a training step as one CUDA graph and replay it; needs static shapes."""

    shard: bool = False
    """Split weights and optimizer state over the devices (FSDP2), for models too large for one."""

    threads: Annotated[int, PROCESSES] = 0
    """CPU threads; 0: as many as PyTorch chooses."""

    seed: Annotated[int, SEED] = 0
    """Seed of the weights, the order of samples and the mixing."""

    save_every: Annotated[int, WHOLE] = 0
    """Steps between checkpoints, besides those after every epoch; 0: only those."""

    keep: Annotated[int, COUNT] = 2
    """How many of the newest checkpoints to keep, besides the best one."""

    telemetry: bool = False
    """Count gradients that were flushed to zero and updates that were lost to rounding."""

    out: Annotated[Path | None, shown_default("PATH", "runs/<data>-<model>-<time>")] = None
    """Folder for everything the run writes; must be new or empty, unless --resume is given."""

    def __post_init__(self) -> None:
        if self.model not in models.MODELS and ":" not in self.model:
            known = ", ".join(models.MODELS)
            raise ConfigError(
                f"model: expected {known} or package.module:factory, got {self.model!r}"
            )
        for name in ("data", "model", "init_from", "out"):  # config.toml could not be read again
            text = str(getattr(self, name))
            if text != text.encode(errors="replace").decode():
                raise ConfigError(f"{name}: expected a name in UTF-8, got {text!a}; rename it")
        for name, allowed in _ranges().items():
            value = getattr(self, name)
            if value is not None:
                allowed.check(name, value)
        if self.unfreeze_every and self.freeze:
            raise ConfigError(
                "unfreeze_every, freeze: expected one of them; unfreeze_every decides for every "
                "layer whether it trains"
            )

        if self.shard and (self.cuda_graph or self.telemetry or self.unfreeze_every):
            raise ConfigError(
                "shard: expected none of cuda_graph, telemetry, unfreeze_every with it; they "
                "need whole parameters"
            )
        if self.shard and self.optimizer == "muon":
            raise ConfigError(
                "shard, optimizer: expected another optimizer than muon with it; it orthogonalises "
                "whole matrices, and a rank has some rows of each"
            )

    def one_lr(self, defaults: TrainConfig) -> TrainConfig:
        """A copy in which a flag for one of lr and base_lr overrides the other in ``defaults``."""
        if self.lr is None or self.base_lr is None:
            return self
        if defaults.base_lr is not None and defaults.lr is None:
            return dataclasses.replace(self, base_lr=None)
        if defaults.lr is not None and defaults.base_lr is None:
            return dataclasses.replace(self, lr=None)
        return self

    def resolved(self, devices: int = 1, samples: int | None = None) -> TrainConfig:
        """A copy with every default that depends on other fields filled in, except ``out``.

        Args:
            devices: number that train together; the learning rate is scaled to the global batch.
            samples: for training; no step has more of them, whatever the batch size. None: unknown.

        Raises:
            ConfigError: no such data set, both ``lr`` and ``base_lr``, or ``shard`` on one device.
        """
        if not data.is_known(self.data):
            known = ", ".join(data.DATASETS)
            raise ConfigError(
                f"data: expected {known}, an existing folder or hf:NAME, got {self.data!r}"
            )
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
        if samples is not None:
            batch_size = _batch_size(samples // devices)
        batch_size = batch_size if self.batch_size is None else self.batch_size
        usual, rule = _BASE_LR[self.optimizer]
        base_lr = usual if self.base_lr is None else self.base_lr
        filled = dataclasses.replace(
            self,
            epochs=epochs if self.epochs is None else self.epochs,
            batch_size=batch_size,
            base_lr=base_lr if self.lr is None else None,
        )
        if self.lr is not None:
            return filled
        return dataclasses.replace(
            filled, lr=scale_lr(base_lr, filled.global_batch(devices, samples), rule=rule)
        )

    def global_batch(self, devices: int = 1, samples: int | None = None) -> int:
        """Samples of a step, of all devices and ``accumulate`` batches; see ``resolved``."""
        assert self.batch_size is not None, "the config must be resolved"
        batch = self.batch_size * devices
        if samples is None:
            return batch * self.accumulate
        batches = min(self.accumulate, max(1, samples // batch))
        return min(batch, samples) * batches


_DEFAULTS = {"digits": (15, 64)}  # epochs; batch size before the number of samples is known


def _batch_size(samples: int) -> int:
    """The largest power of two that leaves 20 steps an epoch, from 8 to 256: 64 for the digits."""
    return min(256, max(8, 1 << (max(samples, 20) // 20).bit_length() - 1))


_BASE_LR: dict[str, tuple[float, Literal["linear", "sqrt"]]] = {  # at a batch of 256
    "adamw": (4e-3, "sqrt"),
    "adam": (4e-3, "sqrt"),
    "sgd": (0.1, "linear"),
    "lion": (4e-4, "sqrt"),  # a tenth of AdamW's
    "muon": (4e-3, "sqrt"),  # AdamW's: match_rms_adamw gives its updates the same size
}


@functools.cache
def _ranges() -> dict[str, Range]:
    """The range of every field that has one."""
    hints = get_type_hints(TrainConfig, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Range)
    }
