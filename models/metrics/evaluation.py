"""Scores of pansharpening methods on PanCollection's files, by the protocol of published tables.

Images are read, sharpened and scored one at a time, in digital numbers and float64, at reduced resolution after
`crop_border`. The stored ``lms``, called EXP, comes first and unchanged: its row shows whether file and protocol are
those of a published table.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from uknowpan.models.errors import DataError
from uknowpan.models.metrics.full_resolution import full_resolution
from uknowpan.models.metrics.indices import crop_border, reduced_resolution
from uknowpan.models.metrics.regions import BLOCK
from uknowpan.models.metrics.sensors import Sensor
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.pancollection.protocol import registration_of
from uknowpan.models.types import PatchBatch

EXP = "EXP"
"""Name of the stored lms as a method."""

FULL_INDICES = ("d_lambda_k", "d_s", "hqnr", "d_lambda", "qnr")
"""Indices of full resolution in the order of display."""

Fuse = Callable[[PatchBatch], Tensor]
"""A method: patches divided by full scale, float64, to hrms (B, C, H, W) in the same unit."""


@dataclass(frozen=True)
class Results:
    """Scores of several methods on the same images."""

    kind: Literal["reduced", "full", "sharp"]
    """Scores against a truth, without one, or against one as sharp as its PAN."""
    images: int
    scores: dict[str, dict[str, Tensor]]
    """Method -> index -> (N,) float64, one value per image, in the order of display.

    Indices are the fields of `ReducedResolution`, `FULL_INDICES`, or, against a sharp truth, few of both judges.
    """

    def mean(self, method: str, index: str) -> float:
        """Mean over the images."""
        return float(self.scores[method][index].mean())

    def std(self, method: str, index: str) -> float:
        """Standard deviation over the images, with N - 1 as in MATLAB; NaN for one image."""
        values = self.scores[method][index]
        return float(values.std()) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class Scored:
    """An image after scoring."""

    number: int
    """Place in the file, from 0."""
    count: int
    """Number of images that are evaluated."""
    patch: PatchBatch
    """One image in DN, float64."""
    fused: dict[str, Tensor]
    """Method -> (1, C, H, W) in DN, with the border that was cut before scoring."""
    scores: dict[str, dict[str, float]]
    """Method -> index -> value of this image."""


def scored_size(file: PanCollectionFile, cut: int) -> tuple[int, int]:
    """Rows and columns of an image that are scored.

    `crop_border` leaves them at reduced resolution; at full resolution they are the largest multiples of 32, from
    the upper left corner, as the toolbox takes no others.

    Raises:
        DataError: less than one window is left, or a ratio without a definition.
    """
    header = file.header
    height, width = header.height, header.width
    if header.has_gt:
        rows, columns = (n - 2 * cut + 1 if cut else n for n in (height, width))
        hint = f"after a border of {cut} (--cut); cut less"
    else:
        if registration_of(header.ratio) == "area":
            raise DataError(
                f"{file.path} has a ratio of {header.ratio} and no truth: the toolbox's full "
                "resolution takes ratios of 2, 4 and 8; score a raster with --pan and --ms instead."
            )
        rows, columns = (n - n % BLOCK for n in (height, width))
        hint = "of whole tiles; take larger images"
    if min(rows, columns) < BLOCK:
        raise DataError(
            f"{file.path}: images of {height} x {width} pixels leave {max(rows, 0)} x "
            f"{max(columns, 0)}, fewer than one window of {BLOCK} x {BLOCK}, {hint}."
        )
    return rows, columns


def evaluate_file(
    file: PanCollectionFile,
    methods: Mapping[str, Fuse],
    *,
    scale: float,
    sensor: Sensor,
    cut: int = 21,
    limit: int | None = None,
    as_is: Collection[str] = (),
    on_image: Callable[[Scored], None] | None = None,
) -> Results:
    """Score EXP and the methods, against the truth if the file holds one.

    Results of methods are clipped to [0, 1], as those of networks are published, and multiplied by `scale`.

    Args:
        file: test file with the images to sharpen.
        methods: name -> method, in the order of display.
        scale: full scale in DN; also the peak of PSNR and SSIM.
        sensor: sensor whose MTF gains are used at full resolution.
        cut: border at reduced resolution, see `crop_border`; published numbers use 21.
        limit: number of images at most, the first ones.
        as_is: methods whose results are not clipped, as the toolbox scores classical ones.
        on_image: called after each image.

    Raises:
        DataError: an image that cannot be read, sharpened or scored.
        ValueError: the sensor has another number of bands, or a method is called EXP.
    """
    if EXP in methods:
        raise ValueError(f"{EXP} is the name of the stored lms; call the method something else")
    header = file.header
    gains = () if header.has_gt else sensor.for_bands(header.bands).mtf_ms
    size = scored_size(file, cut)
    count = len(file) if limit is None else min(limit, len(file))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (EXP, *methods)}
    for number in range(count):
        patch = file.read([number], torch.float64)
        origin = torch.tensor([[int(file.sources[number]), 0, 0]])
        scaled = replace(patch.map(lambda x: x / scale), origin=origin)
        fused = {EXP: patch.lms}
        for name in rows:
            try:
                if name in methods:
                    hrms = _checked(methods[name](scaled), patch)
                    fused[name] = (hrms if name in as_is else hrms.clamp(0, 1)) * scale
                if header.has_gt:
                    scores = _reduced(fused[name], patch, cut, scale, header.ratio)
                else:
                    scores = _full(fused[name], patch, size, gains, header.ratio)
            except ValueError as error:
                raise DataError(f"{file.path}, image {number}, {name}: {error}.") from error
            rows[name].append(scores)
        if on_image is not None:
            on_image(Scored(number, count, patch, fused, {name: own[-1] for name, own in rows.items()}))
    columns = {
        name: {index: torch.tensor([row[index] for row in own], dtype=torch.float64) for index in own[0]}
        for name, own in rows.items()
    }
    return Results("reduced" if header.has_gt else "full", count, columns)


def _checked(hrms: Tensor, patch: PatchBatch) -> Tensor:
    if hrms.shape != patch.lms.shape:
        raise ValueError(f"the result is {tuple(hrms.shape)}, the lms {tuple(patch.lms.shape)}")
    hrms = hrms.detach().to("cpu", torch.float64)
    if not bool(hrms.isfinite().all()):
        raise ValueError("the result holds values that are not finite; leave the method out")
    return hrms


def _reduced(image: Tensor, patch: PatchBatch, cut: int, peak: float, ratio: int) -> dict[str, float]:
    assert patch.gt is not None
    scores = reduced_resolution(crop_border(image, cut), crop_border(patch.gt, cut), ratio=ratio, peak=peak)
    return {name: float(score) for name, score in scores._asdict().items()}


def _full(
    image: Tensor, patch: PatchBatch, size: tuple[int, int], gains: tuple[float, ...], ratio: int
) -> dict[str, float]:
    whole = (..., slice(size[0]), slice(size[1]))
    scores = full_resolution(image[whole], patch.lms[whole], patch.pan[whole], gains, ratio=ratio)
    return {name: float(getattr(scores, name)) for name in FULL_INDICES}
