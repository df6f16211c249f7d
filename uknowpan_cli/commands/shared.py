"""Common parts of commands: options, and errors that become a sentence and an exit code."""

import functools
import inspect
import logging
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from uknowpan import __version__, errors
from uknowpan.console import note, say, set_up_logging
from uknowpan.options import RUN, SharpenOptions, declared


def option(
    flags: str, group: str, help: str, metavar: str | None = None, min: Any = None, max: Any = None, env: Any = None
) -> Any:
    """A Typer option from the values of an `Option`."""
    return typer.Option(*flags.split(), rich_help_panel=group, help=help, metavar=metavar, min=min, max=max, envvar=env)


def typed(name: str, kind: type = SharpenOptions) -> Any:
    """The Typer option of a field of a class of options."""
    return option(**{key: value for key, value in vars(declared(kind)[name][1]).items() if key != "cli"})


ModelOption = Annotated[str | None, typed("model")]
DeviceOption = Annotated[str, typed("device")]
ThreadsOption = Annotated[int | None, typed("num_threads")]
RatioOption = Annotated[int | None, typed("ratio")]
BidxOption = Annotated[str | None, typed("bidx")]
NodataOption = Annotated[float | None, typed("nodata")]
OverwriteOption = Annotated[bool, typed("overwrite")]
JsonOption = Annotated[bool, option("--json", RUN, "Print the result as JSON.")]
_JSON_LINES = "Write messages and progress as JSON lines; -: to stderr, instead of text."
LogJsonOption = Annotated[Path | None, option("--log-json", RUN, _JSON_LINES, "FILE|-")]
QuietOption = Annotated[bool, option("--quiet -q", RUN, "No progress, errors only.")]
_STEPS = "-v: steps of the run; -vv: tracebacks."
VerboseOption = Annotated[
    int, typer.Option("--verbose", "-v", count=True, metavar="", help=_STEPS, rich_help_panel=RUN)
]


def shares(
    only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn the parameter `options` of a command, a class of options, into Typer parameters, one per field.

    The command runs under `guarded`.

    Args:
        only: names of the fields; None: all.
        without: fields that are left out, also those that the command declares itself.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kind = signature.parameters["options"].annotation
        names = [name for name in declared(kind) if (only is None or name in only) and name not in without]
        parameters = []
        for parameter in signature.parameters.values():
            if parameter.name != "options":
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            for name in names:
                hint, described = declared(kind)[name]
                value: Any = described.cli or hint
                default = getattr(kind, name, inspect.Parameter.empty)
                parts: Any = {"default": default, "annotation": Annotated[value, typed(name, kind)]}
                parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, **parts))

        @functools.wraps(command)
        def run(**values: Any) -> None:
            given = {name: values.pop(name) for name in names}
            verbosity = -1 if values.get("quiet") else values["verbose"]
            with guarded(verbosity, values.pop("log_json", None)):
                if (ctx := values.get("ctx")) is not None:  # commands without --log-json need none
                    note("begins", version=__version__, command=ctx.command.name, options=ctx.params)
                if given.get("method") and not is_typed(values["ctx"], "model"):
                    given["model"] = None  # the environment's model is no choice
                command(options=kind(**given), **values)

        del run.__wrapped__
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def is_typed(ctx: typer.Context, parameter: str) -> bool:
    """Whether a parameter is from the command line, not from the environment or its default."""
    source = ctx.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


def _log_unraisable(event: Any) -> None:
    """Errors in callbacks of libraries, such as a message of GDAL that is not UTF-8, are no news for the user."""
    logging.getLogger("uknowpan").debug("in %r: %r", event.object, event.exc_value)


@contextmanager
def guarded(verbosity: int = 0, log_json: Path | None = None) -> Iterator[None]:
    """Turn exceptions into one sentence and the exit code; SIGTERM counts as Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        before = None
    unraisable, sys.unraisablehook = sys.unraisablehook, _log_unraisable
    try:
        set_up_logging(verbosity, log_json)
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        if verbosity >= 2 and not isinstance(error, errors.UsageError):
            traceback.print_exc(file=sys.stderr)
        message, code = errors.sentence(error), errors.exit_code(error)
        say(f"uknowpan: error: {message}", logging.ERROR, exit_code=code)
        raise typer.Exit(code) from error
    finally:
        sys.unraisablehook = unraisable
        if before is not None:
            signal.signal(signal.SIGTERM, before)
