"""The displacement of the MS on the PAN: measured once, reported with one sign, warned of or taken out."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasters import observed, textured
from running import STOPPING, MakePair, Outcome, Run, read, spawn
from scipy.ndimage import gaussian_filter, map_coordinates

from uknowpan import api, sharpen_array, surveying
from uknowpan.datasets.options import SimulationOptions
from uknowpan.datasets.pack import pack_scenes
from uknowpan.datasets.simulate import SceneFiles, simulate_files
from uknowpan.models.blur import Psf
from uknowpan.models.metrics.indices import ergas
from uknowpan.models.registration import gain_to_sigma
from uknowpan.models.registration.field import Registration
from uknowpan.registering import deceived, measured_field
from uknowpan.tiling import ScenePair, open_pair

Sharpen = Callable[..., Outcome]
Field = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]
Arrays = tuple[np.ndarray, np.ndarray]

SIDE, RATIO = 256, 4


def nowhere(u: np.ndarray, v: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    return 0 * u, 0 * v


def shifted(u: np.ndarray, v: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    return 3.3 + 0 * u, -2.6 + 0 * v


def stretched(u: np.ndarray, v: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    return 1 + 1.5 * u - 0.7 * v, -0.5 + 0.6 * u + 1.2 * v


def bent(u: np.ndarray, v: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    return 1.7 * np.sin(2.2 * u + 0.6) * np.cos(1.7 * v), 1.8 * np.cos(1.9 * u) * np.sin(2.4 * v - 0.4)


def apart(u: np.ndarray, v: np.ndarray, band: int) -> tuple[np.ndarray, np.ndarray]:
    dy, dx = ((1.1, 0.2), (-0.6, -0.9), (0.1, 0.8))[band]
    return dy + 0 * u, dx + 0 * v


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    return textured(SIDE).clip(1)


def planted(truth: np.ndarray, field: Field) -> Arrays:
    """PAN (H, W) and MS (3, h, w) whose content lies off by a field of places from -1 to 1."""
    y = np.stack(np.meshgrid(*[np.arange(SIDE // RATIO) * RATIO + (RATIO - 1) / 2] * 2, indexing="ij"))
    bands = []
    for band, plane in enumerate(truth):
        x = y
        for _ in range(6):
            x = y - np.stack(field(*(x / (SIDE / 2) - 1), band))
        bands.append(map_coordinates(gaussian_filter(plane, gain_to_sigma(0.3, RATIO)), x, order=3, mode="nearest"))
    return truth.mean(0).astype(np.float32), np.stack(bands).astype(np.float32)


def written(folder: Path, pan: np.ndarray, ms: np.ndarray, nodata: float | None = None) -> tuple[Path, Path]:
    """PAN and MS as files."""
    paths = folder / "pan.tif", folder / "ms.tif"
    for path, values, step in zip(paths, (pan[None], ms), (1, RATIO), strict=True):
        place = Affine(step, 0, 4e5, 0, -step, 5e6)
        profile = {"driver": "GTiff", "dtype": "float32", "crs": "EPSG:32631", "transform": place, "nodata": nodata}
        bands, height, width = values.shape
        with rasterio.open(path, "w", count=bands, height=height, width=width, **profile) as dataset:
            dataset.write(values)
    return paths


def error(result: np.ndarray, truth: np.ndarray) -> float:
    """ERGAS without the border."""
    inner = (slice(None), slice(16, -16), slice(16, -16))
    return float(ergas(*(torch.from_numpy(x[inner].astype(float)) for x in (result, truth))))


@pytest.fixture(scope="module")
def unmoved(truth: np.ndarray) -> np.ndarray:
    return sharpen_array(*planted(truth, nowhere), method="mtf-glp", coregister="off")


@pytest.mark.parametrize(
    ("field", "mode", "bound"),
    [(shifted, "shift", 1.02), (stretched, "global", 1.05), (bent, "auto", 1.12), (apart, "auto", 1.12)],
)
def test_a_displacement_is_taken_out(
    field: Field, mode: str, bound: float, truth: np.ndarray, unmoved: np.ndarray
) -> None:
    """ERGAS over that of the same scene without displacement."""
    done = sharpen_array(*planted(truth, field), method="mtf-glp", coregister=mode)
    assert error(done, truth) < bound * error(unmoved, truth)


def test_a_registered_scene_is_left_alone(truth: np.ndarray) -> None:
    pair = planted(truth, lambda u, v, band: (0.12 + 0 * u, -0.1 + 0 * v))
    auto, off = (sharpen_array(*pair, method="gsa", coregister=mode) for mode in ("auto", "off"))
    assert auto.tobytes() == off.tobytes()


def test_a_part_has_the_pixels_of_the_whole(tmp_path: Path, truth: np.ndarray) -> None:
    """Fault: a field that is measured anew, or begins elsewhere, with bounds."""
    pan, ms = written(tmp_path, *planted(truth, bent))
    whole, part = tmp_path / "whole.tif", tmp_path / "part.tif"
    api.sharpen(pan, ms, whole, method="mtf-glp")
    api.sharpen(pan, ms, part, method="mtf-glp", bounds=(400070, 4999850, 400190, 4999960))
    difference = read(whole)[:, 40:150, 70:190] - read(part)
    assert np.abs(difference).max() < 1e-3


def test_files_and_arrays_agree(tmp_path: Path, truth: np.ndarray) -> None:
    pan, ms = planted(truth, stretched)
    api.sharpen(*written(tmp_path, pan, ms), tmp_path / "out.tif", method="gsa")
    assert (read(tmp_path / "out.tif") == sharpen_array(pan, ms, method="gsa")).all()


def test_invalid_pixels_move_with_the_ms(truth: np.ndarray) -> None:
    """An output pixel is invalid where the MS pixel that shows its place is."""
    pan, ms = planted(truth, lambda u, v, band: (4 + 0 * u, -6 + 0 * v))
    ms[:, 20:26, 30:40] = np.nan
    off, auto = (sharpen_array(pan, ms, method="mtf-glp", coregister=mode) for mode in ("off", "auto"))
    hole = np.zeros((SIDE, SIDE), bool)
    hole[80:104, 120:160] = True
    assert (np.isnan(off) == hole).all()
    found = np.argwhere(np.isnan(auto[0]))
    assert np.abs(found.min(0) - (76, 126)).max() <= 1 and np.abs(found.max(0) - (99, 165)).max() <= 1
    assert error(np.where(np.isnan(auto), truth, auto), truth) < 0.9 * error(np.where(hole, truth, off), truth)


def test_one_sign_and_one_measure(sharpen: Sharpen, uknowpan: Run, tiny_model: Path, tmp_path: Path) -> None:
    """Report, tags and `info` give the same numbers; + is down and right."""
    pair = observed(textured(192), 4, tmp_path, (3, -2))
    facts = json.loads(uknowpan("info", pair.pan, *pair.ms, "--model", tiny_model, "--json").stdout)
    assert np.abs(np.array(facts["shift_pan_pixels"]) - (3, -2)).max() < 0.3
    for mode in ("check", "global", "local", "auto"):
        outcome = sharpen(pair, "--method", "gsa", "--coregister", mode, "--overwrite", "--json")
        report = json.loads(outcome.stdout)
        assert report["shift"] == pytest.approx(facts["shift_pan_pixels"], abs=0.05)
        moved = mode != "check"
        assert (report["registration"] != "none") == moved
        assert np.abs(np.array(report["applied_shift"]) - ((-3, 2) if moved else (0, 0))).max() < 0.3
        warned = re.search(r"lies \+[23]\.\d+ rows and -[12]\.\d+ columns.*--coregister auto", outcome.stderr)
        assert (warned is not None) == (mode == "check")
        with rasterio.open(tmp_path / "out.tif") as dataset:
            tags = dataset.tags()
        assert tags["UKNOWPAN_REGISTRATION"] == report["registration"]
        assert float(tags["UKNOWPAN_LARGEST_DISPLACEMENT"]) == report["largest_displacement"]
        assert np.array(tags["UKNOWPAN_MEASURED_SHIFT"].split(), float) == pytest.approx(report["shift"], abs=1e-3)
    off = json.loads(sharpen(pair, "--method", "gsa", "--coregister", "off", "--overwrite", "--json").stdout)
    assert (off["shift"], off["registration"], off["applied_shift"]) == (None, "none", [0, 0])


def test_the_field_as_a_raster(uknowpan: Run, tiny_model: Path, tmp_path: Path, truth: np.ndarray) -> None:
    paths, target = written(tmp_path, *planted(truth, stretched)), tmp_path / "field.tif"
    outcome = uknowpan("info", *paths, "--model", tiny_model, "--displacement", target)
    assert "by default it is taken out" in outcome.stdout
    with rasterio.open(target) as dataset, rasterio.open(paths[1]) as ms:
        assert (dataset.transform, dataset.shape, dataset.crs) == (ms.transform, ms.shape, ms.crs)
        u, v = np.meshgrid(*[(np.arange(SIDE // RATIO) * RATIO + 1.5) / (SIDE / 2) - 1] * 2, indexing="ij")
        assert np.abs(dataset.read() - np.stack(stretched(u, v, 0))).max() < 0.25
    with rasterio.open(target.with_suffix(".png")) as picture:
        assert (picture.count, picture.width) == (3, 14 * 40)
    assert uknowpan("info", *paths, "--displacement", paths[0]).code != 0


def test_resumed_with_a_field(tiny_model: Path, tmp_path: Path, truth: np.ndarray) -> None:
    """A resumed run has the field of its strips."""
    pan, ms = written(tmp_path, *planted(truth, bent))
    common = ("--model", tiny_model, "--tile", 64)
    unbroken, broken = tmp_path / "unbroken.tif", tmp_path / "broken.tif"
    run = ("sharpen", pan, ms, *common)
    assert spawn(*run, "-o", unbroken).code == 0
    assert spawn(*run, "-o", broken, before=STOPPING.format(strips=1, name="SIGKILL")).code == -9
    kept = json.loads(next(tmp_path.glob("broken.tif.part*/survey.json")).read_text().partition("\n")[2])
    assert kept["statistics"]["field"]["model"] == "local"
    assert spawn(*run, "-o", broken, "--resume").code == 0
    with rasterio.open(unbroken) as one, rasterio.open(broken) as other:
        assert one.read().tobytes() == other.read().tobytes()
        assert one.tags() == other.tags()
        assert one.tags()["UKNOWPAN_REGISTRATION"] == "local"


def test_shift_that_cannot_be_measured(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    outcome = sharpen(make_pair(ms_shape=(8, 8)), "--json")
    assert json.loads(outcome.stdout)["shift"] is None
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert "UKNOWPAN_MEASURED_SHIFT" not in dataset.tags()


@pytest.mark.parametrize("words", [("--method", "gsa"), ("--method", "gsa", "--dry-run"), ()])
def test_one_survey_is_enough(
    words: tuple[str, ...], sharpen: Sharpen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = observed(textured(96).clip(1), 4, tmp_path, (3, -2))
    calls, scale = [], surveying.scene_scale
    monkeypatch.setattr(surveying, "scene_scale", lambda *a: calls.append(a) or scale(*a))
    sharpen(pair, *words)
    assert len(calls) == 1


@pytest.mark.parametrize(("field", "left"), [(bent, 0.4), (apart, 0.7)])
def test_truths_lie_on_their_pan(field: Field, left: float, tmp_path: Path, truth: np.ndarray) -> None:
    """Fault: `simulate` and `pack` took out a shift only. Bands that are moved are resampled, which leaves more."""
    rest = {}
    for name, mode, off in (("twin", "off", nowhere), ("off", "off", field), ("auto", "auto", field)):
        folder = tmp_path / name
        folder.mkdir()
        pan, ms = written(folder, *planted(truth, off))
        options = SimulationOptions(patch=32, split=(100, 0, 0), max_value=4095, coregister=mode)
        done = simulate_files([SceneFiles(str(pan), (str(ms),))], folder / "train.h5", options)
        assert (mode == "auto") == any("taken out" in note for note in done.notes)
        with h5py.File(folder / "train.h5") as file:
            rest[name] = unexplained(file["pan"][:], file["gt"][:])
    recipe = tmp_path / "recipe.csv"
    recipe.write_text(
        "name,kind,pan,ms,sensor,licence,split,weight\none,pair,auto/pan.tif,auto/ms.tif,drawn,own,train,1\n"
    )
    assert "taken out" in pack_scenes(recipe, tmp_path, tmp_path / "scenes.h5")[0]
    with h5py.File(tmp_path / "scenes.h5") as file:
        rest["pack"] = unexplained(file["one"]["pan"][:][None], file["one"]["gt"][:][None])
    assert max(rest["auto"], rest["pack"]) - rest["twin"] < left * (rest["off"] - rest["twin"]), rest


def unexplained(pan: np.ndarray, gt: np.ndarray) -> float:
    """Share of a PAN's contrast, (n, 1, h, w), that the bands (n, C, h, w) of its truth do not explain, inside."""
    low, *bands = (x[..., 5:-5, 5:-5].ravel().astype(float) for x in (pan, *gt.swapaxes(0, 1)))
    design = np.stack([*bands, np.ones(low.size)], 1)
    return float((low - design @ np.linalg.lstsq(design, low, rcond=None)[0]).std() / low.std())


