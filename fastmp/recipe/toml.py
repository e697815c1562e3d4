"""The recipe as a TOML file, read and written, and the folder of the results."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from fastmp.files import atomic_write
from fastmp.recipe.config import ConfigError, TrainConfig

_COMMAND = "# fastmp train"  # a line that begins so is a command


def read_toml(path: Path, base: TrainConfig | None = None) -> TrainConfig:
    """The recipe in a TOML file; missing fields are those of ``base``, by default the defaults.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, or a value of a wrong type or range.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path}: not found") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"config file {path}: expected TOML, got: {error}") from error
    types = get_type_hints(TrainConfig)
    for key, value in values.items():
        if key not in types:
            raise ConfigError(
                f"config file {path}: unknown key {key!r}; the known ones are {', '.join(types)}"
            )
        values[key] = _converted(value, types[key], f"config file {path}: {key}")
    base = TrainConfig() if base is None else base
    return dataclasses.replace(base, **values).one_lr(base)


def _converted(value: Any, expected: Any, name: str) -> Any:
    choices = get_args(expected) or (expected,)  # of a union, or of a Literal
    if get_origin(expected) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ConfigError(f"{name}: expected a list of strings, got {value!r}")
    if Path in choices and isinstance(value, str):
        return Path(value)
    if float in choices and type(value) is int:
        return float(value)
    if type(value) in choices or value in choices:
        return value
    wanted = " or ".join(getattr(c, "__name__", str(c)) for c in choices if c is not type(None))
    raise ConfigError(f"{name}: expected {wanted}, got {value!r}")


def write_toml(config: TrainConfig, path: Path, commands: Iterable[str] = ()) -> None:
    """Write the recipe for ``read_toml``; fields that are None are left out.

    ``commands``: those that made the run, for ``commands_in``.
    """
    printable = ("".join(c if c.isprintable() else " " for c in command) for command in commands)
    lines = [f"# {command}\n" for command in printable]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_as_toml(value)}\n")
    atomic_write(path, "".join(lines).encode())


def commands_in(path: Path) -> list[str]:
    """The commands that ``write_toml`` wrote into a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("# ") for line in lines if line.startswith(_COMMAND)]


def _as_toml(value: Any) -> str:
    """Strings, lists and booleans are written as JSON, numbers as Python writes them (inf too)."""
    if isinstance(value, bool | tuple):
        return json.dumps(value)
    return json.dumps(str(value)) if isinstance(value, str | Path) else repr(value)


def make_folder(setting: str, folder: Path) -> None:
    """Create a folder and check that files can be written into it, before any work is done.

    Raises:
        ConfigError: it cannot be created or written to; the message names the setting.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"{setting}: expected a folder that can be written to, got {folder} "
            f"({error.strerror}); choose another"
        ) from error
