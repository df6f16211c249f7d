"""`uknowpan demo`: a made-up scene with a known truth, sharpened and scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from uknowpan import options as opt
from uknowpan.errors import OutputExists

METHODS = ("bicubic", "brovey", "gsa")
"""Classical methods shown beside the model."""

PICTURE = "before_after.png"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the scene and results.")] = Path("demo"),
    size: Annotated[int, typer.Option("--size", min=128, max=4096, help="PAN pixels along a side.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="Of the scene.")] = 7,
    model: opt.ModelOption = None,
    overwrite: opt.OverwriteOption = False,
    num_threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Make a small georeferenced scene, sharpen it, score it against its truth, draw a picture."""
    with opt.guarded(-1 if quiet else verbose), opt.bounded_gdal_cache():
        if not overwrite:
            _spare_foreign_files(out)
        from uknowpan.models.devices import tune_cpu

        tune_cpu(num_threads)
        size -= size % 16
        scores = _run(out, size, seed, model)
        picture = out / PICTURE
        if as_json:
            typer.echo(json.dumps({"scores": scores, "picture": str(picture)}))
            return
        if not quiet:
            _table(scores)
        typer.echo(picture)


def _spare_foreign_files(out: Path) -> None:
    """Exit with 4 where the demo would replace files that no demo made: an earlier one, even
    if it was interrupted, has left the made-up scene, which it writes first."""
    if (out / "demo_pan.tif").exists() and (out / "demo_ms.tif").exists():
        return
    scene = ("demo_pan.tif", "demo_ms.tif", "demo_truth.tif")
    for name in (*scene, *(f"{m}.tif" for m in (*METHODS, "uknowpan")), PICTURE):
        if (out / name).exists():
            raise OutputExists(f"{out / name} exists and is no earlier demo's; use --overwrite or another --out.")


def _run(out: Path, size: int, seed: int, model: str | None) -> dict[str, dict[str, float]]:
    """Everything that the demo does, through files like a user's run."""
    import numpy as np
    import rasterio
    import torch

    from uknowpan.datasets.demo_scene import make_demo_scene, write_demo_scene
    from uknowpan.models.metrics.indices import ergas, psnr, sam
    from uknowpan.models.sharpeners import load_sharpener
    from uknowpan.pictures import panels, stretch_from, write_png
    from uknowpan.sharpening import SharpenOptions, sharpen_scene
    from uknowpan.tiling import OutputOptions, open_pair

    out.mkdir(parents=True, exist_ok=True)
    scene = make_demo_scene(size=size, seed=seed)
    paths = write_demo_scene(scene, out)
    truth = torch.from_numpy(np.asarray(scene.truth)).double()
    inner = (..., slice(8, -8), slice(8, -8))
    sharpeners = {name: load_sharpener(None, name) for name in METHODS}
    sharpeners["uknowpan"] = load_sharpener(model)
    scores, images = {}, {}
    for name, sharpener in sharpeners.items():
        target = str(out / f"{name}.tif")
        with open_pair(str(paths.pan), [str(paths.ms)]) as pair:
            report = sharpen_scene(pair, sharpener, SharpenOptions(target, writing=OutputOptions(overwrite=True)))
        with rasterio.open(target) as dataset:
            images[name] = dataset.read().astype(np.float32)
        fused = torch.from_numpy(images[name]).double()
        scores[name] = {
            "ergas": float(ergas(fused[inner], truth[inner], scene.ratio)),
            "sam": float(sam(fused[inner], truth[inner])),
            "psnr": float(psnr(fused[inner], truth[inner], 2047.0)),
            "seconds": report.seconds,
        }
    look = stretch_from(scene.truth)
    side = min(size, 256)
    start = (size - side) // 2
    window = (slice(None), slice(start, start + side), slice(start, start + side))
    ms = scene.ms.repeat(scene.ratio, axis=1).repeat(scene.ratio, axis=2)
    grey = np.repeat(scene.pan, 3, axis=0)
    pictures = {
        "PAN": stretch_from(grey).apply(grey),
        f"MS, {scene.ratio} x coarser": look.apply(ms),
        **{name: look.apply(images[name]) for name in sharpeners},
        "truth": look.apply(scene.truth),
    }

    def cell(title: str, key: str) -> tuple[str, np.ndarray]:
        cut = pictures[key][window]
        return title, cut.repeat(2, axis=1).repeat(2, axis=2)

    coarse = f"MS, {scene.ratio} x coarser"
    rows = [
        [cell("PAN", "PAN"), cell("MS as delivered", coarse), cell("bicubic", "bicubic")],
        [cell("Brovey", "brovey"), cell("uknowpan", "uknowpan"), cell("truth", "truth")],
    ]
    write_png(out / PICTURE, panels(rows))
    return scores


def _table(scores: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Against the known truth")
    for name in ("method", "ERGAS (0 is best)", "SAM, degrees (0)", "PSNR, dB", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, s in scores.items():
        table.add_row(
            name,
            f"{s['ergas']:.2f}",
            f"{s['sam']:.2f}",
            f"{s['psnr']:.2f}",
            f"{s['seconds']:.1f}",
        )
    Console(stderr=True).print(table)
