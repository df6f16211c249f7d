"""Errors to exit codes (DESIGN section 8) and sentences."""

from __future__ import annotations

__all__ = ["Interrupted", "OutOfMemory", "exit_code", "is_out_of_memory", "sentence"]

OK, INTERNAL, USAGE, INPUT, EXISTS, MODEL, MEMORY, BATCH, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 130


class OutOfMemory(Exception):
    """Memory ran out even with the smallest batch and tile."""


LONGEST = 600
"""Characters of a message; torch's own can run to a megabyte."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM; the message says what can be gone on with."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the host's or the device's memory is full."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "allocate memory" in text or "out of memory" in text or "not enough memory" in text
    )


def exit_code(error: BaseException) -> int:
    """The exit code that an exception stands for; 1 for what nobody foresaw.

    torch's part of the package is looked up by name, so that no command imports it for this.
    """
    names = {c.__name__ for c in type(error).__mro__}
    if isinstance(error, KeyboardInterrupt) or "Interrupted" in names:
        return INTERRUPTED
    if "OutputExists" in names:
        return EXISTS
    if "OutputError" in names or "ResumeMismatch" in names or "TilingError" in names:
        return INPUT
    if "DataError" in names or "Diverged" in names:  # by the data or settings of a training run
        return INPUT
    if "ModelError" in names:
        return MODEL
    if "OutOfMemory" in names:
        return MEMORY
    # Files that the system or GDAL refuses: rasterio lets some of GDAL's errors through.
    if isinstance(error, OSError) or "CPLE_BaseError" in names or "RasterioError" in names:
        return INPUT
    return INTERNAL


def sentence(error: BaseException) -> str:
    """What the user reads."""
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
