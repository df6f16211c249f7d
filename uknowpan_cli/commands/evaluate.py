"""`uknowpan evaluate`: scores of models and of results, as published tables have them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import progress, to_json
from uknowpan.errors import UsageError
from uknowpan.evaluation.asked import Asked, Measured, Registration, named_sensor

DEFAULT_RATIO = 4


def evaluate(
    ctx: typer.Context,
    target: Annotated[
        str,
        typer.Argument(metavar="TARGET", help="Test file in PanCollection's layout (.h5), or a result raster."),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="h5: bundled model's name or a checkpoint of any stage; may be repeated. Default: "
            "$UKNOWPAN_MODEL or the bundled model.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="h5: a classical method: brovey, gsa, mtf-glp-fs, mtf-glp-hpm-r, bdsd-pc; may be repeated.",
        ),
    ] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="h5: all classical methods as well.")] = False,
    reference: Annotated[str | None, typer.Option("--reference", help="Raster: the truth, on the same grid.")] = None,
    pan: Annotated[str | None, typer.Option("--pan", help="Raster without truth: the PAN it was made from.")] = None,
    ms: Annotated[
        list[str] | None,
        typer.Option("--ms", help="Raster without truth: the MS; or several files, repeated."),
    ] = None,
    sensor: Annotated[
        str | None,
        typer.Option(
            "--sensor",
            help="QB, IKONOS, GeoEye1, WV2, WV3, WV4, GF2 or generic: MTF gains and full scale. "
            "Default: as file or model say.",
        ),
    ] = None,
    max_value: Annotated[
        float | None,
        typer.Option("--max-value", min=0, help="Full scale in DN; default: as file, sensor or model say."),
    ] = None,
    bit_depth: Annotated[int | None, typer.Option("--bit-depth", min=1, max=32, help="--max-value as 2^N - 1.")] = None,
    ratio: opt.RatioOption = None,
    nodata: opt.NodataOption = None,
    pan_bidx: opt.PanBidxOption = None,
    bidx: opt.BidxOption = None,
    registration: Annotated[
        Registration,
        typer.Option(
            "--registration",
            help="How --ms is enlarged: area, as georeferenced, or pancollection, as the toolbox does.",
        ),
    ] = Registration.area,
    cut: Annotated[
        int,
        typer.Option("--cut", min=0, help="With a truth: border left out, pixels; published: 21."),
    ] = 21,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="h5: only the first so many images.")] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", min=1, help="Network evaluations; default: the model's."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the initial noise.")] = 0,
    softness: Annotated[
        float | None,
        typer.Option(
            "--softness",
            min=0.2,
            max=1.0,
            help="h5: of the results, for models that mind it, see `sharpen`; default 0.45.",
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="Also write the scores of every image.")] = None,
    latex: Annotated[Path | None, typer.Option("--latex", help="Also write the table for a paper.")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", metavar="DIR", help="h5: also draw every image into a folder."),
    ] = None,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    overwrite: opt.OverwriteOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Score models on a test file, or a sharpened raster against the truth or against its PAN
    and MS, with the DLPan-Toolbox's definitions.

    Prints a table: mean and standard deviation over the images. A test file with a truth is
    scored at reduced resolution, one without at full resolution.
    """
    with opt.guarded(-1 if quiet else verbose):
        asked = Asked(
            target=target,
            models=tuple(model or ()),
            methods=tuple(method or ()),
            baselines=baselines,
            reference=reference,
            pan=pan,
            ms=tuple(ms or ()),
            sensor=None if sensor is None else named_sensor(sensor),
            max_value=_full_scale(max_value, bit_depth),
            ratio=ratio,
            nodata=nodata,
            pan_bidx=pan_bidx,
            bidx=_bands(bidx),
            registration=registration,
            cut=cut,
            limit=limit,
            steps=steps,
            seed=seed,
            softness=softness,
            pictures=pictures,
            device=device,
            overwrite=overwrite,
            quiet=quiet,
        )
        typed = {name for name in ctx.params if opt.is_typed(ctx, name)}
        _check_usage(asked, typed)

        from uknowpan.files import check_outputs

        named = {"--csv": csv, "--latex": latex}
        outputs = {name: None if path is None else str(path) for name, path in named.items()}
        check_outputs(outputs, _inputs(asked), overwrite)

        from uknowpan.evaluation.h5 import measure_file
        from uknowpan.models.devices import tune_cpu

        tune_cpu(num_threads)
        measured = measure_file(asked) if asked.is_h5 else _measure_raster(asked)
        _report(measured, as_json, csv, latex)


# ------------------------------------------------------------------------------------- options


def _full_scale(max_value: float | None, bit_depth: int | None) -> float | None:
    if max_value is not None and bit_depth is not None:
        raise UsageError("--max-value and --bit-depth exclude each other.")
    if bit_depth is not None:
        return float(2**bit_depth - 1)
    if max_value is not None:
        from uknowpan.models.pancollection.file import is_full_scale

        if not is_full_scale(max_value):
            raise UsageError(f"--max-value: {max_value:g} is no full scale (1e-9 to 1e12).")
    return max_value