def test_overlapping_windows_are_read_once(tmp_path: Path, truth: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a small scene was read, blurred and filtered window by window, many times over."""
    reads, read_frame = [], ScenePair.read_frame
    monkeypatch.setattr(ScenePair, "read_frame", lambda *a: reads.append(a) or read_frame(*a))
    pan, ms = written(tmp_path, *planted(truth, shifted))
    with open_pair(pan, [ms]) as pair:
        assert measured_field(pair, "auto").model == "shift"
    assert len(reads) == 1


def test_what_was_done_is_said_once(caplog: pytest.LogCaptureFixture, truth: np.ndarray) -> None:
    """A run that takes out all warns of nothing."""
    with caplog.at_level(logging.INFO, "uknowpan"):
        sharpen_array(*planted(truth, stretched), method="gsa")
    said = [record for record in caplog.records if "off the PAN" in record.message]
    assert [record.levelname for record in said] == ["INFO"]
    assert "an affine displacement is taken out" in said[0].message


def test_another_date_is_left_alone(caplog: pytest.LogCaptureFixture, truth: np.ndarray) -> None:
    """Fault: a pair that hardly resembles itself was moved by a shift that few details support."""
    pan, _ = planted(truth, nowhere)
    _, ms = planted(0.45 * truth + 0.55 * textured(SIDE, 9).clip(1), shifted)
    with caplog.at_level(logging.INFO, "uknowpan"):
        auto, off = (sharpen_array(pan, ms, method="gsa", coregister=mode) for mode in ("auto", "off"))
    assert auto.tobytes() == off.tobytes()
    assert "too little" in caplog.text


def test_a_drifting_cloud_decides_no_shift() -> None:
    """Fault: the blur's own search followed a cloud that the windows had voted down."""
    ground = Registration(
        "shift", False, np.zeros((3, 2)), np.array([[0.1, 0, 0], [0.0, 0, 0]]), None, (50.0, 50.0), 50.0, (100.0, 100.0)
    )
    assert deceived(ground, Psf(2, (2.9, -2.4), 0.9)) and not deceived(ground, Psf(2, (-0.1, 0.2), 0.9))
    assert not deceived(None, Psf(2, (2.9, -2.4), 0.9))
