"""`uknowpan sharpen`: one scene."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uknowpan import options as opt
from uknowpan.console import progress, to_json
from uknowpan.creation import creation_options
from uknowpan.opening import PairRequest
from uknowpan.scene_job import MethodRequest, SceneRequest, full_scale, opened, softness_of


def sharpen(
    ctx: typer.Context,
    pan: opt.PanArgument,
    ms: opt.MsArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="GeoTIFF to write.")],
    model: opt.ModelOption = None,
    method: opt.MethodOption = None,
    softness: opt.SoftnessOption = None,
    consistency: opt.ConsistencyOption = 0,
    steps: opt.StepsOption = None,
    seed: opt.SeedOption = 0,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = opt.Precision.fp32,
    tile: opt.TileOption = 512,
    overlap: opt.OverlapOption = None,
    batch_size: opt.BatchSizeOption = None,
    bidx: opt.BidxOption = None,
    pan_bidx: opt.PanBidxOption = None,
    nodata: opt.NodataOption = None,
    ratio: opt.RatioOption = None,
    resampling: opt.ResamplingOption = opt.Resampling.cubic,
    coregister: opt.CoregisterOption = opt.Coregister.check,
    bounds: opt.BoundsOption = None,
    max_value: opt.MaxValueOption = None,
    bit_depth: opt.BitDepthOption = None,
    output_dtype: opt.OutputDtypeOption = None,
    format: opt.FormatOption = opt.Format.gtiff,
    creation: opt.CreationOption = None,
    overviews: opt.OverviewsOption = False,
    uncertainty: Annotated[
        str | None,
        typer.Option("--uncertainty", help="Also write 1-sigma per band, in the output's units."),
    ] = None,
    preview: Annotated[Path | None, typer.Option("--preview", help="Also write a small PNG of the result.")] = None,
    overwrite: opt.OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, with memory and time.")] = False,
    as_json: opt.JsonOption = False,
    num_threads: opt.ThreadsOption = None,
    log_json: opt.LogJsonOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen MS with PAN: the MS's bands on the PAN's grid, as a georeferenced GeoTIFF.

    Prints the output's path (or a JSON report); messages go to stderr.
    """
    with opt.guarded(-1 if quiet else verbose, log_json), opt.bounded_gdal_cache():
        opt.refuse_both(ctx, method)
        co = creation_options(creation or [])
        max_value = full_scale(max_value, bit_depth)
        how = MethodRequest(
            model=model,
            method=None if method is None else method.value,
            softness=softness_of(softness),
            consistency=consistency,
            steps=steps,
            seed=seed,
            device=device,
            dtype=dtype.value,
        )
        request = SceneRequest(
            PairRequest(pan, ms, pan_bidx, bidx, nodata, ratio, resampling.value, bounds),
            output,
            uncertainty=uncertainty,
            preview=None if preview is None else str(preview),
            tile=tile,
            overlap=overlap,
            batch_size=batch_size,
            coregister=coregister,
            max_value=max_value,
            output_dtype=None if output_dtype is None else output_dtype.value,
            format=format.value,
            creation=co,
            overviews=overviews,
            overwrite=overwrite,
            resume=resume,
        )
        with opened(request, lambda: how.load(num_threads), model=model, dry_run=dry_run) as scene:
            if dry_run:
                forecast = scene.estimate()
                typer.echo(to_json(asdict(forecast)) if as_json else forecast.text())
                return
            with progress("sharpen", quiet) as on_progress:
                report = scene.sharpen(on_progress)
        typer.echo(to_json(asdict(report)) if as_json else report.output)
