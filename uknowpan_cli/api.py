"""`uknowpan.sharpen` and its companions: files in, files out. Nothing prints."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rasterio.errors import NotGeoreferencedWarning

from uknowpan.console import collected
from uknowpan.errors import UknowpanWarning, UsageError
from uknowpan.loading import load_for
from uknowpan.models.devices import tune_cpu
from uknowpan.models.sharpeners import Sharpener
from uknowpan.options import OF_MODEL, SharpenOptions, declared
from uknowpan.scenes import open_scene, prepared
from uknowpan.sharpening import SharpenReport, sharpen_scene
from uknowpan.surveying import Survey
from uknowpan.surveying import survey as survey_pair
from uknowpan.tiling import ScenePair
from uknowpan.tiling.raster import RasterLike, bounded_gdal_cache

logging.getLogger("uknowpan").addHandler(logging.NullHandler())  # or Python would print warnings to stderr

OF_PAIR = ("bidx", "pan_bidx", "nodata", "ratio", "resampling", "bounds", "valid", "mask_clouds", "height", "dem")


@contextmanager
def python_warnings(depth: int = 4) -> Iterator[None]:
    """Messages of a run become `UknowpanWarning`s at the line that called the API."""
    texts: list[str] = []
    try:
        with collected("uknowpan") as texts, warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # there is a sentence of our own
            yield
    finally:
        for text in texts:
            warnings.warn(text, UknowpanWarning, stacklevel=depth)


def options_from(given: dict[str, Any], allowed: Sequence[str] | None = None) -> SharpenOptions:
    """Options by keyword; an unknown keyword is a UsageError."""
    known = list(declared()) if allowed is None else list(allowed)
    for name in given:
        if name not in known:
            raise UsageError(f"There is no option {name!r}; the options are {', '.join(known)}.")
    return SharpenOptions(**given)


def loader(model: Any, given: dict[str, Any]) -> tuple[Callable[[SharpenOptions], Sharpener], str | None]:
    """A function from options to the sharpener, and the name of the model if it is to be loaded."""
    if model is None or isinstance(model, str | os.PathLike):
        return load_for, None if model is None else os.fspath(model)
    if not hasattr(model, "sharpen") or not hasattr(model, "provenance"):
        raise UsageError(f"model is a name, a file or the result of uknowpan.load, not {type(model).__name__}.")
    fixed = [name for name in given if name in OF_MODEL and name != "num_threads"]
    if fixed:
        raise UsageError(f"{', '.join(fixed)} of a loaded model are given to uknowpan.load.")

    def loaded(options: SharpenOptions) -> Sharpener:
        if "torch" in sys.modules:
            tune_cpu(options.num_threads)
        sharpener: Sharpener = model
        return sharpener

    return loaded, None


def sharpen(
    pan: RasterLike,
    ms: RasterLike | Sequence[RasterLike] = (),
    output: str | os.PathLike[str] = "",
    *,
    model: Any = None,
    **options: Any,
) -> SharpenReport:
    """Sharpen MS with PAN: the bands of the MS on the grid of the PAN, as a GeoTIFF.

    Args:
        pan: a file, `FILE,band=N`, or an open rasterio dataset with one band. Without `ms`: a vendor's product, by
            its folder or its metadata.
        ms: the same with several bands, or a list of these.
        output: the file to write.
        model: name of a bundled model, a checkpoint file, or the result of `load`.
        **options: fields of `uknowpan.options.SharpenOptions`.

    Raises:
        Error: a subclass with one sentence and an exit code.
    """
    if not os.fspath(output):
        raise UsageError("output names the file to write; it is missing.")
    load_model, name = loader(model, options)
    wanted = options_from({"model": name, **options})
    with python_warnings(), prepared(pan, ms, os.fspath(output), wanted, lambda: load_model(wanted)) as scene:
        return sharpen_scene(scene)


def load(model: str | os.PathLike[str] | None = None, **options: Any) -> Sharpener:
    """Load a model once, for many scenes.

    Args:
        model: name of a bundled model or a checkpoint file; None: the default model.
        **options: method, softness, consistency, steps, seed, device, dtype, engine, num_threads.

    Raises:
        ModelError: no such model, or its file is damaged.
    """
    wanted = options_from({"model": model, **options}, OF_MODEL)
    with python_warnings():
        return load_for(wanted)


def open_pair(pan: RasterLike, ms: RasterLike | Sequence[RasterLike] = (), **options: Any) -> ScenePair:
    """Open PAN and MS as one pair; use it in a `with` statement.

    Args:
        pan: as of `sharpen`.
        ms: as of `sharpen`.
        **options: bidx, pan_bidx, nodata, ratio, resampling, bounds, valid, mask_clouds, height, dem.

    Raises:
        InputError: a file cannot be read, or the two do not fit.
    """
    return open_scene(pan, ms, options_from(options, OF_PAIR))


def survey(pair: ScenePair, model: Sharpener | None = None, *, max_value: float | None = None) -> Survey:
    """Measure scale, blur, shift and softness of a pair.

    Args:
        pair: from `open_pair`.
        model: the result of `load`, whose scale counts; None: the scene's own.
        max_value: full scale in digital numbers, if it is known.

    Returns:
        `.shift` is (dy, dx) in PAN pixels from the PAN to the MS at the centre of the scene, + is down and right, or
        None. `.displacement` is the field, see `uknowpan.models.registration.field`.
    """
    with bounded_gdal_cache():
        return survey_pair(pair, model, max_value=max_value, softness=True)
