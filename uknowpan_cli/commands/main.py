"""The Typer application. Heavy libraries are imported inside the commands: --help is instant."""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from uknowpan import __version__
from uknowpan.commands.shared import guarded
from uknowpan.console import open_streams, own_process
from uknowpan.errors import UsageError
from uknowpan.options import RUN

COMMANDS = [
    *("sharpen", "batch", "info", "compare", "demo", "train"),
    *("pack", "simulate", "distill-cache", "evaluate", "reproduce"),
]
"""Names as the help lists them; each is a function in a module of that name."""

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


def _version(value: bool) -> None:
    if value:
        typer.echo(f"uknowpan {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def application(wanted: str = "") -> typer.Typer:
    """All commands, or the one that is wanted alone: the options of the others take a tenth of a second."""
    app = typer.Typer(
        name="uknowpan",
        help="Pansharpening of real satellite scenes with a distilled diffusion student.",
        epilog="Defaults of options come from UKNOWPAN_COMMAND_OPTION (UKNOWPAN_SHARPEN_TILE=256), or else from "
        "uknowpan.toml in the working folder: a table for each command, as sharpen with tile = 256.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "UKNOWPAN"},
    )
    app.callback()(_options)
    alone = wanted in COMMANDS
    for name in [wanted] if alone else COMMANDS:
        module = name.replace("-", "_")
        app.command(cls=Command)(getattr(import_module(f"uknowpan.commands.{module}"), module))
    if not alone:
        from uknowpan.commands.models import models_app

        app.add_typer(models_app, name="models")
    return app


def __getattr__(name: str) -> typer.Typer:
    """`app`: all commands."""
    if name != "app":
        raise AttributeError(name)
    return application()


def _defaults(file: Path = Path("uknowpan.toml")) -> dict[str, dict[str, Any]]:
    """Defaults of options by command, from the file in the working folder, if there is one.

    Raises:
        UsageError: the file is no TOML, or has an option that its command lacks.
    """
    if not file.is_file():
        return {}
    import tomllib

    try:
        tables = tomllib.loads(file.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no TOML: {error}.") from error
    known: Any = typer.main.get_command(application())
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
        application(*sys.argv[1:2])(default_map=defaults)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
