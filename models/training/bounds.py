"""Bounds of a configuration's numbers, declared on the fields of its dataclass."""

from dataclasses import MISSING, field, fields
from typing import Any

FULL_SCALES = (1e-9, 1e12)
"""Bounds of a full scale; float32 cannot hold the squares and scores of others."""


def is_full_scale(value: float) -> bool:
    """Whether images can be divided by a value: neither NaN nor outside `FULL_SCALES`."""
    return FULL_SCALES[0] <= value <= FULL_SCALES[1]


def count(default: Any = MISSING) -> Any:
    """A dataclass field of at least 1; tuples are bounded element by element."""
    return field(default=default, metadata={"least": 1})


def share(default: float) -> Any:
    """A dataclass field from 0 to 1, with a default."""
    return field(default=default, metadata={"most": 1})


def check_bounds(config: Any) -> None:
    """Check the numbers of a dataclass against the bounds of its fields: by default 0 and none.

    Raises:
        ValueError: a number lies outside; the text names the field.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) not in (int, float):
                continue
            least, most = entry.metadata.get("least", 0), entry.metadata.get("most")
            if number < least:
                raise ValueError(f"{entry.name} must be at least {least}, not {number}")
            if most is not None and number > most:
                raise ValueError(f"{entry.name} must be at most {most}, not {number}")
