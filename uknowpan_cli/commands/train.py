"""`uknowpan train`: train a stage of U-Know-DiffPAN, or another network."""

import json
from dataclasses import replace
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.options import RUN
from uknowpan.training.options import TrainOptions


@opt.shares()
def train(
    options: TrainOptions,
    dry_run: Annotated[bool, opt.option("--dry-run", RUN, "Print configuration and parameters, and stop.")] = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Train one of the three stages: PriorNet, the teacher FSA-T, the student FSA-S.

    Or, with --model, another network on the same data: PAN-Crafter or SSDiff.

    Run with `torchrun --nproc-per-node N -m uknowpan train ...` to use several GPUs.
    """
    from uknowpan.training.settings import read_config

    tables = read_config(options.config)  # PyTorch takes a second to import; a typing error should not wait for it
    from uknowpan.loading import choose_device
    from uknowpan.training.jobs import resolve
    from uknowpan.training.run import described, own_device, run

    options = replace(options, device=own_device(choose_device(options.device)))
    settings = resolve(options, tables)
    description = described(options.kind, settings)
    if dry_run:
        typer.echo(json.dumps(description, indent=2))
        return
    best = run(options, settings, quiet=quiet)
    if best is not None:
        typer.echo(best)
