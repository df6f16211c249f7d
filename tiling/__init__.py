"""Rasters to arrays and back: scene pairs, tiles, blending, GeoTIFF output. No torch in here."""

from uknowpan.tiling.blend import StripBlender, feather
from uknowpan.tiling.errors import (
    IncompatiblePair,
    InputUnreadable,
    OutputError,
    OutputExists,
    ResumeMismatch,
    TilingError,
)
from uknowpan.tiling.fill import FILL_REACH, TileArrays, output_valid
from uknowpan.tiling.output import (
    Encoding,
    OutputOptions,
    SceneWriter,
    check_output,
    encode,
    output_encoding,
    sweep_temporary,
    uncertainty_meta,
)
from uknowpan.tiling.pair import Grid, MsMeta, PanMeta, ScenePair, open_pair, parse_band_spec, sample_windows
from uknowpan.tiling.strips import StripStore
from uknowpan.tiling.tiles import Tile, plan_tiles, strip_rows, tile_rows_needed

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
