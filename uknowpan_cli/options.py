"""Options that several commands share, named as in GDAL and rasterio where those have them."""

from __future__ import annotations

import logging
import math
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import exits
from .console import set_up_logging

__all__ = [
    "BidxOption",
    "BoundsOption",
    "Coregister",
    "DeviceOption",
    "JsonOption",
    "Method",
    "ModelOption",
    "MsArgument",
    "NodataOption",
    "OutputDtype",
    "OverwriteOption",
    "PanArgument",
    "PanBidxOption",
    "QuietOption",
    "RatioOption",
    "Resampling",
    "ResamplingOption",
    "ThreadsOption",
    "VerboseOption",
    "bounded_gdal_cache",
    "fail",
    "guarded",
    "is_typed",
    "numbers",
]


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
    typer.Option(
        "--model", "-m", envvar="UKNOWPAN_MODEL", help="Bundled model's name or a checkpoint file."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output if it exists.")
]
BidxOption = Annotated[
    str | None,
    typer.Option("--bidx", "-b", help="MS bands to use, 1-based, in order: 3,2,1."),
]
PanBidxOption = Annotated[
    int | None, typer.Option("--pan-bidx", min=1, help="Band of PAN, if it has several.")
]
NodataOption = Annotated[
    float | None, typer.Option("--nodata", help="Nodata value, instead of what the files say.")
]
RatioOption = Annotated[
    int | None,
    typer.Option("--ratio", min=1, max=8, help="PAN pixels per MS pixel, if not as georeferenced."),
]
ResamplingOption = Annotated[
    Resampling,
    typer.Option("--resampling", "-r", help="For an MS whose pixels do not nest in the PAN's."),
]
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
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, errors only.")]
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="-v: what is done; -vv: tracebacks.")
]


GDAL_CACHE_BYTES = 64 * 2**20
"""Blocks that GDAL keeps; its own default is 5 % of the machine's memory, which adds to ours.
Tiles overlap by their margins only, so little is read twice."""


@contextmanager
def bounded_gdal_cache() -> Iterator[None]:
    """GDAL with a small block cache: memory is then what the forecast says on any machine."""
    import rasterio

    with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES):
        yield


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
        fail(f"{option} takes {wanted} separated by commas, not {text!r}.", exits.USAGE)
    return values


def fail(message: str, code: int) -> NoReturn:
    """One sentence on stderr, then the exit code."""
    logging.getLogger("uknowpan").debug("exit %d: %s", code, message)
    typer.echo(f"uknowpan: error: {message}", err=True)
    raise typer.Exit(code)


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
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except BaseException as error:
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        if verbosity >= 2:
            traceback.print_exc(file=sys.stderr)
        fail(exits.sentence(error), exits.exit_code(error))
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
