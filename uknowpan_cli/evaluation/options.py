"""Every option of `evaluate`, once. This module needs no Typer."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from uknowpan.errors import UsageError
from uknowpan.models.metrics.sensors import SENSORS, Sensor, find_sensor
from uknowpan.options import INPUT, MODEL, RESULT, Option, band_numbers, check_full_scale, shared

SCORES = "Scores"
"""Group of the options that decide what the numbers depend on."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of `evaluate`. Some go with a test file (.h5) only, others with rasters or with a protocol.

    Raises:
        UsageError: a value is out of its range, or two values exclude each other.
    """

    protocol: Annotated[
        Literal["sharp"] | None,
        Option(
            "--protocol",
            INPUT,
            "sharp: TARGET is a PAN and its MS; a truth as sharp as the PAN is made of them, and the classical methods "
            "and models are scored against it.",
        ),
    ] = None
    reference: Annotated[str | None, Option("--reference", INPUT, "Raster: the truth, on the same grid.", "FILE")] = (
        None
    )
    pan: Annotated[str | None, Option("--pan", INPUT, "Raster without truth: the PAN it was made from.", "FILE")] = None
    ms: Annotated[
        Sequence[str],
        Option(
            "--ms", INPUT, "Raster without truth: the MS; or several files, repeated.", "FILE", cli=list[str] | None
        ),
    ] = ()
    ratio: Annotated[int | None, shared("ratio")] = None
    nodata: Annotated[float | None, shared("nodata")] = None
    pan_bidx: Annotated[int | None, shared("pan_bidx")] = None
    bidx: Annotated[str | Sequence[int] | None, shared("bidx")] = None
    limit: Annotated[int | None, Option("--limit", INPUT, "h5: only the first N images.", "N", 1)] = None
    model: Annotated[
        Sequence[str],
        Option(
            "--model -m",
            MODEL,
            "h5, sharp: bundled model's name or a checkpoint of any stage; may be repeated. Default: "
            "$UKNOWPAN_MODEL or the bundled model.",
            "NAME|FILE",
            cli=list[str] | None,
        ),
    ] = ()
    method: Annotated[
        Sequence[str],
        Option(
            "--method",
            MODEL,
            "h5: a classical method: brovey, gsa, mtf-glp-fs, mtf-glp-hpm-r, bdsd-pc; may be repeated.",
            "METHOD",
            cli=list[str] | None,
        ),
    ] = ()
    baselines: Annotated[bool, Option("--baselines", MODEL, "h5: all classical methods as well.")] = False
    steps: Annotated[
        int | None, Option("--steps", MODEL, "h5, sharp: network evaluations; default: as the model declares.", "N", 1)
    ] = None
    seed: Annotated[int, Option("--seed", MODEL, "h5, sharp: seed of the initial noise.", "N")] = 0
    softness: Annotated[
        float | None,
        Option("--softness", MODEL, "h5, sharp: softness of models that take one; default: 0.3.", "SIGMA", 0.2, 1.0),
    ] = None
    device: Annotated[str, Option("--device", MODEL, "h5, sharp: auto, cpu, cuda or cuda:N.", "DEVICE")] = "auto"
    sensor: Annotated[
        str | None,
        Option(
            "--sensor",
            SCORES,
            "QB, IKONOS, GeoEye1, WV2, WV3, WV4, GF2 or generic: MTF gains and full scale. "
            "Default: as file or model declare.",
            "NAME",
        ),
    ] = None
    max_value: Annotated[
        float | None,
        Option("--max-value", SCORES, "Full scale in DN; default: as file, sensor or model declare.", "VALUE", 0),
    ] = None
    bit_depth: Annotated[int | None, Option("--bit-depth", SCORES, "--max-value as 2^N - 1.", "N", 1, 32)] = None
    registration: Annotated[
        Literal["area", "pancollection"],
        Option("--registration", SCORES, "Enlargement of --ms: area, as georeferenced; pancollection, as the toolbox."),
    ] = "area"
    cut: Annotated[
        int, Option("--cut", SCORES, "With a truth: border left out, pixels; published: 21.", "PIXELS", 0)
    ] = 21
    reprojection: Annotated[
        bool,
        Option(
            "--reprojection",
            SCORES,
            "h5, or --pan and --ms: indices by reprojection too; this takes many times as long.",
        ),
    ] = False
    output: Annotated[
        Path | None, Option("--output -o", RESULT, "Also write the scores, as .json, .csv or .tex.", "FILE")
    ] = None
    csv: Annotated[Path | None, Option("--csv", RESULT, "Also write the scores of every image.", "FILE")] = None
    latex: Annotated[Path | None, Option("--latex", RESULT, "Also write the table for a paper.", "FILE")] = None
    pictures: Annotated[
        Path | None, Option("--pictures", RESULT, "h5: also draw every image into a folder.", "DIR")
    ] = None
    save: Annotated[
        Path | None, Option("--save", RESULT, "h5: also write the sharp images, to DIR/METHOD/output_mulExm_N.", "DIR")
    ] = None
    save_as: Annotated[
        Literal["mat", "h5", "tif"], Option("--save-as", RESULT, "Form of --save; the DLPan-Toolbox reads mat.")
    ] = "mat"
    num_threads: Annotated[int | None, shared("num_threads")] = None
    overwrite: Annotated[bool, shared("overwrite")] = False

    def __post_init__(self) -> None:
        for name in ("ms", "model", "method"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "bidx", band_numbers(self.bidx))
        object.__setattr__(self, "max_value", _full_scale(self.max_value, self.bit_depth))
        if self.output is not None and self.output.suffix.lower() not in OUTPUTS:
            raise UsageError(f"--output {self.output} must end in {', '.join(OUTPUTS)}.")
        _ = self.known_sensor

    @property
    def known_sensor(self) -> Sensor | None:
        """The sensor that `sensor` names; a UsageError for an unknown one."""
        if self.sensor is None:
            return None
        try:
            return find_sensor(self.sensor)
        except ValueError as error:
            raise UsageError(f"--sensor: {error}.") from error

    @property
    def used_sensor(self) -> Sensor:
        """The sensor whose MTF gains count for rasters; without a name the generic one."""
        return self.known_sensor or SENSORS["generic"]

    @property
    def full_scale(self) -> float | None:
        """Full scale in DN: the option's, else the sensor's."""
        return self.max_value or self.used_sensor.max_value

    def for_targets(self, targets: Sequence[str], given: set[str]) -> None:
        """Refuse options among those `given` that do not go with a pair, a test file or a raster."""
        if self.protocol is not None:
            if len(targets) < 2:
                raise UsageError("--protocol sharp needs a pair: uknowpan evaluate --protocol sharp PAN MS.")
            wrong = next((f.name for f in fields(self) if f.name in given and f.name not in WITH_SHARP), None)
            if wrong is not None:
                raise UsageError(f"{_flag(wrong)} does not go with --protocol sharp.")
            return
        if len(targets) > 1:
            raise UsageError(f"One TARGET can be scored at a time, not {len(targets)}; a pair needs --protocol sharp.")
        target = targets[0]
        of_file = is_test_file(target)
        for field in fields(self):
            if field.name in given and field.name in (ONLY_RASTER if of_file else ONLY_FILE):
                goes_with = "a result raster" if of_file else "a test file (.h5)"
                raise UsageError(f"{_flag(field.name)} goes with {goes_with}, not {target}.")
        if of_file:
            return
        pair = self.pan is not None or bool(self.ms)
        if pair == (self.reference is not None) or (self.pan is None) != (not self.ms):
            raise UsageError(f"{target} is a raster: give either its truth with --reference, or both --pan and --ms.")
        for name in ("cut",) if pair else ONLY_PAIR:
            if name in given:
                raise UsageError(f"{_flag(name)} goes with {'--reference' if pair else '--pan and --ms'}.")


OUTPUTS = (".json", ".csv", ".tex")
ONLY_FILE = (
    "model",
    "method",
    "baselines",
    "limit",
    "steps",
    "seed",
    "softness",
    "pictures",
    "save",
    "save_as",
    "device",
)
ONLY_PAIR = ("pan_bidx", "bidx", "registration", "reprojection")
ONLY_RASTER = ("reference", "pan", "ms", "ratio", "nodata", "pan_bidx", "bidx", "registration")
WITH_SHARP = (
    *("protocol", "model", "steps", "seed", "softness", "device", "max_value", "bit_depth", "num_threads"),
    *("ratio", "nodata", "pan_bidx", "bidx", "output", "csv", "latex", "overwrite"),
)
"""Options that go with `protocol`."""


def is_test_file(target: str) -> bool:
    """Whether a name is that of a file of images in PanCollection's layout."""
    return Path(target).suffix.lower() in (".h5", ".hdf5", ".he5", ".mat")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _full_scale(max_value: float | None, bit_depth: int | None) -> float | None:
    if bit_depth is not None:
        if max_value is not None:
            raise UsageError("--max-value and --bit-depth exclude each other.")
        return float(2**bit_depth - 1)
    check_full_scale(max_value)
    return max_value
