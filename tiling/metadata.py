"""Headers: the parts of the inputs' that are kept, and the content of the outputs'."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader

from uknowpan.tiling.raster import Raster, usable_nodata


@dataclass(frozen=True)
class MsMeta:
    """Metadata of the MS: one entry per band in the tuples."""

    dtype: str
    nodata: float | None
    descriptions: tuple[str | None, ...]
    colorinterp: tuple[ColorInterp, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    units: tuple[str | None, ...]
    band_tags: tuple[dict[str, str], ...]
    tags: dict[str, str]
    nbits: int | None
    """significant bits if the file declares them (IMAGE_STRUCTURE NBITS)"""


@dataclass(frozen=True)
class PanMeta:
    """Metadata of the PAN besides its grid."""

    dtype: str
    nodata: float | None
    nbits: int | None
    acquired: str | None = None
    """time of the image, ISO 8601 in UTC, if the file declares it"""


def declared_bits(dataset: DatasetReader, band: int) -> int | None:
    """Significant bits of a band, or None where the file declares none."""
    text = dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS")
    text = text or dataset.tags(ns="IMAGE_STRUCTURE").get("NBITS")
    return int(text) if text and text.isdigit() else None


def iso_time(text: str | None) -> str | None:
    """A time of metadata as ISO 8601 in UTC, to the second; None where it is none."""
    try:
        time = datetime.fromisoformat((text or "").strip())
    except ValueError:
        return None
    zoned = time if time.tzinfo else time.replace(tzinfo=UTC)
    return zoned.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def pan_meta(pan: Raster) -> PanMeta:
    time = iso_time(pan.dataset.tags(ns="IMAGERY").get("ACQUISITIONDATETIME"))
    return PanMeta(pan.dtypes[0], pan.nodata[0], declared_bits(pan.dataset, pan.bands[0]), time)


def ms_meta(rasters: Sequence[Raster], nodata: float | None) -> MsMeta:
    """Metadata of the stack of all bands; `nodata` as the user gives it goes before the files' own."""
    stack = [(raster, raster.dataset, band) for raster in rasters for band in raster.bands]
    dtype = str(np.result_type(*(np.dtype(data.dtypes[b - 1]) for _, data, b in stack)))
    values = [nodata, *(value for raster in rasters for value in raster.nodata)]
    usable = [value for value in (usable_nodata(v, dtype) for v in values) if value is not None]
    bits = [declared_bits(data, b) for _, data, b in stack]
    known_bits = [b for b in bits if b is not None]
    separate = len(rasters) > 1
    tags: dict[str, str] = {}
    for raster in rasters:
        tags = {**raster.dataset.tags(), **tags}
    colours = [data.colorinterp[b - 1] for _, data, b in stack]
    return MsMeta(
        dtype=dtype,
        nodata=usable[0] if usable else None,
        descriptions=tuple(
            # Separate band files are distinguished by their names.
            data.descriptions[b - 1] or (Path(raster.path).stem if separate and len(raster.bands) == 1 else None)
            for raster, data, b in stack
        ),
        colorinterp=tuple(
            ColorInterp.undefined if c == ColorInterp.alpha or (i > 0 and c == ColorInterp.gray) else c
            for i, c in enumerate(colours)
        ),
        scales=tuple(data.scales[b - 1] for _, data, b in stack),
        offsets=tuple(data.offsets[b - 1] for _, data, b in stack),
        units=tuple(data.units[b - 1] or None for _, data, b in stack),
        band_tags=tuple(dict(data.tags(b)) for _, data, b in stack),
        tags=tags,
        nbits=max(known_bits) if len(known_bits) == len(bits) else None,
    )


def with_alpha(meta: MsMeta) -> MsMeta:
    """Metadata with an alpha band after the others."""
    more: dict[str, Any] = {
        "descriptions": "alpha",
        "colorinterp": ColorInterp.alpha,
        "scales": 1.0,
        "offsets": 0.0,
        "units": None,
    }
    more = {key: (*getattr(meta, key), value) for key, value in more.items()}
    return replace(meta, band_tags=(*meta.band_tags, {}), **more)


def rgb_meta(meta: MsMeta, bands: Sequence[int]) -> MsMeta:
    """Metadata of an 8-bit picture of one or three bands (0-based), nodata 0."""
    colours = (ColorInterp.red, ColorInterp.green, ColorInterp.blue) if len(bands) == 3 else (ColorInterp.gray,)
    n = len(bands)
    return replace(
        meta, dtype="uint8", nodata=0.0, descriptions=tuple(meta.descriptions[b] for b in bands), colorinterp=colours,
        scales=(1.0,) * n, offsets=(0.0,) * n, units=(None,) * n, band_tags=({},) * n, nbits=None,
    )  # fmt: skip


def uncertainty_meta(meta: MsMeta, coverage: int = 68) -> MsMeta:
    """Metadata of a raster of half-widths in the MS's units: float32, nodata NaN, no offset.

    Args:
        meta: of the MS.
        coverage: percentage of the errors that the half-widths hold; 68 is 1-sigma.
    """
    n, kind = len(meta.descriptions), "1-sigma" if coverage == 68 else f"half-width {coverage} %"
    return replace(
        meta,
        dtype="float32",
        nodata=float("nan"),
        descriptions=tuple(f"{name or f'band {i}'} {kind}" for i, name in enumerate(meta.descriptions, 1)),
        colorinterp=(ColorInterp.gray,) + (ColorInterp.undefined,) * (n - 1),
        offsets=(0.0,) * n,
        band_tags=({},) * n,
        tags={},
        nbits=None,
    )
