"""A delivery: the files of a product that are the PAN, and those that are bands of the MS."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from pathlib import Path

from uknowpan.errors import InputError, UsageError
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.tiling.assembly import Part, assembled
from uknowpan.tiling.raster import Assembly


@dataclass(frozen=True)
class Band:
    """A band of the MS, in one file or in tiles."""

    name: str
    """Empty: its file may name it."""
    tiles: tuple[Part, ...]


@dataclass(frozen=True)
class Delivery:
    """A product as it is delivered. Its rasters were not opened yet."""

    product: str
    """The product's folder or metadata, as given."""
    scene: str
    """Its name as a scene of a batch."""
    kind: str
    """Sensor and level, for people."""
    pan: tuple[Part, ...]
    """Tiles of the panchromatic band."""
    ms: tuple[Band, ...]
    """Bands of the MS in the product's order, which `--bidx` counts."""
    usual: tuple[int, ...] = ()
    """Bands, from 1, that are taken by default; empty: all."""
    nodata: float | None = None
    """Value of fill; None: as the files declare."""
    bits: int | None = None
    """Significant bits; None: as the files declare."""
    sensor: str | None = None
    """Its name in `uknowpan.models.metrics.sensors`; None: that table has none."""
    clouds: tuple[str, int] | None = None
    """File of quality flags, and its bits of clouds and shadows."""
    acquired: str | None = None
    """Time of the image, ISO 8601; None: as the PAN declares."""
    metadata: tuple[str, ...] = ()
    """Metadata files that were read."""
    left_out: tuple[str, ...] = ()
    """Parts that are not used, with the reason."""

    @property
    def name(self) -> str:
        return Path(self.product).name or self.product

    def chosen(self, numbers: Sequence[int] | None) -> tuple[int, ...]:
        """Numbers of the MS bands, from 1; None: the usual ones. Raises UsageError."""
        numbers = tuple(numbers or self.usual or range(1, len(self.ms) + 1))
        wrong = [number for number in numbers if not 1 <= number <= len(self.ms)]
        if wrong:
            raise UsageError(f"--bidx {wrong[0]}: {self.name} has the MS bands {self.numbered()}.")
        return numbers

    def numbered(self) -> str:
        """The MS bands with their numbers."""
        return ", ".join(f"{number} {band.name or 'unnamed'}" for number, band in enumerate(self.ms, 1))

    def gains(self, numbers: Sequence[int] | None = None) -> dict[str, float]:
        """MTF gains at the Nyquist frequency of the MS grid, by band; empty for a sensor without published ones."""
        if self.sensor is None:
            return {}
        sensor = find_sensor(self.sensor)
        published = {"PAN": sensor.mtf_pan, **dict(zip(sensor.bands, sensor.mtf_ms, strict=True))}
        wanted = ["PAN", *(self.ms[number - 1].name for number in self.chosen(numbers))]
        return {name: published[name] for name in wanted if name in published}

    def line(self, numbers: Sequence[int] | None = None) -> str:
        """The product as it was understood, in one line."""
        names = ", ".join(self.ms[number - 1].name or f"band {number}" for number in self.chosen(numbers))
        pan, ms = (
            Path(tiles[0][0]).name + (f" in {len(tiles)} tiles" if tiles[1:] else "")
            for tiles in (self.pan, self.ms[0].tiles)
        )
        clouds = f"; clouds by {Path(self.clouds[0]).name}" if self.clouds else ""
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.name} is {self.kind}: PAN {pan}, MS {ms}: {names}{clouds}{left}."

    def rasters(self, numbers: Sequence[int] | None = None) -> tuple[Assembly, Assembly]:
        """PAN and MS as one raster each, the MS with its bands' names.

        Raises:
            UsageError: no such band.
            InputError: a file is missing, or tiles do not fit.
        """
        bands = [self.ms[number - 1] for number in self.chosen(numbers)]
        for band in (Band("PAN", self.pan), *bands):
            for path, _ in band.tiles:
                if not (path.startswith("/vsi") or os.path.isfile(path)):
                    raise InputError(f"{self.name} lacks {path} ({band.name}); fetch it, or choose bands with --bidx.")
        pan = assembled(f"the PAN of {self.name}", [[part] for part in self.pan], nodata=self.nodata, bits=self.bits)
        ms = assembled(
            f"the MS of {self.name}",
            list(zip(*(band.tiles for band in bands), strict=True)),
            descriptions=[band.name or None for band in bands],
            nodata=self.nodata,
            bits=self.bits,
            beside=self.metadata,
        )
        return pan, ms


def read_text(path: str | os.PathLike[str]) -> str:
    """A metadata file. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} is no UTF-8 text; fetch it anew.") from error


def within(folder: Path, pattern: str) -> list[Path]:
    """Files in a folder and below it, by name; case does not count."""
    matching = re.compile(translate(pattern), re.IGNORECASE).match
    return sorted(path for path in folder.rglob("*") if matching(path.name) and path.is_file())


def only(candidates: Sequence[str | os.PathLike[str]], what: str, product: str) -> str:
    """The one candidate. Raises InputError for two or more."""
    if len(candidates) > 1:
        names = ", ".join(Path(path).name for path in candidates[:3])
        raise InputError(f"{product} holds {len(candidates)} {what} ({names}); name one of them.")
    return str(candidates[0])
