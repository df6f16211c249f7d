"""Writing a teacher's answers to every training sample."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uknowpan.console import progress, say, stop_requests
from uknowpan.errors import Interrupted
from uknowpan.loading import memory_watched
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.uknow.cache import bytes_per_sample, write_cache
from uknowpan.models.published.uknow.distillation import FrozenTeacher


@dataclass(frozen=True)
class CacheRun:
    """Settings of a cache; see `write_cache`."""

    output: Path
    max_value: float | None = None
    batch_size: int = 16
    dtype: Literal["float16", "float32"] = "float16"
    resume: bool = False
    quiet: bool = False


def cache_answers(frozen: FrozenTeacher, data: Path, run: CacheRun) -> dict[str, Any]:
    """Write the cache; returns facts on it, as JSON has them.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; `resume` goes on.
        DataError, ModelMismatch: as `write_cache`.
    """
    remedy = f"with {run.batch_size} samples at once; --resume goes on with a smaller --batch-size."
    with PanCollectionFile(data) as file:
        frozen.check_serves(file)
        scale = PanCollectionDataset([file], max_value=run.max_value or frozen.card.max_value).scales[0]
        count, each = len(file), bytes_per_sample(frozen, file.header, run.dtype)
        if not run.quiet:
            free = shutil.disk_usage(Path(os.path.realpath(run.output)).parent).free / 1e9
            needed = f"{count} samples of {each / 1e3:.1f} kB make {count * each / 1e9:.3g} GB"
            say(f"{needed}; {free:.3g} GB are free")
        shows = progress("distill-cache", run.quiet, "samples")
        with memory_watched(remedy), shows as shown, stop_requests() as stopping:
            done = write_cache(
                *(frozen, file, scale, run.output),
                batch_size=run.batch_size,
                dtype=run.dtype,
                resume=run.resume,
                on_progress=shown,
                should_stop=lambda: bool(stopping),
            )
    if done < count:
        raise Interrupted(f"stopped after {done} of {count} samples; --resume goes on from there")
    return {
        **{"path": str(run.output), "samples": count, "bytes": run.output.stat().st_size},
        **{"teacher": frozen.card.name, "teacher_sha256": frozen.digest},
        **{"steps": frozen.steps, "seed": frozen.seed, "scale": scale},
    }
