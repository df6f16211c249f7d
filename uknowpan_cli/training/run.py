"""A training run: processes of torchrun, threads, memory, interruption."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from uknowpan.console import say, stop_requests
from uknowpan.errors import OutputExists, UsageError
from uknowpan.loading import memory_watched
from uknowpan.models.checkpoints import at_most, network_of
from uknowpan.models.devices import tune_cpu, usable_cores
from uknowpan.models.published.stages import PatchStage
from uknowpan.models.training.loop import Stage, train
from uknowpan.models.training.presets import Settings
from uknowpan.models.training.run_folder import ConfigMismatch, resolved_config
from uknowpan.training.jobs import make_job
from uknowpan.training.options import TrainOptions
from uknowpan.training.show import TrainShow, profiled

MOST_TENSORS, MOST_NUMBERS = 2000, 10**10
"""Parameters of a network, and numbers in them, beyond which a configuration is a mistake."""


def described(stage: str, settings: Settings) -> dict[str, Any]:
    """The configuration of a run as config.json holds it, and the count of trained parameters."""
    try:
        with torch.device("meta"), at_most(MOST_TENSORS, MOST_NUMBERS):
            network = network_of(settings.network)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"[network]: there is no such network ({error}).") from error
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return {**resolved_config(stage, settings.train, settings.network, settings.options), "parameters": parameters}


def run(options: TrainOptions, settings: Settings, *, quiet: bool) -> Path | None:
    """Train; returns the path of the best checkpoint, in the first process only."""
    out = options.out
    if not options.resume and (out / "state.pt").exists():
        raise OutputExists(f"{out} holds a run already; --resume goes on with it, or choose another folder.")
    tune_cpu(options.num_threads or _threads_of_one())
    remedy = f"with a batch_size of {settings.train.batch_size}; begin anew with a lower one in [train] of --config."
    with _processes(options.device) as first, memory_watched(remedy):
        job = make_job(options, settings)
        if first and not quiet:
            _say_scales(job)
        show = TrainShow(out, settings.train.iterations, quiet=quiet or not first, writes=first)
        try:
            profile = profiled(out / "profile.txt") if options.profile and first else nullcontext(lambda: None)
            with stop_requests() as stopping, profile as timed:

                def after_step(step: int, parts: dict[str, float]) -> None:
                    show.step(step, parts)
                    timed()

                best = train(
                    *(job, settings.train, out),
                    resume=options.resume,
                    init=options.init,
                    device=options.device,
                    on_step=after_step,
                    on_log=show.log,
                    on_examples=show.examples,
                    should_stop=lambda: bool(stopping),
                )
        except ConfigMismatch as error:
            raise UsageError(str(error)) from error
        finally:
            show.close()
        return best if first else None


def _say_scales(job: Stage) -> None:
    """A line for every file whose sensor and full scale its name decided."""
    for dataset in (job.data.dataset, job.data.valid) if isinstance(job, PatchStage) else ():
        for file, scale in zip(dataset.files, dataset.scales, strict=True):
            if file.header.by_name:
                say(f"{Path(file.path).name}: {file.header.sensor} by its name, full scale {scale:g}")


def own_device(device: str) -> str:
    """The device of this process: under torchrun each process of a machine has a GPU of its own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _threads_of_one() -> int | None:
    """Threads of each process of a machine, which share its cores."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if processes == 1 else max(1, usable_cores() // processes)


@contextmanager
def _processes(device: str) -> Iterator[bool]:
    """Join the other processes of torchrun; yields whether this process is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    # The others wait while the first one validates, which may take longer than torch's 10 minutes.
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()
