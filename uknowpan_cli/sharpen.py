"""`uknowpan sharpen`: one scene."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import exits
from . import options as opt
from .console import progress, to_json
from .creation import creation_options, try_creation

__all__ = ["sharpen"]


class Format(StrEnum):
    gtiff = "gtiff"
    cog = "cog"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"


def sharpen(
    ctx: typer.Context,
    pan: opt.PanArgument,
    ms: opt.MsArgument,
    output: Annotated[str, typer.Option("--output", "-o", help="GeoTIFF to write.")],
    model: opt.ModelOption = None,
    method: Annotated[
        opt.Method | None,
        typer.Option("--method", help="A classical method instead of a model."),
    ] = None,
    consistency: Annotated[
        int,
        typer.Option(
            "--consistency",
            min=0,
            max=10,
            help="Passes at the end that make the result, blurred as the scene is, agree with the "
            "MS; 1 or 2 help where the optics blur as a Gaussian does.",
        ),
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Network evaluations; default: the model's."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the initial noise.")] = 0,
    device: opt.DeviceOption = "auto",
    dtype: Annotated[
        Precision, typer.Option("--dtype", help="Precision of the network.")
    ] = Precision.fp32,
    tile: Annotated[int, typer.Option("--tile", min=16, help="Tile size in PAN pixels.")] = 512,
    overlap: Annotated[
        int | None,
        typer.Option(
            "--overlap",
            min=0,
            help="Overlap to blend over, PAN pixels; default: as the "
            "model needs (0 for the bundled ones, whose tiles join without a seam).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Tiles at once; default: by device.")
    ] = None,
    bidx: opt.BidxOption = None,
    pan_bidx: opt.PanBidxOption = None,
    nodata: opt.NodataOption = None,
    ratio: opt.RatioOption = None,
    resampling: opt.ResamplingOption = opt.Resampling.cubic,
    coregister: Annotated[
        opt.Coregister,
        typer.Option("--coregister", help="PAN/MS shift: ignore it, warn of it, or remove it."),
    ] = opt.Coregister.check,
    bounds: opt.BoundsOption = None,
    max_value: Annotated[
        float | None,
        typer.Option(
            "--max-value", min=0, help="Full scale in digital numbers; the result is clipped at it."
        ),
    ] = None,
    bit_depth: Annotated[
        int | None, typer.Option("--bit-depth", min=1, max=32, help="--max-value as 2^N - 1.")
    ] = None,
    output_dtype: Annotated[
        opt.OutputDtype | None,
        typer.Option(
            "--output-dtype", help="Instead of the MS's; values are clipped, not rescaled."
        ),
    ] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="File layout.")] = Format.gtiff,
    creation: Annotated[
        list[str] | None,
        typer.Option("--co", help="GDAL creation option KEY=VALUE; may be repeated."),
    ] = None,
    overviews: Annotated[bool, typer.Option("--overviews", help="Build overviews.")] = False,
    uncertainty: Annotated[
        str | None,
        typer.Option("--uncertainty", help="Also write 1-sigma per band, in the output's units."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Also write a small PNG of the result.")
    ] = None,
    overwrite: opt.OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run of the same command.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, with memory and time.")
    ] = False,
    as_json: opt.JsonOption = False,
    num_threads: opt.ThreadsOption = None,
    log_json: Annotated[
        Path | None, typer.Option("--log-json", help="Write messages as JSON lines.")
    ] = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen MS with PAN: the MS's bands on the PAN's grid, as a georeferenced GeoTIFF.

    Prints the output's path (or a JSON report); messages go to stderr.
    """
    with opt.guarded(-1 if quiet else verbose, log_json), opt.bounded_gdal_cache():
        if method is not None:
            for name in ("model", "steps"):
                if opt.is_typed(ctx, name):
                    opt.fail(f"--method and --{name} exclude each other.", exits.USAGE)
        co = creation_options(creation or [])
        if bit_depth is not None:
            if max_value is not None:
                opt.fail("--max-value and --bit-depth exclude each other.", exits.USAGE)
            max_value = float(2**bit_depth - 1)
        if max_value is not None and not 0 < max_value < math.inf:
            opt.fail(f"--max-value must be above 0 and finite, not {max_value:g}.", exits.USAGE)
        from uknowpan_tiling import OutputOptions

        from .opening import (
            PairRequest,
            check_outputs,
            choose_device,
            coregistered,
            open_request,
        )

        request = PairRequest(pan, ms, pan_bidx, bidx, nodata, ratio, resampling.value, bounds)
        pair = open_request(request)
        try:
            named = {
                "--output": output,
                "--uncertainty": uncertainty,
                "--preview": None if preview is None else str(preview),
            }
            used = [*pair.inputs, *([model] if model else [])]
            check_outputs(named, used, overwrite or dry_run)
            try_creation(co, format.value, output_dtype or pair.meta.dtype)

            import torch

            from uknowpan_models.pansharpener import load_sharpener
            from uknowpan_models.runtime import tune_cpu

            from .pipeline import SharpenOptions, clipping_warning, plan_scene, sharpen_scene

            threads = tune_cpu(num_threads)
            chosen = choose_device(device)
            try:
                sharpener = load_sharpener(
                    model,
                    None if method is None else method.value,
                    consistency=consistency,
                    steps=steps,
                    seed=seed,
                    device=chosen,
                    dtype=torch.bfloat16 if dtype is Precision.bf16 else torch.float32,
                )
            except ValueError as error:
                if steps is None:
                    raise
                opt.fail(f"--steps: {error}.", exits.USAGE)
            if uncertainty is not None and not sharpener.has_uncertainty:
                opt.fail(
                    f"--uncertainty: {sharpener.name} has none; use a model of the form "
                    "fsa-s-lite, like the bundled one.",
                    exits.USAGE,
                )
            sharpener.check(pair.bands, pair.ratio)
            pair, found = coregistered(request, pair, coregister, sharpener, max_value)
            log = logging.getLogger("uknowpan")
            idle = {
                "--seed": seed != 0,
                "--dtype": dtype is not Precision.fp32,
                "--device": chosen != "cpu" and device != "auto",
            }
            for option in [name for name, given in idle.items() if given and method is not None]:
                log.warning("%s changes nothing for --method %s", option, method)
            for note in pair.notes:
                log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
            clipped = clipping_warning(pair.meta, found.scale, output_dtype)
            if clipped is not None:
                log.warning(clipped)
            options = SharpenOptions(
                output=output,
                tile=tile,
                overlap=overlap,
                batch_size=batch_size or (1 if chosen == "cpu" else 16),
                max_value=max_value,
                writing=OutputOptions(
                    format=format.value,
                    dtype=None if output_dtype is None else output_dtype.value,
                    nodata=nodata,
                    creation=co,
                    overviews=overviews,
                    overwrite=overwrite,
                    num_threads=threads,
                ),
                uncertainty=uncertainty,
                resume=resume,
                survey=found,
            )
            plan = plan_scene(pair, sharpener, found.statistics, options)
            if not sharpener.local and plan.count > 1:
                log.warning(
                    "the result of model %s depends on how the scene is cut, here into %d tiles "
                    "that overlap by %d PAN pixels (--tile, --overlap)",
                    *(sharpener.name, plan.count, plan.overlap * pair.ratio),
                )
            if dry_run:
                from .estimate import estimate

                forecast = estimate(pair, sharpener, options)
                typer.echo(to_json(asdict(forecast)) if as_json else forecast.text())
                return
            with progress("sharpen", quiet) as on_progress:
                report = sharpen_scene(pair, sharpener, options, on_progress)
        finally:
            pair.close()
        if preview is not None:
            from .pictures import preview_png

            preview_png(output, preview)
        typer.echo(to_json(asdict(report)) if as_json else report.output)
