"""Settings of a run: a TOML over the dataclasses of a preset."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uknowpan.errors import UsageError
from uknowpan.models.training.bounds import check_bounds

if TYPE_CHECKING:
    from uknowpan.models.training.presets import Settings

TABLES = ("train", "network", "options")
LARGEST = 2**31 - 1
"""Largest whole number: seeds are multiplied, sizes go to C."""


PRESETS = ("lite", "paper", "release", "streams")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML as a dictionary; one that cannot be read is a UsageError."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise UsageError(f"--config {path} cannot be read: it is nested too deeply.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}.") from error


def read_config(path: Path | None) -> dict[str, Any]:
    """The TOML of `train` as a dictionary; usage errors exit with 2."""
    if path is None:
        return {}
    settings = read_toml(path)
    unknown = sorted(set(settings) - {*TABLES, "preset"})
    if unknown:
        tables = ", ".join(f"[{table}]" for table in TABLES)
        raise UsageError(f"--config has preset and {tables}, not {', '.join(unknown)}.")
    if settings.get("preset", PRESETS[0]) not in PRESETS:
        raise UsageError(f"There is no preset {settings['preset']!r}; known are {', '.join(PRESETS)}.")
    return settings


def overridden(settings: Settings, config: dict[str, Any]) -> Settings:
    """The settings with the fields of a TOML; unknown ones are refused with the valid ones."""
    changed = {table: _replaced(getattr(settings, table), config[table], table) for table in TABLES if table in config}
    return replace(settings, **changed)


def _replaced(there: Any, values: Any, table: str) -> Any:
    """A dataclass with the fields of a table."""
    if not isinstance(values, dict):
        raise UsageError(f"[{table}] is a table, not {values!r}.")
    valid = [f.name for f in fields(there)]
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise UsageError(f"{type(there).__name__} has no field {', '.join(unknown)}; valid are {', '.join(valid)}.")
    checked = {name: _checked(getattr(there, name), value, f"{table}.{name}") for name, value in values.items()}
    try:
        changed = replace(there, **checked)
        check_bounds(changed)
        return changed
    except ValueError as error:
        raise UsageError(f"[{table}]: {error}.") from error


def _checked(there: Any, value: Any, place: str) -> Any:
    """A value of the type of the one that it replaces."""
    if is_dataclass(there):
        return _replaced(there, value, place)
    name = place.rpartition(".")[2]
    if isinstance(there, tuple):
        if not isinstance(value, list) or any(type(v) is not int for v in value):
            raise UsageError(f"{name} takes a list of whole numbers, not {value!r}.")
        for number in value:
            _check_size(name, number)
        return tuple(value)
    wanted = type(there)
    if type(value) is not wanted and not (wanted is float and type(value) is int):
        raise UsageError(f"{name} takes {wanted.__name__}, not {value!r}.")
    if wanted is float and not math.isfinite(value):
        raise UsageError(f"{name} takes a finite number, not {value}.")
    if wanted is int:
        _check_size(name, value)
    return value


def _check_size(name: str, value: int) -> None:
    if value > LARGEST:
        raise UsageError(f"{name} must be at most {LARGEST}, not {value}.")
