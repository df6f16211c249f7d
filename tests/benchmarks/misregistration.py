"""What a shift between PAN and MS does to the result, and what `--coregister shift` gives back.

    python tests/benchmarks/misregistration.py runs/scenes.h5 [--model FILE] [--only NAMES]
    python tests/benchmarks/misregistration.py --picture docs/misregistration.png

Scenes of the split "valid" are degraded with MTF 0.30 and sampled off their place, written as
GeoTIFFs that claim to nest, and sharpened as `uknowpan sharpen` does; the MS reaches beyond the
PAN, so that no side of it is lost when it is moved. The demo scene's MS keeps its pixels instead,
ends with the PAN, and has a wrong geotransform. The truth lies on the PAN. Prints Markdown.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from affine import Affine
from rasterio.crs import CRS
from torch import Tensor
from validate import COARSE_PAN, geometric_mean, prepare

from uknowpan.datasets.synthetic import SyntheticScene, make_scene, write_scene
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.metrics.indices import ergas
from uknowpan.models.resample import box_mean, crop, cubic, decimate
from uknowpan.models.sharpeners import Sharpener, load_sharpener
from uknowpan.models.training.degradations import Degradation, degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes
from uknowpan.opening import PairRequest, coregistered, open_request
from uknowpan.options import Coregister
from uknowpan.pictures import Stretch, enlarge, panels, stretch_from, write_png
from uknowpan.sharpening import SharpenOptions, sharpen_scene
from uknowpan.tiling import OutputOptions

Shift = tuple[float, float]

SHIFTS: tuple[Shift, ...] = (*((0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (1.4, -1.4), (2.0, 2.0), (-2.0, 1.0), (3.0, 3.0)),)
"""(dy, dx) in PAN pixels: an MS pixel shows what PAN shows so far down and right of its place."""
PLACED: Shift = (2.0, 2.0)
"""The one of them at which it is looked where brightness and colours lie."""
SIDE, RIM, BORDER = 256, 16, 16
"""PAN pixels: a scene's side, what the MS has beyond the PAN, and what is not compared."""
LEAST_MS = 16
"""MS pixels along a side: scenes with fewer are left out, no shift is measured on them."""
SMOOTHED, DETAIL = 5, 33
"""PAN pixels, for places: over which colours are smoothed, and whose mean is taken off."""
GAIN = 0.30
WHOLE = "whole"
"""What `shift` could do: the MS is moved by whole PAN pixels, so that nothing is resampled, and
the rest is left to the student."""
UTM, PIXEL = CRS.from_epsg(32631), 0.5
CORNER = Affine(PIXEL, 0, 464_000.0, 0, -PIXEL, 5_242_000.0)

DEMO_SIZES = (512, 256)

PICTURE_SHIFTS: tuple[Shift, ...] = ((0.0, 0.0), (1.0, 1.0), (2.0, 2.0))
PICTURE_CROP, PICTURE_ENLARGED = (slice(250, 322), slice(308, 380)), 3

Files = tuple[Path, Path]
"""PAN and MS."""
Variant = tuple[str, str]
"""A method with how it is coregistered: a value of `Coregister`, or `WHOLE`."""
KINDS: tuple[Variant, ...] = (
    *(("student", "off"), ("student", "shift"), ("student", WHOLE)),
    *(("gsa", "off"), ("gsa", "shift"), ("mtf-glp", "off"), ("brovey", "off"), ("bicubic", "off")),
)
DEMO_KINDS: tuple[Variant, ...] = (
    *(("student", "off"), ("student", "check"), ("student", "shift"), ("student", WHOLE)),
    *(("gsa", "off"), ("gsa", "shift"), ("gsa", WHOLE)),
    *(("brovey", "off"), ("brovey", "shift"), ("bicubic", "off")),
)
PICTURE_KINDS: tuple[Variant, ...] = (*(("brovey", "off"), ("gsa", "off"), ("student", "off"), ("student", "shift")),)


@dataclass(frozen=True)
class Result:
    """One variant on one scene with one shift."""

    truth: float
    """ERGAS against the truth, which lies on the PAN."""
    unshifted: float
    """ERGAS against the same method's result for the MS in its place, not coregistered."""
    left: tuple[float, float]
    """Share of the shift that is left in brightness and in colours."""


