"""The stage of a training run with its data, from the options of `train`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
from torch import nn

from uknowpan import __version__
from uknowpan.errors import InputError, UsageError
from uknowpan.models.architectures import ARCHITECTURES, architecture_of
from uknowpan.models.architectures import resolve as imported
from uknowpan.models.checkpoints import load_model, read_card
from uknowpan.models.denoising import StudentSharpener
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.features import StreamsConfig
from uknowpan.models.network import LiteConfig
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import DAMAGE, PanCollectionFile
from uknowpan.models.published.stages import PatchData
from uknowpan.models.published.uknow.cache import CachedDataset, CacheFile
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.training.loop import Stage, TrainConfig
from uknowpan.models.training.parallel import current_world
from uknowpan.models.training.presets import PRESETS, Settings, preset
from uknowpan.models.training.run_folder import resolved_config
from uknowpan.models.training.scenes import GenericBatches, Scene, VariantShares, read_scenes
from uknowpan.models.training.stages import GenericOptions, GenericStudentStage
from uknowpan.training.options import TrainOptions
from uknowpan.training.settings import overridden

SCENES_PRESETS = {"lite": LiteConfig, "streams": StreamsConfig}
"""Preset -> config of the network that a scenes file trains."""


def is_scenes_file(path: Path) -> bool:
    """Whether a file is one of `uknowpan pack`, which holds groups, not PanCollection's arrays."""
    try:
        with h5py.File(path, "r") as file:
            return bool(len(file)) and all(isinstance(v, h5py.Group) for v in file.values())
    except DAMAGE:  # `PanCollectionFile` explains it
        return False


def resolve(options: TrainOptions, tables: dict[str, Any]) -> Settings:
    """Preset and TOML (`tables`) as settings; reads the header of the training files only."""
    name = options.preset or tables.get("preset", PRESETS[0])
    if is_scenes_file(options.data[0]):
        others = (options.cache, options.valid, options.max_value)
        alone = len(options.data) == 1 and not any(others) and name in SCENES_PRESETS
        if options.kind != "fsa-s" or not alone:
            raise UsageError(
                "A scenes file of `uknowpan pack` trains the presets lite and streams of the stage fsa-s, alone; "
                "the others take PanCollection h5 (`uknowpan simulate`)."
            )
        return overridden(Settings(TrainConfig(), SCENES_PRESETS[name](), GenericOptions()), tables)
    if name not in PRESETS:
        raise UsageError(f"The preset {name} takes a scenes file of `uknowpan pack`; leave --preset out.")
    bands = PanCollectionFile(options.data[0], needs_gt=True).header.bands
    return overridden(preset(name, options.kind, bands), tables)


def make_job(options: TrainOptions, settings: Settings) -> Stage:
    """The stage, with its data opened."""
    if is_scenes_file(options.data[0]):
        return _scenes_job(options, settings)
    data = _patch_data(options, settings)
    source: list[Any] = [] if options.prior is None else [options.prior]
    if options.teacher is not None:
        teacher = FrozenTeacher(options.teacher, steps=options.teacher_steps, device=options.device)
        teacher.check_serves(data.dataset.files[0])
        source = [teacher]
    trainer = imported(architecture_of(settings.network).trainer)
    stage: Stage = trainer(settings.network, data, settings.options, *source)
    return stage


def _scenes_job(options: TrainOptions, settings: Settings) -> Stage:
    config, training = settings.train, settings.options
    teacher, named = (None, {}) if options.teacher is None else _scenes_teacher(options.teacher)
    batches = GenericBatches(
        read_scenes(options.data[0], "train"),
        seed=config.seed,
        batch_size=config.batch_size,
        shares=VariantShares(config.halved_share, training.subsampled_share, training.truth_blur_share),
    )
    valid = GenericBatches(read_scenes(options.data[0], "valid"), seed=config.seed + 1, patches_per_variant=4)
    notes = {
        **_notes(options, settings),
        **named,
        "scenes_by_licence": _by_licence(batches.scenes),
        "validation_scenes_by_licence": _by_licence(valid.scenes),
    }
    return GenericStudentStage(
        *(settings.network, batches, valid),
        options=training,
        teacher=teacher,
        workers=config.workers,
        device=options.device,
        notes=notes,
    )


def _scenes_teacher(path: Path) -> tuple[nn.Module, dict[str, str]]:
    """A network that predicts from the condition of whole scenes, and its name for the card."""
    teacher, card = load_model(path)
    if imported(ARCHITECTURES[card.architecture].sharpener) is not StudentSharpener:
        raise ModelMismatch(
            f"{card.name} is of the architecture {card.architecture}, which cannot teach on whole scenes; "
            "give a model that takes any number of bands, like the bundled one."
        )
    return teacher, {"teacher": card.name}


def _by_licence(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """Licence -> names of the scenes under it."""
    names: dict[str, list[str]] = {}
    for scene in scenes:
        names.setdefault(scene.licence, []).append(scene.name)
    return names


def _patch_data(options: TrainOptions, settings: Settings) -> PatchData:
    """The PanCollection files that are named, and how they are drawn."""
    world, config = current_world(), settings.train
    valid_paths = list(options.valid) or [_beside(path) for path in options.data]
    train, valid = (
        PanCollectionDataset([PanCollectionFile(p, needs_gt=True) for p in paths], max_value=options.max_value)
        for paths in (options.data, valid_paths)
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
    caches = [CacheFile(path) for path in options.cache]
    notes = {
        **_notes(options, settings),
        "files": [path.name for path in options.data],
        "validation_files": [path.name for path in valid_paths],
        "patches": len(train),
        "validation_patches": len(valid),
    }
    return PatchData(
        train=PatchBatches(CachedDataset(train, caches) if caches else train, sampler),
        valid=valid,
        validation_samples=config.validation_samples,
        workers=config.workers,
        device=options.device,
        notes=notes,
    )


def _beside(path: Path) -> Path:
    """The validation file that belongs to a training file."""
    head, train, tail = path.name.rpartition("train")
    if not train:
        raise UsageError(f"--valid is missing: {path.name} has no `train` in its name to find the validation file by.")
    return path.with_name(f"{head}valid{tail}")


def _notes(options: TrainOptions, settings: Settings) -> dict[str, Any]:
    """For the card: code, command, configuration and origin of the weights."""
    return {
        "code_version": __version__,
        "command": options.command,
        "seed": settings.train.seed,
        "config": resolved_config(options.kind, settings.train, settings.network, settings.options),
        "started_from": None if options.init is None else read_card(options.init).training,
    }
