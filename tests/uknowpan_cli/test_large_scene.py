"""A scene of 60 000 x 60 000 pixels that is almost empty: planned, and sharpened in a part."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasters import ORIGIN, UTM
from running import Run

from uknowpan.datasets.synthetic import make_scene
from uknowpan.tiling import open_pair, sample_windows

SIZE, RATIO, SIDE = 60_000, 4, 256
"""Side of the PAN, and PAN pixels of the drawn scene that is repeated."""
METRES = 0.5
Area = tuple[int, int, int, int]
"""Row, column, rows, columns of the PAN."""
DATA: Area = (4608, 4608, 2048, 4096)
SMALLER, UNMET = 16_000, (3744, 2048, 768, 1536)
"""A scene with data that no lattice of samples meets. Windows of 128 MS pixels begin at 645, 1936
and on, at 322, 968, 1613 and on, or at 161, 484, 806, 1129 and on, along both axes; the data lie
in rows 936 to 1127 and columns 512 to 895."""


def write_sparse(folder: Path, size: int, area: Area) -> tuple[Path, Path]:
    """PAN and MS, blocks only where there is data, the rest nodata 0."""
    row, col, rows, cols = area
    scene = make_scene(SIDE)
    paths = []
    for name, values, factor in (("pan", scene.pan, 1), ("ms", scene.ms, RATIO)):
        path = folder / f"{name}.tif"
        place = Affine.translation(*ORIGIN) @ Affine.scale(METRES * factor, -METRES * factor)
        with rasterio.open(
            path, "w", driver="GTiff", width=size // factor, height=size // factor,
            count=len(values), dtype="uint16", nodata=0, crs=UTM, transform=place, tiled=True,
            blockxsize=512, blockysize=512, bigtiff="YES", SPARSE_OK="TRUE",
        ) as dataset:  # fmt: skip
            block = np.tile(np.maximum(values, 1).astype("uint16"), (1, rows // SIDE, cols // SIDE))
            dataset.write(
                block,
                window=((row // factor, (row + rows) // factor),
                        (col // factor, (col + cols) // factor)),
            )  # fmt: skip
        paths.append(path)
    return paths[0], paths[1]


def bounds_of(area: Area) -> str:
    row, col, rows, cols = area
    left, top = ORIGIN[0] + col * METRES, ORIGIN[1] - row * METRES
    return f"{left},{top - rows * METRES},{left + cols * METRES},{top}"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pair = write_sparse(tmp_path_factory.mktemp("sparse"), SIZE, DATA)
    assert sum(path.stat().st_size for path in pair) < 60e6
    return pair


def answer(uknowpan: Run, *words: object) -> dict[str, Any]:
    outcome = uknowpan("sharpen", *words, "--method", "brovey", "-q", "--json")
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_data_are_found_where_no_lattice_meets_them(uknowpan: Run, tmp_path: Path) -> None:
    """In a trial run on bounds they are the same samples."""
    paths = write_sparse(tmp_path, SMALLER, UNMET)
    pan, ms = map(str, paths)
    with open_pair(pan, [ms]) as pair:
        windows = sample_windows(pair, 9, 128)
        assert len(windows) >= 5
        assert all(pair.valid_fraction(*window) >= 0.5 for window in windows)
        assert pair.fill_values[0] > 100
    left, bottom, right, top = (float(n) for n in bounds_of((3744, 2560, 256, 256)).split(","))
    with open_pair(pan, [ms], bounds=(left, bottom, right, top)) as part:
        row, col = part.origin
        moved = [(r + row, c + col, h, w) for r, c, h, w in sample_windows(part, 9, 128)]
    assert moved == windows
    assert answer(uknowpan, *paths, "-o", tmp_path / "out.tif", "--dry-run")["tiles_with_data"] >= 6


def test_plan_counts_only_tiles_with_data(uknowpan: Run, sparse: tuple[Path, Path], tmp_path: Path) -> None:
    said = answer(uknowpan, *sparse, "-o", tmp_path / "out.tif", "--dry-run")
    assert (said["width"], said["height"]) == (SIZE, SIZE)
    assert said["tiles"] == 118**2
    full = DATA[2] * DATA[3] / 512**2
    assert said["tiles_with_data"] == pytest.approx(full, rel=0.4)
    assert said["output_mb"] == pytest.approx(SIZE**2 * 4 * 2 / 1e6)
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_sharpened_as_if_it_were_all(uknowpan: Run, sparse: tuple[Path, Path], tmp_path: Path) -> None:
    """Two rows of tiles over the edge of the data: what is valid there comes out, no more."""
    area = (DATA[0] + 1536, DATA[1] + 3584, 1024, 1024)
    target = tmp_path / "out.tif"
    report = answer(uknowpan, *sparse, "-o", target, "--bounds", bounds_of(area))
    assert report["skipped_tiles"] > 0
    with rasterio.open(target) as dataset:
        assert dataset.bounds == pytest.approx([float(n) for n in bounds_of(area).split(",")], abs=1e-6)
        values = dataset.read()
        assert dataset.nodata == 0
    inside = np.zeros(values.shape[1:], bool)
    inside[:512, :512] = True
    assert (values[:, inside] > 0).all() and (values[:, ~inside] == 0).all()
    colours = make_scene(SIDE).ms.mean((1, 2))
    np.testing.assert_allclose(values[:, inside].mean(1), colours, rtol=0.03)
