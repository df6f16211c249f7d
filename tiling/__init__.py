"""Rasters to arrays and back: scene pairs, tiles, blending, GeoTIFF output. No torch in here."""

from uknowpan.tiling.errors import (
    IncompatiblePair,
    InputUnreadable,
    OutputBusy,
    OutputError,
    OutputExists,
    ResumeMismatch,
    TilingError,
)
from uknowpan.tiling.fill import FILL_REACH, TileArrays, output_valid
from uknowpan.tiling.metadata import MsMeta, PanMeta, uncertainty_meta
from uknowpan.tiling.output import Encoding, OutputOptions, SceneWriter, check_output, encode, output_encoding
from uknowpan.tiling.pair import ScenePair, open_pair, sample_windows
from uknowpan.tiling.raster import parse_band_spec
from uknowpan.tiling.strips import StripStore, placed_by_interrupted, sweep_strips
from uknowpan.tiling.tiles import StripBlender, Tile, cut_strips, feather, plan_tiles, strip_window, strips_needed
from uknowpan.tiling.window import Frame, Grid, Window

# fmt: off
__all__ = [
    "FILL_REACH", "Encoding", "Frame", "Grid", "IncompatiblePair", "InputUnreadable", "MsMeta", "OutputBusy",
    "OutputError", "OutputExists", "OutputOptions", "PanMeta", "ResumeMismatch", "ScenePair", "SceneWriter",
    "StripBlender", "StripStore", "Tile", "TileArrays", "TilingError", "Window", "check_output", "cut_strips",
    "encode", "feather", "open_pair", "output_encoding", "output_valid", "parse_band_spec", "placed_by_interrupted",
    "plan_tiles", "sample_windows", "strip_window", "strips_needed", "sweep_strips", "uncertainty_meta",
]
