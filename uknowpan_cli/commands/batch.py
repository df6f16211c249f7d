"""`uknowpan batch`: many scenes with one method."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uknowpan import errors as exits
from uknowpan.archive.manifest import Entry, Scene, by_patterns, choose_shard, read_manifest, scenes_of
from uknowpan.archive.report import append_line, merged_report, report_path
from uknowpan.commands import shared as opt
from uknowpan.console import progress, say, to_json
from uknowpan.errors import BatchFailed, InputError, UsageError
from uknowpan.options import INPUT, RESULT, RUN, SharpenOptions

if TYPE_CHECKING:
    from uknowpan.archive.run import BatchSettings, SceneOutcome


log = logging.getLogger("uknowpan")


@opt.shares(without=("bounds", "uncertainty", "preview", "stac", "overwrite", "resume"))
def batch(
    ctx: typer.Context,
    options: SharpenOptions,
    manifest: Annotated[
        str | None,
        typer.Argument(
            metavar="[MANIFEST|FOLDER]",
            help="A folder, whose products and pairs are sharpened. Or a CSV with the columns pan, ms and perhaps id, "
            "output, or JSON lines with these "
            "keys; - is stdin. Several MS files of a scene: with semicolons, or as a JSON list.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None, opt.option("--output -o --out", RESULT, "Folder for the results; made.", "FOLDER")
    ] = None,
    pan_glob: Annotated[
        str | None, opt.option("--pan-glob", INPUT, "Instead of a manifest: PANs, as 'in/*_pan.tif'.", "PATTERN")
    ] = None,
    ms_glob: Annotated[
        str | None, opt.option("--ms-glob", INPUT, "Their MS: * stands for the same text as in the PAN's.", "PATTERN")
    ] = None,
    skip_missing: Annotated[bool, opt.option("--skip-missing", INPUT, "Leave out scenes without PAN or MS.")] = False,
    suffix: Annotated[str, opt.option("--suffix", RESULT, "Outputs are called ID<suffix>.tif.", "TEXT")] = "_sharp",
    uncertainty: Annotated[
        bool, opt.option("--uncertainty", RESULT, "Also write 1-sigma per band: ID_sigma.tif.")
    ] = False,
    shard: Annotated[
        str,
        opt.option(
            "--shard",
            RUN,
            "K/N: only the K-th of N shares, K from 1; none: all; auto: as SLURM, AWS Batch, "
            "Kubernetes or torchrun set it in the environment.",
            "K/N|auto|none",
        ),
    ] = "auto",
    fail_fast: Annotated[bool, opt.option("--fail-fast", RUN, "Stop at the first scene that fails.")] = False,
    retries: Annotated[int, opt.option("--retries", RUN, "More attempts where a failure may pass.", "N", 0)] = 1,
    dask: Annotated[
        str | None,
        opt.option(
            "--dask",
            RUN,
            "Run the scenes on a Dask cluster: local makes one of processes, tcp://HOST:PORT is a scheduler that runs.",
            "local|ADDRESS",
        ),
    ] = None,
    dask_workers: Annotated[
        int | None,
        opt.option("--dask-workers", RUN, "Processes of --dask local; default: one per GPU, or per two cores.", "N", 1),
    ] = None,
    report: Annotated[Path | None, opt.option("--report", RUN, "Only report on the batch in FOLDER.", "FOLDER")] = None,
    overwrite: Annotated[
        bool, opt.option("--overwrite", RUN, "Replace outputs made from other inputs or options.")
    ] = False,
    dry_run: Annotated[bool, opt.option("--dry-run", RUN, "Print what would be done with each scene.")] = False,
    as_json: opt.JsonOption = False,
    log_json: opt.LogJsonOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen many scenes: those in a folder, of MANIFEST, or of --pan-glob and --ms-glob.

    The same command goes on where a run was stopped. An output that is there, made from the same inputs with the same
    options, is skipped. Prints the path of each output; FOLDER/report*.jsonl keeps how every scene ended.

    Example: uknowpan batch --pan-glob 'in/*_pan.tif' --ms-glob 'in/*_ms.tif' -o out
    """
    if report is not None:
        _print_report(report, as_json)
        return
    if dask is not None or dask_workers is not None:
        from uknowpan.archive.cluster import check_cluster

        check_cluster(dask, dask_workers)
    folder = _folder(output)
    entries = _entries(manifest, pan_glob, ms_glob, skip_missing)
    scenes = scenes_of(entries, folder, suffix, uncertainty)
    share = choose_shard(shard, os.environ)
    own = share.share([scene.id for scene in scenes])
    mine = [scene for scene in scenes if scene.id in own]
    if not mine:
        log.warning("none of the %d scenes is in shard %s", len(scenes), share.suffix[1:])
        return
    from uknowpan.archive.run import BatchSettings
    from uknowpan.loading import load_once
    from uknowpan.scenes import check_uncertainty

    options = replace(options, device=_own_device(options.device), overwrite=overwrite)
    settings = BatchSettings(options, str(folder), uncertainty, retries)
    # Workers have devices of their own; here the model is only tried.
    here = options if dask is None or dry_run else replace(options, device="cpu")
    sharpener = load_once(here.of_model)
    check_uncertainty(sharpener, uncertainty, options.coverage)
    if dry_run:
        _plan(mine, settings, as_json)
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = report_path(folder, share)

    def note(outcome: SceneOutcome) -> None:
        append_line(path, outcome.as_dict())
        if as_json:
            _print(to_json(outcome.as_dict()))

    if dask is None:
        outcomes = _in_turn(mine, settings, note, quiet)
    else:
        from uknowpan.archive.cluster import on_cluster

        outcomes = on_cluster(mine, settings, dask, dask_workers, note)
    ended, failed = _shown(outcomes, len(mine), fail_fast, as_json, quiet)
    if failed:
        left = len(mine) - ended
        stopped = f" and {left} were not tried (--fail-fast)" if left else ""
        raise BatchFailed(f"{failed} of {len(mine)} scenes failed{stopped}; see {path}.")


