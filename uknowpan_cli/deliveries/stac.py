"""STAC items: PAN and MS by the bands and roles of the assets (STAC 1.0 and 1.1, `eo:bands` or `bands`)."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urljoin
from urllib.request import urlopen

from uknowpan.deliveries.delivery import Band, Delivery, only, read_text, within
from uknowpan.errors import InputError
from uknowpan.tiling.metadata import iso_time

_NAMES = {"nir08": "nir", "rededge": "red edge", "swir16": "swir 1", "swir22": "swir 2"}
_USUAL = ("blue", "green", "red", "nir")
_PAN = ("pan", "panchromatic")
_OTHER_ROLES = frozenset(["thumbnail", "overview", "visual", "metadata", "data-mask"])
_THERMAL = re.compile("lwir|tir|thermal")
_RASTER = re.compile(r"(?i)\.(tiff?|jp2|vrt|ntf)$")
_SECONDS = 30
_MOST_BYTES = 1 << 24
"""An item has some kilobytes."""


def find(place: Path) -> list[list[Path]]:
    """The items in a folder, an item itself, or the items on this machine that a collection links to."""
    if place.is_dir():
        return [[path] for path in within(place, "*.json") if _document(path).get("type") == "Feature"]
    document = _document(place) if place.suffix == ".json" else {}
    if document.get("type") == "Feature":
        return [[place]]
    links = [link for link in _list(document.get("links")) if isinstance(link, dict) and link.get("rel") == "item"]
    return [[path] for link in links if (path := place.parent / str(link.get("href"))).is_file()]


def read(files: Sequence[Path]) -> Delivery:
    """The delivery of an item.

    Raises:
        InputError: its assets name no PAN, no MS, or several of them.
    """
    (path,) = files
    return _delivery(_document(path), str(path), (str(path),))


def from_url(url: str) -> Delivery:
    """The delivery of an item on the web; its rasters are read through /vsicurl/.

    Raises:
        InputError: it cannot be fetched, is no item, or names no PAN or no MS.
    """
    try:
        with urlopen(url, timeout=_SECONDS) as answer:
            document = json.loads(answer.read(_MOST_BYTES))
    except (URLError, OSError, ValueError) as error:
        raise InputError(f"{url} cannot be read as a STAC item ({error}); fetch it, and name the file.") from error
    if not isinstance(document, dict) or document.get("type") != "Feature":
        raise InputError(f"{url} is no STAC item; name an item's own URL.")
    return _delivery(document, url, ())


def _document(path: Path) -> dict[str, Any]:
    """A STAC document; empty where the file is none."""
    if path.stat().st_size > _MOST_BYTES:
        return {}
    try:
        text = read_text(path)
        document = json.loads(text) if '"stac_version"' in text else {}
    except (InputError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _delivery(item: dict[str, Any], source: str, metadata: tuple[str, ...]) -> Delivery:
    given = item.get("assets")
    assets = {key: asset for key, asset in given.items() if _is_image(asset)} if isinstance(given, dict) else {}
    named = {key: _bands(key, asset) for key, asset in assets.items()}
    pans = [key for key, names in named.items() if len(names) == 1 and names[0] in _PAN]
    stacks = [key for key, names in named.items() if len(names) > 1]
    singles = [key for key, names in named.items() if len(names) == 1 and key not in pans]
    for kind, keys in (("PAN", pans), ("MS", stacks or singles)):
        if not keys:
            raise InputError(f"{source} has no asset of its {kind} (eo:bands, bands); name the files of PAN and MS.")
    pan = only(pans, "assets that are a PAN", source)
    chosen = [only(stacks, "assets that may be the MS", source)] if stacks else singles
    ms = [
        Band(name, ((_href(assets[key], source), number),))
        for key in chosen
        for number, name in enumerate(named[key], 1)
        if not _THERMAL.match(name)
    ]
    names = [band.name for band in ms]
    usual = tuple(names.index(name) + 1 for name in _USUAL if name in names)
    facts = item.get("properties")
    platform = facts.get("platform") if isinstance(facts, dict) else None
    return Delivery(
        product=source,
        scene=str(item.get("id") or Path(source).stem),
        kind=f"a STAC item of {platform}" if platform else "a STAC item",
        pan=((_href(assets[pan], source), 1),),
        ms=tuple(ms),
        usual=usual if not stacks and len(usual) == len(_USUAL) else (),
        nodata=_nodata(assets[chosen[0]]),
        acquired=iso_time(str(facts.get("datetime"))) if isinstance(facts, dict) else None,
        metadata=metadata,
        left_out=tuple(f"asset {key}" for key in assets if key != pan and key not in chosen),
    )


def _is_image(asset: object) -> bool:
    if not isinstance(asset, dict) or not isinstance(asset.get("href"), str):
        return False
    image = str(asset.get("type", "")).startswith(("image/tiff", "image/jp2")) or _RASTER.search(asset["href"])
    return bool(image) and not _OTHER_ROLES & {str(role) for role in _list(asset.get("roles"))}


def _bands(key: str, asset: dict[str, Any]) -> list[str]:
    """Names of an asset's bands; an asset without a list is known by its key if that is a band's."""
    names = []
    for band in _list(asset.get("eo:bands")) or _list(asset.get("bands")):
        if isinstance(band, dict):
            name = str(band.get("common_name") or band.get("eo:common_name") or band.get("name") or "")
            names.append(_NAMES.get(name, name))
    plain = _NAMES.get(key, key)
    return names or ([plain] if plain in (*_USUAL, *_PAN) else [])


def _href(asset: dict[str, Any], source: str) -> str:
    """The path of an asset as GDAL opens it."""
    href = str(asset["href"])
    if re.match(r"https?://", source):
        href = urljoin(source, href)
    if re.match(r"https?://", href):
        return f"/vsicurl/{href}"
    if href.startswith("s3://"):
        return f"/vsis3/{href.removeprefix('s3://')}"
    return href if href.startswith("/vsi") else str(Path(source).parent / href.removeprefix("file://"))


def _nodata(asset: dict[str, Any]) -> float | None:
    """The nodata value of the first band that declares one."""
    for band in (*_list(asset.get("raster:bands")), *_list(asset.get("bands"))):
        value = band.get("nodata") if isinstance(band, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None
