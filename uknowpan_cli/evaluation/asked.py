"""What `evaluate` is asked for and what it measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uknowpan.errors import UsageError

if TYPE_CHECKING:
    from uknowpan.models.metrics.evaluation import Results
    from uknowpan.models.metrics.sensors import Sensor


H5 = (".h5", ".hdf5", ".he5")


class Registration(StrEnum):
    area = "area"
    pancollection = "pancollection"


@dataclass(frozen=True)
class Asked:
    """What was typed."""

    target: str
    models: tuple[str, ...]
    methods: tuple[str, ...]
    baselines: bool
    reference: str | None
    pan: str | None
    ms: tuple[str, ...]
    sensor: Sensor | None
    max_value: float | None
    ratio: int | None
    nodata: float | None
    pan_bidx: int | None
    bidx: list[int] | None
    registration: Registration
    cut: int
    limit: int | None
    steps: int | None
    seed: int
    softness: float | None
    pictures: Path | None
    device: str
    overwrite: bool
    quiet: bool

    @property
    def is_h5(self) -> bool:
        """A file of images, not a raster."""
        return Path(self.target).suffix.lower() in H5


@dataclass(frozen=True)
class Measured:
    """Scores, and what is said with them."""

    results: Results
    title: str
    bands: int | None
    about: dict[str, Any]
    """For JSON: what the numbers depend on."""
    notes: list[str] = field(default_factory=list)


def named_sensor(name: str) -> Sensor:
    from uknowpan.models.metrics.sensors import find_sensor

    try:
        return find_sensor(name)
    except ValueError as error:
        raise UsageError(f"--sensor: {error}.") from error
