"""Compare the results of two revisions to the bit, on six real scenes and one machine; prints Markdown.

    python tests/benchmarks/bits.py --before REVISION --imagery FOLDER

Both revisions are checked out into temporary worktrees and run as a user would run them, one after the other.
Pixels, nodata, dtype, georeferencing, band descriptions and tags must be equal; tags of the version and the
registration are left out. Networks get one softness, since the default has changed.
The exit code is 1 if anything differs. FOLDER holds `scenes/` and `pairs/`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

ROOT = Path(__file__).parents[2]
FREE_TAGS = {f"UKNOWPAN_{name}" for name in ("VERSION", "REGISTRATION", "MEASURED_SHIFT", "LARGEST_DISPLACEMENT")}
SIGMA = "sigma.tif"


@dataclass(frozen=True)
class Case:
    """One call of `uknowpan sharpen`: input files below the imagery's folder, and options."""

    name: str
    files: tuple[str, ...]
    options: tuple[str, ...] = ()


CASES = (
    Case("VHR, ratio 4", ("scenes/vhr_henan_4band/pan.tif", "scenes/vhr_henan_4band/ms.tif")),
    Case(
        "Landsat-8, ratio 2, float32, bands in files",
        tuple(f"scenes/landsat8_separate_bands/l8_B{n}.tif" for n in (8, 2, 3, 4)),
        ("--output-dtype", "float32", "--seed", "3"),
    ),
    Case("Landsat-8, nodata, holes", ("holes_pan.tif", "holes_ms.tif")),
    Case(
        "Pleiades, ratio 4, uncertainty",
        ("pairs/pleiades_urban_pan.tif", "pairs/pleiades_urban_ms.tif"),
        ("--uncertainty", SIGMA, "--softness", "ms"),
    ),
    Case(
        "WorldView-2, float64, GSA",
        ("scenes/rotterdam_ratio2_float64/pan1.tif", "scenes/rotterdam_ratio2_float64/ms1.tif"),
        ("--method", "gsa"),
    ),
    Case(
        "QuickBird, MS on the PAN's grid, MTF-GLP",
        tuple(f"scenes/quickbird_toulouse_ms_on_pan_grid/QB_Toulouse_Ortho_{n}.tif" for n in ("PAN", "XS")),
        ("--method", "mtf-glp", "--consistency", "1"),
    ),
)


def write_holes(imagery: Path, folder: Path) -> None:
    """A Landsat-8 pair with nodata in a corner, and in round holes of the PAN and of the MS."""
    for name, factor in (("pan", 1), ("ms", 2)):
        with rasterio.open(imagery / "scenes/landsat8_float_nodata" / f"{name}_example.tif") as source:
            data, profile = source.read(), source.profile
        rows, cols = np.ogrid[: data.shape[1], : data.shape[2]]
        hole = (rows * factor - 300) ** 2 + (cols * factor - 200 * factor) ** 2 < 50**2
        data[:, hole | ((rows + 2 * cols) * factor < 300)] = profile["nodata"]
        with rasterio.open(folder / f"holes_{name}.tif", "w", **profile) as target:
            target.write(data)


@contextmanager
def checkout(revision: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """The name of the revision's package, and a folder on the import path from which it is imported."""
    tree, imports = folder / "tree", folder / "imports"
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
    try:
        project = tomllib.loads((tree / "pyproject.toml").read_text())
        package = project["project"]["scripts"]["uknowpan"].split(".")[0]
        places = {package: "uknowpan_cli", **project["tool"]["setuptools"]["package-dir"]}
        for name, place in sorted(places.items()):
            link(tree / place, imports / name.replace(".", "/"))
        yield package, imports
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def link(source: Path, target: Path) -> None:
    """A folder of links to the source's files, so that other packages can be put beside them."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.name != "__pycache__":
            (target / path.name).symlink_to(path)


def sharpen(package: str, imports: Path, case: Case, imagery: Path, inputs: Path, output: Path) -> None:
    """Run one case; the uncertainty is written beside the output."""
    output.mkdir(parents=True)
    files = [str((inputs if name.startswith("holes") else imagery) / name) for name in case.files]
    options = [str(output / word) if word == SIGMA else word for word in case.options]
    command = [sys.executable, "-P", "-m", package, "sharpen", *files, "-o", str(output / "sharp.tif")]
    command += ["--coregister", "off", "-q", *options]
    if not {"--method", "--softness"} & set(options):
        command += ["--softness", "0.45"]
    environment = {**os.environ, "PYTHONPATH": str(imports)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=output)
    if done.returncode:
        raise SystemExit(f"{case.name}: exit code {done.returncode} of {' '.join(command)}\n{done.stderr}")


def differences(one: Path, other: Path) -> list[str]:
    """The names of the things that differ between two rasters."""
    with rasterio.open(one) as a, rasterio.open(other) as b:
        parts = ["dtypes", "nodatavals", "transform", "crs", "shape", "count", "descriptions", "colorinterp"]
        parts += ["scales", "offsets", "units", "compression", "block_shapes"]
        found = [name for name in parts if repr(getattr(a, name)) != repr(getattr(b, name))]
        for index in range(a.count + 1):
            left, right = a.tags(index) if index else a.tags(), b.tags(index) if index else b.tags()
            names = sorted((left.keys() | right.keys()) - FREE_TAGS)
            found += [f"tag {name}" for name in names if left.get(name) != right.get(name)]
        if a.shape == b.shape and a.count == b.count:
            first, second = a.read(), b.read()
            if first.tobytes() != second.tobytes():
                # Whole numbers would wrap around, and NaN is not equal to itself.
                unequal = (first != second) & ~((first != first) & (second != second))
                gap = np.abs(first.astype("f8") - second.astype("f8"))[unequal]
                found.append(f"{unequal.sum()} of {first.size} values, by at most {gap.max(initial=0):g}")
            if (a.dataset_mask() != b.dataset_mask()).any():
                found.append("mask")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="revision to compare with")
    parser.add_argument("--after", default="HEAD")
    parser.add_argument("--imagery", type=Path, required=True)
    arguments = parser.parse_args()
    imagery, equal = arguments.imagery.resolve(), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_holes(imagery, folder)
        for side, revision in (("before", arguments.before), ("after", arguments.after)):
            with checkout(revision, folder / side) as (package, imports):
                for number, case in enumerate(CASES):
                    sharpen(package, imports, case, imagery, folder, folder / side / str(number))
        print("| scene | file | values | differs in |\n|---|---|---|---|")
        for number, case in enumerate(CASES):
            for path in sorted((folder / "before" / str(number)).glob("*.tif")):
                found = differences(path, folder / "after" / str(number) / path.name)
                equal = equal and not found
                with rasterio.open(path) as dataset:
                    size = dataset.count * dataset.height * dataset.width
                print(f"| {case.name} | {path.name} | {size} | {', '.join(found) or 'nothing'} |")
    raise SystemExit(0 if equal else 1)


if __name__ == "__main__":
    main()