def _folder(output: Path | None) -> Path:
    if output is None:
        raise UsageError("-o names the folder for the results; it is missing.")
    if output.exists() and not output.is_dir():
        raise InputError(f"-o: {output} is a file; name a folder.")
    return output.absolute()


def _holds_products(path: str) -> bool:
    """Whether an argument is a folder or a STAC collection, not a manifest."""
    if os.path.isdir(path) or not path.endswith(".json") or not os.path.isfile(path):
        return os.path.isdir(path)
    from uknowpan.deliveries import stac

    return bool(stac.find(Path(path)))


def _entries(manifest: str | None, pan_glob: str | None, ms_glob: str | None, skip_missing: bool) -> list[Entry]:
    if manifest is not None and pan_glob is None and ms_glob is None and _holds_products(manifest):
        from uknowpan.archive.discovery import by_folder

        entries, left_out = by_folder(Path(manifest).absolute())
        for sentence in left_out:
            log.warning("left out: %s", sentence)
        nothing = f"{manifest} holds no product and no pair of PAN and MS."
    elif manifest is not None and pan_glob is None and ms_glob is None:
        entries = read_manifest(manifest, skip_missing)
        nothing = f"{manifest} names no scene."
    elif manifest is None and pan_glob is not None and ms_glob is not None:
        entries = by_patterns(pan_glob, ms_glob, skip_missing)
        nothing = f"No scene matches {pan_glob} and {ms_glob}."
    else:
        raise UsageError("Give either a MANIFEST or a folder, or --pan-glob and --ms-glob.")
    if not entries:
        raise InputError(nothing)
    return entries


def _own_device(device: str) -> str:
    """The GPU of this process where torchrun started several on a machine."""
    rank = os.environ.get("LOCAL_RANK", "")
    if device != "auto" or not rank.isdigit():
        return device
    from uknowpan.models.devices import gpu_count

    count = gpu_count()
    return f"cuda:{int(rank) % count}" if count else device


def _print_report(folder: Path, as_json: bool) -> None:
    report = merged_report(folder)
    typer.echo(to_json(report.as_dict()) if as_json else report.text())
    if report.of("failed"):
        raise typer.Exit(exits.BATCH)


def _plan(scenes: list[Scene], settings: BatchSettings, as_json: bool) -> None:
    from uknowpan.archive.run import check_scene

    words = {"todo": "to do", "done": "done already", "cannot": "cannot"}
    kept = ("id", "status", "code", "message", "output")
    counts = dict.fromkeys(words, 0)
    for scene in scenes:
        plan = check_scene(scene, settings)
        counts[plan.status] += 1
        if as_json:
            typer.echo(to_json({key: getattr(plan, key) for key in kept}))
        elif plan.status == "cannot":
            typer.echo(f"{plan.id}: cannot ({plan.code}): {plan.message}")
        else:
            typer.echo(f"{plan.id}: {words[plan.status]}: {plan.output}")
    if counts["cannot"]:
        raise BatchFailed(f"{counts['cannot']} of {len(scenes)} scenes cannot be sharpened.")


def _shown(
    outcomes: Generator[SceneOutcome, None, None], count: int, fail_fast: bool, as_json: bool, quiet: bool
) -> tuple[int, int]:
    """Show how scenes end as they do; returns how many have ended and how many of these failed."""
    ended, failed = 0, 0
    try:
        with closing(outcomes):
            for outcome in outcomes:
                ended += 1
                failed += outcome.status == "failed"
                _show(outcome, f"{ended}/{count} {outcome.id}", quiet)
                if outcome.status != "failed" and not as_json:
                    _print(outcome.output)
                if failed and fail_fast:
                    break
    except (exits.Interrupted, KeyboardInterrupt) as error:
        text = f"Interrupted after {ended} of {count} scenes; the same command goes on from there."
        raise exits.Interrupted(text) from error
    return ended, failed


def _in_turn(
    scenes: list[Scene], settings: BatchSettings, note: Callable[[SceneOutcome], None], quiet: bool
) -> Generator[SceneOutcome, None, None]:
    """One scene after the other in this process: `note` has each attempt, yielded is the last.

    Scenes that another run is at come last.
    """
    from uknowpan.archive.run import attempts

    busy: list[Scene] = []
    for number, scene in enumerate(chain(scenes, busy), 1):
        outcome = None
        with progress(f"{min(number, len(scenes))}/{len(scenes)} {scene.id}", quiet, "Mpx") as on_progress:
            for outcome in attempts(scene, settings, on_progress, wait=number > len(scenes)):
                note(outcome)
        if outcome is None:
            log.info("%s: another run is at it; it comes last", scene.id)
            busy.append(scene)
        else:
            yield outcome


def _print(line: str) -> None:
    """A line on stdout; where its reader has gone, as `head` does, the batch goes on without one."""
    try:
        typer.echo(line)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _show(outcome: SceneOutcome, label: str, quiet: bool) -> None:
    """One line on stderr."""
    if outcome.status == "failed":
        tries = f", {outcome.attempts} attempts" if outcome.attempts > 1 else ""
        log.error("%s failed (%d%s): %s", label, outcome.code, tries, outcome.message)
    elif not quiet:
        text = f"{outcome.status} in {outcome.seconds:.1f} s"
        if outcome.megapixels_per_second is not None:
            text += f", {outcome.megapixels_per_second:.3g} Mpx/s, {outcome.peak_mb:.0f} MB"
        say(f"{label}: {text}")
