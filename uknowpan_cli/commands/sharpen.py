"""`uknowpan sharpen`: one scene."""

from dataclasses import asdict
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import note, progress, run_began, say, to_json
from uknowpan.options import RESULT, RUN, SharpenOptions


@opt.shares()
def sharpen(
    ctx: typer.Context,
    pan: Annotated[
        str,
        typer.Argument(
            metavar="PAN|PRODUCT",
            help="Panchromatic raster, one band; FILE,band=N selects one. Or a product: its folder or metadata.",
        ),
    ],
    output: Annotated[str, opt.option("--output -o --out", RESULT, "GeoTIFF to write.", "FILE")],
    options: SharpenOptions,
    ms: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MS...]",
            help="Multispectral raster; or several files, their bands in order; FILE,band=N selects.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, opt.option("--dry-run", RUN, "Print grid, memory and time, and write nothing.")] = False,
    as_json: opt.JsonOption = False,
    log_json: opt.LogJsonOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen MS with PAN: the MS's bands on the PAN's grid, as a georeferenced GeoTIFF.

    Prints the output's path (or a JSON report); messages go to stderr.

    Example: uknowpan sharpen pan.tif ms.tif -o sharp.tif
    """
    began = run_began()
    from uknowpan.loading import load_for
    from uknowpan.scenes import prepared
    from uknowpan.sharpening import sharpen_scene

    with (
        progress("survey", quiet or dry_run, "samples") as shown,
        prepared(
            *(pan, ms or [], output, options, lambda: load_for(options)),
            dry_run=dry_run, began=began, on_progress=shown,
        ) as scene,
    ):  # fmt: skip
        if dry_run:
            from uknowpan.forecast import estimate

            forecast = estimate(scene)
            typer.echo(to_json(asdict(forecast)) if as_json else forecast.text())
            return
        report = sharpen_scene(scene, shown.stage("sharpen", "Mpx"))
    note("report", report=asdict(report))
    if not quiet:
        if not ms:
            say(report.notes[0])
        size = f"{report.width} x {report.height} pixels, {report.bands} bands"
        speed = f"in {report.seconds:.1f} s, {report.megapixels_per_second:.3g} Mpx/s"
        say(f"{report.output}: {size}, by {report.method} {speed}")
    typer.echo(to_json(asdict(report)) if as_json else report.output)