Table = dict[Shift, dict[Variant, Result]]


def sharpened(files: Files, sharpener: Sharpener, mode: str) -> tuple[Tensor, Shift | None]:
    """(C, H, W) as `uknowpan sharpen --coregister MODE` writes it, and where the MS lies by it."""
    if mode == WHOLE:
        return sharpened_whole(files, sharpener)
    request = PairRequest(
        *(str(files[0]), [str(files[1])]),
        pan_band=None, bidx=None, nodata=None, ratio=None, resampling="cubic", bounds=None,
    )  # fmt: skip
    logging.getLogger("uknowpan").disabled = True  # it tells of every shift
    target = files[1].with_name("fused.tif")
    pair = open_request(request)
    try:
        pair, survey = coregistered(request, pair, Coregister(mode), sharpener, None)
        writing = OutputOptions(overwrite=True)
        options = SharpenOptions(str(target), writing=writing, survey=survey)
        sharpen_scene(pair, sharpener, options)
    finally:
        pair.close()
    with rasterio.open(target) as dataset:
        return torch.from_numpy(dataset.read().astype(np.float32)), survey.offset


def sharpened_whole(files: Files, sharpener: Sharpener) -> tuple[Tensor, Shift | None]:
    """As `sharpened`, the geotransform moved back by what MS lies off in whole PAN pixels.

    PAN is cut to whole MS pixels then: of a small scene with ragged sides no blur is measured.
    """
    lies = sharpened(files, sharpener, "check")[1]
    if lies is None:
        return sharpened(files, sharpener, "off")
    whole_pan, moved = (files[1].with_name(name) for name in ("cut.tif", "moved.tif"))
    shutil.copyfile(files[1], moved)
    with rasterio.open(files[0]) as pan, rasterio.open(moved, "r+") as ms:
        values, place = torch.from_numpy(pan.read().astype(np.float32)), pan.transform
        ratio = round(ms.transform.a / place.a)
        ms.transform *= Affine.translation(-round(lies[1]) / ratio, -round(lies[0]) / ratio)
        col, row = (round(v) % ratio for v in ~place * (ms.transform.c, ms.transform.f))
    height, width = values.shape[1:]
    rows, cols = (height - row) // ratio * ratio, (width - col) // ratio * ratio
    window = (slice(None), slice(row, row + rows), slice(col, col + cols))
    write(whole_pan, values[window], place * Affine.translation(col, row))
    fused, _ = sharpened((whole_pan, moved), sharpener, "off")
    whole = torch.full((len(fused), height, width), torch.nan)
    whole[window] = fused
    return whole, lies


def write(path: Path, values: Tensor, transform: Affine) -> Path:
    """Float GeoTIFF of (C, h, w)."""
    count, height, width = values.shape
    with rasterio.open(
        *(path, "w"), driver="GTiff", count=count, height=height, width=width, dtype="float32",
        crs=UTM, transform=transform,
    ) as dataset:  # fmt: skip
        dataset.write(values.float().numpy())
    return path


def displaced(scene: SyntheticScene, shift: Shift, folder: Path) -> Files:
    """The demo scene's files; the MS's geotransform is so wrong that it shows `shift` further."""
    paths = write_scene(scene, folder)
    with rasterio.open(paths.ms, "r+") as dataset:
        off = Affine.translation(-shift[1] / scene.ratio, -shift[0] / scene.ratio)
        dataset.transform = dataset.transform * off
    return paths.pan, paths.ms


def inside(x: Tensor) -> Tensor:
    return x[..., BORDER:-BORDER, BORDER:-BORDER].double()


def left_of(fused: Tensor, truth: Tensor, shift: Shift) -> float:
    """The t for which the truth moved by t times the shift correlates best with the result.

    0: it lies on the PAN. 1: it lies where the MS says.
    """
    shares = torch.arange(-0.2, 1.21, 0.1)
    wanted = _detail(fused)

    def likeness(share: float) -> float:
        offset = (share * shift[0], share * shift[1])
        moved = _detail(decimate(truth[None], 1, cubic(1.0), offset, 6)[0])
        return float((moved * wanted).sum() / moved.norm())

    return float(shares[int(np.argmax([likeness(float(t)) for t in shares]))])


