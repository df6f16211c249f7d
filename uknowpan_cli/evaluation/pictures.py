"""Pictures of `evaluate`: PAN, LMS, results, truth; error maps and uncertainty with a legend."""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from uknowpan.models.metrics.evaluation import Scored
from uknowpan.models.metrics.sensors import Sensor
from uknowpan.pictures import BACKGROUND, enlarge, error_map, panels, rgb_bands, stretch_from

SHOWN = 256
"""Pixels along a side that small images are enlarged to, about."""
LEGEND_HEIGHT = 24
LIMIT_PERCENTILE = 99
"""Percentile of the error that is shown brightest."""
BLANK = "", np.array(BACKGROUND, np.uint8)[:, None, None]


def evaluation_sheet(scored: Scored, sigmas: Mapping[str, Tensor | None], sensor: Sensor) -> np.ndarray:
    """uint8 (3, H, W): PAN, LMS, every method and the truth; below them errors and 1-sigma at one scale.

    Args:
        scored: an image in DN.
        sigmas: method -> (1, C, H, W) in DN, or None.
        sensor: names the bands.
    """
    pan, lms = _array(scored.patch.pan), _array(scored.patch.lms)
    gt = None if scored.patch.gt is None else _array(scored.patch.gt)
    fused = {name: _array(x) for name, x in scored.fused.items() if name != "EXP"}
    known = {name: _array(x) for name, x in sigmas.items() if x is not None}
    try:
        bands = sensor.for_bands(len(lms)).rgb
    except ValueError:
        bands = rgb_bands((), (), len(lms))
    look = stretch_from(lms if gt is None else gt, bands=bands)
    rows = [[("PAN", stretch_from(pan, bands=(0, 0, 0)).apply(pan)), ("LMS (EXP)", look.apply(lms))]]
    rows[0] += [(name, look.apply(x)) for name, x in fused.items()]

    shown = [np.abs(lms - gt).mean(0)] if gt is not None else [sigma.mean(0) for sigma in known.values()]
    limit = max([1e-6, *(float(np.percentile(error, LIMIT_PERCENTILE)) for error in shown)])
    ramp = np.broadcast_to(np.linspace(0, limit, lms.shape[2]), (1, 1, lms.shape[2]))
    legend = f"0 to {limit:.3g} DN, mean of bands", error_map(ramp, np.zeros_like(ramp), limit)
    if gt is not None:
        rows[0].append(("truth", look.apply(gt)))
        rows.append(
            [legend, *((f"error {n}", error_map(x, gt, limit)) for n, x in {"LMS (EXP)": lms, **fused}.items())]
        )
    if known:
        zero = np.zeros_like(lms)
        cells = [(f"1-sigma {n}", error_map(known[n], zero, limit)) if n in known else BLANK for n in fused]
        rows.append([BLANK if gt is not None else legend, BLANK, *cells])
    factor = max(1, round(SHOWN / lms.shape[2]))
    return panels([[(text, _enlarged(picture, factor)) for text, picture in row] for row in rows])


def _enlarged(picture: np.ndarray, factor: int) -> np.ndarray:
    """The legend, one pixel high, becomes a bar."""
    wide = enlarge(picture, factor)
    return wide if picture.shape[1] > 1 else np.repeat(wide[:, :1], LEGEND_HEIGHT, axis=1)


def _array(x: Tensor) -> np.ndarray:
    return x[0].float().cpu().numpy()
