"""The footprint of a finished raster, in a STAC item: JSON that a GIS opens as GeoJSON."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rasterio
import shapely
from rasterio.enums import ColorInterp
from rasterio.features import shapes
from rasterio.io import DatasetReader
from rasterio.warp import transform_geom
from shapely.geometry.base import BaseGeometry

from uknowpan import __version__
from uknowpan.errors import UsageError
from uknowpan.pictures import valid_mask

EXTENSIONS = [
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/processing/v1.2.0/schema.json",
    "https://stac-extensions.github.io/eo/v2.0.0/schema.json",
]
SIDE = 1024
"""Pixels of the longer side of the mask that an outline is taken from."""
NAMES = {"red edge": "rededge", "swir 1": "swir16", "swir1": "swir16", "swir 2": "swir22", "swir2": "swir22"}
COMMON = {"pan", "coastal", "blue", "green", "yellow", "red", "rededge", "nir", "nir08", "nir09", "swir16", "swir22"}
"""Common names of bands in the extension eo."""


def footprint(raster: DatasetReader) -> BaseGeometry:
    """Outline of the valid pixels in the raster's CRS, true to 1/1024 of its longer side."""
    shrink = max(1.0, max(raster.shape) / SIDE)
    height, width = (max(1, round(n / shrink)) for n in raster.shape)
    mask = valid_mask(raster, (height, width))
    step = raster.transform @ raster.transform.scale(raster.width / width, raster.height / height)
    parts = [shapely.geometry.shape(part) for part, value in shapes(mask, mask > 0, transform=step) if value]
    pixel = max(abs(step.a) + abs(step.b), abs(step.d) + abs(step.e))
    outline = shapely.union_all(parts).simplify(0.0 if shrink == 1 else pixel)
    # Edges that are straight on the map bend on the globe.
    bent: BaseGeometry = outline.segmentize(pixel * SIDE / 4)
    return bent


def stac_item(
    raster: str | os.PathLike[str], name: str, href: str, acquired: str | None, inputs: Sequence[str]
) -> dict[str, Any]:
    """A STAC 1.1 item with one asset, and the extensions projection 2, processing 1.2 and eo 2.

    Args:
        raster: the finished file.
        name: the item's id.
        href: path from the item to the file under its final name.
        acquired: time of the image, ISO 8601; None: the time of processing stands for it.
        inputs: the files that it was made from.

    Raises:
        UsageError: the raster has no CRS, or no valid pixel.
    """
    with rasterio.open(raster) as source:
        if source.crs is None or source.transform.is_identity:
            raise UsageError("--stac needs a scene with a CRS; leave it out.")
        outline = footprint(source)
        if outline.is_empty:
            raise UsageError("--stac: no pixel of the result is valid; leave it out.")
        geometry = transform_geom(source.crs, "EPSG:4326", shapely.geometry.mapping(outline), precision=8)
        code = source.crs.to_epsg()
        projection = {
            "proj:code": None if code is None else f"EPSG:{code}",
            **({} if code is not None else {"proj:wkt2": source.crs.to_wkt(version="WKT2_2019")}),
            "proj:shape": list(source.shape),
            "proj:transform": list(source.transform)[:6],
            "proj:bbox": list(source.bounds),
        }
        bands = [_band(source, n) for n in source.indexes if source.colorinterp[n - 1] != ColorInterp.alpha]
        tiled = "; profile=cloud-optimized" if source.tags(ns="IMAGE_STRUCTURE").get("LAYOUT") == "COG" else ""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    names = ", ".join(Path(path).name for path in inputs)
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": EXTENSIONS,
        "id": name,
        "geometry": geometry,
        "bbox": list(shapely.geometry.shape(geometry).bounds),
        "properties": {
            "datetime": acquired or now,
            "created": now,
            **projection,
            "processing:software": {"uknowpan": __version__},
            "processing:lineage": f"Pansharpened by uknowpan {__version__} from {names}",
        },
        "links": [],
        "assets": {
            "image": {
                "href": Path(href).as_posix(),
                "type": f"image/tiff; application=geotiff{tiled}",
                "roles": ["data"],
                "bands": bands,
            }
        },
    }


def _band(source: DatasetReader, number: int) -> dict[str, Any]:
    """A band of the asset; its nodata is text where JSON has no such number."""
    described = source.descriptions[number - 1] or f"band {number}"
    common = NAMES.get(described.lower(), described.lower())
    nodata = source.nodatavals[number - 1]
    finite = nodata is not None and abs(nodata) < float("inf")
    return {
        "name": described,
        "data_type": source.dtypes[number - 1],
        **({} if nodata is None else {"nodata": nodata if finite else str(nodata)}),
        **({"eo:common_name": common} if common in COMMON else {}),
    }
