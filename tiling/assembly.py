"""Bands of several files, or tiles of one image, as one raster: GDAL's VRT, which is never written to a file."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from itertools import combinations

import numpy as np
from affine import Affine
from rasterio.io import DatasetReader

from uknowpan.tiling.errors import IncompatiblePair
from uknowpan.tiling.raster import Assembly, RasterLike, has_mask, open_raster, parse_band_spec, usable_nodata
from uknowpan.tiling.vrt import mask_of, source, type_name, virtual
from uknowpan.tiling.window import same_crs

_TOLERANCE = 0.01
"""Pixels by which a tile may lie off the grid of the first one, at any corner."""

Part = tuple[str, int]
"""(file, band from 1)"""


@dataclass(frozen=True)
class _Tile:
    """Where a tile lies, in pixels from the first one's corner, and its bands."""

    row: int
    col: int
    height: int
    width: int
    bands: Sequence[tuple[str, DatasetReader, int]]


def assembled(
    name: str,
    tiles: Sequence[Sequence[Part]],
    *,
    descriptions: Sequence[str | None] = (),
    nodata: float | None = None,
    bits: int | None = None,
    beside: Sequence[str] = (),
) -> Assembly:
    """One raster of tiles that share a pixel grid; the bands of each tile in order.

    Args:
        name: its name in messages.
        tiles: the bands of each tile; later tiles lie on top.
        descriptions: of the bands; default: as the first tile's files declare.
        nodata: instead of the one that the files declare.
        bits: significant bits, where the files do not declare them.
        beside: more files that the raster depends on, such as the metadata of a product.

    Raises:
        InputUnreadable, IncompatiblePair: a file cannot be opened, or does not fit the others.
    """
    with ExitStack() as closing:
        paths = dict.fromkeys(path for tile in tiles for path, _ in tile)
        opened = {path: closing.enter_context(open_raster(path)) for path in paths}
        base = opened[tiles[0][0][0]]
        placed = [_placed([(path, opened[path], band) for path, band in tile], base) for tile in tiles]
        top, left = min(tile.row for tile in placed), min(tile.col for tile in placed)
        height = max(tile.row + tile.height for tile in placed) - top
        width = max(tile.col + tile.width for tile in placed) - left
        first = placed[0].bands
        values = [_nodata([tile.bands[i] for tile in placed], nodata) for i in range(len(first))]
        data = first[0][1]
        lines = [line for domain in ("", "RPC", "IMAGERY") for line in _metadata(data.tags(ns=domain or None), domain)]
        masked = any(has_mask(data) for data in opened.values())
        masked = masked or (len(tiles) > 1 and None in values)  # between tiles there is nothing
        for i, value in enumerate(values):
            lines += _band(i, placed, (top, left), value, [*descriptions, *[None] * len(first)][i], bits, masked)
        place = data.transform if data.transform.is_identity else data.transform @ Affine.translation(left, top)
        return Assembly(name, virtual(width, height, data.crs, place, "\n".join(lines)), (*paths, *beside))


def joined(specs: Sequence[RasterLike], nodata: float | None) -> list[RasterLike]:
    """Tiles of one MS as one raster; files that show the same place, such as single bands, stay as they are.

    Raises:
        InputUnreadable, IncompatiblePair: a file cannot be opened, or the tiles do not share a pixel grid.
    """
    paths = [os.fspath(spec) for spec in specs if isinstance(spec, str | os.PathLike)]
    if len(paths) < 2 or len(paths) < len(specs) or any(parse_band_spec(path)[1] is not None for path in paths):
        return list(specs)
    with ExitStack() as closing:
        opened = [closing.enter_context(open_raster(path)) for path in paths]
        counts, bounds = {data.count for data in opened}, [data.bounds for data in opened]
        if len(counts) > 1 or any(data.transform.is_identity for data in opened) or not apart(bounds):
            return list(specs)
    bands = range(1, counts.pop() + 1)
    name = f"{paths[0]} with its {len(paths) - 1} other tiles"
    return [assembled(name, [[(path, band) for band in bands] for path in paths], nodata=nodata)]


def apart(bounds: Sequence[tuple[float, float, float, float]]) -> bool:
    """Whether rectangles (left, bottom, right, top) share less than half of the smaller one, two by two."""

    def shared(a: tuple[float, ...], b: tuple[float, ...]) -> float:
        width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
        return max(width, 0) * max(height, 0)

    return all(shared(a, b) < 0.5 * min(shared(a, a), shared(b, b)) for a, b in combinations(bounds, 2))


