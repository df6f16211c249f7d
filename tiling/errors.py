"""Errors of maps. The text of each is one sentence for the user, with the way out."""

from uknowpan.errors import InputError
from uknowpan.errors import OutputExists as OutputExists


class TilingError(InputError):
    """Base of the errors of this package, but OutputExists."""


class InputUnreadable(TilingError):
    """A raster cannot be opened or read: missing, corrupt, truncated, not a raster."""


class IncompatiblePair(TilingError):
    """The rasters open, but do not fit: CRS, overlap, ratio, bands, dtype, geotransform."""


class OutputError(TilingError):
    """The output cannot be written: folder missing or read-only, disk full, equals an input."""


class InvalidResult(OutputError):
    """A valid pixel of the result is NaN or infinite."""


class OutputBusy(OutputError):
    """Another run is writing the output."""


class ResumeMismatch(TilingError):
    """Finished strips on disk were made from other inputs or parameters."""
