"""`uknowpan demo`: a real scene with a known truth, sharpened and scored."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import OutputExists

if TYPE_CHECKING:
    import numpy as np

    from uknowpan.datasets.synthetic import SyntheticScene

METHODS = ("bicubic", "brovey", "gsa")
"""Classical methods shown beside the model."""
PICTURE = "before_after.png"
FILES = ("demo_pan.tif", "demo_ms.tif", "demo_truth.tif", *(f"{m}.tif" for m in (*METHODS, "uknowpan")), PICTURE)
BORDER = 8
"""PAN pixels along the border that scores leave out."""
CROP, DETAIL, ZOOM = (136, 8, 148, 196), (108, 68, 52, 60), 3
"""Row, column, height and width of the part of the scene in the picture, and of its inset in the part."""


def demo(
    out: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="DIR", help="Folder for the scene and the results.")
    ] = Path("demo"),
    size: Annotated[
        int, typer.Option("--size", min=128, max=4096, metavar="PIXELS", help="PAN pixels along a side, up to 304.")
    ] = 512,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sensor noise.")] = 7,
    model: opt.ModelOption = None,
    overwrite: opt.OverwriteOption = False,
    num_threads: opt.ThreadsOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Sharpen a small real scene, score it against its known truth, draw a picture.

    The scene is aerial imagery (USDA NAIP, public domain), degraded to a PAN/MS pair.

    Example: uknowpan demo -o demo
    """
    with opt.guarded(-1 if quiet else verbose):
        # An earlier demo, even an interrupted one, has left the pair, which is written first.
        if not overwrite and not all((out / name).exists() for name in FILES[:2]):
            for name in FILES:
                if (out / name).exists():
                    raise OutputExists(f"{out / name} exists and is no earlier demo's; use --overwrite or another -o.")
        from uknowpan.models.devices import tune_cpu

        tune_cpu(num_threads)
        scores = _run(out, size - size % 16, seed, model)
        if as_json:
            typer.echo(json.dumps({"scores": scores, "picture": str(out / PICTURE)}))
            return
        if not quiet:
            _print_table(scores)
        typer.echo(out / PICTURE)


def _run(out: Path, size: int, seed: int, model: str | None) -> dict[str, dict[str, float]]:
    """Scores by method and index; files are written and read as in a user's run."""
    import rasterio
    import torch

    from uknowpan.datasets.synthetic import load_demo_scene, write_scene
    from uknowpan.loading import load_for
    from uknowpan.models.metrics.indices import ergas, psnr, sam
    from uknowpan.options import SharpenOptions
    from uknowpan.pictures import write_png
    from uknowpan.scenes import prepared
    from uknowpan.sharpening import sharpen_scene

    scene = load_demo_scene(size, seed=seed)
    paths = write_scene(scene, out)
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    truth = torch.from_numpy(scene.truth).double()[inner]
    scores, images = {}, {}
    for name in (*METHODS, "uknowpan"):
        target = str(out / f"{name}.tif")
        way: dict[str, Any] = {"model": model} if name == "uknowpan" else {"method": name}
        options = SharpenOptions(overwrite=True, **way)
        with prepared(str(paths.pan), [str(paths.ms)], target, options, partial(load_for, options)) as opened:
            report = sharpen_scene(opened)
        with rasterio.open(target) as dataset:
            images[name] = dataset.read()
        fused = torch.from_numpy(images[name]).double()[inner]
        scores[name] = {
            "ergas": float(ergas(fused, truth, scene.ratio)),
            "sam": float(sam(fused, truth)),
            "psnr": float(psnr(fused, truth, 255.0)),
            "seconds": report.seconds,
        }
    write_png(out / PICTURE, _draw(scene, images))
    return scores


def _draw(scene: SyntheticScene, images: dict[str, np.ndarray]) -> np.ndarray:
    """PAN, MS, bicubic, Brovey, uknowpan and truth at one stretch, each with an enlarged detail."""
    from uknowpan.pictures import add_inset, enlarge, panels, stretch_from

    look, grey = stretch_from(scene.truth), stretch_from(scene.pan, bands=(0, 0, 0))
    shown = [
        ("PAN, 1 m", grey.apply(scene.pan)),
        ("MS, 4 m", look.apply(enlarge(scene.ms, scene.ratio))),
        ("Bicubic", look.apply(images["bicubic"])),
        ("Brovey", look.apply(images["brovey"])),
        ("uknowpan", look.apply(images["uknowpan"])),
        ("Truth, 1 m", look.apply(scene.truth)),
    ]
    row, column, height, width = CROP

    def cell(picture: np.ndarray) -> np.ndarray:
        if picture.shape[1] < row + height:  # a smaller scene is shown whole
            return enlarge(picture, 2)
        cut = enlarge(picture[:, row : row + height, column : column + width], 2)
        return add_inset(cut, DETAIL, ZOOM)

    cells = [(text, cell(picture)) for text, picture in shown]
    return panels([cells[:3], cells[3:]])


def _print_table(scores: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Against the known truth")
    for name in ("method", "ERGAS (0 is best)", "SAM, degrees (0)", "PSNR, dB", "seconds"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for name, s in scores.items():
        table.add_row(name, f"{s['ergas']:.2f}", f"{s['sam']:.2f}", f"{s['psnr']:.2f}", f"{s['seconds']:.1f}")
    Console(stderr=True).print(table)
