"""A folder of rasters without metadata: PAN and MS by their number of bands and their pixel size."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uknowpan.deliveries.delivery import Band, Delivery
from uknowpan.errors import InputError
from uknowpan.tiling import InputUnreadable
from uknowpan.tiling.assembly import apart
from uknowpan.tiling.raster import alpha_bands, open_raster

SUFFIXES = frozenset([".tif", ".tiff", ".jp2", ".vrt", ".img", ".ntf"])
METRES_PER_DEGREE = 111_320
FINER = 0.75
"""PAN pixel over MS pixel, at most."""
_TILE = re.compile(r"(?i)r\d+_?c\d+")
"""In the name of a tile. PANs side by side may as well be scenes of their own."""


@dataclass(frozen=True)
class Header:
    """The declarations of a raster file."""

    path: Path
    bands: tuple[int, ...]
    """Without alpha."""
    names: tuple[str, ...]
    pixel: float
    """Side of a pixel, metres; 0: the raster is not placed."""
    bounds: tuple[float, float, float, float]
    crs: str
    made_here: bool
    """Whether it is a result of this program."""


def headers(folder: Path) -> tuple[list[Header], list[str]]:
    """Headers of the rasters in a folder by name, and what cannot be opened."""
    read, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith(".") or not path.is_file():
            continue
        try:
            read.append(_header(path))
        except InputUnreadable:
            left_out.append(f"{path.name} (cannot be opened)")
    return read, left_out


def _header(path: Path) -> Header:
    with open_raster(str(path)) as data:
        bands = [band for band in data.indexes if band not in alpha_bands(data)]
        side = 0.0 if data.transform.is_identity else math.sqrt(abs(data.transform.determinant))
        return Header(
            path=path,
            bands=tuple(bands),
            names=tuple(data.descriptions[band - 1] or "" for band in bands),
            pixel=side * (METRES_PER_DEGREE if data.crs and data.crs.is_geographic else 1),
            bounds=tuple(data.bounds),
            crs=data.crs.to_wkt() if data.crs else "",
            made_here="UKNOWPAN_VERSION" in data.tags(),
        )


def find(place: Path) -> list[list[Path]]:
    """The rasters of a folder, where one of them may be a PAN and another an MS."""
    if not place.is_dir():
        return []
    rasters = [raster for raster in headers(place)[0] if not raster.made_here]
    pans, ms = divided(rasters)
    return [[raster.path for raster in rasters]] if pans and ms else []


def divided(rasters: Sequence[Header]) -> tuple[list[Header], list[Header]]:
    """PANs and MS: the finest single bands, and coarser rasters of several bands, or else coarser single bands."""
    singles = [raster for raster in rasters if len(raster.bands) == 1]
    finest = min((raster.pixel for raster in singles), default=0.0)
    pans = [raster for raster in singles if raster.pixel <= finest / FINER]
    coarser = [raster for raster in rasters if raster not in pans]
    several = [raster for raster in coarser if len(raster.bands) > 1]
    return pans, [raster for raster in several if raster.pixel >= finest / FINER or not finest] or coarser


def read(files: Sequence[Path]) -> Delivery:
    """The pair in the folder of such files; PAN and MS may be in tiles.

    Raises:
        InputError: there are several PANs or MS.
    """
    place = files[0].parent
    rasters, left_out = headers(place)
    left_out += [f"{raster.path.name} (made by uknowpan)" for raster in rasters if raster.made_here]
    rasters = [raster for raster in rasters if not raster.made_here]
    pans, ms = divided(rasters)
    if len(pans) > 1 and not all(_TILE.search(raster.path.stem) for raster in pans):
        names = ", ".join(raster.path.name for raster in pans[:3])
        raise InputError(f"{place} may hold {len(pans)} PANs ({names}); name the files of PAN and MS.")
    _refuse_several(place, pans, "PANs")
    left_out += [f"{raster.path.name} (neither PAN nor MS)" for raster in rasters if raster not in (*pans, *ms)]
    return Delivery(
        product=str(place),
        scene=place.name,
        kind="a folder with one PAN and one MS",
        pan=tuple((str(raster.path), raster.bands[0]) for raster in pans),
        ms=_bands(place, ms),
        left_out=tuple(left_out),
    )


def _refuse_several(place: Path, rasters: Sequence[Header], what: str) -> None:
    """Refuse rasters that are not tiles of one image."""
    first = rasters[0]
    same = all((raster.crs, len(raster.bands)) == (first.crs, len(first.bands)) for raster in rasters)
    if len(rasters) > 1 and not (same and first.pixel and apart([raster.bounds for raster in rasters])):
        names = ", ".join(raster.path.name for raster in rasters[:3])
        raise InputError(f"{place} may hold {len(rasters)} {what} ({names}); name the files of PAN and MS.")


def _bands(place: Path, ms: Sequence[Header]) -> tuple[Band, ...]:
    """The bands of one MS: of a raster, of its tiles, or of one file for each."""
    sizes = [(raster.bounds, raster.crs) for raster in ms]
    if all(len(raster.bands) == 1 for raster in ms) and len(ms) > 1 and len(set(sizes)) == 1:
        return tuple(Band(raster.path.stem, ((str(raster.path), raster.bands[0]),)) for raster in ms)
    _refuse_several(place, ms, "MS")
    return tuple(
        Band(name, tuple((str(raster.path), raster.bands[index]) for raster in ms))
        for index, name in enumerate(ms[0].names)
    )
