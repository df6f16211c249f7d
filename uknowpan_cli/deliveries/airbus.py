"""Airbus DIMAP V2 (Pleiades, Pleiades Neo, SPOT 6 and 7): a `DIM_*.XML` of PAN and MS each, which GDAL reads."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from uknowpan.deliveries.delivery import Band, Delivery, only, within
from uknowpan.errors import InputError

_NAMES = {
    **{"B0": "blue", "B1": "green", "B2": "red", "B3": "nir"},
    **{"B": "blue", "G": "green", "R": "red", "NIR": "nir", "RE": "red edge", "DB": "deep blue"},
}
_MISSIONS = {"PHR": "Pleiades ", "PNEO": "Pleiades Neo ", "SPOT": "SPOT "}


def find(place: Path) -> list[list[Path]]:
    """The XML files of each delivery in a folder, or of the one that an XML file belongs to."""
    if place.is_dir():
        found = within(place, "DIM_*.XML")
    elif place.suffix.upper() == ".XML" and place.name.upper().startswith("DIM_"):
        found = within(_home(place), "DIM_*.XML")
    else:
        return []
    homes: dict[Path, list[Path]] = defaultdict(list)
    for path in found:
        homes[_home(path)].append(path)
    return list(homes.values())


def _home(path: Path) -> Path:
    """The folder of a delivery, which has a folder IMG_* for each image."""
    return path.parent.parent if path.parent.name.upper().startswith("IMG_") else path.parent


def read(files: Sequence[Path]) -> Delivery:
    """The delivery of such files; bands in its own order, which is red, green, blue, near infrared for four bands.

    Raises:
        InputError: PAN or MS is missing, or there are several.
    """
    home, paths = _home(files[0]), list(files)
    images = {path: _parsed(path) for path in paths}
    sharpened = [path for path, image in images.items() if _text(image, "SPECTRAL_PROCESSING").startswith("PMS")]
    pans = [path for path, image in images.items() if _text(image, "NBANDS") == "1"]
    ms = [path for path in paths if path not in (*pans, *sharpened)]
    for kind, chosen in (("PAN", pans), ("MS", ms)):
        if not chosen:
            raise InputError(f"{home} has no DIM_*.XML of its {kind}; order the bundle of PAN and MS.")
    pan, coarse = Path(only(pans, "PANs", str(home))), Path(only(ms, "MS", str(home)))
    image = images[coarse]
    for path in (pan, coarse):
        _refuse_lacking(path, images[path])
    mission = _text(image, "MISSION")
    sensor = _MISSIONS.get(mission, f"{mission} ") + _text(image, "MISSION_INDEX")
    nodata = [
        value.findtext("SPECIAL_VALUE_COUNT", "")
        for value in image.iter("Special_Value")
        if value.findtext("SPECIAL_VALUE_TEXT") == "NODATA"
    ]
    return Delivery(
        product=str(pan),
        scene=home.name,
        kind=f"{sensor.strip() or 'Airbus DIMAP'}, {_text(image, 'PROCESSING_LEVEL') or 'unknown level'}",
        pan=((str(pan), 1),),
        ms=tuple(Band(name, ((str(coarse), number),)) for number, name in enumerate(_bands(coarse, image), 1)),
        nodata=float(nodata[0]) if nodata and nodata[0].lstrip("-").isdigit() else None,
        left_out=tuple(f"{path.name} (sharpened already)" for path in sharpened),
    )


def _parsed(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise InputError(f"{path} is no XML ({error}); fetch it anew.") from error


def _text(image: ElementTree.Element, tag: str) -> str:
    """Text of the first element of that name."""
    return next((element.text or "" for element in image.iter(tag)), "").strip()


def _bands(path: Path, image: ElementTree.Element) -> list[str]:
    """Names of the bands in the order of the file.

    Each group of files may list its bands. Else the colours on a screen come first, and the others follow.
    """
    count = _text(image, "NBANDS")
    listed = []
    for group in image.iter("Raster_Index_List"):
        rows = [(item.findtext("BAND_INDEX", ""), item.findtext("BAND_ID", "")) for item in group.iter("Raster_Index")]
        if {index for index, _ in rows} == {str(number) for number in range(1, len(rows) + 1)}:
            rows.sort(key=lambda row: int(row[0]))
        listed += [name for _, name in rows]
    if not listed:
        shown = [_text(image, f"{colour}_CHANNEL") for colour in ("RED", "GREEN", "BLUE")]
        all_of_them = dict.fromkeys(band.findtext("BAND_ID", "") for band in image.iter("Band_Radiance"))
        rest = [name for name in (*all_of_them, "B3") if name and name not in shown]
        listed = [name for name in (*shown, *dict.fromkeys(rest)) if name][: int(count) if count.isdigit() else None]
    if str(len(listed)) != count:
        raise InputError(f"{path} declares {count or 'no'} bands and names {len(listed)}; fetch it anew.")
    return [_NAMES.get(name, name) for name in listed]


def _refuse_lacking(path: Path, image: ElementTree.Element) -> None:
    """Refuse an image without one of its tiles: GDAL would notice in the middle of the work."""
    there = {file.name.upper() for file in path.parent.iterdir()}
    for entry in image.iter("DATA_FILE_PATH"):
        name = entry.get("href", "")
        if "/" not in name and name.upper() not in there:
            raise InputError(f"{path.parent} lacks {name}, which {path.name} names; fetch it.")
