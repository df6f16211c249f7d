"""Mistakes of every kind: one sentence, the exit code of its kind, and no half-made file."""

import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasters import ORIGIN, write_raster
from running import MakePair, Run, flip_blocks, listing, truncate, write_tiny_model

Arguments = Sequence[object]


@dataclass
class Bench:
    """The folder, the pairs and the model of a row of the table."""

    folder: Path
    pair: MakePair
    model: Path

    @property
    def output(self) -> Path:
        return self.folder / "out.tif"

    def typed(self, *more: object, **options: object) -> list[object]:
        """Arguments for a pair made with `options`."""
        pair = self.pair(**options)
        return [pair.pan, *pair.ms, *more]


def plain(*more: object, **options: object) -> Callable[[Bench], Arguments]:
    return lambda bench: bench.typed(*more, **options)


def spoiled(which: str, change: Callable[[Path], None], **options: object) -> Callable[[Bench], Arguments]:
    """Arguments for a good pair of which one file is changed."""

    def prepare(bench: Bench) -> Arguments:
        pair = bench.pair(**options)
        change(Path({"pan": pair.pan, "ms": pair.ms[0]}[which]))
        return [pair.pan, *pair.ms]

    return prepare


def empty(path: Path) -> None:
    path.write_bytes(b"")


def become_text(path: Path) -> None:
    path.write_text("This is no raster at all.\n" * 20)


def become_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def become_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def set_values(which: str, value: float) -> Callable[[Bench], Arguments]:
    """A pair in which all pixels of one raster have one value."""

    def change(path: Path) -> None:
        with rasterio.open(path, "r+") as dataset:
            dataset.write(np.full((dataset.count, *dataset.shape), value, "float32"))

    return spoiled(which, change, dtype="float32", nodata=-1.0, pan_nodata=-1.0)


def ms_in(crs: str) -> Callable[[Bench], Arguments]:
    """The same numbers in another CRS."""

    def change(path: Path) -> None:
        with rasterio.open(path, "r+") as dataset:
            dataset.crs = crs

    return spoiled("ms", change)


def many_pan_bands(bench: Bench) -> Arguments:
    pair = bench.pair()
    place = Affine.translation(*ORIGIN) @ Affine.scale(0.5, -0.5)
    three = np.repeat(pair.pan_values[None], 3, axis=0)
    return [write_raster(bench.folder / "pan3.tif", three, place), *pair.ms]


def complex_ms(bench: Bench) -> Arguments:
    pair = bench.pair()
    place = Affine.translation(*ORIGIN) @ Affine.scale(2, -2)
    values = pair.ms_values.astype("complex64")
    return [pair.pan, write_raster(bench.folder / "complex.tif", values, place)]


def ground_control_points(bench: Bench) -> Arguments:
    pair = bench.pair()
    path = bench.folder / "gcp.tif"
    points = [
        rasterio.control.GroundControlPoint(row=r, col=c, x=500_000 + 2 * c, y=5_000_000 - 2 * r)
        for r, c in ((0, 0), (0, 20), (24, 0), (24, 20))
    ]
    with rasterio.open(pair.ms[0]) as source:
        profile = {**source.profile, "transform": None, "crs": None}
        with rasterio.open(path, "w", **profile) as dataset:
            dataset.gcps = (points, source.crs)
            dataset.write(source.read())
    return [pair.pan, path]


def existing(bench: Bench) -> Arguments:
    bench.output.write_text("precious")
    return bench.typed("-o", bench.output)


def onto(which: str, how: str = "same") -> Callable[[Bench], Arguments]:
    """The output is an input, by its own name or through a link."""

    def prepare(bench: Bench) -> Arguments:
        pair = bench.pair()
        target = Path({"pan": pair.pan, "ms": pair.ms[0]}[which])
        if how == "symlink":
            link = bench.folder / "link.tif"
            link.symlink_to(target)
            target = link
        elif how == "dotted":
            target = target.parent / ".." / target.parent.name / target.name
        return [pair.pan, *pair.ms, "-o", target, "--overwrite"]

    return prepare


def pipe(bench: Bench) -> Arguments:
    os.mkfifo(bench.output)
    return bench.typed("-o", bench.output, "--overwrite")


