"""Numbers of the sensors: bands, ratio, bit depth, and the gains of their optics.

MTF gains (amplitude at the Nyquist frequency of the MS grid) are those of the DLPan-Toolbox's ``genMTF``, as in
published scores; bands are in the order of delivery.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

UNKNOWN_SOURCE = "none published; the toolbox's gains for other sensors"
UNKNOWN_GAIN, UNKNOWN_PAN_GAIN = 0.30, 0.15
"""Gains that the toolbox uses for a sensor without published ones."""

FOUR = ("blue", "green", "red", "nir")
WV3_GAINS = (0.325, 0.355, 0.360, 0.350, 0.365, 0.360, 0.335, 0.315)
EIGHT = ("coastal", "blue", "green", "yellow", "red", "red edge", "nir", "nir 2")


@dataclass(frozen=True)
class Sensor:
    """Numbers that all scenes of a sensor share."""

    name: str
    aliases: tuple[str, ...]
    """Other names, as in product files."""
    bands: tuple[str, ...]
    """Names in order; empty for a sensor of any bands."""
    max_value: float | None
    """Full scale in digital numbers; None where it differs between scenes."""
    mtf_ms: tuple[float, ...]
    """One gain per band, or a single one for a sensor of any bands."""
    mtf_pan: float
    source: str = "DLPan-Toolbox, genMTF"
    """Source of the gains."""
    ratio: int = 4
    """PAN pixels per MS pixel along one axis."""

    @property
    def rgb(self) -> tuple[int, int, int]:
        """Places of red, green and blue among the bands, from 0; ValueError if the bands have no such names."""
        if not {"red", "green", "blue"} <= set(self.bands):
            raise ValueError(f"which bands of {self.name} are red, green and blue is not known")
        return self.bands.index("red"), self.bands.index("green"), self.bands.index("blue")

    def for_bands(self, count: int) -> Sensor:
        """The sensor as delivered with `count` bands, one gain for each; ValueError if it is not.

        Eight-band sensors are also sold as a bundle of blue, green, red and near infrared.
        """
        if not self.bands:
            return replace(self, mtf_ms=self.mtf_ms * count)
        if count == len(self.bands):
            return self
        if self.bands == EIGHT and count == len(FOUR):
            return replace(self, bands=FOUR, mtf_ms=tuple(self.mtf_ms[EIGHT.index(band)] for band in FOUR))
        raise ValueError(
            f"{self.name} has {len(self.bands)} bands, not {count}; name another sensor (generic"
            " takes any bands) or select the bands"
        )


SENSORS: dict[str, Sensor] = {
    sensor.name: sensor
    for sensor in (
        Sensor("QB", ("QuickBird", "QB02"), FOUR, 2047.0, (0.34, 0.32, 0.30, 0.22), 0.15),
        Sensor("IKONOS", ("IK", "IK01"), FOUR, 2047.0, (0.26, 0.28, 0.29, 0.28), 0.17),
        Sensor("GeoEye1", ("GE1", "GE01"), FOUR, 2047.0, (0.23,) * 4, 0.16),
        Sensor("WV2", ("WorldView2", "WV02"), EIGHT, 2047.0, (*(0.35,) * 7, 0.27), 0.11),
        Sensor("WV3", ("WorldView3", "WV03"), EIGHT, 2047.0, WV3_GAINS, 0.14),
        Sensor("WV4", ("WorldView4", "WV04"), FOUR, 2047.0, (0.23,) * 4, 0.16),
        Sensor("GF2", ("GaoFen2", "GF02"), FOUR, 1023.0, (UNKNOWN_GAIN,) * 4, UNKNOWN_PAN_GAIN, UNKNOWN_SOURCE),
        Sensor("generic", (), (), None, (UNKNOWN_GAIN,), UNKNOWN_PAN_GAIN, UNKNOWN_SOURCE),
    )
}
"""Sensors by name."""


def find_sensor(name: str) -> Sensor:
    """The sensor of that name or alias; case, blanks, dashes and underscores do not count.

    Raises:
        ValueError: no such sensor; the sentence lists the known ones.
    """
    for sensor in SENSORS.values():
        if _plain(name) in map(_plain, (sensor.name, *sensor.aliases)):
            return sensor
    raise ValueError(f"no sensor is called {name!r}; known are {', '.join(SENSORS)}")


def sensor_in_name(stem: str) -> Sensor | None:
    """The sensor that a part of a file's name stands for, as wv3 in `test_wv3_multiExm1`; None without one."""
    parts = re.split(r"[^a-z0-9]+", stem.lower())
    names = {_plain(name): sensor for sensor in SENSORS.values() for name in (sensor.name, *sensor.aliases)}
    return next((names[part] for part in parts if part in names and part != "generic"), None)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