def _detail(x: Tensor) -> Tensor:
    x = inside(x)
    return x - box_mean(x[None], DETAIL)[0]


def brightness(x: Tensor) -> Tensor:
    return x.mean(0, keepdim=True)


def colours(x: Tensor) -> Tensor:
    """Shares of the bands in their sum, smoothed: fine shares are the injection's, not the MS's."""
    smooth = box_mean(x[None], SMOOTHED)[0]
    return smooth / smooth.sum(0, keepdim=True).clamp_min(1e-6)


def places(fused: Tensor, truth: Tensor, shift: Shift) -> tuple[float, float]:
    """`left_of` of brightness and of colours."""
    return (
        left_of(brightness(fused), brightness(truth), shift),
        left_of(colours(fused), colours(truth), shift),
    )


def cut(scene: Scene) -> tuple[Tensor, Tensor, int]:
    """Truth, PAN and ratio."""
    ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
    gt, pan = (x[:, :SIDE, :SIDE] for x in prepare(scene, ratio))
    return gt, pan, ratio


def measurable(scene: Scene) -> bool:
    """Whether what is left inside the rim is large enough for `estimate_psf`."""
    gt, _, ratio = cut(scene)
    return min(gt.shape[1:]) - 2 * RIM >= LEAST_MS * ratio


def measure(scene: Scene, methods: Mapping[str, Sharpener]) -> Table:
    """All shifts and variants of one scene."""
    gt, pan, ratio = cut(scene)
    table: Table = {}
    unshifted: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        inner = CORNER * Affine.translation(RIM, RIM)
        pan_file = write(Path(folder) / "pan.tif", crop(pan, RIM), inner)
        truth = crop(gt, RIM)
        for shift in SHIFTS:
            ms = degrade_truth(gt, Degradation(ratio, "gaussian", (GAIN,) * len(gt), shift))
            files = (pan_file, write(Path(folder) / "ms.tif", ms, CORNER * Affine.scale(ratio)))
            table[shift] = {}
            for name, mode in KINDS:
                fused, _ = sharpened(files, methods[name], mode)
                reference = unshifted.setdefault(name, fused)
                table[shift][name, mode] = Result(
                    float(ergas(inside(fused), inside(truth), ratio)),
                    float(ergas(inside(fused), inside(reference), ratio)),
                    places(fused, truth, shift) if shift == PLACED else (0.0, 0.0),
                )
    return table


def title(variant: Variant) -> str:
    name, mode = variant
    return name if mode == "off" else f"{name}, {mode}"


def heading(first: str, columns: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}"


def name_of(shift: Shift) -> str:
    return f"{shift[0]:g}, {shift[1]:g}"


def scene_rows(scene: str, table: Table) -> Iterator[str]:
    """The student: ERGAS against the truth / against the unshifted result."""
    for kind in (k for k in KINDS if k[0] == "student"):
        found = [f"{table[s][kind].truth:.2f} / {table[s][kind].unshifted:.2f}" for s in SHIFTS]
        yield f"| {scene} | {kind[1]} | {' | '.join(found)} |"


