"""`uknowpan simulate`: training files from the user's own scenes."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.datasets.options import SCENES, SimulationOptions
from uknowpan.errors import InputError, UsageError

OUTPUT_HELP = (
    "train.h5 writes train.h5, valid.h5 and test.h5; wv3.h5 writes wv3_train.h5 and so on. With --sample: a folder."
)


@opt.shares()
def simulate(
    options: SimulationOptions,
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
    if not sample and output.is_dir():
        raise InputError(f"-o: {output} is a folder; name a file in it.")

    from uknowpan.datasets.simulate import SceneFiles, simulate_files, simulate_sample, split_paths
    from uknowpan.files import HDF5, check_outputs, check_suffix
    from uknowpan.tiling import parse_band_spec

    if sample:
        output.mkdir(parents=True, exist_ok=True)
    else:
        check_suffix("-o", output, "HDF5", *HDF5)
    inputs = [parse_band_spec(spec)[0] for files in (*pairs, *alone) for spec in files]
    paths = split_paths(output / "train.h5") if sample else split_paths(output, options.split)
    check_outputs({name: str(path) for name, path in paths.items()}, inputs, overwrite)
    if sample:
        done = simulate_sample(output)
    else:
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