def _placed(bands: Sequence[tuple[str, DatasetReader, int]], base: DatasetReader) -> _Tile:
    """A tile on the grid of the first one."""
    path, data, _ = bands[0]
    for other, same, _ in bands:
        if (same.shape, same.transform) != (data.shape, data.transform) or not same_crs(same.crs, data.crs):
            raise IncompatiblePair(f"{other} and {path} differ in size or place, but are bands of one image.")
    if data is not base and data.transform.is_identity:
        raise IncompatiblePair(f"{path} is a tile without georeferencing; make one image of the tiles first.")
    step = ~base.transform @ data.transform
    drift = max(abs(step.a - 1) * data.width, abs(step.e - 1) * data.height, abs(step.b), abs(step.d))
    off = max(abs(value - round(value)) for value in (step.c, step.f))
    if max(drift, off) > _TOLERANCE or not same_crs(data.crs, base.crs):
        raise IncompatiblePair(
            f"{path} and {base.name} are tiles, but do not share one pixel grid; make one image of them: gdalwarp."
        )
    return _Tile(round(step.f), round(step.c), data.height, data.width, bands)


def _nodata(bands: Sequence[tuple[str, DatasetReader, int]], wanted: float | None) -> float | None:
    """The nodata value of one band of all tiles."""
    declared: list[float | None] = [
        usable_nodata(data.nodatavals[band - 1] if wanted is None else wanted, data.dtypes[band - 1])
        for _, data, band in bands
    ]
    kinds = {repr(value) for value in declared}
    if len(kinds) > 1:
        raise IncompatiblePair(
            f"{bands[0][0]} and its other tiles declare different nodata values ({', '.join(sorted(kinds))}); "
            "make one image of them: gdalwarp."
        )
    return declared[0]


def _metadata(tags: dict[str, str], domain: str = "") -> list[str]:
    if not tags:
        return []
    where = f' domain="{domain}"' if domain else ""
    items = [f'<MDI key="{escape(key)}">{escape(value)}</MDI>' for key, value in tags.items()]
    return [f"<Metadata{where}>", *items, "</Metadata>"]


def _band(
    index: int,
    tiles: Sequence[_Tile],
    corner: tuple[int, int],
    nodata: float | None,
    description: str | None,
    bits: int | None,
    masked: bool,
) -> list[str]:
    """Lines for one band, with what the first tile's file declares of it, and its mask."""
    _, data, band = tiles[0].bands[index]
    kind = np.result_type(*(np.dtype(t.bands[index][1].dtypes[t.bands[index][2] - 1]) for t in tiles))
    height, width = data.block_shapes[band - 1]
    described = description or data.descriptions[band - 1]
    structure = {"NBITS": str(bits)} if bits else {}
    structure |= {k: v for k, v in data.tags(band, ns="IMAGE_STRUCTURE").items() if k == "NBITS"}

    def sources(kind: str = "") -> str:
        parts = ((tile, *tile.bands[index]) for tile in tiles)
        return "".join(_source(tile, corner, path, f"{kind}{number}") for tile, path, _, number in parts)

    return [
        f'<VRTRasterBand dataType="{type_name(kind.name)}" band="{index + 1}"'
        f' blockXSize="{width}" blockYSize="{height}">',
        *([f"<Description>{escape(described)}</Description>"] if described else []),
        *_metadata(data.tags(band)),
        *_metadata(structure, "IMAGE_STRUCTURE"),
        *([] if nodata is None else [f"<NoDataValue>{nodata!r}</NoDataValue>"]),
        f"<ColorInterp>{data.colorinterp[band - 1].name.capitalize()}</ColorInterp>",
        f"<UnitType>{escape(data.units[band - 1] or '')}</UnitType>",
        f"<Offset>{data.offsets[band - 1]!r}</Offset>",
        f"<Scale>{data.scales[band - 1]!r}</Scale>",
        sources(),
        *([mask_of(sources("mask,"))] if masked else []),
        "</VRTRasterBand>",
    ]


def _source(tile: _Tile, corner: tuple[int, int], path: str, band: int | str) -> str:
    return source(path, band, (0, 0, tile.width, tile.height), tile.col - corner[1], tile.row - corner[0])
