"""The shift between PAN and MS: measured once, reported with one sign, warned of or removed."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import observed, textured
from running import STOPPING, MakePair, Outcome, Run, read, spawn

from uknowpan import surveying

Sharpen = Callable[..., Outcome]


def test_coregistration_moves_the_ms(sharpen: Sharpen, tmp_path: Path) -> None:
    """An MS that lies (3, -2) PAN pixels off is brought back."""
    truth = textured(192)
    pair = observed(truth, 4, tmp_path, (3, -2))
    inner = (slice(None), slice(24, -24), slice(24, -24))
    errors = {}
    for mode in ("off", "check", "shift"):
        outcome = sharpen(pair, "--coregister", mode, "--method", "mtf-glp", "--overwrite")
        warned = re.search(r"lies \+3\.\d+ rows and -[12]\.\d+ columns.*--coregister shift", outcome.stderr)
        assert (warned is not None) == (mode == "check")
        with rasterio.open(tmp_path / "out.tif") as dataset:
            tags = dataset.tags()
            errors[mode] = np.abs(dataset.read().astype(float) - truth)[inner].mean()
        # One sign: + is down and right, for where the MS lies and for how it was moved.
        applied = np.array(tags["UKNOWPAN_APPLIED_SHIFT"].split(), float)
        assert np.abs(applied - ((-3, 2) if mode == "shift" else (0, 0))).max() < 0.3
        assert ("UKNOWPAN_MEASURED_SHIFT" in tags) == (mode != "off")
        if mode != "off":
            measured = np.array(tags["UKNOWPAN_MEASURED_SHIFT"].split(), float)
            assert np.abs(measured - (3, -2)).max() < 0.3
    assert (applied == -np.round(measured)).all()  # whole pixels: nothing is resampled
    assert errors["check"] == errors["off"]
    assert errors["shift"] < 0.8 * errors["off"]


def test_resumed_with_a_shift(sharpen: Sharpen, tiny_model: Path, tmp_path: Path) -> None:
    """A resumed run measures the shift of its strips anew, and tags it."""
    pair = observed(textured(128), 4, tmp_path, (3, -2))
    common = ("--model", tiny_model, "--tile", 32, "--coregister", "shift")
    unbroken, broken = tmp_path / "unbroken.tif", tmp_path / "broken.tif"
    sharpen(pair, *common, output=unbroken)
    stop = STOPPING.format(strips=1, name="SIGKILL")
    assert spawn("sharpen", pair.pan, *pair.ms, "-o", broken, *common, before=stop).code == -9
    sharpen(pair, *common, "--resume", output=broken)
    with rasterio.open(unbroken) as one, rasterio.open(broken) as other:
        assert one.read().tobytes() == other.read().tobytes()
        assert one.tags() == other.tags()
        assert "UKNOWPAN_MEASURED_SHIFT" in one.tags()


def test_one_sign_in_all_reports(uknowpan: Run, sharpen: Sharpen, tiny_model: Path, tmp_path: Path) -> None:
    pair = observed(textured(192), 4, tmp_path, (3, -2))

    def report(*words: object) -> dict:
        return json.loads(sharpen(pair, *words, "--overwrite", "--json").stdout)

    facts = json.loads(uknowpan("info", pair.pan, *pair.ms, "--model", tiny_model, "--json").stdout)
    assert np.abs(np.array(facts["shift_pan_pixels"]) - (3, -2)).max() < 0.3
    for words in (("--coregister", "off"), ("--method", "gsa")):  # the network measures in any case
        checked = report(*words)
        assert checked["shift"] == facts["shift_pan_pixels"]
        assert checked["correlation"] == facts["correlation"]
        assert checked["applied_shift"] == [0, 0]
    unmeasured = report("--method", "gsa", "--coregister", "off")
    assert (unmeasured["shift"], unmeasured["correlation"]) == (None, None)
    moved = report("--method", "gsa", "--coregister", "shift")
    assert moved["shift"] == facts["shift_pan_pixels"]
    assert moved["applied_shift"] == [round(-v) for v in moved["shift"]]


def test_shift_that_cannot_be_measured(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    outcome = sharpen(make_pair(ms_shape=(8, 8)), "--json")
    assert json.loads(outcome.stdout)["shift"] is None
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert "UKNOWPAN_MEASURED_SHIFT" not in dataset.tags()


def test_shift_too_small_to_resample_for(sharpen: Sharpen, tmp_path: Path) -> None:
    pair, off = observed(textured(192), 4, tmp_path), tmp_path / "off.tif"
    assert sharpen(pair, "--method", "gsa").messages == ""
    outcome = sharpen(pair, "--method", "gsa", "-v", "--coregister", "shift", "--overwrite")
    assert re.search(r"INFO: the MS lies .* too little to resample it for", outcome.stderr)
    sharpen(pair, "--method", "gsa", "--coregister", "off", output=off)
    assert (read(tmp_path / "out.tif") == read(off)).all()


@pytest.mark.parametrize(("mode", "surveys"), [("off", 1), ("check", 1), ("shift", 2)])
@pytest.mark.parametrize("words", [("--method", "gsa"), ("--method", "gsa", "--dry-run"), ()])
def test_one_survey_is_enough(
    mode: str, surveys: int, words: tuple[str, ...], sharpen: Sharpen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = observed(textured(96).clip(1), 4, tmp_path, (3, -2))
    calls, scale = [], surveying.scene_scale
    monkeypatch.setattr(surveying, "scene_scale", lambda *a: calls.append(a) or scale(*a))
    sharpen(pair, *words, "--coregister", mode)
    assert len(calls) == surveys
