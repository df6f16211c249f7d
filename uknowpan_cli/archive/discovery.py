"""The scenes of a folder without a manifest: by product, by the names of the files, or by overlap of footprints."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds
from shapely import Polygon, STRtree, box

from uknowpan.archive.manifest import Entry, safe_name
from uknowpan.deliveries import READERS, Delivery
from uknowpan.deliveries.folder import FINER, Header, divided, headers
from uknowpan.errors import Error
from uknowpan.tiling.assembly import apart

Pair = tuple[Header, list[Header]]
"""A PAN and its MS."""

_PAN = re.compile(r"(?i)(?:^|[_\-. ])(pan\d*|panchromatic|p)(?=[_\-. ]|$)")
_MS = re.compile(r"(?i)(?:^|[_\-. ])(ms\d*|mss\d*|mul|mux|xs|multi|multispectral|analytic)(?=[_\-. ]|$)")
"""The part of a file's name that PAN and MS do not share."""
_SHARED = 0.5
"""Part of the smaller footprint that PAN and MS share at least."""


def by_folder(root: Path) -> tuple[list[Entry], list[str]]:
    """The scenes in a folder and below it, or of a STAC collection, and what was left out, with the reason.

    Products come first. Of other rasters a PAN has the MS of the same name but for words such as `pan` and `ms`, or
    else the coarser one on the same ground. Several MS files of a scene are bands, or tiles that lie side by side.
    """
    entries, left_out = [], []
    claimed: set[Path] = set()
    for reader in READERS:
        known = frozenset(claimed)
        for files in reader.find(root):
            if any(path.parent in known for path in files):
                continue  # a STAC item beside a vendor's own metadata
            claimed |= {path.parent for path in files}
            try:
                delivery = reader.read(files)
            except Error as error:
                left_out.append(str(error))
                continue
            entries.append(Entry(pan=delivery.product, ms=(), key=safe_name(delivery.scene)))
            claimed |= {Path(path).parent for path in _files(delivery)}
    loose: list[Header] = []
    for folder in sorted({path for path in (root, *root.rglob("*")) if path.is_dir()} - claimed):
        rasters, unreadable = headers(folder)
        loose += rasters
        left_out += [f"{folder}: {text}." for text in unreadable]
    made_here = [raster.path for raster in loose if raster.made_here]
    if made_here:
        left_out.append(f"{made_here[0]} and {len(made_here) - 1} other results of uknowpan.")
    pairs, lonely = _pairs([raster for raster in loose if not raster.made_here])
    entries += [
        Entry(pan=str(pan.path), ms=tuple(str(raster.path) for raster in ms), key=_key(pan.path.stem))
        for pan, ms in pairs
    ]
    shared = {key for key, count in Counter(entry.key for entry in entries).items() if count > 1}
    return [_distinct(entry, root) if entry.key in shared else entry for entry in entries], left_out + lonely


def _key(stem: str) -> str:
    """The name of a scene, by that of its PAN."""
    return safe_name(_PAN.sub("", stem, count=1).strip("_-. ") or stem)


def _distinct(entry: Entry, root: Path) -> Entry:
    """An entry whose key holds the folders of its PAN, because another one has the same name."""
    return replace(entry, key=safe_name("_".join([*Path(os.path.relpath(entry.pan, root)).parts[:-1], entry.key])))


def _files(delivery: Delivery) -> list[str]:
    return [path for tiles in (delivery.pan, *(band.tiles for band in delivery.ms)) for path, _ in tiles]


def _pairs(rasters: Sequence[Header]) -> tuple[list[Pair], list[str]]:
    """Each PAN with its MS, and a sentence for each other raster. Files of one folder are nearest to each other."""
    pairs: list[Pair] = []
    rest, reasons = list(rasters), dict[Path, str]()
    for search in (
        partial(_by_name, within_folders=True),
        partial(_by_name, within_folders=False),
        _by_footprint,
        _by_band,
    ):
        pairs += search(rest, reasons)
        used = {raster.path for pan, ms in pairs for raster in (pan, *ms)}
        rest = [raster for raster in rest if raster.path not in used]
    left_out = [reasons.get(it.path, f"{it.path} has no partner by name or by footprint.") for it in rest]
    return sorted(pairs, key=lambda pair: pair[0].path), left_out


def _by_name(rasters: Sequence[Header], reasons: dict[Path, str], within_folders: bool) -> list[Pair]:
    """PANs and MS whose names differ in one word only."""
    pans: dict[tuple[Path, str], list[Header]] = defaultdict(list)
    ms: dict[tuple[Path, str], list[Header]] = defaultdict(list)
    for raster in rasters:
        for words, kind, fits in ((_MS, ms, True), (_PAN, pans, len(raster.bands) == 1)):
            name, changes = words.subn("", raster.path.stem, count=1)
            if changes and fits:
                kind[raster.path.parent if within_folders else Path(), name.lower()].append(raster)
                break
    return [(pans[key][0], ms[key]) for key in pans if len(pans[key]) == 1 and key in ms and _one(ms[key])]


def _by_band(rasters: Sequence[Header], reasons: dict[Path, str]) -> list[Pair]:
    """The one PAN of a folder with the coarser single bands beside it."""
    pairs = []
    for folder in dict.fromkeys(raster.path.parent for raster in rasters):
        pans, ms = divided([raster for raster in rasters if raster.path.parent == folder])
        if len(pans) == 1 and len(ms) > 1 and all(len(raster.bands) == 1 for raster in ms) and _one(ms):
            pairs.append((pans[0], ms))
    return pairs


def _one(ms: Sequence[Header]) -> bool:
    """Whether files are one MS: a file, bands of one place, or tiles."""
    same = len({(raster.bounds, raster.crs) for raster in ms}) == 1 and all(len(raster.bands) == 1 for raster in ms)
    return len(ms) == 1 or same or (all(raster.pixel for raster in ms) and apart([raster.bounds for raster in ms]))


def _by_footprint(rasters: Sequence[Header], reasons: dict[Path, str]) -> list[Pair]:
    """Each PAN with the one coarser MS on its ground; where there are several, `reasons` gets a sentence."""
    placed = {raster.path: shape for raster in rasters if (shape := _footprint(raster)) is not None}
    pans = [raster for raster in rasters if raster.path in placed and len(raster.bands) == 1]
    ms = [raster for raster in rasters if raster.path in placed and len(raster.bands) > 1]
    tree = STRtree([placed[raster.path] for raster in ms])
    pairs = []
    for pan in pans:
        ground = placed[pan.path]
        partners = [
            ms[index]
            for index in sorted(tree.query(ground))
            if pan.pixel <= FINER * ms[index].pixel and _overlap(ground, placed[ms[index].path]) >= _SHARED
        ]
        if partners and _one(partners):
            pairs.append((pan, partners))
        elif partners:
            names = ", ".join(raster.path.name for raster in partners[:3])
            reasons[pan.path] = f"{pan.path} has {len(partners)} MS on its ground ({names}); name them in a manifest."
    return pairs


def _footprint(raster: Header) -> Polygon | None:
    """The ground of a raster in degrees; None: it is not placed."""
    if not raster.pixel or not raster.crs:
        return None
    try:
        ground: Polygon = box(*transform_bounds(raster.crs, "EPSG:4326", *raster.bounds))
        return ground
    except RasterioError:
        return None


def _overlap(a: Polygon, b: Polygon) -> float:
    """Shared part of the smaller of two areas."""
    return float(a.intersection(b).area / max(min(a.area, b.area), 1e-30))