def onto_archive(bench: Bench) -> Arguments:
    """The rasters are read out of the zip file that the output would replace."""
    pair = bench.pair()
    archive = bench.folder / "scene.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (pair.pan, *pair.ms):
            file.write(path, Path(path).name)
    inside = [f"/vsizip/{archive}/{Path(path).name}" for path in (pair.pan, *pair.ms)]
    return [*inside, "-o", archive, "--overwrite"]


def onto_vrt_source(bench: Bench) -> Arguments:
    pair = bench.pair()
    vrt = bench.folder / "ms.vrt"
    rasterio.shutil.copy(pair.ms[0], vrt, driver="VRT")
    return [pair.pan, vrt, "-o", pair.ms[0], "--overwrite"]


def onto_model(bench: Bench) -> Arguments:
    model = shutil.copy(bench.model, bench.folder / "model.safetensors")
    return bench.typed("-o", model, "--model", model, "--overwrite")


def checkpoint(make: Callable[[Path, Path], None]) -> Callable[[Bench], Arguments]:
    """--model with a file made by make(path, a good checkpoint)."""

    def prepare(bench: Bench) -> Arguments:
        path = bench.folder / "model.safetensors"
        make(path, bench.model)
        return bench.typed("--model", path)

    return prepare


def pickled(path: Path, good: Path) -> None:
    """Loading it would make a folder called `hacked`."""

    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path.parent / "hacked"),)

    path.write_bytes(pickle.dumps(Evil()))


def without_card(path: Path, good: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, "float32")}, path)


def relabelled(old: str, new: str) -> Callable[[Path, Path], None]:
    """A card that does not describe the weights."""

    def make(path: Path, good: Path) -> None:
        data = good.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = data[8 : 8 + length].decode().replace(old, new)
        assert header.encode() != data[8 : 8 + length]
        path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])

    return make


other_widths = relabelled('\\"width\\": 4', '\\"width\\": 8')
other_depth = relabelled('\\"deep_blocks\\": 1', '\\"deep_blocks\\": 80')


