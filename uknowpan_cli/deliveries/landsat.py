"""Landsat 7, 8 and 9, level 1: the MTL file lists the files of the bands (USGS LSDS-1337, LSDS-1822)."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from uknowpan.deliveries.delivery import Band, Delivery, read_text, within
from uknowpan.errors import InputError
from uknowpan.tiling.metadata import iso_time

_ETM = {1: "blue", 2: "green", 3: "red", 4: "nir", 5: "swir 1", 7: "swir 2"}
_OLI = {1: "coastal", 2: "blue", 3: "green", 4: "red", 5: "nir", 6: "swir 1", 7: "swir 2", 9: "cirrus"}
_BANDS = {"LANDSAT_7": _ETM, "LANDSAT_8": _OLI, "LANDSAT_9": _OLI}
"""Spacecraft -> its bands of 30 m. The thermal bands are coarser."""
_PAN = 8
_USUAL = ("blue", "green", "red", "nir")
_FILL = 0.0
_CLOUDS = 0b11110
"""Bits of QA_PIXEL: dilated cloud, cirrus, cloud, cloud shadow."""


def find(place: Path) -> list[list[Path]]:
    """The MTL file of each product in a folder, or the file itself; JSON goes before text."""
    if place.is_dir():
        texts, jsons = ({path.with_suffix(""): [path] for path in within(place, f"*_MTL.{x}")} for x in ("txt", "json"))
        return list((texts | jsons).values())
    return [[place]] if re.search(r"_MTL\.(json|txt)$", place.name) else []


def read(files: Sequence[Path]) -> Delivery:
    """The delivery of an MTL file.

    Raises:
        InputError: it is of another level or satellite, or names no band 8.
    """
    (metadata,) = files
    facts = _facts(metadata)
    craft = facts.get("SPACECRAFT_ID", "an unknown satellite").replace("LANDSAT", "Landsat").replace("_", " ")
    level = facts.get("PROCESSING_LEVEL") or facts.get("DATA_TYPE", "")
    if level.startswith("L2"):
        raise InputError(f"{metadata.parent} is level 2, which has no PAN; take the level-1 product of the same scene.")
    bands = _BANDS.get(facts.get("SPACECRAFT_ID", ""))
    named = {
        number: str(metadata.parent / facts[key])
        for number in (*(bands or ()), _PAN)
        if (key := f"FILE_NAME_BAND_{number}") in facts
    }
    if bands is None or _PAN not in named:
        raise InputError(f"{metadata} is of {craft} and names no band 8; only Landsat 7, 8 and 9, level 1, have a PAN.")
    ms = tuple(Band(name, ((named[number], 1),)) for number, name in bands.items() if number in named)
    names = [band.name for band in ms]
    missing = [name for name in _USUAL if name not in names]
    if missing:
        raise InputError(f"{metadata} names no file of the band {missing[0]}; fetch it anew.")
    quality = metadata.parent / facts.get("FILE_NAME_QUALITY_L1_PIXEL", "none")
    return Delivery(
        product=str(metadata),
        scene=metadata.stem.removesuffix("_MTL"),
        kind=f"{craft}, level {level or 1}",
        pan=((named[_PAN], 1),),
        ms=ms,
        usual=tuple(names.index(name) + 1 for name in _USUAL),
        nodata=_FILL,
        clouds=(str(quality), _CLOUDS) if quality.is_file() else None,
        acquired=iso_time(f"{facts.get('DATE_ACQUIRED')}T{facts.get('SCENE_CENTER_TIME', '')[:8]}"),
        metadata=(str(metadata),),
        left_out=("thermal bands",),
    )


def _facts(metadata: Path) -> dict[str, str]:
    """Keys of all groups of an MTL file; the first of a name counts, which is the product's own."""
    text = read_text(metadata)
    if metadata.suffix == ".txt":
        pairs = re.findall(r'(?m)^\s*(\w+)\s*=\s*"?([^"\n]*?)"?\s*$', text)
    else:
        try:
            pairs = list(_pairs(json.loads(text)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{metadata} is no JSON ({error}); fetch it anew.") from error
    facts: dict[str, str] = {}
    for key, value in pairs:
        facts.setdefault(key, value)
    return facts


def _pairs(group: Any) -> Iterator[tuple[str, str]]:
    for key, value in group.items() if isinstance(group, dict) else ():
        if isinstance(value, dict):
            yield from _pairs(value)
        else:
            yield key, str(value)