ONLY_H5 = (
    "model",
    "method",
    "baselines",
    "limit",
    "steps",
    "seed",
    "softness",
    "pictures",
    "device",
)
ONLY_PAIR = ("pan_bidx", "bidx", "registration")
ONLY_RASTER = ("reference", "pan", "ms", "ratio", "nodata", *ONLY_PAIR)


def _check_usage(asked: Asked, typed: set[str]) -> None:
    """Options that do not go together exit with 2."""
    alien = [name for name in (ONLY_RASTER if asked.is_h5 else ONLY_H5) if name in typed]
    if alien:
        goes_with = "a result raster" if asked.is_h5 else "a test file (.h5)"
        raise UsageError(f"{_option(alien[0])} goes with {goes_with}, not {asked.target}.")
    if asked.is_h5:
        return
    pair = asked.pan is not None or bool(asked.ms)
    if pair == (asked.reference is not None) or (asked.pan is None) != (not asked.ms):
        raise UsageError(f"{asked.target} is a raster: give either its truth with --reference, or both --pan and --ms.")
    alien = [name for name in (("cut",) if pair else ONLY_PAIR) if name in typed]
    if alien:
        goes_with = "--reference" if pair else "--pan and --ms"
        raise UsageError(f"{_option(alien[0])} goes with {goes_with}.")


def _option(parameter: str) -> str:
    return f"--{parameter.replace('_', '-')}"


def _bands(text: str | None) -> list[int] | None:
    bands = opt.numbers(text, "--bidx")
    if bands is not None and any(b < 1 or b != int(b) for b in bands):
        raise UsageError(f"--bidx takes band numbers from 1 on, not {text!r}.")
    return None if bands is None else [int(b) for b in bands]


def _inputs(asked: Asked) -> list[str]:
    from uknowpan.tiling import parse_band_spec

    bands = [parse_band_spec(spec)[0] for spec in (asked.pan, *asked.ms) if spec is not None]
    named = [asked.target, *asked.models, *bands]
    return named if asked.reference is None else [*named, asked.reference]


# -------------------------------------------------------------------------------------- rasters


def _measure_raster(asked: Asked) -> Measured:
    from uknowpan.evaluation.rasters import evaluate_against, evaluate_without

    name = Path(asked.target).name
    about: dict[str, Any] = {"file": asked.target, "nodata": asked.nodata}
    with progress("evaluate", asked.quiet) as on_progress:
        if asked.reference is not None:
            ratio = asked.ratio or DEFAULT_RATIO
            known = None if asked.sensor is None else asked.sensor.max_value
            max_value = asked.max_value or known
            results = evaluate_against(
                asked.target,
                asked.reference,
                ratio=ratio,
                max_value=max_value,
                cut=asked.cut,
                nodata=asked.nodata,
                on_progress=on_progress,
            )
            said = f"against {Path(asked.reference).name}: border {asked.cut} cut, ratio {ratio}"
            about |= {
                "reference": asked.reference,
                "ratio": ratio,
                "cut": asked.cut,
                "max_value": max_value,
            }
            return Measured(results, f"{name} {said}", None, about)
        assert asked.pan is not None
        sensor = asked.sensor or named_sensor("generic")
        results = evaluate_without(
            asked.target,
            asked.pan,
            asked.ms,
            sensor=sensor,
            registration=asked.registration.value,
            pan_band=asked.pan_bidx,
            ms_bands=asked.bidx,
            nodata=asked.nodata,
            ratio=asked.ratio,
            on_progress=on_progress,
        )
    notes = []
    if asked.sensor is None:
        notes.append(
            f"No --sensor is given: D_lambda_K and HQNR assume an MTF of {sensor.mtf_ms[0]:.2f} at "
            "the MS's Nyquist frequency for every band."
        )
    lies = f"without truth: {sensor.name} MTF, MS enlarged by {asked.registration.value}"
    about |= {
        "pan": asked.pan,
        "ms": list(asked.ms),
        "sensor": sensor.name,
        "registration": asked.registration.value,
    }
    return Measured(results, f"{name} {lies}", None, about, notes)


# --------------------------------------------------------------------------------------- report


def _report(measured: Measured, as_json: bool, csv: Path | None, latex: Path | None) -> None:
    from uknowpan.evaluation.report import as_dict, csv_text, latex_text, plain_words, print_table, write_text

    results = measured.results
    if csv is not None:
        write_text(csv, csv_text(results))
    if latex is not None:
        write_text(latex, latex_text(results, measured.bands))
    words = plain_words(results)
    if as_json:
        said = {**measured.about, **as_dict(results), "notes": measured.notes}
        typer.echo(to_json(said | ({"in_words": words} if words else {})))
        return
    print_table(results, measured.title, measured.bands)
    for line in (*measured.notes, *([words] if words else [])):
        typer.echo(line)
