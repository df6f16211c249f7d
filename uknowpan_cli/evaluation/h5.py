"""Scores of models and classical methods on a test file."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from torch import Tensor

from uknowpan.console import progress
from uknowpan.errors import Error, InputError, UsageError
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.pictures import evaluation_sheet
from uknowpan.evaluation.report import TRUTH, Report, known_exp
from uknowpan.evaluation.reprojection import SecondJudge, ways_of_image
from uknowpan.evaluation.saving import save_images, saved_path
from uknowpan.loading import choose_device, memory_watched
from uknowpan.models.checkpoints import DEFAULT_MODEL, Card, find_checkpoint, read_card
from uknowpan.models.denoising import NetworkSharpener, load_network
from uknowpan.models.metrics.baselines import BASELINES
from uknowpan.models.metrics.evaluation import Fuse, Results, Scored, evaluate_file, scored_size
from uknowpan.models.metrics.images import whole_images
from uknowpan.models.metrics.regions import BLOCK
from uknowpan.models.metrics.sensors import SENSORS, Sensor, find_sensor
from uknowpan.models.pancollection.condition import image_sharpener
from uknowpan.models.pancollection.file import PanCollectionFile, damage_explained
from uknowpan.models.sharpeners import Sharpened
from uknowpan.models.types import PatchBatch
from uknowpan.pictures import write_png
from uknowpan.tiling import check_output

log = logging.getLogger("uknowpan")

COARSE_SCALE = 255.0
"""Q2n rounds to whole digital numbers: below this full scale there are few of them."""


def measure_file(target: str, options: EvaluateOptions, *, quiet: bool = False) -> Report:
    """Score every chosen method on the file; errors as `evaluate` reports them."""
    with PanCollectionFile(target) as file:
        header = file.header
        size = scored_size(file, options.cut)
        classical = _chosen_methods(options)
        models = options.model
        if not models and not options.method:
            models = (os.environ.get("UKNOWPAN_MODEL") or DEFAULT_MODEL,)
        cards = [read_card(find_checkpoint(name)) for name in models]
        scale = _scale(options, file, cards)
        if options.reprojection:
            _require_windows(file)
        needed = bool(classical) or not header.has_gt or options.reprojection
        sensor = _sensor(options, file, cards, needed=needed)
        folder = _picture_folder(options, len(file))
        sharpeners = _load(options, models)
        sigmas: dict[str, Tensor | None] = {}
        fuses = {
            **{name: _classical(name, sensor, file) for name in classical},
            **{n: _keeping_sigma(image_sharpener(s, file, scale), n, sigmas) for n, s in sharpeners.items()},
        }
        remedy = (
            f"with one image of {header.bands} x {header.height} x {header.width}; "
            "take --device cpu, or a smaller model."
        )
        judges: dict[str, list[SecondJudge]] = {}
        if options.save is not None:
            for name in fuses:
                for number in range(min(options.limit or len(file), len(file))):
                    path = saved_path(options.save, name, number, options.save_as)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    check_output(str(path), [], options.overwrite)
        with _shown(quiet, sensor, sigmas, scale, folder) as shown, memory_watched(remedy):

            def on_image(scored: Scored) -> None:
                if options.reprojection:
                    _judge(scored, sensor, judges)
                if options.save is not None:
                    save_images(options.save, scored, options.save_as)
                shown(scored)

            results = evaluate_file(
                file,
                fuses,
                scale=scale,
                sensor=sensor,
                cut=options.cut,
                limit=options.limit,
                as_is=classical,
                on_image=on_image,
            )
    return _report(options, file, results, judges, sensor, scale, size, sharpeners)


def _require_windows(file: PanCollectionFile) -> None:
    """Refuse images that are too small for the indices by reprojection. Raises InputError."""
    header = file.header
    h, w = header.height // header.ratio, header.width // header.ratio
    if min(h, w) < BLOCK:
        raise InputError(
            f"{file.path}: --reprojection needs an MS of {BLOCK} x {BLOCK} pixels, and these images have {h} x {w}; "
            "leave it out, or take larger images."
        )


def _judge(scored: Scored, sensor: Sensor, judges: dict[str, list[SecondJudge]]) -> None:
    """Add the scores by reprojection of an image's results, and of its truth where there is one."""
    pan, ms, gt = scored.patch.pan[0], scored.patch.ms[0], scored.patch.gt
    gains = sensor.for_bands(len(ms)).mtf_ms
    results = scored.fused if gt is None else {**scored.fused, TRUTH: gt}
    ways = ways_of_image(pan, ms, gains)
    for name, fused in results.items():
        d_lambda_k = scored.scores.get(name, {}).get("d_lambda_k")
        judges.setdefault(name, []).append(ways.judge(whole_images(fused[0], pan, ms), d_lambda_k))


