"""Files that a run reads and writes, checked before hours are spent on a scene."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from uknowpan.durable import sweep
from uknowpan.errors import UsageError

_SIDE = 1024
"""Pixels of the file that creation options are tried on: blocks up to this size mean something."""


def check_outputs(named: Mapping[str, str | None], inputs: Sequence[str], overwrite: bool) -> None:
    """Refuse outputs (option -> path) that are inputs, exist, cannot be made or share one name."""
    from uknowpan.tiling import check_output, sweep_strips
    from uknowpan.tiling.identity import files_behind

    inputs = [*inputs, *files_behind(inputs)]
    seen: dict[Path, str] = {}
    for option, path in named.items():
        if path is None:
            continue
        check_output(path, inputs, overwrite)
        sweep(path)
        sweep_strips(path)
        other = seen.setdefault(Path(path).resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file {path}.")


class _Messages(logging.Handler):
    """Keeps the warnings of GDAL."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def try_creation(options: Mapping[str, str], format: str, dtype: str) -> None:
    """Refuse creation options that GDAL does not take.

    GDAL only warns of unknown options, and only when the file is made, which comes last.

    Raises:
        UsageError: GDAL warns of the options or fails with them.
    """
    if not options:
        return
    import numpy as np
    from affine import Affine
    from rasterio.io import MemoryFile

    messages = _Messages()
    logger = logging.getLogger("rasterio")
    logger.addHandler(messages)
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
        messages.texts.insert(0, str(error.__cause__ or error))
    finally:
        logger.removeHandler(messages)
    if messages.texts:
        reason = " ".join(messages.texts[0].split()).rstrip(".")
        words = " ".join(f"--co {key}={value}" for key, value in options.items())
        raise UsageError(f"{words}: GDAL does not take it for {dtype} ({reason}).")
