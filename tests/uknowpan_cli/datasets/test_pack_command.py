"""`uknowpan pack`: scenes for training from rasters."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import torch
from rasterio import Affine
from rasters import ORIGIN, write_raster
from running import MakePair, Run
from textures import make_pair as make_waves

from uknowpan.models.blur import estimate_psf, gain_to_sigma
from uknowpan.models.resample import crop, degrade

HEADER = "name,kind,pan,ms,sensor,licence,split,weight\n"


def test_pack_makes_what_train_reads(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    from uknowpan.models.training.scenes import read_scenes

    make_pair(ms_shape=(48, 40))
    recipe, output = tmp_path / "recipe.csv", tmp_path / "scenes.h5"
    recipe.write_text(
        HEADER
        + "a,pair,scene_pan.tif,scene_ms.tif,made up,none,train,2\n"
        + "b,ms,,scene_ms.tif,made up,none,valid,1\n"
        + "c,ms,,not_there.tif,made up,none,skip,1\n"
    )
    outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "-q")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"{output}\n"
    (scene,) = read_scenes(output, "train")
    assert (scene.name, scene.weight, tuple(scene.gt.shape)) == ("a", 2.0, (4, 48, 40))
    assert scene.pan is not None and tuple(scene.pan.shape) == (1, 48, 40)
    assert read_scenes(output, "valid")[0].pan is None
    again = uknowpan("pack", recipe, "-o", output, "--root", tmp_path)
    assert again.code == 4
    assert uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "--overwrite").code == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must hold scenes"),
        ("name,kind\na,pair\n", "is no recipe.*'pan'"),
        (HEADER + "a,ms,,scene_ms.tif,s,l,train,heavy\n", "is no recipe.*heavy"),
        (HEADER + "a,ms\n", "is no recipe"),
        (HEADER + "a,triplet,,scene_ms.tif,s,l,train,1\n", "kind of scene 'a' is 'triplet'"),
        (HEADER + "a,ms,,scene_ms.tif,s,l,exam,1\n", "split of scene 'a' is 'exam'"),
        (HEADER + 2 * "a,ms,,scene_ms.tif,s,l,train,1\n", "a name of its own"),
        (HEADER + "a,ms,,none.tif,s,l,train,1\n", "none.tif"),
        (HEADER + "a,pair,scene_ms.tif,scene_pan.tif,s,l,train,1\n", "4 bands"),
        (b"\xff\xfe\x00", "is no recipe"),
    ],
)
def test_pack_refuses(text: str | bytes, says: str, uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    make_pair()
    recipe = tmp_path / "recipe.csv"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    uknowpan("pack", recipe, "-o", tmp_path / "scenes.h5", "--root", tmp_path).fails(3, says)
    assert {p.name for p in tmp_path.iterdir()} == {"recipe.csv", "scene_pan.tif", "scene_ms.tif"}


PackOne = Callable[..., tuple[np.ndarray, np.ndarray | None, str]]


@pytest.fixture
def pack_one(uknowpan: Run, tmp_path: Path) -> PackOne:
    """`pack_one(kind, pan, ms)`: (gt, pan or None, note) of a recipe of one scene."""

    def pack(kind: str, pan: str, ms: str) -> tuple[np.ndarray, np.ndarray | None, str]:
        recipe, output = tmp_path / "one.csv", tmp_path / "one.h5"
        recipe.write_text(f"{HEADER}a,{kind},{pan},{ms},s,l,train,1\n")
        outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "--overwrite", "-q")
        assert outcome.code == 0, outcome.stderr
        with h5py.File(output) as file:
            group = file["a"]
            pan_values = group["pan"][()] if "pan" in group else None
            return group["gt"][()], pan_values, group.attrs["note"]

    return pack


@pytest.mark.parametrize("offset", [(32, 24), (-32, -24), (30, -25), (-3, 7)])
def test_pack_where_the_pan_sticks_out(offset: tuple[int, int], pack_one: PackOne, make_pair: MakePair) -> None:
    """On every side, MS pixels that the PAN covers wholly are the truth, and PAN lies on them."""
    pair = make_pair(ms_shape=(48, 40), pan_shape=(192, 160), offset=offset)
    gt, pan, _ = pack_one("pair", "scene_pan.tif", "scene_ms.tif")
    spans = []
    for start, (count, pan_count) in zip(offset, [(48, 192), (40, 160)], strict=True):
        first = -(start // 4) if start < 0 else 0  # whole MS pixels inside the PAN
        spans.append(slice(first, min(count, (pan_count - start) // 4)))
    assert np.array_equal(gt, pair.ms_values[:, spans[0], spans[1]])
    assert pan is not None and pan.shape[1:] == gt.shape[1:]
    # Both show the same smooth landscape, the first band with a gain of 1.
    assert np.abs(pan[0] - gt[0])[2:-2, 2:-2].max() < 20 < 0.1 * np.ptp(gt[0])


@pytest.mark.parametrize("mask", [None, "mask", "alpha"])
@pytest.mark.parametrize("kind", ["pair", "ms"])
def test_pack_leaves_invalid_pixels_out(kind: str, mask: str | None, pack_one: PackOne, make_pair: MakePair) -> None:
    holes = np.zeros((48, 40), bool)
    holes[20, 3] = holes[:, 38:] = True
    pan_holes = np.zeros((192, 160), bool)
    pan_holes[190, 50] = True  # in MS row 47
    pair = make_pair(
        ms_shape=(48, 40), holes=holes, nodata=0 if mask is None else None, mask=mask,
        pan_holes=pan_holes, pan_nodata=0,
    )  # fmt: skip
    gt, pan, note = pack_one(kind, "scene_pan.tif" if kind == "pair" else "", "scene_ms.tif")
    rows = slice(0, 47) if kind == "pair" else slice(0, 48)
    assert np.array_equal(gt, pair.ms_values[:, rows, 4:38])
    share = f"{gt[0].size / 1920:.1%} of it without invalid pixels"
    assert note.endswith(share)
    assert (pan is None) == (kind == "ms")


def test_pack_with_a_nodata_value_that_the_files_do_not_say(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    holes = np.zeros((48, 40), bool)
    holes[40:] = True
    pair = make_pair(ms_shape=(48, 40), holes=holes, nodata=0)
    with rasterio.open(tmp_path / "scene_ms.tif", "r+") as file:
        file.nodata = None
    found = {}
    for value in ("", "0"):
        recipe, output = tmp_path / "one.csv", tmp_path / f"one{value}.h5"
        row = f"a,pair,scene_pan.tif,scene_ms.tif,s,l,train,1,{value}\n"
        recipe.write_text(HEADER.replace("weight", "weight,nodata") + row)
        outcome = uknowpan("pack", recipe, "-o", output, "--root", tmp_path, "-q")
        assert outcome.code == 0, outcome.stderr
        with h5py.File(output) as file:
            found[value] = file["a/gt"][()]
    assert found[""].shape[1:] == (48, 40)
    assert np.array_equal(found["0"], pair.ms_values[:, :40])


@pytest.mark.parametrize("kind", ["reduced", "ms"])
def test_pack_takes_bands_in_files_of_their_own(kind: str, pack_one: PackOne, make_pair: MakePair) -> None:
    holes = np.zeros((40, 32), bool)
    holes[:5] = True
    pair = make_pair(ratio=1, ms_shape=(40, 32), bands=3, separate=True, holes=holes, nodata=0)
    names = ";".join(Path(path).name for path in pair.ms)
    gt, pan, _ = pack_one(kind, "scene_pan.tif" if kind == "reduced" else "", names)
    assert gt.dtype == np.uint16
    assert np.array_equal(gt, pair.ms_values[:, 5:])
    if kind == "reduced":
        assert pan is not None
        assert np.abs(pan[0] - pair.pan_values[5:])[2:-2, 2:-2].max() < 20


def write_waves(folder: Path) -> torch.Tensor:
    """A pair of ratio 4 whose MS has a gain of 0.3 and lies off the PAN; returns its bands behind the PAN's optics."""
    pair = make_waves(4, (72, 64), sigma=gain_to_sigma(0.3, 4), shift=(1.5, -0.8), seed=5)
    for name, values, size in (("pan", pair.pan, 0.5), ("ms", pair.ms, 2.0)):
        transform = Affine(size, 0, ORIGIN[0], 0, -size, ORIGIN[1])
        write_raster(folder / f"scene_{name}.tif", 100 * values.numpy(), transform)
    return 100 * pair.gt