def _chosen_methods(options: EvaluateOptions) -> list[str]:
    """Names of `BASELINES`, in its order."""
    wanted = {name.lower() for name in options.method}
    unknown = wanted - {name.lower() for name in BASELINES}
    if unknown:
        raise UsageError(
            f"--method: no classical method is called {min(unknown)!r}; known are "
            f"{', '.join(name.lower() for name in BASELINES)}."
        )
    return [name for name in BASELINES if options.baselines or name.lower() in wanted]


def _scale(options: EvaluateOptions, file: PanCollectionFile, cards: Sequence[Card]) -> float:
    """Full scale in DN.

    Raises:
        InputError: neither options, nor the file, nor a model declare one, or they contradict each other.
    """
    header, known = file.header, options.known_sensor
    own = None if header.by_name else header.max_value
    if own is not None and options.max_value not in (None, own):
        raise InputError(f"{file.path} declares a full scale of {own:g}, not {options.max_value:g}; leave it out.")
    candidates: list[float | None] = [options.max_value or own, known.max_value if known else None, header.max_value]
    for name in (file.header.sensor, *(card.sensor for card in cards)):
        with suppress(ValueError):  # a sensor without an entry
            candidates.append(None if name is None else find_sensor(name).max_value)
    trained = {card.max_value for card in cards} - {None}
    candidates += trained if len(trained) == 1 else ()
    for value in candidates:
        if value is not None:
            file.check_scale(value)
            return value
    raise InputError(
        f"{file.path} does not declare its full scale, nor does a model; give --sensor, or "
        "--max-value (2047 for WV2, WV3 and QB, 1023 for GF2)."
    )


def _sensor(options: EvaluateOptions, file: PanCollectionFile, cards: Sequence[Card], needed: bool) -> Sensor:
    """The sensor with the MTF gains.

    Raises:
        UsageError, InputError: gains are needed, but the option or the file has none that fit.
    """
    bands = file.header.bands
    code: type[Error] = InputError
    trained = {card.sensor for card in cards} - {"generic"}  # "generic" is any sensor
    name = file.header.sensor or (trained.pop() if len(trained) == 1 else None)
    try:
        if options.known_sensor is not None:
            sensor, code = options.known_sensor, UsageError
        elif file.header.sensor and not file.header.by_name and (gains := _stored_gains(file)):
            names = tuple(f"band {b + 1}" for b in range(bands))
            return replace(find_sensor(name or ""), bands=names, mtf_ms=gains)
        elif name is not None:
            sensor = find_sensor(name)
        elif not needed:
            return SENSORS["generic"]
        else:
            raise InputError(
                f"{file.path} does not declare its sensor, whose MTF gains this needs; give "
                f"--sensor ({', '.join(SENSORS)})."
            )
        sensor.for_bands(bands)
    except ValueError as error:
        if not needed:
            return SENSORS["generic"]
        raise code(f"{file.path}: {error}.") from error
    return sensor


def _stored_gains(file: PanCollectionFile) -> tuple[float, ...] | None:
    """MTF gains that `simulate` degraded by, one per band."""
    with damage_explained(file.path), h5py.File(file.path, "r", locking="best-effort") as opened:
        gains = np.ravel(opened.attrs.get("mtf_gains", ()))
    numbers = gains.dtype.kind == "f" and len(gains) == file.header.bands
    return tuple(gains.tolist()) if numbers else None


def _load(options: EvaluateOptions, models: Sequence[str]) -> dict[str, NetworkSharpener]:
    """Row of the table -> network."""
    device = choose_device(options.device) if models else "cpu"
    loaded: dict[str, NetworkSharpener] = {}
    for model in models:
        try:
            sharpener = load_network(
                model, needless=True, steps=options.steps, seed=options.seed, softness=options.softness, device=device
            )
        except ValueError as error:
            if options.steps is None:
                raise
            raise UsageError(f"--steps: {error}.") from error
        loaded[_row_name(sharpener.name, model, loaded)] = sharpener
    return loaded


