"""Files that a run reads and writes, checked before hours are spent on a scene."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from affine import Affine
from rasterio.io import MemoryFile

from uknowpan.console import collected
from uknowpan.durable import sweep
from uknowpan.errors import UsageError
from uknowpan.tiling import check_output, sweep_strips
from uknowpan.tiling.identity import files_behind

_SIDE = 1024
"""Pixels of the file that creation options are tried on: blocks up to this size mean something."""


OTHERS = frozenset(
    [".png", ".jpg", ".jpeg", ".jp2", ".j2k", ".jxl", ".webp", ".gif", ".bmp", ".img", ".vrt", ".nc", ".h5", ".hdf"]
)
"""Suffixes of other formats than GeoTIFF."""


HDF5 = (".h5", ".hdf5", ".hdf")


def check_suffix(option: str, path: str | os.PathLike[str], kind: str, *suffixes: str) -> None:
    """Refuse an output whose name promises another format than `kind`. Raises UsageError."""
    if os.path.splitext(path)[1].lower() not in suffixes:
        raise UsageError(f"{option} {path}: {kind} is written; name it {suffixes[0]}.")


def check_suffixes(named: Mapping[str, str]) -> None:
    """Refuse outputs of `sharpen` (option -> path) whose name promises another format. Raises UsageError."""
    for option, path in named.items():
        if option == "--preview":
            check_suffix(option, path, "a PNG", ".png", "")
        elif option == "--stac":
            check_suffix(option, path, "a STAC item, which is JSON,", ".json", ".geojson")
        elif os.path.splitext(path)[1].lower() in OTHERS:
            raise UsageError(f"{option} {path}: a GeoTIFF is written; name it .tif, and convert it: gdal_translate.")


def check_outputs(named: Mapping[str, str | None], inputs: Sequence[str], overwrite: bool | None) -> None:
    """Refuse outputs (option -> path) that are inputs, exist, cannot be made or share one name."""
    inputs = [*inputs, *files_behind(inputs)]
    seen: dict[str, str] = {}
    given = {option: path for option, path in named.items() if path is not None}
    for path in given.values():
        sweep(path)
        sweep_strips(path)
    for option, path in given.items():
        check_output(path, inputs, overwrite)
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file {path}.")


def try_creation(options: Mapping[str, str], format: str, dtype: str) -> None:
    """Refuse creation options that GDAL does not take.

    GDAL only warns of unknown options, and only when the file is made, which comes last.

    Raises:
        UsageError: GDAL warns of the options or fails with them.
    """
    if not options:
        return
    defaults = {"COMPRESS": "DEFLATE"}
    if format == "gtiff":
        defaults |= {"TILED": "YES", "BLOCKXSIZE": "512", "BLOCKYSIZE": "512"}
    wanted = {key.lower(): value for key, value in (defaults | dict(options)).items()}
    wanted |= {"driver": {"gtiff": "GTiff", "cog": "COG"}[format], "dtype": dtype}
    with collected("rasterio") as texts, MemoryFile() as memory:
        try:
            with memory.open(width=_SIDE, height=_SIDE, count=1, transform=Affine.scale(2, -2), **wanted) as dataset:
                dataset.write(np.zeros((1, _SIDE, _SIDE), dtype))
        except Exception as error:  # many kinds, of rasterio and of GDAL
            texts.insert(0, str(error.__cause__ or error))
    if texts:
        reason = " ".join(texts[0].split()).rstrip(".")
        words = " ".join(f"--co {key}={value}" for key, value in options.items())
        raise UsageError(f"{words}: GDAL does not take it for {dtype} ({reason}).")
