"""From what was typed to an opened pair and a sharpener; shared by `sharpen` and `info`."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uknowpan.errors import UsageError
from uknowpan.options import Coregister, numbers

if TYPE_CHECKING:
    from uknowpan.models.sharpeners import Sharpener
    from uknowpan.sharpening import Survey
    from uknowpan.tiling import ScenePair


log = logging.getLogger("uknowpan")

NOTICEABLE_SHIFT = 0.5
"""PAN pixels above which `--coregister check` warns."""

LEAST_SHIFT = 0.05
"""PAN pixels below which `--coregister shift` leaves the MS as it is: resampling costs more."""


@dataclass(frozen=True)
class PairRequest:
    """What was typed about the two rasters."""

    pan: str
    ms: Sequence[str]
    pan_band: int | None
    bidx: str | None
    nodata: float | None
    ratio: int | None
    resampling: str
    bounds: str | None


def open_request(request: PairRequest, shift: tuple[float, float] = (0.0, 0.0)) -> ScenePair:
    """Open the pair; usage errors exit with 2."""
    from uknowpan.tiling import open_pair

    bands = numbers(request.bidx, "--bidx")
    if bands is not None and any(b < 1 or b != int(b) for b in bands):
        raise UsageError(f"--bidx takes band numbers from 1 on, not {request.bidx!r}.")
    bounds = numbers(request.bounds, "--bounds", 4)
    return open_pair(
        request.pan,
        list(request.ms),
        pan_band=request.pan_band,
        ms_bands=None if bands is None else [int(b) for b in bands],
        nodata=request.nodata,
        ratio=request.ratio,
        resampling=request.resampling,
        shift=shift,
        bounds=None if bounds is None else (bounds[0], bounds[1], bounds[2], bounds[3]),
    )


def check_outputs(named: Mapping[str, str | None], inputs: Sequence[str], overwrite: bool) -> None:
    """Refuse files (option -> path) that are inputs, exist, cannot be made, or are one and the
    same, before anything is computed."""
    from uknowpan.tiling import check_output

    inputs = [*inputs, *files_behind(inputs)]
    seen: dict[Path, str] = {}
    for option, path in named.items():
        if path is None:
            continue
        check_output(path, inputs, overwrite)
        other = seen.setdefault(Path(path).resolve(), option)
        if other != option:
            raise UsageError(f"{other} and {option} name the same file {path}.")


def files_behind(inputs: Sequence[str]) -> list[str]:
    """The local files that rasters are read from: sources of a VRT, the archive of a /vsizip/."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    found = []
    for name in inputs:
        if Path(name).suffix.lower() != ".vrt" and not name.startswith("/vsi"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with rasterio.open(name) as dataset:
                files = list(dataset.files)
        for file in (name, *files):
            path = Path(re.sub(r"^(/vsi[a-z0-9]+/)+", "", file))
            found += [str(p) for p in (path, *path.parents) if p.is_file()]
    return found


def coregistered(
    request: PairRequest,
    pair: ScenePair,
    mode: Coregister,
    sharpener: Sharpener,
    max_value: float | None,
) -> tuple[ScenePair, Survey]:
    """Survey the scene, and warn of the shift between PAN and MS or open the pair anew without it.

    Returns the pair to go on with, and its survey.
    """
    from uknowpan.sharpening import survey_for

    found = survey_for(pair, sharpener, max_value, measure=mode is not Coregister.off)
    if mode is Coregister.off:
        return pair, found
    if found.offset is None:
        log.info("PAN and MS resemble each other too little to measure a shift")
        return pair, found
    dy, dx = found.offset
    lies = f"the MS lies {dy:+.2f} rows and {dx:+.2f} columns (PAN pixels, + is down and right)"
    if mode is Coregister.shift:
        if max(abs(dy), abs(dx)) < LEAST_SHIFT:
            log.info("%s off the PAN: too little to resample it for", lies)
            return pair, found
        # Rounded, so that a resumed run, which measures anew, opens the very same pair.
        moved = open_request(request, (round(-dy, 3), round(-dx, 3)))
        if moved.shift == (0.0, 0.0):
            moved.close()
            log.info("%s off the PAN: less than half a pixel stays as it is", lies)
            return pair, found
        pair.close()
        log.info("%s off the PAN and is moved by %+.2f and %+.2f", lies, *moved.shift)
        try:
            again = survey_for(moved, sharpener, max_value)
        except BaseException:
            moved.close()
            raise
        return moved, replace(again, measured=found.measured)
    if max(abs(dy), abs(dx)) > NOTICEABLE_SHIFT:
        log.warning("%s off the PAN; --coregister shift moves it back", lies)
    return pair, found


def choose_device(name: str) -> str:
    """`auto` is the GPU where there is one; a device that is not there exits with 2."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}.") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device {name}: PyTorch sees {found} CUDA devices here.")
    return name