def _row_name(card: str, typed: str, taken: Mapping[str, object]) -> str:
    """The card's name; the path where another model has the same."""
    reserved = {"exp", "pan", "lms", TRUTH, *(name.lower() for name in taken)}
    if card.lower() not in reserved:
        return card
    if typed not in taken:
        return typed
    raise UsageError(f"--model {typed} is given twice.")


def _classical(name: str, sensor: Sensor, file: PanCollectionFile) -> Fuse:
    header, baseline = file.header, BASELINES[name]
    gains, pan_gain = sensor.for_bands(header.bands).mtf_ms, sensor.mtf_pan
    return lambda patches: baseline(patches, gains, header.ratio, pan_gain)


def _keeping_sigma(sharpen: Callable[[PatchBatch], Sharpened], name: str, sigmas: dict[str, Tensor | None]) -> Fuse:
    """The sharpener; its latest sigma goes to `sigmas`."""

    def fuse(patches: PatchBatch) -> Tensor:
        done = sharpen(patches)
        sigmas[name], hrms = done.sigma, done.hrms
        assert isinstance(hrms, Tensor)
        return hrms

    return fuse


def _picture_folder(options: EvaluateOptions, images: int) -> Path | None:
    """The folder for pictures; existing ones are refused without --overwrite."""
    if options.pictures is None:
        return None
    try:
        options.pictures.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--pictures: {options.pictures} is a file; name a folder.") from None
    for number in range(min(options.limit or images, images)):
        check_output(str(_picture(options.pictures, number)), [], options.overwrite)
    return options.pictures


def _picture(folder: Path, number: int) -> Path:
    return folder / f"image_{number:03d}.png"


@contextmanager
def _shown(
    quiet: bool, sensor: Sensor, sigmas: dict[str, Tensor | None], scale: float, folder: Path | None
) -> Iterator[Callable[[Scored], None]]:
    """Function for after each image: a bar on a terminal, a line with -v, a picture."""
    with progress("evaluate", quiet or not sys.stderr.isatty(), "images") as shown:

        def show(scored: Scored) -> None:
            shown(scored.number + 1, scored.count)
            log.info("image %d of %d", scored.number + 1, scored.count)
            if folder is not None:
                in_dn = {name: None if s is None else s * scale for name, s in sigmas.items()}
                write_png(_picture(folder, scored.number), evaluation_sheet(scored, in_dn, sensor))

        yield show


def _report(
    options: EvaluateOptions,
    file: PanCollectionFile,
    results: Results,
    judges: dict[str, list[SecondJudge]],
    sensor: Sensor,
    scale: float,
    size: tuple[int, int],
    sharpeners: Mapping[str, NetworkSharpener],
) -> Report:
    header = file.header
    border = f"border {options.cut} cut, " if header.has_gt else f"{sensor.name} MTF, "
    title = (
        f"{Path(file.path).name}, {results.kind} resolution: {results.images} images of "
        f"{header.bands} x {header.height} x {header.width}, {border}full scale {scale:g}\n"
        "mean ± standard deviation (N - 1); models clipped to full scale, EXP and classical methods as they are"
    )
    notes = []
    if header.by_name:
        notes.append(f"By its name the file is of {header.sensor}; --sensor and --max-value override that.")
    if not header.has_gt and size != (header.height, header.width):
        notes.append(
            f"Only {size[0]} x {size[1]} of {header.height} x {header.width} pixels are scored: "
            "full resolution takes whole tiles of 32 x 32."
        )
    if scale < COARSE_SCALE:
        notes.append(
            f"Q2n and D_lambda_K round to whole numbers, and full scale is only {scale:g}: they mean little here."
        )
    exp = known_exp(results, sensor.name)
    about = {
        "file": str(file.path),
        "bands": header.bands,
        "ratio": header.ratio,
        "max_value": scale,
        "sensor": sensor.name,
        "mtf_gains": list(sensor.for_bands(header.bands).mtf_ms),
        "cut": options.cut if header.has_gt else None,
        "scored_size": list(size),
        "models": {
            name: {"sha256": s.digest, "steps": s.steps, "stage": s.card.stage, "seed": options.seed}
            | ({"softness": options.softness} if options.softness and s.takes_softness else {})
            for name, s in sharpeners.items()
        },
    }
    return Report(results, title, header.bands, about, [*notes, *([exp] if exp else [])], judges)
