"""The root of all errors that a user can act on, and the exit codes that they stand for.

This module imports the standard library alone, so that `tiling` and `models` can derive their errors from it.
"""

import errno
import re

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


_FULL = re.compile(
    "allocate memory|out of memory|not enough memory|memory allocation failed|unable to allocate|failed to allocate|"
    "can't allocate|cannot (re)?allocate|could not create a (primitive|memory)|bad_?alloc|malloc|mmap.*failed|"
    "(cublas|cudnn|cusolver|cufft)_status_alloc_failed|can't start new thread|failed to map segment from shared object"
)
"""Words of NumPy, PyTorch, GDAL, HDF5, CUDA's libraries and the loader for memory that is full."""
_REPORTING = {
    "CPLE_BaseError", "RasterioError", "RuntimeError", "ImportError", "SystemError", "OSError", "RuntimeException",
}  # fmt: skip
"""Classes whose text is looked at, by name, so that nothing is imported for them; the last is ONNX Runtime's."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or what it was raised from, reports that the host's or the device's memory is full."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"MemoryError", "OutOfMemory", "OutOfMemoryError", "CPLE_OutOfMemoryError"}:
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if kinds & _REPORTING and _FULL.search(str(error).lower()):
        return True
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return cause is not None and cause is not error and is_out_of_memory(cause)


def exit_code(error: BaseException) -> int:
    """The exit code for an exception; 1 for an unforeseen one."""
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return INTERRUPTED
    if is_out_of_memory(error):
        return MEMORY
    if isinstance(error, Error):
        return error.exit_code
    if _needs_torch(error):
        return USAGE
    if isinstance(error, RecursionError) or _is_name(error):
        return INPUT
    # rasterio lets some of GDAL's own errors through; both roots are recognised by name so that
    # no command imports rasterio for them.
    roots = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, OSError) or roots & {"CPLE_BaseError", "RasterioError"}:
        return INPUT
    return INTERNAL


def _needs_torch(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == "torch"


def _is_name(error: BaseException) -> bool:
    """Whether an exception is about a name of a file, which the system keeps as any bytes."""
    return isinstance(error, UnicodeEncodeError) and "surrogates" in error.reason


def sentence(error: BaseException) -> str:
    """The one sentence for the user."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if is_out_of_memory(error) and not isinstance(error, OutOfMemory):
        return "Memory ran out; free some, or work on less at once (sharpen: --bounds or a smaller --tile)."
    if _needs_torch(error):
        return "This needs PyTorch, which is not installed; `pip install torch` brings it."
    if isinstance(error, RecursionError):
        return "A file is nested too deeply to be read; it is none of uknowpan's."
    if _is_name(error):
        return f"The name {error.object!a} is not UTF-8; rename the file or folder."  # type: ignore[attr-defined]
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}."
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} ..."
    if exit_code(error) == INTERNAL:
        return f"internal error, please report it ({type(error).__name__}: {text}); -vv shows more"
    return text
