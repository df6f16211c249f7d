"""Scores of rasters by windows against `metrics` of the arrays in them."""

import logging
from functools import partial

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasters import ORIGIN, UTM, write_raster
from scipy.ndimage import gaussian_filter
from textures import images_of

from uknowpan.evaluation import rasters as evaluate_rasters
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.rasters import METHOD, evaluate_against, evaluate_without
from uknowpan.models.metrics import full_resolution as fr
from uknowpan.models.metrics import indices as m
from uknowpan.models.metrics.images import gaussian_kernel, mtf_kernel
from uknowpan.models.metrics.regions import regions
from uknowpan.models.metrics.reprojection import Published, Registered, find_phases, measure
from uknowpan.models.metrics.toolbox import imresize, interp23tap
from uknowpan.models.metrics.windows import window_quality
from uknowpan.models.resample import upsample
from uknowpan.tiling import IncompatiblePair, InputUnreadable

GRID = Affine.translation(*ORIGIN) @ Affine.scale(0.5, -0.5)
GAINS = (0.34, 0.32, 0.30, 0.22)
FULL = ("d_lambda_k", "d_s", "hqnr", "d_lambda", "qnr")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Scenes of a few windows."""
    monkeypatch.setattr(evaluate_rasters, "regions", partial(regions, rows=64, cols=96))


@pytest.fixture
def messages(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("uknowpan"), "propagate", True)
    caplog.set_level(logging.INFO, "uknowpan")
    return caplog


def _without(paths, **options):
    """Scores of the scene at `paths` without a reference."""
    return evaluate_without(paths["result"], paths["pan"], [paths["ms"]], _options(**options))[0]


def _options(**values):
    return EvaluateOptions(**{"sensor": "QB"} | values)


def _against(result, reference, on_progress=None, **values):
    return evaluate_against(result, reference, EvaluateOptions(**values), on_progress)


def _texture(bands, height, width, seed=0):
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    field = 900 + 400 * np.sin(rows / 13) * np.cos(cols / 17)
    gain = np.linspace(0.7, 1.3, bands)[:, None, None]
    return np.rint(gain * field + 60 * rng.normal(size=(bands, height, width))).astype("uint16")


def _coarse(values, ratio=4):
    bands, height, width = values.shape
    means = values.reshape(bands, height // ratio, ratio, width // ratio, ratio).mean((2, 4))
    return np.rint(means).astype(values.dtype)


def _tensor(values):
    return torch.from_numpy(values.astype("f8"))


def _scene(folder, height=128, width=160, offset=(0, 0), around=0, dtype="uint16", factor=1, **kw):
    """Result, PAN and MS: paths and arrays; the MS goes `around` pixels beyond the PAN and lies
    `offset` PAN pixels further down and right."""
    pad = 4 * around
    pan = _texture(1, height, width, seed=1)
    truth = _texture(4, height + 2 * pad, width + 2 * pad, seed=2)
    arrays = {
        "result": _texture(4, height, width, seed=3), "pan": pan, "ms": _coarse(truth)
    }  # fmt: skip
    arrays = {k: (v * factor).astype(dtype) for k, v in arrays.items()}
    ms_grid = GRID @ Affine.translation(offset[1] - pad, offset[0] - pad) @ Affine.scale(4)
    paths = {
        name: write_raster(folder / f"{name}.tif", values, ms_grid if name == "ms" else GRID, **kw)
        for name, values in arrays.items()
    }
    return paths, {name: _tensor(values) for name, values in arrays.items()}


def _value(results, index):
    assert results.images == 1 and list(results.scores) == [METHOD]
    assert results.scores[METHOD][index].shape == (1,)
    return results.mean(METHOD, index)


# ------------------------------------------------------------------------- against a reference


def _pair(folder, height=170, width=230, holes=None, dtype="uint16", **creation):
    gt = _texture(4, height, width)
    fused = gt + np.random.default_rng(5).integers(0, 60, gt.shape).astype("uint16")
    fused[:, 90:95, 100:108] = 0
    arrays = [x.astype(dtype) for x in (fused, gt)]
    paths = [
        write_raster(folder / "fused.tif", arrays[0], GRID, nodata=0),
        write_raster(folder / "gt.tif", arrays[1], GRID, mask=holes, **creation),
    ]
    return paths, [_tensor(x) for x in arrays]


def test_against_a_reference_equals_the_metrics(tmp_path):
    holes = np.full((170, 230), 255, "uint8")
    holes[40:43, 200:230] = 0
    (result, reference), arrays = _pair(tmp_path, holes=holes)
    seen = []
    results = _against(result, reference, ratio=4, max_value=2047, cut=5, on_progress=lambda *n: seen.append(n))
    mask = torch.from_numpy(holes == 0)
    mask[90:95, 100:108] = True
    fused, gt, mask = (m.crop_border(x, 5) for x in (*arrays, mask))
    expected = m.reduced_resolution(fused, gt, ratio=4, peak=2047, mask=mask)
    assert results.kind == "reduced"
    assert list(results.scores[METHOD]) == ["q2n", "q", "sam", "ergas", "scc", "psnr", "ssim"]
    for index in results.scores[METHOD]:
        assert _value(results, index) == pytest.approx(float(getattr(expected, index)), rel=1e-9), index
    assert seen == [(n, 6) for n in range(1, 7)]


@pytest.mark.parametrize(
    "dtype, creation, peak", [("uint16", {}, 2047), ("uint16", {"NBITS": 12}, 4095), ("float32", {}, 2047)]
)
def test_full_scale_is_the_files_or_found(tmp_path, messages, dtype, creation, peak):
    (result, reference), arrays = _pair(tmp_path, dtype=dtype, **creation)
    found = _value(_against(result, reference, cut=0), "psnr")
    mask = torch.zeros(170, 230, dtype=torch.bool)
    mask[90:95, 100:108] = True
    assert found == pytest.approx(float(m.psnr(*arrays, peak, mask=mask)), rel=1e-9)
    assert (f"take {peak:g} for full scale" in messages.text) == (not creation)


def test_reflectances_are_scored_like_their_digital_numbers(tmp_path, messages):
    gt = _texture(4, 70, 70)
    fused = gt + 20
    scores = []
    for name, dtype, divisor in (("dn", "uint16", 1), ("reflectance", "float32", 10_000)):
        paths = [
            write_raster(tmp_path / f"{name}{i}.tif", (x / divisor).astype(dtype), GRID)
            for i, x in enumerate((fused, gt))
        ]
        peak = 10_000 / divisor
        scores.append(_against(*paths, max_value=peak, cut=0).scores[METHOD])
    assert "are multiplied by 10000" in messages.text
    for index, value in scores[0].items():
        assert float(scores[1][index]) == pytest.approx(float(value), rel=1e-5), index


def test_full_scale_of_reflectances_is_one(tmp_path, messages):
    gt = _texture(4, 70, 70) / np.float32(3000)
    paths = [write_raster(tmp_path / f"{i}.tif", x.astype("float32"), GRID) for i, x in enumerate((gt + 0.1, gt))]
    assert _value(_against(*paths, cut=0), "psnr") == pytest.approx(20, abs=1e-4)
    assert "take 1 for full scale" in messages.text


# ------------------------------------------------------------------------ without a reference


def test_the_toolbox_s_numbers_of_a_scene(tmp_path):
    paths, x = _scene(tmp_path)
    results = _without(paths, registration="pancollection")
    expected = fr.full_resolution(x["result"], interp23tap(x["ms"]), x["pan"], GAINS)
    assert results.kind == "full" and tuple(results.scores[METHOD]) == FULL
    for index in FULL:
        assert _value(results, index) == pytest.approx(float(getattr(expected, index)), rel=1e-9), index


def _symmetric(x, before, after):
    return torch.from_numpy(np.pad(x, ((0, 0), *zip(before, after, strict=True)), mode="symmetric"))


@pytest.mark.parametrize("offset, around", [((0, 0), 12), ((2, -1), 12), ((0, 0), 0)])
def test_a_scene_is_measured_where_its_ms_lies(tmp_path, messages, offset, around):
    """The MS reaches beyond the PAN or ends with it, and its pixels may nest with an offset."""
    paths, x = _scene(tmp_path, offset=offset, around=around)
    results = _without(paths)
    top, left = 4 * around - offset[0] + 16, 4 * around - offset[1] + 16
    lms = upsample(_symmetric(x["ms"], (4, 4), (4, 4))[None], 4)[0][:, top : top + 128, left : left + 160]
    # PAN, reflected, in cells that nest in the MS's pixels.
    before = [20 + o % 4 for o in (-offset[0], -offset[1])]
    after = [-(n + b) % 4 + 20 for n, b in zip((128, 160), before, strict=True)]
    low = upsample(imresize(_symmetric(x["pan"], before, after))[None], 4)[0]
    low = low[:, before[0] : before[0] + 128, before[1] : before[1] + 160]
    to_pan, to_low = (
        window_quality(a[None], b[None].expand_as(a[None]), 32, 32).mean((0, 2, 3))
        for a, b in ((x["result"], x["pan"]), (lms, low))
    )
    whole = fr.full_resolution(x["result"], lms, x["pan"], GAINS)
    assert _value(results, "d_lambda_k") == pytest.approx(float(whole.d_lambda_k), rel=1e-9)
    assert _value(results, "d_s") == pytest.approx(float((to_pan - to_low).abs().mean()), rel=1e-9)
    assert _value(results, "d_lambda") == pytest.approx(float(whole.d_lambda), rel=1e-9)
    assert "20 of 20 tiles hold data" in messages.text


@pytest.mark.parametrize("which", ["result", "pan", "ms"])
@pytest.mark.parametrize("registration", ["area", "pancollection"])
def test_nodata_does_not_count(tmp_path, messages, which, registration):
    paths, _ = _scene(tmp_path, height=224, width=224)

    def hqnr(nodata):
        return _value(_without(paths, registration=registration, nodata=nodata), "hqnr")

    untouched, answers = hqnr(None), []
    for value in (7, 60_000):
        with rasterio.open(paths[which], "r+") as data:
            values = data.read()
            middle = values.shape[-1] // 2
            values[:, middle : middle + 3, middle : middle + 3] = value
            data.write(values)
        answers.append(hqnr(value))
    assert answers[0] == pytest.approx(answers[1], rel=1e-12)
    assert abs(answers[0] - untouched) < 0.02
    assert abs(hqnr(None) - answers[0]) > 1e-4
    counts = [int(message.split()[0]) for message in messages.messages if "tiles hold" in message]
    assert counts[0] == counts[3] == 49 and 30 <= counts[1] == counts[2] < 49


def test_sizes_that_are_no_multiple_of_a_tile(tmp_path, messages):
    paths, x = _scene(tmp_path, height=140, width=164)
    results = _without(paths)
    assert "the last 12 rows and 4 columns of the scene fill none and are left out" in messages.text
    lms = upsample(x["ms"][None], 4)[0]
    cropped = [y[:, :128, :160] for y in (x["result"], lms, x["pan"])]
    # Tiles at the right see no reflection here, so the whole image serves.
    assert _value(results, "d_lambda") == pytest.approx(float(fr.full_resolution(*cropped, GAINS).d_lambda), abs=1e-5)


def test_reflectances_without_a_reference(tmp_path, messages):
    folders = [tmp_path / "dn", tmp_path / "reflectance"]
    scores = []
    for folder, dtype, factor in zip(folders, ("uint16", "float32"), (1, 1e-4), strict=True):
        folder.mkdir()
        scores.append(_without(_scene(folder, dtype=dtype, factor=factor)[0]))
    assert messages.text.count("are multiplied by 10000") == 1
    for index in FULL:
        assert _value(scores[1], index) == pytest.approx(_value(scores[0], index), rel=1e-3)


def test_separate_band_files_and_no_georeferencing(tmp_path, messages):
    paths, _ = _scene(tmp_path)
    expected = _without(paths)
    bands = [f"{paths['ms']},band={b}" for b in (1, 2, 3, 4)]
    found, _ = evaluate_without(paths["result"], paths["pan"], bands, _options())
    assert _value(found, "hqnr") == _value(expected, "hqnr")
    with rasterio.open(paths["result"]) as data:
        plain = write_raster(tmp_path / "plain.tif", data.read(), None)
    found = _without(paths | {"result": plain})
    assert _value(found, "hqnr") == _value(expected, "hqnr")
    assert "plain.tif is not georeferenced" in messages.text


# ----------------------------------------------------------------------------- by reprojection


def _displaced(folder, shift=(0, 0), around=0, nodata=None):
    """A textured scene whose MS content lies `shift` PAN pixels further down and right; its truth is the result."""
    rng = np.random.default_rng(0)
    pad = 4 * around
    size = 256 + 2 * pad
    common, *own = (gaussian_filter(rng.normal(size=(size, size)), sigma) for sigma in (1.5, 4, 4, 4, 4))
    truth = np.stack([1000 + 900 * common + 900 * band for band in own])
    low = np.stack([gaussian_filter(band, 1.7) for band in truth])
    ms = np.roll(low, shift, (1, 2)).reshape(4, size // 4, 4, size // 4, 4).mean((2, 4))
    inner = (..., slice(pad, pad + 256), slice(pad, pad + 256))
    values = {"result": truth[inner], "pan": truth.mean(0, keepdims=True)[inner], "ms": ms}
    grids = {"ms": GRID @ Affine.translation(-pad, -pad) @ Affine.scale(4)}
    return {
        name: write_raster(folder / f"{name}.tif", x.astype("float32"), grids.get(name, GRID), nodata=nodata)
        for name, x in values.items()
    }, {name: torch.from_numpy(x.astype("f4")).double() for name, x in values.items()}  # fmt: skip


def _judge(paths):
    return evaluate_without(paths["result"], paths["pan"], [paths["ms"]], _options(reprojection=True))


@pytest.mark.parametrize("around", [0, 3])
def test_a_scene_by_reprojection_equals_its_arrays(tmp_path, around):
    paths, x = _displaced(tmp_path, around=around)
    results, judge = _judge(paths)
    ms = x["ms"][:, around : around + 64, around : around + 64]
    images = images_of(x["result"], x["pan"], ms)
    assert judge.phases == [list(phase) for phase in find_phases(images, GAINS[0])[0]]
    dy, dx = judge.shift

    def field(rows, cols):
        return torch.tensor([dy, dx]).double()[None, :, None, None].expand(1, 2, len(rows), len(cols))

    ways = {
        "published": Published(GAINS, [tuple(phase) for phase in judge.phases]),
        "registered": Registered([gaussian_kernel(judge.sigma)] * 4, field),
        "registered_nominal": Registered([mtf_kernel(gain, 4) for gain in GAINS], field),
    }
    expected = dict(zip(ways, measure(images, list(ways.values())), strict=True))
    assert list(judge.scores) == list(expected)
    for way, scores in judge.scores.items():
        for index in ("r_q2n", "r_sam", "r_ergas", "d_rho", "d_rho_thr", "d_sr", "colour_grain", "rqnr_align"):
            assert scores[index] == pytest.approx(getattr(expected[way], index), rel=1e-9), (way, index)
        assert scores["rqnr"] == pytest.approx(expected[way].rqnr(_value(results, "d_lambda_k")), rel=1e-9)
    assert judge.scores["registered"]["d_rho_excess"] == pytest.approx(expected["registered"].d_rho_excess, rel=1e-9)
    assert "d_rho_excess" not in judge.scores["published"]


def test_a_truth_beside_a_displaced_ms_is_judged_at_its_place(tmp_path):
    paths, _ = _displaced(tmp_path, shift=(2, -1), around=4)
    _, judge = _judge(paths)
    assert judge.shift == pytest.approx((2, -1), abs=0.3)
    assert judge.sigma == pytest.approx(2.0, abs=0.4)  # with the area of a pixel
    assert judge.scores["registered"]["r_ergas"] < 0.25 * judge.scores["published"]["r_ergas"]


def test_nodata_does_not_count_by_reprojection(tmp_path):
    answers = []
    for value in (7.0, 30_000.0):
        folder = tmp_path / str(value)
        folder.mkdir()
        paths, _ = _displaced(folder, nodata=value)
        with rasterio.open(paths["result"], "r+") as data:
            values = data.read()
            values[:, 100:110, 50:60] = value
            data.write(values)
        answers.append(_judge(paths)[1])
    for way, scores in answers[0].scores.items():
        assert answers[1].scores[way] == pytest.approx(scores, rel=1e-9)


def test_a_scene_that_is_too_small_for_it_has_no_second_judge(tmp_path, messages):
    paths, _ = _scene(tmp_path, height=64, width=64)
    results, judge = _judge(paths)
    assert judge is None and "is not measured by reprojection" in messages.text
    assert _value(results, "hqnr") < 1


# ---------------------------------------------------------------------------------- bad inputs


def _refused(tmp_path, other, message):
    """`other` is refused as a result, with a reference and without."""
    paths, _ = _scene(tmp_path)
    with pytest.raises(IncompatiblePair, match=message):
        _against(other, paths["result"], max_value=2047, cut=0)
    with pytest.raises(IncompatiblePair, match=message):
        evaluate_without(other, paths["pan"], [paths["ms"]], _options())


@pytest.mark.parametrize(
    "shape, place, crs, message",
    [
        ((4, 128, 150), GRID, UTM, r"has 150 x 128 pixels and .* has 160 x 128"),
        ((4, 128, 160), GRID @ Affine.translation(0.5, 0), UTM, "up to 0.50 pixels off the grid"),
        ((4, 128, 160), GRID @ Affine.scale(1.001), UTM, "up to 0.16 pixels off the grid"),
        ((4, 128, 160), GRID, "EPSG:32632", "is in EPSG:32632 and .* in EPSG:32631"),
        ((3, 128, 160), GRID, UTM, "has 3 bands and .* has 4"),
    ],
)
def test_rasters_that_do_not_fit(tmp_path, shape, place, crs, message):
    other = write_raster(tmp_path / "other.tif", _texture(*shape), place, crs=crs)
    _refused(tmp_path, other, message)


def test_all_masked(tmp_path):
    empty = np.zeros((4, 128, 160), "uint16")
    other = write_raster(tmp_path / "other.tif", empty, GRID, nodata=0)
    _refused(tmp_path, other, "cannot be measured: no .* without nodata is left to measure")


def test_other_bad_input(tmp_path):
    paths, _ = _scene(tmp_path)
    result, pan, ms = paths["result"], paths["pan"], [paths["ms"]]
    with pytest.raises(InputUnreadable, match=r"nowhere\.tif cannot be opened"):
        _against(str(tmp_path / "nowhere.tif"), result)
    with pytest.raises(IncompatiblePair, match="A border of 80 leaves nothing of the 160 x 128"):
        _against(result, result, max_value=2047, cut=80)
    with pytest.raises(IncompatiblePair, match="27 x 59 pixels are fewer than one window"):
        _against(result, result, max_value=2047, cut=51)
    with pytest.raises(IncompatiblePair, match="QB has 4 bands, not 3"):
        three = write_raster(tmp_path / "three.tif", _texture(3, 128, 160), GRID)
        evaluate_without(three, pan, [f"{ms[0]},band={b}" for b in (1, 2, 3)], _options())
    empty = write_raster(tmp_path / "empty.tif", np.zeros((4, 128, 160), "uint16"), GRID, nodata=0)
    with pytest.raises(IncompatiblePair, match=r"empty\.tif holds no valid pixel above 0"):
        _against(result, empty, cut=0)
    with pytest.raises(IncompatiblePair, match="take area or pancollection"):
        _without(paths, registration="elsewhere")


def test_the_toolbox_s_enlargement_needs_a_common_corner(tmp_path):
    paths, _ = _scene(tmp_path, offset=(2, 2), around=4)
    with pytest.raises(IncompatiblePair, match="begins at the PAN's corner"):
        _without(paths, registration="pancollection")


def test_gains_are_the_sensor_s(tmp_path):
    paths, _ = _scene(tmp_path)
    first, other = (_without(paths, sensor=sensor) for sensor in ("QB", "IKONOS"))
    assert _value(first, "d_lambda_k") != _value(other, "d_lambda_k")
    assert _value(first, "d_s") == _value(other, "d_s")
