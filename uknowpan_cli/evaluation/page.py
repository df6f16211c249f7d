"""A comparison as one self-contained HTML page, or as a sheet of pictures."""

import base64
import io
import json
import math
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from uknowpan.evaluation.comparing import Comparison
from uknowpan.pictures import enlarge, panels, stretch_from

SHOWN = {
    "sharp_ergas": "ERGAS, coarse twin",
    "sharp_sam": "SAM, coarse twin",
    "sharp_d_rho_excess": "D_rho excess, twin",
    "sharp_colour_grain": "colour grain, twin",
    "hqnr": "HQNR",
    "r_ergas": "R-ERGAS",
    "r_sam": "R-SAM, deg",
    "r_q2n": "R-Q2n",
    "d_rho_excess": "D_rho excess",
    "colour_grain": "colour grain",
}
"""Indices of the table and their labels."""

TAILS = (0.1, 99.9)
"""Percentiles of all results that the 8 bits of a band span."""

ZOOM = 192
"""Pixels along a side of the part that the sheet shows at twice its size."""


def html_page(comparison: Comparison) -> str:
    """The page as text: pictures with one zoom, differences, spectra at a point, scores. It loads nothing."""
    ranges = [_range([entry.hrms[band] for entry in comparison.entries]) for band in range(len(comparison.bands))]
    pan_range = _range([comparison.pan[0]])
    height, width = comparison.pan.shape[1:]
    data: dict[str, Any] = {
        "scene": comparison.scene,
        "height": height,
        "width": width,
        "bands": comparison.bands,
        "rgb": comparison.rgb,
        "ratio": comparison.ratio,
        "shift": comparison.shift,
        "bounds": comparison.bounds,
        "indices": SHOWN,
        "truth": _shown(comparison.truth),
        "ranges": ranges,
        "panRange": pan_range,
        "pan": _png(_quantised(comparison.pan, [pan_range])),
        "entries": [
            {
                "name": entry.name,
                "seconds": entry.seconds,
                "scores": _shown(entry.scores),
                "pictures": _band_pictures(entry.hrms, ranges),
            }
            for entry in comparison.entries
        ],
    }
    template = files("uknowpan").joinpath("data", "compare.html").read_text(encoding="utf-8")
    return template.replace("{{DATA}}", json.dumps(data, allow_nan=False).replace("</", "<\\/"))


def sheet(comparison: Comparison) -> np.ndarray:
    """uint8 (3, H, W): the middle of the window by every method, beside the PAN."""
    height, width = comparison.pan.shape[1:]
    part = tuple(slice(max(n // 2 - ZOOM // 2, 0), min(n // 2 + ZOOM // 2, n)) for n in (height, width))
    look = stretch_from(comparison.entries[0].hrms, bands=comparison.rgb)
    grey = stretch_from(comparison.pan, bands=(0, 0, 0))
    cells = [("PAN", enlarge(grey.apply(comparison.pan)[:, part[0], part[1]], 2))]
    cells += [(entry.name, enlarge(look.apply(entry.hrms)[:, part[0], part[1]], 2)) for entry in comparison.entries]
    across = math.ceil(math.sqrt(len(cells)))
    return panels([cells[start : start + across] for start in range(0, len(cells), across)])


def _shown(scores: dict[str, float]) -> dict[str, float]:
    """The scores that the table shows and that are numbers."""
    return {key: scores[key] for key in SHOWN if not math.isnan(scores.get(key, math.nan))}


def _range(images: list[np.ndarray]) -> tuple[float, float]:
    """Values that become 1 and 255."""
    values = np.concatenate([image[np.isfinite(image)] for image in images])
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, TAILS))
    return low, high if high > low else low + 1.0


def _quantised(image: np.ndarray, ranges: list[tuple[float, float]]) -> np.ndarray:
    """(C, H, W) as uint8: 0 is invalid, 1 to 255 span the ranges."""
    low, high = (np.array(limits, np.float32)[:, None, None] for limits in zip(*ranges, strict=True))
    valid = np.isfinite(image)
    unit = np.clip((np.where(valid, image, 0) - low) / (high - low), 0, 1)
    quantised: np.ndarray = np.where(valid, 1 + np.rint(254 * unit), 0).astype(np.uint8)
    return quantised


def _band_pictures(hrms: np.ndarray, ranges: list[tuple[float, float]]) -> list[str]:
    """PNGs of three bands each; the last repeats its last band."""
    bands = _quantised(hrms, ranges)
    groups = [[min(first + k, len(bands) - 1) for k in range(3)] for first in range(0, len(bands), 3)]
    return [_png(bands[group]) for group in groups]


def _png(bands: np.ndarray) -> str:
    """A grey or RGB picture (1 or 3, H, W) as a data URL."""
    image = Image.fromarray(bands[0] if len(bands) == 1 else np.ascontiguousarray(np.moveaxis(bands, 0, 2)))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
