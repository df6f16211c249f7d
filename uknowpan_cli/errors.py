"""The root of all errors that a user can act on, and the exit codes that they stand for.

This module imports nothing, so that `tiling` and `models` can derive their errors from it.
"""

from __future__ import annotations

OK, INTERNAL, USAGE, INPUT, EXISTS, MODEL, MEMORY, BATCH, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130

LONGEST = 600
"""Characters of a message; torch's own can run to a megabyte."""


class Error(Exception):
    """Base of every error of uknowpan. Its text is one sentence that names the way out."""

    exit_code = INTERNAL


class UsageError(Error):
    """An option or argument has a value that cannot be used."""

    exit_code = USAGE


class InputError(Error):
    """An input cannot be read or does not fit, or an output cannot be written."""

    exit_code = INPUT


class OutputExists(Error):
    """The output exists and overwriting was not requested."""

    exit_code = EXISTS


class ModelError(Error):
    """A model is missing, damaged or does not serve the data."""

    exit_code = MODEL


class OutOfMemory(Error):
    """Memory ran out even with the smallest batch and tile."""

    exit_code = MEMORY


class BatchFailed(Error):
    """A batch has finished and some of its scenes have failed."""

    exit_code = BATCH


class Interrupted(Error):
    """Ctrl-C or SIGTERM ended a run; the text names how to resume it."""

    exit_code = INTERRUPTED


class UknowpanWarning(UserWarning):
    """A remark on a run that goes on; its text is one sentence."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception reports that the host's or the device's memory is full."""
    if isinstance(error, MemoryError | OutOfMemory) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text or "not enough memory" in text
    )


def exit_code(error: BaseException) -> int:
    """The exit code for an exception; 1 for an unforeseen one."""
    if isinstance(error, Error):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    # rasterio lets some of GDAL's own errors through; both roots are found by name so that
    # no command imports rasterio for them.
    roots = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) or roots & {"CPLE_BaseError", "RasterioError"}:
        return INPUT
    return INTERNAL


def sentence(error: BaseException) -> str:
    """The one sentence for the user."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}."
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    if exit_code(error) == INTERNAL:
        return f"internal error, please report it ({type(error).__name__}: {text}); -vv shows more"
    return text
