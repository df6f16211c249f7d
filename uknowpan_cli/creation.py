"""GDAL creation options (`--co`): parsed, and tried out before hours are spent on a scene."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from uknowpan.errors import UsageError

_OPEN_ARGUMENTS = {
    *("FP", "MODE", "DRIVER", "WIDTH", "HEIGHT", "COUNT"),
    *("CRS", "TRANSFORM", "DTYPE", "NODATA", "SHARING", "THREAD_SAFE"),
}
"""Not creation options but arguments of rasterio.open, which shares one name space for both."""

_SIDE = 1024
"""Pixels of the file that is tried out: blocks up to this size mean something."""


def creation_options(words: Sequence[str]) -> dict[str, str]:
    """KEY=VALUE words, also several in one separated by commas, to a dictionary."""
    found = {}
    for word in (w for text in words for w in text.split(",")):
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--co takes KEY=VALUE, not {word!r}.")
        if key.upper() in _OPEN_ARGUMENTS:
            raise UsageError(f"--co {word}: {key} is no creation option of GDAL's GTiff or COG.")
        found[key.upper()] = value
    return found


class _Heard(logging.Handler):
    """Keeps what GDAL warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def try_creation(options: Mapping[str, str], format: str, dtype: str) -> None:
    """Exit with 2 if GDAL does not take the options: it only warns of those that it does not
    know and ignores them, and says so when the file is made, which is last."""
    if not options:
        return
    import numpy as np
    from affine import Affine
    from rasterio.io import MemoryFile

    heard = _Heard()
    logger = logging.getLogger("rasterio")
    logger.addHandler(heard)
    defaults = {"COMPRESS": "DEFLATE"}
    if format == "gtiff":
        defaults |= {"TILED": "YES", "BLOCKXSIZE": "512", "BLOCKYSIZE": "512"}
    wanted = {key.lower(): value for key, value in (defaults | dict(options)).items()}
    try:
        with (
            MemoryFile() as memory,
            memory.open(
                driver={"gtiff": "GTiff", "cog": "COG"}[format],
                width=_SIDE, height=_SIDE, count=1, dtype=dtype,
                transform=Affine.scale(2, -2), **wanted,
            ) as dataset,
        ):  # fmt: skip
            dataset.write(np.zeros((1, _SIDE, _SIDE), dtype))
    except Exception as error:  # many kinds, of rasterio and of GDAL
        heard.messages.insert(0, str(error.__cause__ or error))
    finally:
        logger.removeHandler(heard)
    if heard.messages:
        said = " ".join(heard.messages[0].split()).rstrip(".")
        words = " ".join(f"--co {key}={value}" for key, value in options.items())
        raise UsageError(f"{words}: GDAL does not take it for {dtype} ({said}).")
