"""`uknowpan reproduce`: a paper on PanCollection, from its first stage to its table."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import UsageError
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.options import INPUT, RESULT, RUN
from uknowpan.training.options import TRAINING


def reproduce(
    system: Annotated[
        Literal["u-know", "pan-crafter", "ssdiff"], typer.Argument(metavar="SYSTEM", help="u-know, pan-crafter, ssdiff")
    ],
    data: Annotated[
        Path, opt.option("--data", INPUT, "Folder with training_data and test_data of PanCollection.", "DIR")
    ],
    output: Annotated[
        Path, opt.option("--output -o --out", RESULT, "Folder for the runs, the cache and scores.json.", "FOLDER")
    ],
    sensor: Annotated[str, opt.option("--sensor", INPUT, "Sensor in the names of the files.", "NAME")] = "wv3",
    preset: Annotated[
        Literal["release", "paper", "lite"], opt.option("--preset", TRAINING, "Settings to begin with.")
    ] = "release",
    config: Annotated[
        Path | None, opt.option("--config", TRAINING, "TOML with tables like [prior.train] of each stage.", "FILE")
    ] = None,
    dry_run: Annotated[
        bool, opt.option("--dry-run", RUN, "Print steps, missing files, expected hours and memory, and stop.")
    ] = False,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Train a paper's stages on PanCollection, write its cache, and score it beside the published numbers.

    Run again, it goes on where it was. Files: training_data/{train,valid}_SENSOR.h5, test_data/test_SENSOR_multiExm1.h5
    and test_SENSOR_OrigScale_multiExm1.h5; one of the two test files will do.

    Example: uknowpan reproduce u-know --data PanCollection --sensor wv3 -o runs/u-know
    """
    with opt.guarded(-1 if quiet else verbose):
        try:
            known = find_sensor(sensor)
            bands = len(known.bands)
        except ValueError as error:
            raise UsageError(f"--sensor: {error}.") from error
        if not bands:
            raise UsageError(f"--sensor {sensor} has no bands of its own; name the sensor of the files, such as wv3.")
        from uknowpan.loading import choose_device
        from uknowpan.training import reproduction

        job = reproduction.Reproduction(
            *(system, data, known, output, preset),
            tables=reproduction.read_stages(config, system),
            device=choose_device(device),
            num_threads=num_threads,
        )
        if dry_run:
            typer.echo(json.dumps(reproduction.planned(job), indent=2))
            return
        done = reproduction.reproduce(job, quiet=quiet)
        typer.echo(json.dumps(done) if as_json else reproduction.as_table(done["scores"]))
