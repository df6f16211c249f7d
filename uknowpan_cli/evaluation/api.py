"""`uknowpan.evaluate`: indices of a result as a dict. Nothing prints."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from affine import Affine
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.vrt import WarpedVRT

from uknowpan.api import python_warnings
from uknowpan.arrays import ArrayRaster, array_raster, in_memory
from uknowpan.errors import UsageError
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.rasters import DEFAULT_RATIO, METHOD, evaluate_against, evaluate_without
from uknowpan.models.metrics.sensors import SENSORS
from uknowpan.tiling.raster import Opener, RasterLike

NAMES = {"result": "result", "reference": "reference", "pan": "PAN", "ms": "MS"}


def evaluate(
    result: Any,
    *,
    reference: Any = None,
    pan: Any = None,
    ms: Any = None,
    sensor: str | None = None,
    ratio: int | None = None,
    max_value: float | None = None,
    nodata: float | None = None,
    cut: int = 21,
) -> dict[str, Any]:
    """Indices of a result: against a reference, or without one from PAN and MS; with all three, both.

    Each raster is a file, an open rasterio dataset, or an array (numpy, torch, xarray). Arrays share their upper left
    corner with the other rasters; NaN and masked pixels do not count.

    Args:
        result: (C, H, W) on the grid of the PAN.
        reference: the truth, (C, H, W) on the same grid.
        pan: (H, W) or (1, H, W).
        ms: (C, h, w), or a list of files or datasets whose bands are taken in order.
        sensor: name of the sensor whose MTF gains and full scale count, as of `uknowpan evaluate --sensor`.
        ratio: PAN pixels per MS pixel; with a reference alone only ERGAS depends on it, and 4 is assumed.
        max_value: full scale in digital numbers, for PSNR and SSIM.
        nodata: value of invalid pixels; None: as the files declare.
        cut: border in pixels that is left out against a reference; published scores have 21.

    Returns:
        q2n, q, sam, ergas, scc, psnr and ssim with a reference; d_lambda_k, d_s, hqnr, d_lambda and qnr without one.
        With PAN and MS also `reprojection`, a dict of the indices by reprojection in each of their modes.

    Raises:
        Error: a subclass with one sentence.
    """
    if (pan is None) != (ms is None) or (reference is None and pan is None):
        raise UsageError("Give evaluate either the reference, or both pan and ms.")
    given = {"result": result, "reference": reference, "pan": pan, "ms": ms}
    known = EvaluateOptions(sensor=sensor, max_value=max_value).known_sensor
    scores: dict[str, Any] = {}
    with (
        python_warnings(),
        _rasters({name: value for name, value in given.items() if value is not None}, nodata) as files,
    ):
        if reference is not None:
            results = evaluate_against(
                files["result"],
                files["reference"],
                ratio=ratio or DEFAULT_RATIO,
                max_value=max_value or (None if known is None else known.max_value),
                cut=cut,
                nodata=nodata,
            )
            scores |= {index: results.mean(METHOD, index) for index in results.scores[METHOD]}
        if pan is not None:
            layers = files["ms"] if isinstance(files["ms"], list) else [files["ms"]]
            sensor_used = known or SENSORS["generic"]
            results, judge = evaluate_without(
                files["result"], files["pan"], layers, sensor=sensor_used, nodata=nodata, ratio=ratio
            )
            scores |= {index: results.mean(METHOD, index) for index in results.scores[METHOD]}
            if judge is not None:
                scores["reprojection"] = judge.facts()
    return scores


def _is_file(value: Any) -> bool:
    return isinstance(value, str | os.PathLike | list | tuple | DatasetReader | DatasetWriter | WarpedVRT)


@contextmanager
def _rasters(given: dict[str, Any], nodata: float | None) -> Iterator[dict[str, Any]]:
    """The rasters as files or datasets: arrays become GeoTIFFs in GDAL's memory."""
    with ExitStack() as stack:
        arrays = {
            name: array_raster(value, NAMES[name], nodata) for name, value in given.items() if not _is_file(value)
        }
        files = {name: list(v) if isinstance(v, list | tuple) else v for name, v in given.items() if name not in arrays}
        transform, crs = _place(files, arrays)
        for name, raster in arrays.items():
            step = 1.0
            if name == "ms":
                step = _height(given["result"], arrays.get("result")) / raster.values.shape[1]
            place = transform * Affine.scale(step)
            files[name] = stack.enter_context(in_memory(raster, place, crs, whole_numbers=True))
        yield files


def _place(files: dict[str, Any], arrays: dict[str, ArrayRaster]) -> tuple[Affine, Any]:
    """Transform of the PAN's grid and CRS, by the files where there are any."""
    for name in ("pan", "reference", "result", "ms"):
        if name not in files:
            continue
        first: RasterLike = files[name][0] if isinstance(files[name], list) else files[name]
        with ExitStack() as closing:
            data = Opener(closing)(first)[0]
            scale = 1.0
            if name == "ms" and "pan" in arrays:
                scale = data.height / arrays["pan"].values.shape[1]
            return data.transform * Affine.scale(scale), data.crs
    return Affine.scale(1.0, -1.0), "EPSG:3857"


def _height(value: Any, array: ArrayRaster | None) -> int:
    """Rows of a raster."""
    if array is not None:
        rows: int = array.values.shape[1]
        return rows
    with ExitStack() as closing:
        return int(Opener(closing)(value)[0].height)
