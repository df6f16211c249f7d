"""Rasters to arrays and back: scene pairs, tiles, blending, GeoTIFF output. No torch in here."""

from .blend import StripBlender, feather
from .errors import (
    IncompatiblePair,
    InputUnreadable,
    OutputError,
    OutputExists,
    ResumeMismatch,
    TilingError,
)
from .plan import Tile, plan_tiles, strip_rows, tile_rows_needed
from .read import FILL_REACH, TileArrays, output_valid
from .scene import Grid, MsMeta, PanMeta, ScenePair, open_pair, parse_band_spec, sample_windows
from .strips import StripStore
from .write import (
    Encoding,
    OutputOptions,
    SceneWriter,
    check_output,
    encode,
    output_encoding,
    sweep_temporary,
    uncertainty_meta,
)

__all__ = [
    "FILL_REACH",
    "Encoding",
    "Grid",
    "IncompatiblePair",
    "InputUnreadable",
    "MsMeta",
    "OutputError",
    "OutputExists",
    "OutputOptions",
    "PanMeta",
    "ResumeMismatch",
    "ScenePair",
    "SceneWriter",
    "StripBlender",
    "StripStore",
    "Tile",
    "TileArrays",
    "TilingError",
    "check_output",
    "encode",
    "feather",
    "open_pair",
    "output_encoding",
    "output_valid",
    "parse_band_spec",
    "plan_tiles",
    "sample_windows",
    "strip_rows",
    "sweep_temporary",
    "tile_rows_needed",
    "uncertainty_meta",
]
