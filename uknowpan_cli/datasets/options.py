"""Every option of a simulation, once. This module needs neither Typer nor PyTorch."""

from dataclasses import dataclass
from typing import Annotated, Any

from uknowpan.errors import UsageError
from uknowpan.models.metrics.sensors import Sensor, find_sensor
from uknowpan.models.training.bounds import is_full_scale
from uknowpan.options import Coregister, Option, band_numbers, numbers, shared

SCENES, OPTICS, PATCHES = "Scenes", "Sensor", "Patches"
"""Groups of options in the help."""


@dataclass(frozen=True)
class SimulationOptions:
    """Settings of a simulation. Sizes are MS pixels of the scene, which are the patches' PAN pixels.

    Numbers may be given as text, separated by commas; they become tuples.

    Raises:
        UsageError: a value is out of its range.
    """

    sensor: Annotated[
        str, Option("--sensor", OPTICS, "QB, IKONOS, GeoEye1, WV2, WV3, WV4, GF2 or generic.", "NAME")
    ] = "generic"
    mtf: Annotated[
        Any,
        Option(
            "--mtf", OPTICS, "MTF gains at the Nyquist frequency, one per band or one for all.", "GAIN,...",
            cli=str | None,
        ),
    ] = None  # fmt: skip
    """None: the sensor's."""
    max_value: Annotated[
        float | None, Option("--max-value", OPTICS, "Full scale, if it differs from the sensor's.", "DN", 0)
    ] = None
    pan_weights: Annotated[
        Any,
        Option(
            "--pan-weights", SCENES, "Share of each band in the PAN of a scene without one.", "W,W,...", cli=str | None
        ),
    ] = None
    """None: equal."""
    patch: Annotated[int | None, Option("--patch", PATCHES, "PAN pixels of a patch; default 64.", "N", 8)] = None
    """None: 64, or the next multiple of the ratio below."""
    stride: Annotated[
        int | None, Option("--stride", PATCHES, "Step between training patches; default 3/4 patch.", "N", 1)
    ] = None
    """Other patches do not overlap."""
    test_patch: Annotated[
        int | None, Option("--test-patch", PATCHES, "Patch size of the test file; default up to 256.", "N", 8)
    ] = None
    """None: the largest multiple of `patch` up to 256 that fits the test area."""
    split: Annotated[
        Any, Option("--split", PATCHES, "Shares of the area: training, validation, test.", "A,B,C", cli=str)
    ] = "80,10,10"
    ratio: Annotated[int | None, shared("ratio")] = None
    """None: the ratio of the pairs, else the sensor's."""
    bidx: Annotated[Any, shared("bidx")] = None
    nodata: Annotated[float | None, shared("nodata")] = None
    coregister: Annotated[Coregister, shared("coregister")] = "auto"

    def __post_init__(self) -> None:
        for name, count in (("mtf", None), ("pan_weights", None), ("split", 3)):
            values = numbers(getattr(self, name), f"--{name.replace('_', '-')}", count)
            object.__setattr__(self, name, tuple(values) if values else None)
        object.__setattr__(self, "bidx", band_numbers(self.bidx))
        object.__setattr__(self, "coregister", "global" if self.coregister == "shift" else self.coregister)
        if min(self.split) < 0 or not self.split[0] > 0:
            raise UsageError(f"A split of {self.split} leaves nothing to train on.")
        if self.max_value is not None and not is_full_scale(self.max_value):
            raise UsageError(f"A full scale of {self.max_value:g} is not within 1e-9 to 1e12.")
        if self.mtf is not None and not all(0 < gain < 1 for gain in self.mtf):
            raise UsageError(f"MTF gains lie between 0 and 1, not at {list(self.mtf)}.")
        if self.pan_weights is not None and not sum(self.pan_weights) > 0:
            raise UsageError(f"PAN weights of {list(self.pan_weights)} leave no PAN.")
        _ = self.optics

    @property
    def optics(self) -> Sensor:
        """The sensor that `sensor` names; a UsageError for an unknown one."""
        try:
            return find_sensor(self.sensor)
        except ValueError as error:
            raise UsageError(f"{error}.") from error
