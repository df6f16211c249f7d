"""`uknowpan evaluate`: scores of models and of results, as published tables have them."""

from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import progress, to_json
from uknowpan.evaluation.options import EvaluateOptions, is_test_file


@opt.shares()
def evaluate(
    ctx: typer.Context,
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...", help="Test file in PanCollection's layout (.h5), a result raster, or PAN and MS."
        ),
    ],
    options: EvaluateOptions,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Score models on a test file or on a pair, or a sharpened raster against the truth or against its PAN and MS.

    The definitions are those of the DLPan-Toolbox. A test file with a truth is scored at reduced resolution, one
    without at full resolution.

    Example: uknowpan evaluate sharp.tif --pan pan.tif --ms ms.tif
    """
    options.for_targets(targets, {name for name in ctx.params if opt.is_typed(ctx, name)})

    from uknowpan.durable import write_text
    from uknowpan.evaluation.report import print_table
    from uknowpan.files import check_outputs
    from uknowpan.models.devices import tune_cpu

    outputs = {"--csv": options.csv, "--latex": options.latex, "--output": options.output}
    named = {name: None if path is None else str(path) for name, path in outputs.items()}
    check_outputs(named, _inputs(targets, options), options.overwrite)
    tune_cpu(options.num_threads)
    target = targets[0]
    if options.protocol is not None:
        from uknowpan.evaluation.sharp import measure_sharp

        with progress("evaluate", quiet, "methods") as on_progress:
            report = measure_sharp(target, targets[1:], options, on_progress)
    elif is_test_file(target):
        from uknowpan.evaluation.h5 import measure_file

        report = measure_file(target, options, quiet=quiet)
    else:
        from uknowpan.evaluation.rasters import measure_raster

        with progress("evaluate", quiet) as on_progress:
            report = measure_raster(target, options, on_progress)
    text = to_json(report.facts())
    for path in (path for path in outputs.values() if path is not None):
        suffix = {options.csv: ".csv", options.latex: ".tex"}.get(path, path.suffix.lower())
        write_text(path, {".csv": report.csv, ".tex": report.latex}[suffix]() if suffix != ".json" else f"{text}\n")
    if as_json:
        typer.echo(text)
        return
    print_table(report)
    for line in report.remarks():
        typer.echo(line)


def _inputs(targets: list[str], options: EvaluateOptions) -> list[str]:
    from uknowpan.tiling import parse_band_spec

    rasters = [spec for spec in (options.reference, options.pan, *options.ms) if spec is not None]
    return [*options.model, *(parse_band_spec(spec)[0] for spec in (*targets, *rasters))]
