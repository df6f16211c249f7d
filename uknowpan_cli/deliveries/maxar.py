"""Maxar (WorldView, GeoEye, QuickBird): an `*.IMD` of PAN and MS each, and an `*.TIL` where the image is in tiles."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from uknowpan.deliveries.delivery import Band, Delivery, only, read_text, within
from uknowpan.errors import InputError
from uknowpan.models.metrics.sensors import Sensor, find_sensor

_NAMES = {
    **{"C": "coastal", "B": "blue", "G": "green", "Y": "yellow", "R": "red"},
    **{"RE": "red edge", "N": "nir", "N2": "nir 2"},
}
_FILL = 0.0


def find(place: Path) -> list[list[Path]]:
    """The IMD files of each part of an order in a folder, or of the part that an IMD or TIL belongs to."""
    if place.is_dir():
        found = within(place, "*.IMD")
    elif place.suffix.upper() in (".IMD", ".TIL"):
        found = [path for path in within(place.parent.parent, "*.IMD") if _part(path) == _part(place)]
    else:
        return []
    parts: dict[tuple[Path, str], list[Path]] = defaultdict(list)
    for path in found:
        parts[path.parent.parent, _part(path)].append(path)
    return list(parts.values())


def _part(path: Path) -> str:
    """Order and part, as 052370638010_01_P001, which PAN and MS share."""
    return path.stem.rpartition("-")[2]


def read(files: Sequence[Path]) -> Delivery:
    """The delivery of such files.

    Raises:
        InputError: PAN or MS is missing, or there are several.
    """
    paths = list(files)
    images = {path: read_text(path) for path in paths}
    bands = {path: re.findall(r"BEGIN_GROUP\s*=\s*BAND_(\w+)", text) for path, text in images.items()}
    sharpened = [path for path, text in images.items() if _value(text, "panSharpenAlgorithm") not in ("None", "")]
    pans = [path for path in paths if bands[path] == ["P"]]
    ms = [path for path in paths if path not in (*pans, *sharpened) and bands[path] and bands[path][0][0] != "S"]
    for kind, chosen in (("PAN", pans), ("MS", ms)):
        if not chosen:
            raise InputError(f"{paths[0]} has no {kind} beside it; fetch both folders of the delivery.")
    pan, coarse = (Path(only(chosen, "images", str(chosen[0].parent.parent))) for chosen in (pans, ms))
    text = images[coarse]
    craft = _value(text, "satId")
    sensor = _sensor(craft)
    tiles = _tiles(coarse, text)
    return Delivery(
        product=str(pan),
        scene=_part(pan),
        kind=f"{craft or 'Maxar'}, level {_value(text, 'productLevel') or 'unknown'}",
        pan=tuple((file, 1) for file in _tiles(pan, images[pan])),
        ms=tuple(
            Band(_NAMES.get(name, name), tuple((file, number) for file in tiles))
            for number, name in enumerate(bands[coarse], 1)
        ),
        nodata=_FILL,
        bits=_bits(sensor, text),
        sensor=None if sensor is None else sensor.name,
        metadata=(str(pan), str(coarse)),
        left_out=tuple(f"{path.name} (neither PAN nor MS)" for path in paths if path not in (pan, coarse)),
    )


def _value(text: str, key: str) -> str:
    match = re.search(rf'\b{key}\s*=\s*"?([^";\n]*)"?\s*;', text)
    return match[1].strip() if match else ""


def _tiles(metadata: Path, text: str) -> list[str]:
    """The files that GDAL opens as the image: the TIL, or else the files with the name of the metadata.

    GDAL places a TIL by the corner in the metadata, so that without one the tiles' own places count.
    """
    beside = sorted(metadata.parent.iterdir())
    for path in beside:
        if path.suffix.upper() == ".TIL" and path.stem == metadata.stem:
            _refuse_lacking(path)
            if _value(text, "ULX") or _value(text, "productLevel").startswith("LV1"):
                return [str(path)]
    files = [path for path in beside if path.suffix.upper() in (".TIF", ".TIFF", ".NTF")]
    named = [path for path in files if _part(path) == _part(metadata)]
    if not named:
        raise InputError(f"{metadata.parent} lacks the image of {metadata.name}; fetch it.")
    return [str(path) for path in named]


def _refuse_lacking(til: Path) -> None:
    """Refuse an image without one of its tiles: GDAL would notice in the middle of the work."""
    for name in re.findall(r'filename\s*=\s*"([^"]+)"', read_text(til)):
        if not (til.parent / name).is_file():
            raise InputError(f"{til.parent} lacks {name}, which {til.name} names; fetch it.")


def _sensor(craft: str) -> Sensor | None:
    """The satellite in the table of sensors."""
    try:
        return find_sensor(craft)
    except ValueError:
        return None


def _bits(sensor: Sensor | None, text: str) -> int | None:
    """Significant bits of raw counts in 16-bit files; processing that changes the counts may use more."""
    raw = _value(text, "radiometricEnhancement") in ("Off", "") and _value(text, "bitsPerPixel") == "16"
    return int(sensor.max_value).bit_length() if raw and sensor is not None and sensor.max_value else None
