"""Errors of this package. `str(error)` is one sentence for the user, with the way out."""


class TilingError(Exception):
    """Base of all errors that are the input's or the user's, not ours."""


class InputUnreadable(TilingError):
    """A raster cannot be opened or read: missing, corrupt, truncated, not a raster."""


class IncompatiblePair(TilingError):
    """The rasters open, but do not fit: CRS, overlap, ratio, bands, dtype, geotransform."""


class OutputExists(TilingError):
    """The output is there already and overwriting was not asked for."""


class OutputError(TilingError):
    """The output cannot be written: folder missing or read-only, disk full, equals an input."""


class ResumeMismatch(TilingError):
    """Finished strips on disk were made from other inputs or parameters."""
