"""Truths as sharp as the PAN, made of a real pair: the third judge.

`sharp_truth` brings PAN and MS onto pixels of twice the MS's size, blurred alike and without their displacement. The
low MS comes from that truth. `compare` calls the pair its coarse twin.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uknowpan.datasets.pack import largest_rectangle
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.report import TRUTH, Report
from uknowpan.loading import load_for, memory_watched
from uknowpan.models.blur import gain_to_sigma
from uknowpan.models.checkpoints import DEFAULT_MODEL, find_checkpoint, read_card
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.metrics.evaluation import Results
from uknowpan.models.metrics.images import gaussian_kernel, whole_images
from uknowpan.models.metrics.indices import ergas, sam
from uknowpan.models.metrics.reprojection import Registered, detail
from uknowpan.models.resample import crop, degrade, like
from uknowpan.models.sharpeners import Sharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import sharp_truth
from uknowpan.options import SharpenOptions
from uknowpan.scenes import open_scene
from uknowpan.surveying import Progress, Survey, survey
from uknowpan.tiling import IncompatiblePair, ScenePair
from uknowpan.tiling.raster import bounded_gdal_cache

GROUND = 3072
"""PAN pixels along a side of the ground that a truth is made of, at most."""

RATIO, MTF, BORDER = 4, 0.3, 8
"""Ratio of the pair that is made of a truth, MTF gain of its MS, and border that the scores leave out."""

LEAST = 32
"""Least side of a truth without its border."""


@dataclass(frozen=True)
class SharpPair:
    """A truth as sharp as its PAN, and the pair that a coarser sensor would give."""

    truth: Tensor
    """(C, H, W)."""
    pan: Tensor
    """(1, H, W)."""
    ms: Tensor
    """(C, H / 4, W / 4)."""


def sharp_pair(pair: ScenePair, look: Survey) -> SharpPair:
    """The pair made of the largest rectangle of valid pixels in the ground around a window of a scene.

    Args:
        pair: the window; the ground reaches beyond it, up to `GROUND`.
        look: survey of the scene with its blur and its displacement.

    Raises:
        IncompatiblePair: blur and shift cannot be measured, the MS is too soft, or the pair is too small.
    """
    if look.measured is None:
        raise IncompatiblePair(
            "PAN and MS resemble each other too little to make a truth of them; check that they show one place."
        )
    shape = [min(GROUND // pair.ratio, n) for n in pair.full_shape]
    middles = [o + n / 2 for o, n in zip(pair.origin, pair.frame_shape, strict=True)]
    first = [
        min(max(int(m - n / 2), 0), whole - n) - o
        for m, n, whole, o in zip(middles, shape, pair.full_shape, pair.origin, strict=True)
    ]
    tile, ratio = pair.read_frame(first[0], first[1], shape[0], shape[1]), pair.ratio
    part = largest_rectangle(tile.ms_valid & tile.pan_valid.reshape(shape[0], ratio, shape[1], ratio).all((1, 3)))
    if part is None:
        raise IncompatiblePair("The pair has too few valid pixels to make a truth of them; give another part of it.")
    rows, cols = (slice(s.start * ratio, s.stop * ratio) for s in part)
    try:
        truth, pan = sharp_truth(
            torch.from_numpy(tile.pan[:, rows, cols]), torch.from_numpy(tile.ms[:, *part]), ratio, look.measured
        )
    except ValueError as error:
        raise IncompatiblePair(f"The pair gives no truth as sharp as its PAN: {error}.") from error
    height, width = (n // RATIO * RATIO for n in truth.shape[1:])
    if min(height, width) < LEAST + 2 * BORDER:
        raise IncompatiblePair(
            f"The pair gives a truth of {truth.shape[1]} x {truth.shape[2]} pixels, fewer than "
            f"{LEAST + 2 * BORDER} along a side; give a larger scene."
        )
    truth, pan = truth[:, :height, :width], pan[:, :height, :width]
    return SharpPair(truth, pan, degrade(truth[None], RATIO, gain_to_sigma(MTF, RATIO))[0])


def sharp_result(sharpener: Sharpener, twin: SharpPair, max_value: float | None = None) -> Tensor:
    """The result (C, H, W) of a method. Raises ModelMismatch where it does not serve the pair."""
    return like(sharpen_array(sharpener, twin.pan, twin.ms, max_value=max_value).hrms, twin.truth)


def sharp_scores(hrms: Tensor, twin: SharpPair) -> dict[str, float]:
    """ERGAS, SAM and the scores of fine detail of a result, or of the truth itself."""
    fused, truth, pan = (crop(x.double(), BORDER) for x in (hrms, twin.truth, twin.pan))
    ms = crop(twin.ms, BORDER // RATIO)
    way = Registered([gaussian_kernel(gain_to_sigma(MTF, RATIO))] * len(ms))
    errors = {"ergas": float(ergas(fused, truth, RATIO)), "sam": float(sam(fused, truth))}
    return errors | asdict(detail(whole_images(fused, pan, ms), way))


def measure_sharp(pan: str, ms: Sequence[str], options: EvaluateOptions, on_progress: Progress | None = None) -> Report:
    """Scores of the classical methods and of models against a truth as sharp as the PAN.

    Args:
        pan, ms: the rasters of a pair.
        options: models and how they run, bands and nodata of the pair.
        on_progress: called with (methods done, methods).

    Raises:
        Error: see `sharp_pair` and `uknowpan.sharpen`.
    """
    models = options.model or (DEFAULT_MODEL,)
    names = ("steps", "seed", "softness", "device", "num_threads")
    run: dict[str, Any] = {name: getattr(options, name) for name in names}
    methods: dict[str, Sharpener] = {name: load_sharpener(None, name) for name in CLASSICAL_METHODS}
    methods |= {_row(model, methods): load_for(SharpenOptions(model=model, **run)) for model in models}
    same = {name: getattr(options, name) for name in ("pan_bidx", "bidx", "nodata", "ratio")}
    with bounded_gdal_cache(), open_scene(pan, list(ms), SharpenOptions(**same)) as pair:
        look = survey(pair, coregister="auto")
        twin = sharp_pair(pair, look)
        ratio = pair.ratio
    assert look.measured is not None
    rows = {TRUTH: sharp_scores(twin.truth, twin)}
    for done, (name, sharpener) in enumerate(methods.items(), 1):
        with memory_watched(f"with a truth of {' x '.join(map(str, twin.truth.shape))}; take --device cpu."):
            try:
                rows[name] = sharp_scores(sharp_result(sharpener, twin, options.max_value), twin)
            except ModelMismatch as error:
                raise ModelMismatch(f"{error}.") from error
        if on_progress is not None:
            on_progress(done, len(methods))
    scores = {
        name: {index: torch.tensor([value], dtype=torch.float64) for index, value in own.items()}
        for name, own in rows.items()
    }
    height, width = twin.truth.shape[1:]
    title = (
        f"{Path(pan).name} and its MS against a truth as sharp as the PAN: {height} x {width} pixels of "
        f"{2 * ratio} PAN pixels, low MS by {RATIO} : 1 at an MTF of {MTF}, border {BORDER} cut"
    )
    shift = [-value for value in look.measured.shift]
    about: dict[str, Any] = {
        "pan": pan,
        "ms": list(ms),
        "truth_size": [height, width],
        "sigma_pan_pixels": look.measured.sigma,
        "shift_pan_pixels": shift,
    }
    return Report(Results("sharp", 1, scores), title, len(twin.truth), about)


def _row(model: str, taken: Mapping[str, object]) -> str:
    """The name of a model's row: that of its card, or the path where another has it."""
    name = read_card(find_checkpoint(model)).name
    return model if name in taken or name == TRUTH else name
