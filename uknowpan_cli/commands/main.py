"""The Typer application. Heavy libraries are imported inside the commands: --help is instant."""

import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from uknowpan import __version__
from uknowpan.commands.batch import batch
from uknowpan.commands.compare import compare
from uknowpan.commands.demo import demo
from uknowpan.commands.distill_cache import distill_cache
from uknowpan.commands.evaluate import evaluate
from uknowpan.commands.info import info
from uknowpan.commands.models import models_app
from uknowpan.commands.pack import pack
from uknowpan.commands.reproduce import reproduce
from uknowpan.commands.shared import guarded
from uknowpan.commands.sharpen import sharpen
from uknowpan.commands.simulate import simulate
from uknowpan.commands.train import train
from uknowpan.console import open_streams, own_process
from uknowpan.errors import UsageError
from uknowpan.options import RUN

METAVARS = {"str": "TEXT", "path": "FILE", "int": "N", "float": "VALUE", "bool": ""}
"""Type of a parameter -> how the help shows its value, where the option names nothing better."""


class Command(TyperCommand):
    """A command whose help keeps square brackets, as in uknowpan[dask], and shows plain metavars."""

    def format_help(self, *arguments: Any) -> None:
        for parameter in self.get_params(arguments[0]):
            if "--help" in parameter.opts:
                parameter.rich_help_panel = RUN  # type: ignore[attr-defined]
            text = getattr(parameter, "help", None)
            if text:
                parameter.help = _escaped(text)  # type: ignore[attr-defined]
            if parameter.metavar is None and isinstance(parameter, TyperOption):
                shown = str(parameter.display_type(arguments[0])).strip("<>").removeprefix("list[").rstrip("]")
                parameter.metavar = METAVARS.get(shown.lower().removesuffix(" range"))
        self.help = _escaped(self.help or "")
        super().format_help(*arguments)


def _escaped(text: str) -> str:
    """The text with brackets that Rich would take for markup escaped."""
    return re.sub(r"(?<!\\)\[(?=[a-z])", r"\\[", text)


app = typer.Typer(
    name="uknowpan",
    help="Pansharpening of real satellite scenes with a distilled diffusion student.",
    epilog="Defaults of options come from UKNOWPAN_COMMAND_OPTION (UKNOWPAN_SHARPEN_TILE=256), or else from "
    "uknowpan.toml in the working folder: a table for each command, as sharpen with tile = 256.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "UKNOWPAN"},
)
for command in (sharpen, batch, info, compare, demo, train, pack, simulate, distill_cache, evaluate, reproduce):
    app.command(cls=Command)(command)
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


def _defaults(file: Path = Path("uknowpan.toml")) -> dict[str, dict[str, Any]]:
    """Defaults of options by command, from the file in the working folder, if there is one.

    Raises:
        UsageError: the file is no TOML, or has an option that its command lacks.
    """
    if not file.is_file():
        return {}
    try:
        tables = tomllib.loads(file.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no TOML: {error}.") from error
    known: Any = typer.main.get_command(app)
    for name, table in tables.items():
        options = {parameter.name for parameter in known.commands[name].params} if name in known.commands else set()
        if not isinstance(table, dict) or not set(table) <= options:
            raise UsageError(f"{file}: [{name}] has what `uknowpan {name} --help` does not list (with _ for -).")
    return tables


def main() -> None:
    """Entry point of the `uknowpan` command."""
    open_streams()
    own_process()
    try:
        with guarded():
            defaults = _defaults()
        app(default_map=defaults)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
