"""The recipe of ``fastmp train``: settings, config file, and the objects built from them."""

from fastmp.recipe.build import (
    build_model,
    build_trainer,
    device_of,
    load_data,
    load_pretrained,
    loaders,
    workers,
)
from fastmp.recipe.config import DTYPES, ConfigError, DtypeName, TrainConfig
from fastmp.recipe.dtype_choice import choose_dtype
from fastmp.recipe.effective import effective
from fastmp.recipe.toml import commands_in, make_folder, read_toml, write_toml

__all__ = [
    "DTYPES",
    "ConfigError",
    "DtypeName",
    "TrainConfig",
    "build_model",
    "build_trainer",
    "choose_dtype",
    "commands_in",
    "device_of",
    "effective",
    "load_data",
    "load_pretrained",
    "loaders",
    "make_folder",
    "read_toml",
    "workers",
    "write_toml",
]
