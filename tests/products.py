"""Made-up deliveries, small, in the layouts that the vendors publish."""

import json
from pathlib import Path

import numpy as np
from affine import Affine
from rasters import ORIGIN, centres, ground, write_raster

OLI = {1: "coastal", 2: "blue", 3: "green", 4: "red", 5: "nir", 6: "swir 1", 7: "swir 2", 9: "cirrus"}


def image(count: int, shape: tuple[int, int], transform: Affine, fill: int = 0) -> np.ndarray:
    """(count, *shape) uint16: a landscape whose bands differ; the first `fill` columns are 0."""
    level = ground(*centres(transform, shape), 20)
    values = np.stack([level * (1 + 0.2 * band) for band in range(count)]).round().astype("uint16")
    values[..., :fill] = 0
    return values


def landsat(folder: Path, *, craft: int = 8, level: str = "L1TP", text: bool = False, size: int = 24) -> Path:
    """A Collection 2 folder: a file for each band, QA_PIXEL, MTL. The PAN begins half a PAN pixel before the MS."""
    stem = f"LC0{craft}_{level}_021039_20200411_20200822_02_T1"
    product = folder / stem
    product.mkdir()
    place = Affine.translation(*ORIGIN) @ Affine.scale(30, -30)
    pan_place = Affine.translation(ORIGIN[0] - 7.5, ORIGIN[1] + 7.5) @ Affine.scale(15, -15)
    ms = image(len(OLI), (size, size), place, fill=3)
    numbers = list(OLI) if craft > 7 else [1, 2, 3, 4, 5, 7]
    files = {number: f"{stem}_B{number}.TIF" for number in [*numbers, 8, 10]}
    for values, number in zip(ms, numbers, strict=False):
        write_raster(product / files[number], values[None], place)
    write_raster(product / files[8], image(1, (2 * size + 1, 2 * size + 1), pan_place, fill=6), pan_place)
    if level.startswith("L2"):
        del files[8]
    contents = {"LANDSAT_PRODUCT_ID": stem, "PROCESSING_LEVEL": level, "COLLECTION_NUMBER": "02"}
    contents |= {f"FILE_NAME_BAND_{number}": file for number, file in files.items()}
    groups = {
        "PRODUCT_CONTENTS": contents,
        "IMAGE_ATTRIBUTES": {"SPACECRAFT_ID": f"LANDSAT_{craft}", "CLOUD_COVER": "3.06"},
        "LEVEL1_PROCESSING_RECORD": {"PROCESSING_LEVEL": "L1TP", "FILE_NAME_BAND_8": "other.TIF"},
    }
    lines = ["GROUP = LANDSAT_METADATA_FILE"]
    for group, facts in groups.items():
        inner = [f'    {key} = "{value}"' for key, value in facts.items()]
        lines += [f"  GROUP = {group}", *inner, f"  END_GROUP = {group}"]
    (product / f"{stem}_MTL.txt").write_text("\n".join([*lines, "END_GROUP = LANDSAT_METADATA_FILE", "END", ""]))
    if not text:
        (product / f"{stem}_MTL.json").write_text(json.dumps({"LANDSAT_METADATA_FILE": groups}, indent=2))
    return product
