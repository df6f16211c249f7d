"""`uknowpan.evaluate`: indices of a result as a dict. Nothing prints."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from affine import Affine
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.vrt import WarpedVRT

from uknowpan.api import python_warnings
from uknowpan.arrays import array_raster, in_memory
from uknowpan.errors import UsageError
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.rasters import METHOD, evaluate_against, evaluate_without
from uknowpan.models.metrics.evaluation import Results
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
    reprojection: bool = False,
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
        reprojection: measure by reprojection too, without a reference; this takes many times as long.

    Returns:
        q2n, q, sam, ergas, scc, psnr and ssim with a reference; d_lambda_k, d_s, hqnr, d_lambda and qnr without one.
        With `reprojection` also that key, a dict of the indices by reprojection in each of their modes.

    Raises:
        Error: a subclass with one sentence.
    """
    if (pan is None) != (ms is None) or (reference is None and pan is None):
        raise UsageError("Give evaluate either the reference, or both pan and ms.")
    given = {"result": result, "reference": reference, "pan": pan, "ms": ms}
    options = EvaluateOptions(
        sensor=sensor, ratio=ratio, max_value=max_value, nodata=nodata, cut=cut, reprojection=reprojection
    )
    scores: dict[str, Any] = {}
    with (
        python_warnings(),
        _rasters({name: value for name, value in given.items() if value is not None}, nodata) as files,
    ):
        if reference is not None:
            scores |= _means(evaluate_against(files["result"], files["reference"], options))
        if pan is not None:
            layers = files["ms"] if isinstance(files["ms"], list) else [files["ms"]]
            results, judge = evaluate_without(files["result"], files["pan"], layers, options)
            scores |= _means(results)
            if judge is not None:
                scores["reprojection"] = judge.facts()
    return scores


def _means(results: Results) -> dict[str, Any]:
    return {index: results.mean(METHOD, index) for index in results.scores[METHOD]}


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
        rows = arrays["result"].values.shape[1] if "result" in arrays else _grid(files["result"])[0]
        transform, crs = Affine.scale(1.0, -1.0), "EPSG:3857"
        placed = next((name for name in ("pan", "reference", "result", "ms") if name in files), None)
        if placed is not None:
            height, transform, crs = _grid(files[placed])
            transform @= Affine.scale(height / rows if placed == "ms" else 1.0)
        for name, raster in arrays.items():
            place = transform @ Affine.scale(rows / raster.values.shape[1] if name == "ms" else 1.0)
            files[name] = stack.enter_context(in_memory(raster, place, crs, whole_numbers=True))
        yield files


def _grid(file: RasterLike | list[RasterLike]) -> tuple[int, Affine, Any]:
    """Rows, transform and CRS of a raster, of the first one of a list."""
    with ExitStack() as closing:
        data = Opener(closing)(file[0] if isinstance(file, list) else file)[0]
        return data.height, data.transform, data.crs
