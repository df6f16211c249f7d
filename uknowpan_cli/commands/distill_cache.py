"""`uknowpan distill-cache`: the teacher's answers, kept in a file."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from uknowpan import errors as exits
from uknowpan.commands import shared as opt
from uknowpan.console import stop_requests
from uknowpan.errors import OutputExists, UsageError
from uknowpan.models.architectures import TIMESTEPS


class FeatureDtype(StrEnum):
    float16 = "float16"
    float32 = "float32"


def distill_cache(
    teacher: Annotated[str, typer.Option("--teacher", help="Checkpoint of a trained teacher (fsa-t).")],
    data: Annotated[Path, typer.Option("--data", help="Training file in PanCollection's layout.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", "--out", metavar="FILE", help="The cache to write, an h5 file.")
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, max=TIMESTEPS, help="Network evaluations per answer.")] = 1,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the noise that answers start from."),
    ] = 0,
    max_value: Annotated[
        float | None,
        typer.Option(
            "--max-value",
            help="Full scale in DN, if the file does not declare it; default: the teacher's.",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Samples at once, which memory depends on.")
    ] = 16,
    dtype: Annotated[
        FeatureDtype, typer.Option("--dtype", help="Type of the features; images are float32.")
    ] = FeatureDtype.float16,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a cache that was interrupted.")] = False,
    overwrite: opt.OverwriteOption = False,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Write a teacher's answers to every training sample, so that training a student need not ask again."""
    with opt.guarded(-1 if quiet else verbose):
        from uknowpan.loading import choose_device
        from uknowpan.models.checkpoints import find_checkpoint
        from uknowpan.models.devices import tune_cpu
        from uknowpan.models.pancollection.dataset import PanCollectionDataset
        from uknowpan.models.pancollection.file import PanCollectionFile, is_full_scale
        from uknowpan.models.published.uknow.cache import bytes_per_sample, part_of, write_cache
        from uknowpan.models.published.uknow.distillation import FrozenTeacher
        from uknowpan.tiling import check_output

        if max_value is not None and not is_full_scale(max_value):
            raise UsageError(f"--max-value: {max_value:g} is no full scale (1e-9 to 1e12).")
        check_output(str(output), [str(data), teacher], overwrite)
        part = part_of(output)
        if part.exists() and not resume and not overwrite:
            raise OutputExists(f"An interrupted run left {part}; --resume goes on with it, --overwrite begins anew.")
        chosen = choose_device(device)
        tune_cpu(num_threads)
        asked = FrozenTeacher(find_checkpoint(teacher), steps=steps, seed=seed, device=chosen)
        with PanCollectionFile(data) as file:
            asked.check_serves(file.header)
            full = max_value or asked.card.max_value
            scale = PanCollectionDataset([file], max_value=full).scales[0]
            count, each = len(file), bytes_per_sample(asked, file.header, dtype.value)
            if not quiet:
                free = shutil.disk_usage(output.resolve().parent).free
                typer.echo(
                    f"{count} samples of {each / 1e3:.1f} kB make {count * each / 1e9:.3g} GB; "
                    f"{free / 1e9:.3g} GB are free",
                    err=True,
                )
            try:
                with stop_requests() as stopping:
                    done = write_cache(
                        asked,
                        file,
                        scale,
                        output,
                        batch_size=batch_size,
                        dtype=dtype.value,
                        resume=resume,
                        on_progress=_progress(quiet),
                        should_stop=lambda: bool(stopping),
                    )
            except (RuntimeError, MemoryError) as error:
                if not exits.is_out_of_memory(error):
                    raise
                raise exits.OutOfMemory(
                    f"Memory ran out with {batch_size} samples at once; --resume goes on with a smaller --batch-size."
                ) from error
        if done < count:
            raise exits.Interrupted(f"stopped after {done} of {count} samples; --resume goes on from there")
        if as_json:
            result = {
                "path": str(output),
                "samples": count,
                "bytes": output.stat().st_size,
                "teacher": asked.card.name,
                "teacher_sha256": asked.sha256,
                "steps": steps,
                "seed": seed,
                "scale": scale,
            }
            typer.echo(json.dumps(result))
        else:
            typer.echo(str(output))


def _progress(quiet: bool, every: float = 5.0) -> Callable[[int, int], None]:
    """A function (done, total) that prints a line every few seconds."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last >= every:
            print(f"distill-cache: {done}/{total} samples", file=sys.stderr, flush=True)
            last = time.monotonic()

    return show
