"""`uknowpan distill-cache`: the teacher's answers, kept in a file."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import OutputExists
from uknowpan.models.architectures import TIMESTEPS
from uknowpan.options import INPUT, MODEL, RESULT, RUN, TILING, check_full_scale


def distill_cache(
    teacher: Annotated[str, opt.option("--teacher", MODEL, "Checkpoint of a trained teacher (fsa-t).", "FILE")],
    data: Annotated[Path, opt.option("--data", INPUT, "Training file in PanCollection's layout.", "FILE")],
    output: Annotated[Path, opt.option("--output -o --out", RESULT, "The cache to write, an h5 file.", "FILE")],
    steps: Annotated[
        int | None,
        opt.option("--steps", MODEL, "Network evaluations per answer; default: as it declares.", "N", 1, TIMESTEPS),
    ] = None,
    seed: Annotated[
        int, opt.option("--seed", MODEL, "Seed of the noise that answers start from.", "N", 0, 2**63 - 1)
    ] = 0,
    max_value: Annotated[
        float | None,
        opt.option("--max-value", INPUT, "Full scale in DN, if the file has none; default: the teacher's.", "VALUE"),
    ] = None,
    batch_size: Annotated[
        int, opt.option("--batch-size", TILING, "Samples at once, which memory depends on.", "N", 1)
    ] = 16,
    dtype: Annotated[
        Literal["float16", "float32"], opt.option("--dtype", RESULT, "Type of the features; images are float32.")
    ] = "float16",
    resume: Annotated[bool, opt.option("--resume", RUN, "Go on with a cache that was interrupted.")] = False,
    overwrite: opt.OverwriteOption = False,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Write a teacher's answers to every training sample, so that training a student need not ask again."""
    with opt.guarded(-1 if quiet else verbose):
        check_full_scale(max_value)
        from uknowpan.files import HDF5, check_outputs, check_suffix
        from uknowpan.loading import choose_device
        from uknowpan.models.checkpoints import find_checkpoint
        from uknowpan.models.devices import tune_cpu
        from uknowpan.models.published.uknow.cache import part_of
        from uknowpan.models.published.uknow.distillation import FrozenTeacher
        from uknowpan.training.caching import CacheRun, cache_answers

        check_outputs({"--output": str(output)}, [str(data), teacher], overwrite)
        check_suffix("--output", output, "HDF5", *HDF5)
        part = part_of(output)
        if part.exists() and not resume and not overwrite:
            raise OutputExists(f"An interrupted run left {part}; --resume goes on with it, --overwrite begins anew.")
        chosen = choose_device(device)
        tune_cpu(num_threads)
        frozen = FrozenTeacher(find_checkpoint(teacher), steps=steps, seed=seed, device=chosen)
        run = CacheRun(output, max_value, batch_size, dtype, resume, quiet)
        result = cache_answers(frozen, data, run)
        typer.echo(json.dumps(result) if as_json else str(output))
