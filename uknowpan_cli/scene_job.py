"""One scene as a command line asks for it: opened, checked, sharpened. `sharpen` does one of
these, `batch` many with the same method."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from uknowpan.errors import UsageError
from uknowpan.opening import PairRequest, check_outputs, choose_device, coregistered, open_request
from uknowpan.options import Coregister

if TYPE_CHECKING:
    from uknowpan.forecast import Forecast
    from uknowpan.models.sharpeners import Sharpener
    from uknowpan.sharpening import SharpenOptions, SharpenReport
    from uknowpan.tiling import ScenePair


log = logging.getLogger("uknowpan")

LARGEST_BATCH = 64
"""Tiles at once on a GPU where nobody asks for a number; larger ones bring nothing."""
SHARE_OF_MEMORY = 0.6
"""Of what is free on a GPU that a batch is to take."""


@dataclass(frozen=True)
class MethodRequest:
    """What sharpens: a model, or a classical method."""

    model: str | None = None
    """Bundled name or file; None: the default model."""
    method: str | None = None
    """A classical method instead."""
    softness: float | str | None = None
    """None: the usual one."""
    consistency: int = 0
    steps: int | None = None
    seed: int = 0
    device: str = "auto"
    dtype: str = "fp32"

    def load(self, num_threads: int | None = None) -> LoadedMethod:
        """The sharpener on its device, with so many CPU threads; usage errors exit with 2."""
        import torch

        from uknowpan.models.devices import tune_cpu, tune_gpu
        from uknowpan.models.sharpeners import load_sharpener

        threads = tune_cpu(num_threads)
        chosen = choose_device(self.device)
        if chosen != "cpu":
            tune_gpu()
        try:
            sharpener = load_sharpener(
                self.model,
                self.method,
                softness=self.softness,
                consistency=self.consistency,
                steps=self.steps,
                seed=self.seed,
                device=chosen,
                dtype=torch.bfloat16 if self.dtype == "bf16" else torch.float32,
            )
        except ValueError as error:
            if self.steps is None:
                raise
            raise UsageError(f"--steps: {error}.") from error
        self._warn_of_idle(chosen)
        return LoadedMethod(sharpener, chosen, threads)

    def _warn_of_idle(self, chosen: str) -> None:
        if self.method is None:
            return
        idle = {
            "--seed": self.seed != 0,
            "--softness": self.softness is not None,
            "--dtype": self.dtype != "fp32",
            "--device": chosen != "cpu" and self.device != "auto",
        }
        for option in [name for name, given in idle.items() if given]:
            log.warning("%s changes nothing for --method %s", option, self.method)


@dataclass(frozen=True)
class LoadedMethod:
    """A sharpener that is ready on its device."""

    sharpener: Sharpener
    device: str
    threads: int
    """CPU threads."""

    def batch_size(self, tile_bytes: int) -> int:
        """Tiles at once where nobody asks for a number: as many as the GPU holds, 1 on a CPU."""
        from uknowpan.models.devices import free_memory

        free = free_memory(self.device)
        if free is None:
            return 1
        return min(max(int(SHARE_OF_MEMORY * free / tile_bytes), 1), LARGEST_BATCH)


@dataclass(frozen=True)
class SceneRequest:
    """What is wanted of one scene; sizes in PAN pixels."""

    pair: PairRequest
    output: str
    uncertainty: str | None = None
    preview: str | None = None
    tile: int = 512
    overlap: int | None = None
    batch_size: int | None = None
    """None: by device."""
    coregister: Coregister = Coregister.check
    max_value: float | None = None
    output_dtype: str | None = None
    format: str = "gtiff"
    creation: Mapping[str, str] = field(default_factory=dict)
    overviews: bool = False
    overwrite: bool = False
    resume: bool = False
    tags: Mapping[str, str] = field(default_factory=dict)
    """More tags for the files, see `SharpenOptions.tags`."""

    @property
    def outputs(self) -> dict[str, str | None]:
        """Option -> file that it names."""
        return {
            "--output": self.output,
            "--uncertainty": self.uncertainty,
            "--preview": self.preview,
        }


@dataclass(frozen=True)
class ReadyScene:
    """A scene that was opened, surveyed and found fit for a sharpener."""

    pair: ScenePair
    sharpener: Sharpener
    options: SharpenOptions
    preview: str | None

    def estimate(self) -> Forecast:
        """What sharpening it would take."""
        from uknowpan.forecast import estimate

        return estimate(self.pair, self.sharpener, self.options)

    def sharpen(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> SharpenReport:
        """Write its outputs; errors as `sharpen_scene` raises them."""
        from uknowpan.sharpening import sharpen_scene

        report = sharpen_scene(self.pair, self.sharpener, self.options, on_progress)
        if self.preview is not None:
            from uknowpan.pictures import preview_png

            preview_png(self.options.output, Path(self.preview))
        return report


def full_scale(max_value: float | None, bit_depth: int | None) -> float | None:
    """--max-value or --bit-depth as a digital number; usage errors exit with 2."""
    if bit_depth is not None:
        if max_value is not None:
            raise UsageError("--max-value and --bit-depth exclude each other.")
        return float(2**bit_depth - 1)
    if max_value is not None and not 0 < max_value < math.inf:
        raise UsageError(f"--max-value must be above 0 and finite, not {max_value:g}.")
    return max_value


def softness_of(text: str | None) -> float | str | None:
    """--softness as a number or "ms"; usage errors exit with 2."""
    if text is None or text == "ms":
        return text
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.2 <= value <= 1:
        raise UsageError(f"--softness is ms or a number from 0.2 to 1, not {text!r}.")
    return value


def check_uncertainty(sharpener: Sharpener) -> None:
    """Exit with 2 where --uncertainty is wanted of a method that has none."""
    if not sharpener.has_uncertainty:
        raise UsageError(
            f"--uncertainty: {sharpener.name} has none; use a model of the form fsa-s-lite, like the bundled one."
        )


@contextmanager
def opened(
    request: SceneRequest,
    load: Callable[[], LoadedMethod],
    *,
    model: str | None = None,
    dry_run: bool = False,
) -> Iterator[ReadyScene]:
    """Open a scene and see that it can be sharpened as asked, before anything is computed.

    Args:
        request: the scene.
        load: gives the method; called when the files were found to be in order.
        model: the file that it comes from, which no output may overwrite.
        dry_run: outputs that exist do no harm.

    Raises:
        TilingError, ModelError: see their classes. Usage errors exit with 2.
    """
    from uknowpan.creation import try_creation

    pair = open_request(request.pair)
    try:
        used = [*pair.inputs, *([model] if model else [])]
        check_outputs(request.outputs, used, request.overwrite or dry_run)
        try_creation(dict(request.creation), request.format, request.output_dtype or pair.meta.dtype)
        loaded = load()
        sharpener = loaded.sharpener
        from uknowpan.sharpening import clipping_warning, plan_scene  # not before: it imports torch

        if request.uncertainty is not None:
            check_uncertainty(sharpener)
        sharpener.check(pair.bands, pair.ratio)
        pair, found = coregistered(request.pair, pair, request.coregister, sharpener, request.max_value)
        for note in pair.notes:
            log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
        clipped = clipping_warning(pair.meta, found.scale, request.output_dtype)
        if clipped is not None:
            log.warning(clipped)
        options = replace(_options(request, loaded), survey=found)
        plan = plan_scene(pair, sharpener, found.statistics, options)
        if request.batch_size is None:
            options = replace(options, batch_size=loaded.batch_size(plan.tile_bytes(pair)))
        if not sharpener.local and plan.count > 1:
            log.warning(
                "the result of model %s depends on how the scene is cut, here into %d tiles "
                "that overlap by %d PAN pixels (--tile, --overlap)",
                *(sharpener.name, plan.count, plan.overlap * pair.ratio),
            )
        yield ReadyScene(pair, sharpener, options, request.preview)
    finally:
        pair.close()


def _options(request: SceneRequest, loaded: LoadedMethod) -> SharpenOptions:
    from uknowpan.sharpening import SharpenOptions
    from uknowpan.tiling import OutputOptions

    return SharpenOptions(
        output=request.output,
        tile=request.tile,
        overlap=request.overlap,
        batch_size=request.batch_size or 1,
        overlapped=loaded.device != "cpu",
        max_value=request.max_value,
        writing=OutputOptions(
            format=request.format,
            dtype=request.output_dtype,
            nodata=request.pair.nodata,
            creation=dict(request.creation),
            overviews=request.overviews,
            overwrite=request.overwrite,
            num_threads=loaded.threads,
        ),
        uncertainty=request.uncertainty,
        resume=request.resume,
        tags=request.tags,
    )