def not_a_number(path: Path, good: Path) -> None:
    """A training that went wrong: the card is fine, the weights are NaN."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(good, framework="np") as file:
        metadata = file.metadata()
    save_file({k: v * np.float32("nan") for k, v in load_file(good).items()}, path, metadata)


def card(**changes: object) -> Callable[[Path, Path], None]:
    return lambda path, good: (write_tiny_model(path, **changes), None)[1]


@dataclass(frozen=True)
class Row:
    """One mistake."""

    name: str
    code: int
    text: str
    """Pattern that the sentence holds, case ignored."""
    prepare: Callable[[Bench], Arguments]
    usage: bool = False
    """The parser refuses it, with a hint on usage around it."""


BLOCKS = {"compress": "deflate", "blockysize": 4}

TABLE = [
    Row("missing pan", 3, "no such file", lambda b: [b.folder / "none.tif", *b.pair().ms]),
    Row("missing ms", 3, "no such file", lambda b: [b.pair().pan, b.folder / "none.tif"]),
    Row("missing second ms", 3, "no such file", plain("nowhere.tif")),
    Row("empty pan", 3, "cannot be opened", spoiled("pan", empty)),
    Row("empty ms", 3, "cannot be opened", spoiled("ms", empty)),
    Row("truncated pan", 3, "cannot be", spoiled("pan", truncate)),
    Row("truncated ms", 3, "cannot be", spoiled("ms", truncate)),
    Row("corrupt ms", 3, "cannot be read", spoiled("ms", flip_blocks, **BLOCKS)),
    Row("text as pan", 3, "cannot be opened", spoiled("pan", become_text)),
    Row("text as ms", 3, "cannot be opened", spoiled("ms", become_text)),
    Row("folder as pan", 3, "cannot be opened", spoiled("pan", become_folder)),
    Row("folder as ms", 3, "cannot be opened", spoiled("ms", become_folder)),
    Row("pipe as ms", 3, "is a pipe", spoiled("ms", become_pipe)),
    Row("pan without a place", 3, "no georeferencing", plain(georeferenced=(False, True))),
    Row("ms without a place", 3, "no georeferencing", plain(georeferenced=(True, False))),
    Row("no place, odd sizes", 3, "no exact multiple", plain(georeferenced=(False, False), pan_shape=(97, 80))),
    Row("ground control points", 3, "orthorectify", ground_control_points),
    Row("another zone", 3, "do not overlap", ms_in("EPSG:32601")),
    Row("another planet", 3, "cannot be transformed|do not overlap", ms_in("+proj=longlat +R=3396190 +no_defs")),
    Row("far away", 3, "do not overlap", plain(offset=(5000, 0))),
    Row("swapped", 3, "bands.*swapped", lambda b: [b.pair().ms[0], b.pair().pan]),
    Row("swapped, one band", 3, "swapped", lambda b: [(p := b.pair(bands=1)).ms[0], p.pan]),
    Row("ratio one half", 3, "swapped", plain(ratio=0.5, ms_shape=(64, 64))),
    Row("ratio 1.4", 3, "1.4 x 1.4 PAN.*hardly coarser", plain(ratio=1.4, ms_shape=(40, 40))),
    Row("ratio 16", 3, "up to 8", plain(ratio=16, ms_shape=(8, 8))),
    Row("ratio 7", 5, "ratio is 7.*serves 2 to 6", plain(ratio=7, ms_shape=(12, 12))),
    Row("rotated apart", 3, "rotated", lambda b: [b.pair(name="a", rotation=3).pan, *b.pair(name="b").ms]),
    Row("pan of three bands", 3, "3 bands; choose one", many_pan_bands),
    Row("pan band 9", 3, "no band 9", plain("--pan-bidx", 9)),
    Row("pan band 0", 2, "pan-bidx", plain("--pan-bidx", 0), usage=True),
    Row("ms band 9", 3, "band 9 does not exist", plain("--bidx", "1,9")),
    Row("ms band 0", 2, "--bidx takes band numbers", plain("--bidx", "0,1")),
    Row("ms band 1.5", 2, "--bidx takes band numbers", plain("--bidx", "1.5")),
    Row("ms band nan", 2, "--bidx takes", plain("--bidx", "nan")),
    Row("ms band inf", 2, "--bidx takes", plain("--bidx", "inf")),
    Row("ms band nonsense", 2, "--bidx takes numbers", plain("--bidx", "red")),
    Row("ms band empty", 2, "--bidx takes numbers", plain("--bidx", "")),
    Row("band=0", 3, "band must be a number", lambda b: [(p := b.pair()).pan, f"{p.ms[0]},band=0"]),
    Row("wrong band count", 5, "3 bands, but model tiny was trained for 4",
        lambda b: b.typed("--model", write_tiny_model(b.folder / "four.safetensors", bands=4), bands=3)),
    Row("pan all nodata", 3, "no pixel is valid", set_values("pan", -1.0)),
    Row("ms all nodata", 3, "no pixel is valid", set_values("ms", -1.0)),
    Row("pan all nan", 3, "no pixel is valid", set_values("pan", np.nan)),
    Row("ms all inf", 3, "no pixel is valid", set_values("ms", np.inf)),
    Row("bounds of no size", 3, "are empty", plain("--bounds", "500010,4999960,500010,4999990")),
    Row("bounds upside down", 3, "are empty", plain("--bounds", "500010,4999990,500020,4999960")),
    Row("bounds outside", 3, "outside of the PAN", plain("--bounds", "0,0,10,10")),
    Row("bounds nonsense", 2, "--bounds takes 4 numbers", plain("--bounds", "here")),
    Row("bounds of three", 2, "--bounds takes 4 numbers", plain("--bounds", "1,2,3")),
    Row("bounds nan", 2, "--bounds takes 4", plain("--bounds", "nan,0,1,1")),
    Row("bounds inf", 2, "--bounds takes 4", plain("--bounds=-inf,-inf,inf,inf")),
    Row("output folder missing", 3, "does not exist", lambda b: b.typed("-o", b.folder / "none" / "out.tif")),
    Row("output is a folder", 3, "is a folder", lambda b: b.typed("-o", b.folder)),
    Row("output under a file", 3, "does not exist", lambda b: b.typed("-o", Path(b.pair().pan) / "out.tif")),
    Row("output on a bucket", 3, "no local file", plain("-o", "/vsis3/bucket/out.tif")),
    Row("output with a long name", 3, "too long", lambda b: b.typed("-o", b.folder / f"{'a' * 250}.tif")),
    Row("output exists", 4, "--overwrite", existing),
    Row("output is the pan", 3, "one of the inputs", onto("pan")),
    Row("output is the ms", 3, "one of the inputs", onto("ms")),
    Row("output is the pan, linked", 3, "one of the inputs", onto("pan", "symlink")),
    Row("output is the ms, linked", 3, "one of the inputs", onto("ms", "symlink")),
    Row("output is the ms, by a detour", 3, "one of the inputs", onto("ms", "dotted")),
    Row("output is a pipe", 3, "device or pipe", pipe),
    Row("output is the archive of the inputs", 3, "one of the inputs", onto_archive),
    Row("output is behind a vrt", 3, "one of the inputs", onto_vrt_source),
    Row("output is the model", 3, "one of the inputs", onto_model),
    Row("uncertainty is the output", 2, "same file", lambda b: b.typed("-o", b.output, "--uncertainty", b.output)),
    Row("uncertainty is the pan", 3, "one of the inputs",
        lambda b: [(p := b.pair()).pan, *p.ms, "--uncertainty", p.pan, "--overwrite"]),
    Row("uncertainty folder missing", 3, "does not exist", plain("--uncertainty", "none/u.tif")),
    Row("uncertainty of a classic", 2, "gsa has none",
        lambda b: b.typed("--uncertainty", b.folder / "u.tif", "--method", "gsa")),
    Row("coverage without uncertainty", 2, "--coverage 90 is for --uncertainty", plain("--coverage", 90)),
    Row("coverage that a card does not declare", 2, "the card of tiny has no such width",
        plain("--uncertainty", "u.tif", "--coverage", 90)),
    Row("method and model", 2, "--method and --model exclude each other",
        plain("--method", "gsa", "--model", "generic")),
    Row("softness of words", 2, "--softness is ms or a number", plain("--softness", "sharp")),
    Row("softness too large", 2, "from 0.2 to 1, not '1.5'", plain("--softness", 1.5)),
    Row("softness nan", 2, "from 0.2 to 1, not 'nan'", plain("--softness", "nan")),
    Row("softness untaught", 5, "was not trained with the softness", plain("--softness", "ms")),
    Row("method and steps", 2, "--method and --steps exclude each other", plain("--method", "gsa", "--steps", 2)),
    Row("preview is the pan", 3, "one of the inputs",
        lambda b: [(p := b.pair()).pan, *p.ms, "--preview", p.pan, "--overwrite"]),
    Row("preview is the output", 2, "same file", lambda b: b.typed("-o", b.output, "--preview", b.output)),
    Row("preview exists", 4, "--overwrite",
        lambda b: [(p := b.pair()).pan, *p.ms, "--preview", shutil.copy(p.pan, b.folder / "p.png")]),
    Row("preview folder missing", 3, "does not exist", plain("--preview", "none/p.png")),
    Row("log folder missing", 3, "none", plain("--log-json", "none/log.jsonl")),
    Row("model missing", 5, "no model", plain("--model", "nowhere.safetensors")),
    Row("model a folder", 5, "no model", lambda b: b.typed("--model", b.folder)),
    Row("model truncated", 5, "not a whole safetensors",
        checkpoint(lambda path, good: (shutil.copy(good, path), truncate(path))[1])),
    Row("model empty", 5, "not a whole safetensors", checkpoint(lambda p, good: empty(p))),
    Row("model of text", 5, "not a whole safetensors", checkpoint(lambda p, g: become_text(p))),
    Row("model pickled", 5, "never loaded", checkpoint(pickled)),
    Row("model without card", 5, "without an uknowpan card", checkpoint(without_card)),
    Row("model of the future", 5, "architecture 'mamba' is unknown", checkpoint(card(architecture="mamba"))),
    Row("model with odd config", 5, "does not fit architecture", checkpoint(card(config={"breadth": 3}))),
    Row("model with other depth", 5, "do not fit its card", checkpoint(other_depth)),
    Row("model with other widths", 5, "do not fit its card", checkpoint(other_widths)),
    Row("model of nan", 5, "not finite", checkpoint(not_a_number)),
    Row("cuda:7", 2, "--device cuda:7", plain("--device", "cuda:7")),
    Row("device nonsense", 2, "--device takes", plain("--device", "abacus")),
    Row("device meta", 2, "--device takes", plain("--device", "meta")),
    Row("device cuda:x", 2, "--device takes", plain("--device", "cuda:x")),
    Row("no steps", 2, "steps", plain("--steps", 0), usage=True),
    Row("too many steps", 2, "1 to 500", plain("--steps", 100000)),
    Row("tile too small", 2, "tile", plain("--tile", 4), usage=True),
    Row("co nonsense", 2, "KEY=VALUE", plain("--co", "nonsense")),
    Row("co unknown compression", 2, "NOPE", plain("--co", "COMPRESS=NOPE")),
    Row("co unknown key", 2, "QUALITI", plain("--co", "QUALITI=9")),
    Row("co for bytes", 2, "JPEG", plain("--co", "COMPRESS=JPEG")),
    Row("co of gtiff for cog", 2, "TILED", plain("--co", "TILED=NO", "-f", "cog")),
    Row("co odd blocks", 2, "multiples of 16", plain("--co", "BLOCKXSIZE=17")),
    Row("co driver", 2, "--co", plain("--co", "DRIVER=PNG")),
    Row("method nonsense", 2, "method", plain("--method", "magic"), usage=True),
    Row("format nonsense", 2, "format", plain("--format", "bmp"), usage=True),
    Row("resampling nonsense", 2, "resampling", plain("--resampling", "magic"), usage=True),
    Row("ratio option 0", 2, "ratio", plain("--ratio", 0), usage=True),
    Row("dtype nonsense", 2, "output-dtype", plain("--output-dtype", "nonsense"), usage=True),
    Row("dtype complex", 2, "output-dtype", plain("--output-dtype", "complex64"), usage=True),
    Row("nodata that does not fit", 3, "does not fit", plain("--nodata", "-9999")),
    Row("nodata nan for integers", 3, "does not fit", plain("--nodata", "nan")),
    Row("nodata nonsense", 2, "nodata", plain("--nodata", "none"), usage=True),
    Row("max value nan", 2, "--max-value", plain("--max-value", "nan"), usage=True),
    Row("max value inf", 2, "--max-value", plain("--max-value", "inf")),
    Row("max value 0", 2, "--max-value", plain("--max-value", "0")),
    Row("two scales", 2, "exclude", plain("--max-value", 255, "--bit-depth", 8)),
    Row("complex ms", 3, "complex", complex_ms),
    Row("unknown option", 2, "no such option", plain("--sharpness", 11), usage=True),
    Row("no ms", 2, "alone is no product", lambda b: [b.pair().pan]),
]  # fmt: skip


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name.replace(" ", "-"))
def test_bad_input(
    row: Row, uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench = Bench(tmp_path, make_pair, tiny_model)
    arguments = list(row.prepare(bench))
    if "-o" not in arguments:
        arguments += ["-o", bench.output]
    if not {"--model", "--method"} & set(arguments):
        arguments += ["--model", tiny_model]
    before = listing(tmp_path)
    outcome = uknowpan("sharpen", *arguments, "-j", 1)

    assert outcome.code == row.code, outcome.stderr
    assert outcome.stdout == ""
    message = re.sub(r"[│╭╮╰╯─\s]+", " ", outcome.stderr) if row.usage else outcome.stderr
    assert re.search(row.text, message, re.IGNORECASE | re.DOTALL), outcome.stderr
    assert "Traceback" not in outcome.stderr
    if not row.usage:
        assert re.fullmatch(r"uknowpan: error: \S[^\n]+\n", outcome.stderr), outcome.stderr
        assert "internal" not in outcome.stderr
        assert len(outcome.stderr) < 800
    assert listing(tmp_path) == before
