"""Options that several commands share, named as in GDAL and rasterio where those have them."""

from __future__ import annotations

import logging
import math
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from uknowpan import errors as exits
from uknowpan.console import set_up_logging
from uknowpan.errors import UsageError


class Method(StrEnum):
    bicubic = "bicubic"
    brovey = "brovey"
    gsa = "gsa"
    mtf_glp = "mtf-glp"


class Resampling(StrEnum):
    nearest = "nearest"
    bilinear = "bilinear"
    cubic = "cubic"
    cubic_spline = "cubic_spline"
    lanczos = "lanczos"
    average = "average"


class OutputDtype(StrEnum):
    uint8 = "uint8"
    uint16 = "uint16"
    int16 = "int16"
    uint32 = "uint32"
    int32 = "int32"
    float32 = "float32"
    float64 = "float64"


class Coregister(StrEnum):
    off = "off"
    check = "check"
    shift = "shift"


class Format(StrEnum):
    gtiff = "gtiff"
    cog = "cog"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


PanArgument = Annotated[
    str,
    typer.Argument(metavar="PAN", help="Panchromatic raster, one band; FILE,band=N selects one."),
]
MsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="MS...",
        help="Multispectral raster; or several files, their bands in order; FILE,band=N selects.",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", envvar="UKNOWPAN_MODEL", help="Bundled model's name or a checkpoint file."),
]
MethodOption = Annotated[Method | None, typer.Option("--method", help="A classical method instead of a model.")]
ConsistencyOption = Annotated[
    int,
    typer.Option(
        "--consistency",
        min=0,
        max=10,
        help="Passes at the end that make the result, blurred as the scene is, agree with the "
        "MS; 1 or 2 help where the optics blur as a Gaussian does.",
    ),
]
SoftnessOption = Annotated[
    str | None,
    typer.Option(
        "--softness",
        help="How soft the result is against the PAN: sigma in PAN pixels, 0.25 (as sharp as "
        "can be) to 0.8; ms: as the MS is, pixel for pixel; default 0.45.",
    ),
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Network evaluations; default: the model's.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Of the initial noise.")]
DtypeOption = Annotated[Precision, typer.Option("--dtype", help="Precision of the network.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
TileOption = Annotated[int, typer.Option("--tile", min=16, help="Tile size in PAN pixels.")]
OverlapOption = Annotated[
    int | None,
    typer.Option(
        "--overlap",
        min=0,
        help="Overlap to blend over, PAN pixels; default: as the "
        "model needs (0 for the bundled ones, whose tiles join without a seam).",
    ),
]
BatchSizeOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Tiles at once; default: by device.")]
BidxOption = Annotated[
    str | None,
    typer.Option("--bidx", "-b", help="MS bands to use, 1-based, in order: 3,2,1."),
]
PanBidxOption = Annotated[int | None, typer.Option("--pan-bidx", min=1, help="Band of PAN, if it has several.")]
NodataOption = Annotated[float | None, typer.Option("--nodata", help="Nodata value, instead of what the files say.")]
RatioOption = Annotated[
    int | None,
    typer.Option("--ratio", min=1, max=8, help="PAN pixels per MS pixel, if not as georeferenced."),
]
ResamplingOption = Annotated[
    Resampling,
    typer.Option("--resampling", "-r", help="For an MS whose pixels do not nest in the PAN's."),
]
CoregisterOption = Annotated[
    Coregister,
    typer.Option("--coregister", help="PAN/MS shift: ignore it, warn of it, or remove it."),
]
MaxValueOption = Annotated[
    float | None,
    typer.Option("--max-value", min=0, help="Full scale in digital numbers; the result is clipped at it."),
]
BitDepthOption = Annotated[int | None, typer.Option("--bit-depth", min=1, max=32, help="--max-value as 2^N - 1.")]
OutputDtypeOption = Annotated[
    OutputDtype | None,
    typer.Option("--output-dtype", help="Instead of the MS's; values are clipped, not rescaled."),
]
FormatOption = Annotated[Format, typer.Option("--format", "-f", help="File layout.")]
CreationOption = Annotated[
    list[str] | None,
    typer.Option("--co", help="GDAL creation option KEY=VALUE; may be repeated."),
]
OverviewsOption = Annotated[bool, typer.Option("--overviews", help="Build overviews.")]
BoundsOption = Annotated[
    str | None,
    typer.Option(
        "--bounds",
        help="Only this part, for a quick trial: LEFT,BOTTOM,RIGHT,TOP in the PAN's CRS.",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--num-threads", "-j", min=1, help="CPU threads; default: all cores.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
LogJsonOption = Annotated[Path | None, typer.Option("--log-json", help="Write messages as JSON lines.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, errors only.")]
VerboseOption = Annotated[int, typer.Option("--verbose", "-v", count=True, help="-v: what is done; -vv: tracebacks.")]


def bounded_gdal_cache(wanted: int = 0) -> AbstractContextManager[None]:
    """See `uknowpan.tiling.raster.bounded_gdal_cache`; imported late, as rasterio is heavy."""
    from uknowpan.tiling.raster import bounded_gdal_cache as bounded

    return bounded(wanted)


def is_typed(ctx: typer.Context, parameter: str) -> bool:
    """Whether a parameter is from the command line, not from the environment or its default."""
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def numbers(text: str | None, option: str, count: int | None = None) -> list[float] | None:
    """Numbers separated by commas or blanks; a usage error (exit 2) if they are none."""
    if text is None:
        return None
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        values = []
    wrong_count = count is not None and len(values) != count
    if not values or wrong_count or not all(math.isfinite(v) for v in values):
        wanted = f"{count} numbers" if count else "numbers"
        raise UsageError(f"{option} takes {wanted} separated by commas, not {text!r}.")
    return values


def refuse_both(ctx: typer.Context, method: Method | None) -> None:
    """A classical method and an option of models, both typed, are a usage error (exit 2)."""
    for name in ("model", "steps"):
        if method is not None and is_typed(ctx, name):
            raise UsageError(f"--method and --{name} exclude each other.")


@contextmanager
def guarded(verbosity: int = 0, log_json: Path | None = None) -> Iterator[None]:
    """Turn exceptions into one sentence and the exit code; SIGTERM counts as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        before = None
    try:
        set_up_logging(verbosity, log_json)
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if verbosity >= 2 and not isinstance(error, exits.UsageError):
            traceback.print_exc(file=sys.stderr)
        message, code = exits.sentence(error), exits.exit_code(error)
        logging.getLogger("uknowpan").debug("exit %d: %s", code, message)
        typer.echo(f"uknowpan: error: {message}", err=True)
        raise typer.Exit(code) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
