"""The Typer application. Heavy libraries are imported inside the commands: --help is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from . import __version__
from .batch import batch
from .demo import demo
from .distill_command import distill_cache
from .evaluate import evaluate
from .info import info
from .models_command import models_app
from .pack_command import pack
from .sharpen import sharpen
from .simulate_command import simulate
from .train import train

__all__ = ["app", "main"]

app = typer.Typer(
    name="uknowpan",
    help="Pansharpening of real satellite scenes with a distilled diffusion student.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(sharpen)
app.command()(batch)
app.command()(info)
app.command()(demo)
app.command()(train)
app.command()(pack)
app.command()(simulate)
app.command()(distill_cache)
app.command()(evaluate)
app.add_typer(models_app, name="models")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"uknowpan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the `uknowpan` command."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