def test_pack_makes_truths_as_sharp_as_the_pan(pack_one: PackOne, tmp_path: Path) -> None:
    """PAN and truth on twice the MS pixel: both with a gain of 0.2, the MS's own counted in, and without the shift."""
    sharp = write_waves(tmp_path)
    gt, pan, note = pack_one("sharp", "scene_pan.tif", "scene_ms.tif")
    expected = degrade(sharp[None], 8, gain_to_sigma(0.2, 8), (1.5, -0.8))[0]
    expected = crop(expected, (expected.shape[-1] - gt.shape[-1]) // 2)
    assert pan is not None and gt.shape == expected.shape == (4, 30, 26) and pan.shape == (1, 30, 26)
    contrast = float(expected.std((1, 2)).mean())
    assert np.abs(gt - expected.numpy()).mean() < 0.03 * contrast
    assert np.abs(pan[0] - gt.mean(0)).mean() < 0.03 * contrast
    assert estimate_psf([(torch.from_numpy(pan), torch.from_numpy(gt))], 1).sigma < 0.3
    assert "lies -1.5" in note and "taken out" in note and "MS blur 0.49 MS px" in note


def test_pack_refuses_scenes(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    holes = np.ones((40, 32), bool)
    holes[:16, :15] = False
    make_pair(name="holes", ms_shape=(40, 32), holes=holes, nodata=0)
    make_pair(name="fine", ms_shape=(40, 32))
    make_pair(name="other", ms_shape=(20, 16), ratio=8)
    noise = np.random.default_rng(3).integers(1, 999, (1, 160, 128)).astype("uint16")
    small = noise[:, :40, :32]
    for name, values, like in (("noise", noise, "fine_pan"), ("small", small, "fine_ms")):
        with rasterio.open(tmp_path / f"{like}.tif") as source:
            place = {"crs": source.crs, "transform": source.transform}
        write_raster(tmp_path / f"{name}.tif", values, **place)
    for row, says in (
        ("pair,holes_pan.tif,holes_ms.tif", "'a' 18.8% of 40 x 32 MS pixels are valid.*16 x 16"),
        ("ms,,holes_ms.tif", "'a' 18.8% of 40 x 32 MS pixels are valid"),
        ("pair,noise.tif,fine_ms.tif", "PAN and MS of scene 'a' do not resemble each other"),
        ("reduced,small.tif,fine_ms.tif", "PAN and MS of scene 'a' do not resemble each other"),
        ("reduced,fine_pan.tif,fine_ms.tif", r"'a' \(kind reduced\) do not lie on one grid"),
        ("ms,,fine_ms.tif;other_ms.tif", r"'a' \(kind ms\) do not lie on one grid"),
        ("sharp,fine_pan.tif,fine_ms.tif", "'a' gives no truth as sharp as its PAN; skip it: it is too small"),
    ):
        recipe, output = tmp_path / "recipe.csv", tmp_path / "scenes.h5"
        recipe.write_text(f"{HEADER}a,{row},s,l,train,1\n")
        uknowpan("pack", recipe, "-o", output, "--root", tmp_path).fails(3, says)
        assert not output.exists()


def test_pack_spares_its_inputs(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    recipe = tmp_path / "recipe.csv"
    recipe.write_text(HEADER + "a,ms,,scene_ms.tif,s,l,train,1\n")
    for target in (Path(pair.ms[0]), recipe):
        before = target.read_bytes()
        outcome = uknowpan("pack", recipe, "-o", target, "--root", tmp_path, "--overwrite")
        assert outcome.code == 3
        assert "one of the inputs" in outcome.stderr
        assert target.read_bytes() == before
