"""A folder of rasters without metadata: PAN and MS by their number of bands and their pixel size."""

import math
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


@dataclass(frozen=True)
class Header:
    """What a file declares."""

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


def read(place: Path) -> list[Delivery]:
    """The pair in a folder: the finest single bands are the PAN, coarser rasters of several bands, or several single
    bands, the MS; either may be in tiles.

    Raises:
        InputError: there are several PANs or MS.
    """
    if not place.is_dir():
        return []
    rasters, left_out = headers(place)
    left_out += [f"{raster.path.name} (made by uknowpan)" for raster in rasters if raster.made_here]
    rasters = [raster for raster in rasters if not raster.made_here]
    singles = [raster for raster in rasters if len(raster.bands) == 1]
    if len(rasters) < 2 or not singles:
        return []
    finest = min(raster.pixel for raster in singles)
    pans = [raster for raster in singles if raster.pixel <= finest / FINER]
    _refuse_several(place, pans, "PANs")
    coarser = [raster for raster in rasters if raster not in pans]
    several = [raster for raster in coarser if len(raster.bands) > 1]
    ms = [raster for raster in several if raster.pixel >= finest / FINER or not finest] or coarser
    if not ms:
        return []
    left_out += [f"{raster.path.name} (neither PAN nor MS)" for raster in coarser if raster not in ms]
    delivery = Delivery(
        product=str(place),
        kind="a folder with one PAN and one MS",
        pan=tuple((str(raster.path), raster.bands[0]) for raster in pans),
        ms=_bands(place, ms),
        left_out=tuple(left_out),
    )
    return [delivery]


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
