"""`uknowpan compare`: methods side by side on a window of a scene."""

import time
from pathlib import Path
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import progress, to_json
from uknowpan.options import MODEL, RESULT, SharpenOptions

OPTIONS = (
    *("bidx", "pan_bidx", "nodata", "ratio", "resampling", "valid", "coregister", "bounds"),
    *("softness", "steps", "seed", "device", "num_threads", "overwrite"),
)


@opt.shares(only=OPTIONS)
def compare(
    ctx: typer.Context,
    pan: Annotated[str, typer.Argument(metavar="PAN", help="Panchromatic raster.")],
    ms: Annotated[list[str], typer.Argument(metavar="MS...", help="Multispectral raster, or one for each band.")],
    options: SharpenOptions,
    models: Annotated[
        list[str] | None, opt.option("--model -m", MODEL, "Model to compare; may be repeated.", "NAME|FILE")
    ] = None,
    output: Annotated[Path, opt.option("--output --out -o", RESULT, "The page.", "FILE")] = Path("compare.html"),
    png: Annotated[Path | None, opt.option("--png", RESULT, "Also a sheet of pictures.", "FILE")] = None,
    as_json: opt.JsonOption = False,
    log_json: opt.LogJsonOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen a window of a scene with every method, and show the results on one page.

    The window has the finest detail of the scene, or is that of --bounds. The page needs no network.

    Example: uknowpan compare pan.tif ms.tif -o compare.html
    """
    from uknowpan.durable import write_text
    from uknowpan.evaluation.comparing import compare as run
    from uknowpan.evaluation.page import html_page, sheet
    from uknowpan.files import check_outputs, check_suffix
    from uknowpan.models.checkpoints import DEFAULT_MODEL
    from uknowpan.pictures import write_png
    from uknowpan.tiling import parse_band_spec

    began = time.monotonic()
    inputs = [parse_band_spec(path)[0] for path in (pan, *ms)]
    named = {"--output": str(output), "--png": None if png is None else str(png)}
    check_suffix("--output", output, "a page of HTML", ".html", ".htm")
    if png is not None:
        check_suffix("--png", png, "a PNG", ".png")
    check_outputs(named, [*inputs, *(models or [])], options.overwrite)
    with progress("compare", quiet, "methods") as shown:
        comparison = run(pan, ms, options, models or [DEFAULT_MODEL], lambda name, n, of: shown(n, of))
    write_text(output, html_page(comparison))
    if png is not None:
        write_png(png, sheet(comparison))
    if as_json:
        scores = {entry.name: {**entry.scores, "seconds": entry.seconds} for entry in comparison.entries}
        facts = {"bounds": comparison.bounds, "shift_pan_pixels": comparison.shift, "scores": scores}
        typer.echo(to_json({"output": str(output), **facts, "seconds": time.monotonic() - began}))
        return
    typer.echo(output)
