"""The Typer application. Heavy libraries are imported inside the commands: --help is instant."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from uknowpan import __version__
from uknowpan.commands.batch import batch
from uknowpan.commands.demo import demo
from uknowpan.commands.distill_cache import distill_cache
from uknowpan.commands.evaluate import evaluate
from uknowpan.commands.info import info
from uknowpan.commands.models import models_app
from uknowpan.commands.pack import pack
from uknowpan.commands.sharpen import sharpen
from uknowpan.commands.simulate import simulate
from uknowpan.commands.train import train

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
