"""Every option of `sharpen`, once: the keywords of the API and the flags of the command line.

Names follow GDAL and rasterio where those have them. This module needs no Typer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_type_hints

from uknowpan.errors import UsageError
from uknowpan.models.training.bounds import is_full_scale

INPUT, RESULT, MODEL, TILING, FORMAT, RUN = "Input", "Result", "Model", "Tiling and memory", "Output format", "Run"
"""Groups of options in the help."""

Method = Literal["bicubic", "brovey", "gsa", "mtf-glp", "awlp"]
Resampling = Literal["nearest", "bilinear", "cubic", "cubic_spline", "lanczos", "average"]
Coregister = Literal["off", "check", "global", "local", "auto", "shift"]
WEIGHTED = ("brovey", "gsa", "awlp")
"""Methods with an intensity, which weighs the bands."""
OutputDtype = Literal["uint8", "uint16", "int16", "uint32", "int32", "float32", "float64"]


@dataclass(frozen=True)
class Option:
    """The form of a field on the command line."""

    flags: str
    """Separated by blanks, the long one first."""
    group: str
    help: str
    metavar: str | None = None
    min: float | None = None
    max: float | None = None
    env: str | None = None
    cli: Any = None
    """Type on the command line, where Python takes more kinds of values."""


@dataclass(frozen=True)
class SharpenOptions:
    """Wishes for the result of a scene; sizes in PAN pixels.

    Raises:
        UsageError: a value is out of its range, or two values exclude each other.
    """

    bidx: Annotated[
        str | Sequence[int] | None,
        Option("--bidx -b", INPUT, "MS bands to use, from 1, in this order.", "3,2,1", cli=str | None),
    ] = None
    pan_bidx: Annotated[int | None, Option("--pan-bidx", INPUT, "Band of the PAN, if it has several.", "N", 1)] = None
    nodata: Annotated[
        float | None, Option("--nodata", INPUT, "Nodata value; default: as the files declare.", "VALUE")
    ] = None
    ratio: Annotated[
        int | None, Option("--ratio", INPUT, "PAN pixels per MS pixel; default: by georeferencing.", "N", 1, 8)
    ] = None
    resampling: Annotated[
        Resampling, Option("--resampling -r", INPUT, "Kernel for an MS whose pixels do not nest in the PAN's.")
    ] = "cubic"
    valid: Annotated[
        Literal["all", "any"],
        Option("--valid", INPUT, "A pixel is valid where all MS bands are, or, each band by itself, where any is."),
    ] = "all"
    coregister: Annotated[
        Coregister,
        Option(
            "--coregister",
            INPUT,
            "Displacement of the MS on the PAN: off ignores it, check warns of it, global takes out a shift or an "
            "affine map, local a smooth field and shifts of the bands too, auto what the scene clearly shows; "
            "shift is global.",
        ),
    ] = "auto"
    mask_clouds: Annotated[
        bool, Option("--mask-clouds", INPUT, "Clouds and shadows of a Landsat product become invalid.")
    ] = False
    bounds: Annotated[
        str | Sequence[float] | None,
        Option("--bounds", INPUT, "Only this part, in the PAN's CRS.", "LEFT,BOTTOM,RIGHT,TOP", cli=str | None),
    ] = None
    height: Annotated[
        float | None,
        Option(
            "--height",
            INPUT,
            "Height of the ground, metres above the ellipsoid, for a pair placed by RPCs; default: that in the RPCs.",
            "METRES",
        ),
    ] = None
    dem: Annotated[
        str | os.PathLike[str] | None,
        Option("--dem", INPUT, "Raster of such heights instead, also above the ellipsoid.", "FILE", cli=str | None),
    ] = None
    max_value: Annotated[
        float | None,
        Option("--max-value", INPUT, "Full scale in digital numbers; the result is clipped at it.", "VALUE"),
    ] = None
    bit_depth: Annotated[int | None, Option("--bit-depth", INPUT, "--max-value as 2^N - 1.", "N", 1, 32)] = None
    softness: Annotated[
        float | str | None,
        Option(
            "--softness",
            RESULT,
            "Softness of the result: sigma in PAN pixels, 0.25 (sharpest) to 0.8; ms: as soft, "
            "pixel for pixel, as the MS; default: 0.3.",
            "SIGMA|ms",
            cli=str | None,
        ),
    ] = None
    consistency: Annotated[
        int,
        Option(
            "--consistency",
            RESULT,
            "Passes that make the result, blurred as the scene is, agree with the MS; 1 or 2 help "
            "where the optics blur as a Gaussian does.",
            "N",
            0,
            10,
        ),
    ] = 0
    uncertainty: Annotated[
        str | os.PathLike[str] | None,
        Option("--uncertainty", RESULT, "Also write 1-sigma per band, in the output's units.", "FILE", cli=str | None),
    ] = None
    coverage: Annotated[
        Literal[68, 90],
        Option(
            "--coverage",
            RESULT,
            "Share of the errors, in percent, that --uncertainty holds: 68 is 1-sigma, 90 the half-width of a wider "
            "interval.",
            cli=Literal["68", "90"],
        ),
    ] = 68
    preview: Annotated[
        str | os.PathLike[str] | None,
        Option("--preview", RESULT, "Also write a small PNG of the result.", "FILE", cli=str | None),
    ] = None
    stac: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "--stac", RESULT, "Also write a STAC item: GeoJSON with the footprint of the valid area.", "FILE",
            cli=str | None,
        ),
    ] = None  # fmt: skip
    model: Annotated[
        str | os.PathLike[str] | None,
        Option(
            "--model -m", MODEL, "Bundled model's name or a checkpoint file.", "NAME|FILE", env="UKNOWPAN_MODEL",
            cli=str | None,
        ),
    ] = None  # fmt: skip
    method: Annotated[Method | None, Option("--method", MODEL, "A classical method instead of a model.")] = None
    weights: Annotated[
        str | Sequence[float] | None,
        Option(
            "--weights -w",
            MODEL,
            "Proportions of the MS bands in the intensity of brovey, gsa or awlp; default: by regression on the PAN.",
            "1,1,1,0",
            cli=str | None,
        ),
    ] = None
    steps: Annotated[
        int | None, Option("--steps", MODEL, "Network evaluations; default: as the model declares.", "N", 1)
    ] = None
    seed: Annotated[int, Option("--seed", MODEL, "Seed of the initial noise.", "N")] = 0
    device: Annotated[str, Option("--device", MODEL, "auto, cpu, cuda or cuda:N.", "DEVICE")] = "auto"
    dtype: Annotated[Literal["fp32", "bf16"], Option("--dtype", MODEL, "Precision of the network.")] = "fp32"
    engine: Annotated[
        Literal["auto", "torch", "onnx"],
        Option(
            "--engine",
            MODEL,
            "Library that runs the network: ONNX Runtime runs the bundled model on a CPU, and starts faster; "
            "PyTorch runs all; auto: ONNX Runtime where it can.",
        ),
    ] = "auto"
    tile: Annotated[int, Option("--tile", TILING, "Side of a tile in PAN pixels.", "PIXELS", 16)] = 512
    overlap: Annotated[
        int | None,
        Option(
            "--overlap",
            TILING,
            "Overlap of tiles that is blended; default: as the model needs (0 for the bundled ones, "
            "whose tiles join without a seam).",
            "PIXELS",
            0,
        ),
    ] = None
    batch_size: Annotated[int | None, Option("--batch-size", TILING, "Tiles at once; default: by device.", "N", 1)] = (
        None
    )
    max_memory: Annotated[
        float | None,
        Option("--max-memory", TILING, "GB that a scene may take, or it is refused; default: the machine's.", "GB"),
    ] = None
    num_threads: Annotated[
        int | None, Option("--num-threads -j", TILING, "CPU threads; default: $OMP_NUM_THREADS or all cores.", "N", 1)
    ] = None
    output_dtype: Annotated[
        OutputDtype | None,
        Option("--output-dtype", FORMAT, "Data type; default: the MS's. Values are clipped, not rescaled."),
    ] = None
    stretch: Annotated[
        str | Sequence[float] | None,
        Option(
            "--stretch",
            FORMAT,
            "Write 8-bit RGB for maps. LOW becomes black and HIGH white: digital numbers, or shares of the "
            "scene's pixels as in 2%,98%.",
            "LOW,HIGH",
            cli=str | None,
        ),
    ] = None
    mask: Annotated[
        Literal["internal", "alpha", "file"] | None,
        Option(
            "--mask", FORMAT, "Mark invalid pixels by a mask in the file, an alpha band or FILE.msk, not by nodata."
        ),
    ] = None
    format: Annotated[Literal["gtiff", "cog"], Option("--format -f", FORMAT, "File layout.")] = "gtiff"
    creation: Annotated[
        Mapping[str, str] | Sequence[str] | None,
        Option("--co", FORMAT, "GDAL creation option; may be repeated.", "KEY=VALUE", cli=list[str] | None),
    ] = None
    overviews: Annotated[bool, Option("--overviews", FORMAT, "Build overviews.")] = False
    overwrite: Annotated[bool, Option("--overwrite", RUN, "Replace outputs that exist.")] = False
    resume: Annotated[bool, Option("--resume", RUN, "Go on with an interrupted run of the same command.")] = False

    def __post_init__(self) -> None:
        for name in ("model", "steps"):
            if self.method is not None and getattr(self, name) is not None:
                raise UsageError(f"--method and --{name} exclude each other.")
        self._set("coverage", {"68": 68, "90": 90}.get(str(self.coverage), self.coverage))  # the command line's is text
        for name, (hint, option) in declared().items():
            value = getattr(self, name)
            if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of NumPy's
                self._set(name, value.item())
            _check(getattr(self, name), hint, option)
        self._refuse_together()
        if self.max_memory is not None and not 0 < self.max_memory < math.inf:
            raise UsageError(f"--max-memory must be above 0 and finite, not {self.max_memory:g}.")
        self._set("creation", creation_options(self.creation or {}))
        self._set("max_value", _full_scale(self.max_value, self.bit_depth))
        self._set("bit_depth", None)
        self._set("softness", _softness(self.softness))
        self._set("coregister", "global" if self.coregister == "shift" else self.coregister)
        self._set("bidx", band_numbers(self.bidx))
        bounds = numbers(self.bounds, "--bounds", 4)
        self._set("bounds", None if bounds is None else tuple(bounds))
        self._set("weights", band_weights(self.weights))
        self._set("stretch", stretch_range(self.stretch))
        for name in ("model", "dem", "uncertainty", "preview", "stac"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | os.PathLike):
                raise UsageError(f"--{name} takes the name of a file, not {value!r}.")
            self._set(name, None if value is None else os.fspath(value))

    def _refuse_together(self) -> None:
        """Refuse two options of which one would have no meaning."""
        if self.height is not None and (self.dem is not None or not math.isfinite(self.height)):
            raise UsageError("--height is one number for the whole scene; leave it out with --dem.")
        if self.stretch is not None and self.output_dtype is not None:
            raise UsageError("--stretch writes uint8; leave out --output-dtype.")
        if self.mask is not None and self.valid == "any":
            raise UsageError("--mask holds for all bands, and --valid any for each by itself; leave one out.")
        if self.mask == "file" and self.format == "cog":
            raise UsageError("--mask file: the mask of a COG lies in it; use --mask internal.")
        if self.weights is not None and self.method not in WEIGHTED:
            raise UsageError(f"--weights is for --method {', '.join(WEIGHTED[:-1])} or {WEIGHTED[-1]}.")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def of_model(self) -> tuple[tuple[str, Any], ...]:
        """The options that decide how a model is loaded, as (name, value)."""
        return tuple((name, getattr(self, name)) for name in OF_MODEL)


OF_MODEL = (
    *("model", "method", "weights", "softness", "consistency", "steps", "seed", "device", "dtype", "engine"),
    "num_threads",
)


@cache
def declared(kind: type = SharpenOptions) -> dict[str, tuple[Any, Option]]:
    """Name of each field of a class of options -> its type and its option."""
    hints = get_type_hints(kind, include_extras=True)
    return {f.name: (get_args(hints[f.name])[0], get_args(hints[f.name])[1]) for f in fields(kind)}


def shared(name: str) -> Option:
    """The option of `sharpen` that another command has too."""
    return declared()[name][1]


def check_full_scale(max_value: float | None) -> None:
    """Refuse a full scale that training data and scores cannot be divided by."""
    if max_value is not None and not is_full_scale(max_value):
        raise UsageError(f"--max-value: {max_value:g} is no full scale (1e-9 to 1e12).")


def _check(value: object, hint: Any, option: Option) -> None:
    """Refuse a value outside of its range or its choices."""
    flag = option.flags.split()[0]
    kinds = [hint, *get_args(hint)]
    choices = [x for kind in kinds if "Literal" in str(kind) for x in get_args(kind) if type(x) in (str, int)]
    if choices and value is not None and value not in choices:
        raise UsageError(f"{flag} takes {', '.join(map(str, choices[:-1]))} or {choices[-1]}, not {value!r}.")
    if float in kinds and str not in kinds and value is not None and not isinstance(value, float | int):
        raise UsageError(f"{flag} must be a number, not {value!r}.")
    if option.min is None or value is None:
        return
    if not isinstance(value, int) or not option.min <= value <= (option.max or math.inf):
        most = "" if option.max is None else f" and at most {option.max}"
        raise UsageError(f"{flag} must be a whole number of at least {option.min}{most}, not {value!r}.")


def numbers(text: str | Sequence[float] | None, option: str, count: int | None = None) -> list[float] | None:
    """Numbers, or text with numbers separated by commas or blanks.

    Raises:
        UsageError: a number is missing or not finite.
    """
    if text is None:
        return None
    try:
        values = [float(part) for part in (text.replace(",", " ").split() if isinstance(text, str) else text)]
    except (TypeError, ValueError):
        values = []
    if not values or (count is not None and len(values) != count) or not all(math.isfinite(v) for v in values):
        wanted = f"{count} numbers" if count else "numbers"
        raise UsageError(f"{option} takes {wanted} separated by commas, not {text!r}.")
    return values


def band_numbers(text: str | Sequence[float] | None) -> tuple[int, ...] | None:
    """Band numbers from 1 on; a UsageError for others."""
    values = numbers(text, "--bidx")
    if values is None:
        return None
    if any(v < 1 or v != int(v) for v in values):
        raise UsageError(f"--bidx takes band numbers from 1 on, not {text!r}.")
    return tuple(int(v) for v in values)


def band_weights(text: str | Sequence[float] | None) -> tuple[float, ...] | None:
    """Proportions of bands, none below 0; a UsageError for others."""
    values = numbers(text, "--weights")
    if values is not None and (min(values) < 0 or sum(values) == 0):
        raise UsageError(f"--weights takes numbers from 0 on, not all 0, not {text!r}.")
    return None if values is None else tuple(values)


def pair_of(stretch: str) -> tuple[float, float]:
    """The two numbers of LOW,HIGH or LOW%,HIGH%."""
    low, high = numbers(stretch.replace("%", ""), "--stretch", 2) or (0.0, 0.0)
    return low, high


def stretch_range(text: str | Sequence[float] | None) -> str | None:
    """LOW,HIGH in digital numbers, or LOW%,HIGH%; a UsageError for others."""
    if text is None:
        return None
    words = text if isinstance(text, str) else ",".join(f"{value:.17g}" for value in text)
    low, high = pair_of(words)
    shares = [word.strip().endswith("%") for word in words.split(",")]
    if not low < high or any(shares) != all(shares) or (any(shares) and not 0 <= low < high <= 100):
        raise UsageError(f"--stretch takes LOW,HIGH, or LOW%,HIGH% from 0 to 100, LOW below HIGH, not {text!r}.")
    return words


def _full_scale(max_value: float | None, bit_depth: int | None) -> float | None:
    if bit_depth is not None:
        if max_value is not None:
            raise UsageError("--max-value and --bit-depth exclude each other.")
        return float(2**bit_depth - 1)
    if max_value is not None and not 0 < max_value < math.inf:
        raise UsageError(f"--max-value must be above 0 and finite, not {max_value:g}.")
    return max_value


def _softness(text: float | str | None) -> float | str | None:
    if text is None or text == "ms":
        return text
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0.2 <= value <= 1:
        raise UsageError(f"--softness is ms or a number from 0.2 to 1, not {text!r}.")
    return value


_OPEN_ARGUMENTS = {
    *("FP", "MODE", "DRIVER", "WIDTH", "HEIGHT", "COUNT"),
    *("CRS", "TRANSFORM", "DTYPE", "NODATA", "SHARING", "THREAD_SAFE"),
}
"""Arguments of rasterio.open, which share one name space with creation options."""


def creation_options(words: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """GDAL creation options from a mapping or from KEY=VALUE words, also several in one word."""
    if isinstance(words, Mapping):
        pairs = [f"{key}={value}" for key, value in words.items()]
    else:
        pairs = [word for text in words for word in text.split(",")]
    options = {}
    for word in pairs:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UsageError(f"--co takes KEY=VALUE, not {word!r}.")
        if key.upper() in _OPEN_ARGUMENTS:
            raise UsageError(f"--co {word}: {key} is no creation option of GDAL's GTiff or COG.")
        options[key.upper()] = value
    return options
