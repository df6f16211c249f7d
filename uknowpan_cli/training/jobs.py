"""From what was typed to a stage that can be trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from uknowpan import __version__
from uknowpan.errors import InputError, UsageError
from uknowpan.models.architectures import architecture_of
from uknowpan.models.architectures import resolve as imported
from uknowpan.models.checkpoints import read_card
from uknowpan.models.network import LiteConfig
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile, is_full_scale
from uknowpan.models.published.stages import PatchData
from uknowpan.models.published.uknow.cache import CachedDataset, CacheFile
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.streams import StreamsConfig
from uknowpan.models.training.loop import Stage, TrainConfig
from uknowpan.models.training.parallel import current_world
from uknowpan.models.training.presets import PRESETS, Settings, preset
from uknowpan.models.training.run_folder import resolved_config
from uknowpan.models.training.scenes import GenericBatches, Scene, VariantShares, read_scenes
from uknowpan.models.training.stages import GenericOptions, GenericStudentStage
from uknowpan.training.settings import overridden

SCENES_PRESETS = {"lite": LiteConfig, "streams": StreamsConfig}
"""Preset -> config of the network that a scenes file trains."""


@dataclass(frozen=True)
class TrainRequest:
    """What was typed."""

    stage: str
    """A stage of `uknowpan.models.architectures`."""
    data: Sequence[Path]
    valid: Sequence[Path]
    prior: Path | None
    teacher: Path | None
    cache: Sequence[Path]
    teacher_steps: int
    max_value: float | None
    preset: str
    config: dict[str, Any]
    init: Path | None
    device: str
    command: str

    def __post_init__(self) -> None:
        """Refuse files that the stage has no use for, or lacks."""
        if self.stage == "fsa-t" and self.prior is None:
            raise UsageError("The stage fsa-t needs --prior, a checkpoint of `uknowpan train --stage prior`.")
        for name, stage in (("prior", "fsa-t"), ("teacher", "fsa-s"), ("cache", "fsa-s")):
            if getattr(self, name) and self.stage != stage:
                raise UsageError(f"--{name} is of the stage {stage}, not of {self.stage}.")
        if self.max_value is not None and not is_full_scale(self.max_value):
            raise UsageError(f"--max-value: {self.max_value:g} is no full scale (1e-9 to 1e12).")
        if self.teacher is not None and self.cache:
            raise UsageError("Give --teacher or --cache, not both.")
        for name in ("valid", "cache"):
            given = getattr(self, name)
            if given and len(given) != len(self.data):
                raise UsageError(
                    f"{len(given)} --{name} for {len(self.data)} --data; give one for each, in the same order."
                )


def is_scenes_file(path: Path) -> bool:
    """Whether a file is one of `uknowpan pack`, which holds groups, not PanCollection's arrays."""
    try:
        with h5py.File(path, "r") as file:
            return bool(len(file)) and all(isinstance(v, h5py.Group) for v in file.values())
    except OSError:
        return False


def resolve(request: TrainRequest) -> Settings:
    """Preset and TOML as settings; looks at the header of the training files only."""
    if is_scenes_file(request.data[0]):
        others = (request.teacher, request.cache, request.valid, request.max_value)
        alone = len(request.data) == 1 and not any(others) and request.preset in SCENES_PRESETS
        if request.stage != "fsa-s" or not alone:
            raise UsageError(
                "A scenes file of `uknowpan pack` trains the presets lite and streams of the stage fsa-s, alone "
                "and without a teacher; the others take PanCollection h5 (`uknowpan simulate`)."
            )
        return overridden(Settings(TrainConfig(), SCENES_PRESETS[request.preset](), GenericOptions()), request.config)
    if request.preset not in PRESETS:
        raise UsageError(f"The preset {request.preset} takes a scenes file of `uknowpan pack`; leave --preset out.")
    bands = PanCollectionFile(request.data[0], needs_gt=True).header.bands
    return overridden(preset(request.preset, request.stage, bands), request.config)


def make_job(request: TrainRequest, settings: Settings) -> Stage:
    """The stage, with its data opened."""
    if is_scenes_file(request.data[0]):
        return _scenes_job(request, settings)
    data = _patch_data(request, settings)
    source: list[Any] = [] if request.prior is None else [request.prior]
    if request.teacher is not None:
        teacher = FrozenTeacher(request.teacher, steps=request.teacher_steps, device=request.device)
        teacher.check_serves(data.dataset.files[0].header)
        source = [teacher]
    trainer = imported(architecture_of(settings.network).trainer)
    stage: Stage = trainer(settings.network, data, settings.options, *source)
    return stage


def _scenes_job(request: TrainRequest, settings: Settings) -> Stage:
    config, options = settings.train, settings.options
    batches = GenericBatches(
        read_scenes(request.data[0], "train"),
        seed=config.seed,
        batch_size=config.batch_size,
        shares=VariantShares(config.halved_share, options.subsampled_share, options.truth_blur_share),
    )
    valid = GenericBatches(read_scenes(request.data[0], "valid"), seed=config.seed + 1, patches_per_variant=4)
    notes = {
        **_notes(request, settings),
        "scenes_by_licence": _by_licence(batches.scenes),
        "validation_scenes_by_licence": _by_licence(valid.scenes),
    }
    return GenericStudentStage(settings.network, batches, valid, options=options, notes=notes)


def _by_licence(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """Licence -> names of the scenes under it."""
    names: dict[str, list[str]] = {}
    for scene in scenes:
        names.setdefault(scene.licence, []).append(scene.name)
    return names


def _patch_data(request: TrainRequest, settings: Settings) -> PatchData:
    """The PanCollection files of a request, and how they are drawn."""
    world, config = current_world(), settings.train
    valid_paths = list(request.valid) or [_beside(path) for path in request.data]
    train, valid = (
        PanCollectionDataset([PanCollectionFile(p, needs_gt=True) for p in paths], max_value=request.max_value)
        for paths in (request.data, valid_paths)
    )
    for name in ("bands", "ratio"):
        ours, theirs = (getattr(d.files[0].header, name) for d in (train, valid))
        if ours != theirs:
            raise InputError(
                f"The {name} of {train.files[0].path} is {ours}, that of {valid.files[0].path} is "
                f"{theirs}; validate on data of the same kind."
            )
    sampler = PatchSampler(
        len(train),
        batch_size=world.share(config.batch_size),
        seed=config.seed,
        flips=getattr(settings.options, "flips", False),
        rank=world.rank,
        world=world.size,
    )
    caches = [CacheFile(path) for path in request.cache]
    notes = {
        **_notes(request, settings),
        "files": [path.name for path in request.data],
        "validation_files": [path.name for path in valid_paths],
        "patches": len(train),
        "validation_patches": len(valid),
    }
    return PatchData(
        train=PatchBatches(CachedDataset(train, caches) if caches else train, sampler),
        valid=valid,
        validation_samples=config.validation_samples,
        workers=config.workers,
        device=request.device,
        notes=notes,
    )


def _beside(path: Path) -> Path:
    """The validation file that belongs to a training file."""
    head, train, tail = path.name.rpartition("train")
    if not train:
        raise UsageError(f"--valid is missing: {path.name} has no `train` in its name to find the validation file by.")
    return path.with_name(f"{head}valid{tail}")


def _notes(request: TrainRequest, settings: Settings) -> dict[str, Any]:
    """For the card: code, command, configuration and origin of the weights."""
    return {
        "code_version": __version__,
        "command": request.command,
        "seed": settings.train.seed,
        "config": resolved_config(request.stage, settings.train, settings.network, settings.options),
        "started_from": None if request.init is None else read_card(request.init).training,
    }
