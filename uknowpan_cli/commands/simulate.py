"""`uknowpan simulate`: training files from the user's own scenes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import InputError, UsageError
from uknowpan.options import ShiftOfTruth, numbers

SCENES, OPTICS, PATCHES = "Scenes", "Sensor", "Patches"
OUTPUT_HELP = (
    "train.h5 writes train.h5, valid.h5 and test.h5; wv3.h5 writes wv3_train.h5 and so on. With --sample: a folder."
)
SENSOR_HELP = "QB, IKONOS, GeoEye1, WV2, WV3, WV4, GF2 or generic."
COREGISTER_HELP = "PAN/MS shift of pairs: ignore it, note it, or remove it."


def simulate(
    pan: Annotated[str | None, typer.Argument(metavar="PAN", help="Panchromatic raster of a first pair.")] = None,
    ms: Annotated[
        list[str] | None, typer.Argument(metavar="MS", help="Its MS; or several files, their bands in order.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "--out", "-o", metavar="FILE", help=OUTPUT_HELP)] = None,
    pair: Annotated[
        list[str] | None, opt.option("--pair", SCENES, "One more pair; may be repeated.", "PAN;MS[;MS...]")
    ] = None,
    ms_only: Annotated[
        list[str] | None, opt.option("--ms-only", SCENES, "Scene without PAN; may be repeated.", "MS[;MS...]")
    ] = None,
    pan_weights: Annotated[
        str | None, opt.option("--pan-weights", SCENES, "Share of each band in the PAN of such a scene.", "W,W,...")
    ] = None,
    sensor: Annotated[str, opt.option("--sensor", OPTICS, SENSOR_HELP, "NAME")] = "generic",
    mtf: Annotated[
        str | None,
        opt.option("--mtf", OPTICS, "MTF gains at the Nyquist frequency, one per band or one for all.", "GAIN,..."),
    ] = None,
    max_value: Annotated[
        float | None, opt.option("--max-value", OPTICS, "Full scale, if it differs from the sensor's.", "DN", 0)
    ] = None,
    patch: Annotated[int | None, opt.option("--patch", PATCHES, "PAN pixels of a patch; default 64.", "N", 8)] = None,
    stride: Annotated[
        int | None, opt.option("--stride", PATCHES, "Step between training patches; default 3/4 patch.", "N", 1)
    ] = None,
    test_patch: Annotated[
        int | None, opt.option("--test-patch", PATCHES, "Patch size of the test file; default up to 256.", "N", 8)
    ] = None,
    split: Annotated[
        str, opt.option("--split", PATCHES, "Shares of the area: training, validation, test.", "A,B,C")
    ] = "80,10,10",
    ratio: opt.RatioOption = None,
    bidx: opt.BidxOption = None,
    nodata: opt.NodataOption = None,
    coregister: Annotated[
        ShiftOfTruth, opt.option("--coregister", SCENES, COREGISTER_HELP, "off|check|shift")
    ] = "check",
    sample: Annotated[
        bool, typer.Option("--sample", help="A tiny drawn data set in the folder -o, to try training.")
    ] = False,
    overwrite: opt.OverwriteOption = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Make training files from scenes by Wald's protocol.

    The MS is the truth. A coarser pair is simulated from MS and PAN, and patches are divided into files by area.

    Example: uknowpan simulate pan.tif ms.tif -o train.h5
    """
    with opt.guarded(-1 if quiet else verbose):
        if output is None:
            raise UsageError("-o is missing: name the file to write, or the folder of --sample.")
        if (pan is None) != (not ms):
            raise UsageError("A pair is PAN and MS; an MS alone goes with --ms-only.")
        pairs = [[pan, *ms]] if pan is not None and ms else []
        pairs += [files.split(";") for files in pair or []]
        alone = [files.split(";") for files in ms_only or []]
        if any(len(files) < 2 or "" in files for files in pairs):
            raise UsageError("--pair takes PAN and MS with a semicolon between, in quotes.")
        if any("" in files for files in alone):
            raise UsageError("--ms-only takes files with semicolons between, in quotes.")
        if sample == bool(pairs or alone):
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
            shares = numbers(split, "--split", 3) or []
            gains, weights = numbers(mtf, "--mtf"), numbers(pan_weights, "--pan-weights")
            bands = numbers(bidx, "--bidx")
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
            inputs = [parse_band_spec(spec)[0] for files in (*pairs, *alone) for spec in files]
            for path in split_paths(output, options.split).values():
                check_output(str(path), inputs, overwrite)
            scenes = [SceneFiles(p, tuple(m)) for p, *m in pairs] + [SceneFiles(None, tuple(m)) for m in alone]
            done = simulate_files(scenes, output, options)
        if not quiet:
            for note in done.notes:
                typer.echo(note, err=True)
            counts = ", ".join(f"{f.patches} {n} ({f.size} px)" for n, f in done.files.items())
            typer.echo(
                f"{counts}; {done.bands} bands, ratio {done.ratio}, full scale {done.max_value:g}; "
                f"{done.left_out} patches touch nodata and were left out",
                err=True,
            )
        typer.echo(json.dumps(asdict(done)) if as_json else "\n".join(file.path for file in done.files.values()))
