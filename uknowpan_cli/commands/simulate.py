"""`uknowpan simulate`: training files from the user's own scenes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uknowpan import options as opt
from uknowpan.errors import InputError, UsageError


def simulate(
    pan: Annotated[str | None, typer.Argument(metavar="PAN", help="Panchromatic raster of a first pair.")] = None,
    ms: Annotated[
        list[str] | None,
        typer.Argument(metavar="MS", help="Its MS; or several files, their bands in order."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="train.h5 writes train.h5, valid.h5 and test.h5; wv3.h5 writes wv3_train.h5 and "
            "so on. With --sample: a folder.",
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option("--pair", metavar="PAN;MS[;MS...]", help="One more pair; may be repeated."),
    ] = None,
    ms_only: Annotated[
        list[str] | None,
        typer.Option("--ms-only", metavar="MS[;MS...]", help="Scene without PAN; may be repeated."),
    ] = None,
    pan_weights: Annotated[
        str | None, typer.Option("--pan-weights", help="Of the bands in such a PAN: 0.1,0.3,0.6.")
    ] = None,
    sensor: Annotated[
        str, typer.Option("--sensor", help="QB, IKONOS, GeoEye1, WV2, WV3, WV4, GF2 or generic.")
    ] = "generic",
    mtf: Annotated[
        str | None,
        typer.Option("--mtf", help="MTF gains at the Nyquist frequency, one per band or one."),
    ] = None,
    max_value: Annotated[
        float | None,
        typer.Option("--max-value", min=0, help="Full scale in DN, if not as the sensor has it."),
    ] = None,
    patch: Annotated[int | None, typer.Option("--patch", min=8, help="PAN pixels of a patch; default 64.")] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", min=1, help="Between training patches; default 3/4 patch."),
    ] = None,
    test_patch: Annotated[
        int | None,
        typer.Option("--test-patch", min=8, help="Of the test file; default up to 256."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Shares of the area: training, validation, test.")] = "80,10,10",
    ratio: opt.RatioOption = None,
    bidx: opt.BidxOption = None,
    nodata: opt.NodataOption = None,
    coregister: Annotated[
        opt.Coregister,
        typer.Option("--coregister", help="PAN/MS shift of pairs: ignore it, tell of it, or remove it."),
    ] = opt.Coregister.check,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="A tiny drawn data set in the folder -o, to try training."),
    ] = False,
    overwrite: opt.OverwriteOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Make training files from scenes by Wald's protocol: the MS is the truth, a coarser pair is
    simulated from MS and PAN, and patches are divided into files by area."""
    with opt.guarded(-1 if quiet else verbose):
        if output is None:
            raise UsageError("-o is missing: name the file to write, or the folder of --sample.")
        if (pan is None) != (not ms):
            raise UsageError("A pair is PAN and MS; an MS alone goes with --ms-only.")
        named = [(pan, *ms)] if pan is not None and ms else []
        given = [*named, *(tuple(files.split(";")) for files in pair or [])]
        if any(len(files) < 2 or "" in files for files in given):
            raise UsageError("--pair takes PAN and MS with a semicolon between, in quotes.")
        if any("" in files.split(";") for files in ms_only or []):
            raise UsageError("--ms-only takes files with semicolons between, in quotes.")
        if sample == bool(given or ms_only):
            raise UsageError("Give either scenes (PAN MS, --pair, --ms-only) or --sample.")

        from uknowpan.datasets.simulate import (
            SceneFiles,
            SimulationOptions,
            simulate_files,
            simulate_sample,
            split_paths,
        )
        from uknowpan.models.metrics.sensors import find_sensor
        from uknowpan.tiling import check_output, parse_band_spec

        if sample:
            output.mkdir(parents=True, exist_ok=True)
            for path in split_paths(output / "train.h5").values():
                check_output(str(path), [], overwrite)
            done = simulate_sample(output)
        else:
            if output.is_dir():
                raise InputError(f"-o: {output} is a folder; name a file in it.")
            shares = opt.numbers(split, "--split", 3) or []
            gains, weights = opt.numbers(mtf, "--mtf"), opt.numbers(pan_weights, "--pan-weights")
            bands = opt.numbers(bidx, "--bidx")
            if bands and any(band != int(band) for band in bands):
                raise UsageError(f"--bidx takes band numbers, not {bidx!r}.")
            try:
                options = SimulationOptions(
                    find_sensor(sensor),
                    gains=tuple(gains) if gains else None,
                    max_value=max_value,
                    pan_weights=tuple(weights) if weights else None,
                    ratio=ratio,
                    bands=tuple(map(int, bands)) if bands else None,
                    nodata=nodata,
                    coregister=coregister,
                    patch=patch,
                    stride=stride,
                    test_patch=test_patch,
                    split=(shares[0], shares[1], shares[2]),
                )
            except ValueError as error:
                raise UsageError(f"{error}.") from error
            scenes = [SceneFiles(p, tuple(files)) for p, *files in given]
            scenes += [SceneFiles(None, tuple(m.split(";"))) for m in ms_only or []]
            inputs = [
                parse_band_spec(spec)[0]
                for scene in scenes
                for spec in (*([scene.pan] if scene.pan else []), *scene.ms)
            ]
            for path in split_paths(output, options.split).values():
                check_output(str(path), inputs, overwrite)
            done = simulate_files(scenes, output, options)
        if not quiet:
            for note in done.notes:
                typer.echo(note, err=True)
            counts = ", ".join(f"{f.patches} {n} ({f.size} px)" for n, f in done.files.items())
            typer.echo(
                f"{counts}; {done.bands} bands, ratio {done.ratio}, full scale "
                f"{done.max_value:g}; {done.left_out} patches touch nodata and were left out",
                err=True,
            )
        if as_json:
            typer.echo(json.dumps(asdict(done)))
        else:
            for file in done.files.values():
                typer.echo(file.path)
