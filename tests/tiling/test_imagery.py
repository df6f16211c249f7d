"""Real scenes as users have them, from the shared imagery folder; skipped where it is absent."""

from pathlib import Path

import numpy as np
import pytest
import rasterio

from uknowpan.tiling import open_pair, sample_windows

SCENES = Path(__file__).parents[2] / ".." / "shared" / "imagery" / "scenes"
pytestmark = pytest.mark.skipif(not SCENES.is_dir(), reason="the shared imagery folder is not beside this repository")


@pytest.mark.parametrize(
    ("folder", "pan", "ms", "ratio", "dtype", "correlation"),
    # correlation: of the best MS band with the PAN's block means, a little below what was found.
    [
        ("vhr_henan_4band", "pan", ["ms"], 4, "uint16", 0.95),
        ("landsat8_separate_bands", "l8_B8", ["l8_B2", "l8_B3", "l8_B4", "l8_B5"], 2,
         "uint16", 0.97),
        ("landsat8_float_nodata", "pan_example", ["ms_example"], 2, "float32", 0.91),
        ("landsat8_offset_extents_3band", "pan", ["ms"], 2, "float32", 0.94),
        ("quickbird_toulouse_ms_on_pan_grid", "QB_Toulouse_Ortho_PAN", ["QB_Toulouse_Ortho_XS"], 4,
         "int16", 0.90),
        ("rotterdam_ratio2_float64", "pan1", ["ms1"], 4, "float64", 0.75),
    ],
)  # fmt: skip
def test_scene(folder, pan, ms, ratio, dtype, correlation):
    if not (SCENES / folder).is_dir():
        pytest.skip(f"scene {folder} is not in the shared imagery folder")
    files = [str(SCENES / folder / f"{name}.tif") for name in [pan, *ms]]
    with open_pair(files[0], files[1:]) as pair, rasterio.open(files[0]) as source:
        assert pair.ratio == ratio and pair.meta.dtype == dtype
        assert (pair.grid.height, pair.grid.width) == source.shape
        assert pair.grid.transform == source.transform and pair.grid.crs == source.crs
        tile = pair.read_frame(0, 0, *pair.frame_shape)
        row, values = pair.to_output(0, tile.pan)
        good = source.dataset_mask() > 0
        np.testing.assert_array_equal(values[0][good], source.read(1)[good].astype(np.float32))
        assert row == 0 and pair.to_output(0, tile.valid)[1].mean() > 0.99
        h, w = tile.ms_valid.shape
        means = tile.pan[0].reshape(h, ratio, w, ratio).mean(axis=(1, 3))
        inside = tile.ms_valid & tile.pan_valid.reshape(h, ratio, w, ratio).all(axis=(1, 3))
        found = max(np.corrcoef(means[inside], band[inside])[0, 1] for band in tile.ms)
        assert found > correlation
        assert len(sample_windows(pair, 8, 32)) == 8