def mean_tables(tables: Mapping[str, Table]) -> Iterator[str]:
    """Geometric means over the scenes, variant by variant."""
    columns = [name_of(s) for s in SHIFTS]
    yield "\nERGAS against the truth:\n"
    yield heading("method", columns)
    for kind in KINDS:
        cells = [geometric_mean([t[s][kind].truth for t in tables.values()]) for s in SHIFTS]
        yield f"| {title(kind)} | {' | '.join(f'{c:.2f}' for c in cells)} |"
    yield "\nERGAS against the truth over the method's own without shift; in brackets the worst:\n"
    yield heading("method", columns[1:])
    for kind in KINDS:
        own = [t[SHIFTS[0]][kind[0], "off"].truth for t in tables.values()]
        found = [[t[s][kind].truth for t in tables.values()] for s in SHIFTS[1:]]
        lost = [[a / b for a, b in zip(column, own, strict=True)] for column in found]
        words = [f"{geometric_mean(x):.2f} ({max(x):.2f})" for x in lost]
        yield f"| {title(kind)} | {' | '.join(words)} |"
    yield "\nERGAS between the result and that without shift, mean of the scenes:\n"
    yield heading("method", columns[1:])
    for kind in KINDS:
        cells = [float(np.mean([t[s][kind].unshifted for t in tables.values()])) for s in SHIFTS[1:]]
        yield f"| {title(kind)} | {' | '.join(f'{c:.2f}' for c in cells)} |"
    yield f"\nShare of a shift of {name_of(PLACED)} that is left, mean of the scenes:\n"
    yield heading("method", ["brightness", "colours"])
    for kind in KINDS:
        left = np.mean([t[PLACED][kind].left for t in tables.values()], 0)
        yield f"| {title(kind)} | {left[0]:.2f} | {left[1]:.2f} |"


def demo_table(methods: Mapping[str, Sharpener], size: int) -> Iterator[str]:
    """The demo scene with a wrong geotransform, through the whole tool."""
    scene = make_scene(size)
    truth = torch.from_numpy(scene.truth)
    yield heading(f"demo scene, {size}", [name_of(s) for s in SHIFTS])
    said = []
    for name, mode in DEMO_KINDS:
        cells = []
        for shift in SHIFTS:
            with tempfile.TemporaryDirectory() as folder:
                files = displaced(scene, shift, Path(folder))
                fused, lies = sharpened(files, methods[name], mode)
            cells.append(f"{float(ergas(inside(fused), inside(truth), scene.ratio)):.2f}")
            if (name, mode) == ("student", "check"):
                said.append("-" if lies is None else f"{-lies[0]:.2f}, {-lies[1]:.2f}")
        yield f"| {name}, {mode} | {' | '.join(cells)} |"
    yield f"| shift as measured | {' | '.join(said)} |"


def picture(methods: Mapping[str, Sharpener], target: str) -> None:
    """Crops of the demo scene: rows are shifts, columns PAN, classical methods, the student."""
    scene = make_scene()
    look = stretch_from(scene.truth)
    grey = np.repeat(scene.pan, 3, axis=0)

    def cell(image: np.ndarray, stretch: Stretch) -> np.ndarray:
        return enlarge(stretch.apply(image)[:, *PICTURE_CROP], PICTURE_ENLARGED)

    rows = []
    for shift in PICTURE_SHIFTS:
        row = [(f"PAN, MS off by {shift[0]:g}", cell(grey, stretch_from(grey)))]
        with tempfile.TemporaryDirectory() as folder:
            files = displaced(scene, shift, Path(folder))
            for name, mode in PICTURE_KINDS:
                fused, _ = sharpened(files, methods[name], mode)
                words = f"{name}, {mode}" if name == "student" else name
                row.append((words, cell(fused.numpy(), look)))
        rows.append(row)
    write_png(target, panels(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", nargs="?", help="without it only the demo scene")
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", help="comma-separated scene names")
    parser.add_argument("--picture", help="draw this PNG of the demo scene and do no more")
    arguments = parser.parse_args()
    tune_cpu()
    methods: dict[str, Sharpener] = {"student": load_sharpener(arguments.model)}
    methods |= {m: load_sharpener(None, m) for m in reversed(CLASSICAL_METHODS)}
    if arguments.picture:
        picture(methods, arguments.picture)
        return
    if arguments.scenes:
        tables = {}
        print(heading("scene | student", [name_of(s) for s in SHIFTS]).replace("|---", "|---|---", 1))
        for scene in read_scenes(arguments.scenes, "valid"):
            wanted = not arguments.only or scene.name in arguments.only.split(",")
            if wanted and measurable(scene):
                tables[scene.name] = measure(scene, methods)
                print("\n".join(scene_rows(scene.name, tables[scene.name])), flush=True)
        print("\n".join(mean_tables(tables)), flush=True)
    for size in DEMO_SIZES:
        print("\n" + "\n".join(demo_table(methods, size)), flush=True)


if __name__ == "__main__":
    main()
