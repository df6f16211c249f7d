from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation, correlate

from uknowpan.models.metrics import full_resolution as fr
from uknowpan.models.metrics import indices as m
from uknowpan.models.metrics.q2n import q2n_tiles
from uknowpan.models.metrics.sensors import SENSORS
from uknowpan.models.metrics.toolbox import imresize, interp23tap, mtf_filter, mtf_kernel

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
GAINS = {name: sensor.mtf_ms for name, sensor in SENSORS.items() if sensor.bands}
RTOL = 1e-9  # measured 2e-12 at worst


def _load(name):
    """Images as float64 tensors, the rest as it is."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        images = {"gt", "fused", "ms", "pan", "x"}
        return {k: torch.from_numpy(v.astype("f8")) if k in images else v for k, v in file.items()}


def _image(*shape, seed=0, low=100, high=1500):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).double()


def _pair(*shape):
    gt = _image(*shape)
    return (gt + 50 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))), gt


# Every index as a function of two images and a mask.
SUMS = m.AgainstReference
PARTS = {"q": SUMS.add_q, "scc": SUMS.add_gradients, "ssim": SUMS.add_ssim, "psnr": SUMS.add_errors}
REDUCED = {"q2n": m.q2n, "sam": m.sam, "ergas": m.ergas} | {
    index: lambda f, g, index=index, part=part, mask=None: m._index(index, part, f, g, mask, peak=2047)
    for index, part in PARTS.items()
}
FULL = {
    index: lambda f, lms, pan, index=index, **k: getattr(fr.full_resolution(f, lms, pan, [0.3], **k), index)
    for index in ("d_lambda_k", "d_lambda", "d_s")
}


# ------------------------------------------------------------------------ the toolbox's values


@pytest.mark.parametrize("name", ["rr_8band", "rr_4band", "rr_3band", "rr_edge", "rr_real"])
def test_reduced_resolution_equals_toolbox(name):
    data = _load(name)
    fused, gt = (m.crop_border(data[k], int(data["cut"])) for k in ("fused", "gt"))
    peak = 2 ** int(data["bits"]) - 1
    scores = m.reduced_resolution(fused, gt, ratio=int(data["ratio"]), peak=peak)
    for index in REDUCED:
        expected = pytest.approx(float(data[f"expected_{index}"]), rel=RTOL)
        assert float(getattr(scores, index)) == expected, index
    tiles = q2n_tiles(fused[None], gt[None], 32)[0]
    np.testing.assert_allclose(tiles.numpy(), data["expected_q2n_map"], rtol=RTOL, atol=1e-12)


@pytest.mark.parametrize("name", ["fr_8band", "fr_4band", "fr_real"])
def test_full_resolution_equals_toolbox(name):
    data = _load(name)
    ratio = int(data["ratio"])
    lms = interp23tap(data["ms"], ratio)
    gains = GAINS[str(data["sensor"])]
    scores = fr.full_resolution(data["fused"], lms, data["pan"], gains, ratio=ratio)
    for index in ("d_lambda_k", "d_lambda", "d_s", "hqnr", "qnr"):
        # One DN that rounds the other way moves D_lambda by up to 1e-7.
        expected = pytest.approx(float(data[f"expected_{index}"]), rel=RTOL, abs=1e-7)
        assert float(getattr(scores, index)) == expected, index
    np.testing.assert_allclose(imresize(data["pan"], ratio).numpy(), data["expected_pan_quarter"], rtol=RTOL)


@pytest.mark.parametrize("sensor", GAINS)
def test_mtf_kernels_equal_toolbox(sensor):
    with np.load(GOLDEN / "mtf_kernels.npz") as file:
        expected = file[sensor]
    kernels = np.stack([mtf_kernel(gain).numpy() for gain in GAINS[sensor]])
    np.testing.assert_allclose(kernels, expected, rtol=RTOL, atol=1e-15)


def test_resampling_equals_toolbox():
    data = _load("resample")
    x = data["x"]
    for result, name in [
        (interp23tap(x, 4), "interp23tap_x4"),
        (interp23tap(x, 2), "interp23tap_x2"),
        (imresize(x, 4), "imresize_quarter"),
    ]:
        np.testing.assert_allclose(result.numpy(), data[f"expected_{name}"], rtol=RTOL)


def test_wald_reduction_equals_toolbox():
    data = _load("wald")
    ms = mtf_filter(data["gt"], GAINS["WV3"])[:, 2::4, 2::4]
    np.testing.assert_allclose(ms.numpy(), data["expected_ms_lr"], rtol=RTOL)
    np.testing.assert_allclose(imresize(data["pan"]).numpy(), data["expected_pan_lr"], rtol=RTOL)


# ----------------------------------------------------------------------------- known answers


def test_equal_images_are_perfect():
    x = _image(5, 64, 64)
    scores = m.reduced_resolution(x, x, ratio=4, peak=2047)
    for index in ("q2n", "q", "scc", "ssim"):
        assert float(getattr(scores, index)) == pytest.approx(1, abs=1e-12), index
    assert scores.sam < 1e-5 and scores.ergas == 0 and scores.psnr == float("inf")


def test_ergas_and_psnr_by_hand():
    gt = torch.tensor([100.0, 200.0])[:, None, None].expand(2, 4, 4)
    # Errors of 10 in both bands: relative to the reference's means 0.1 and 0.05.
    for ratio in (2, 4):
        assert float(m.ergas(gt + 10, gt, ratio)) == pytest.approx(100 / ratio * np.sqrt((0.01 + 0.0025) / 2))
    assert float(m.psnr(gt + 10, gt, 1000)) == pytest.approx(40)
    empty = gt * torch.tensor([1.0, 0.0])[:, None, None]
    assert float(m.ergas(empty + 1, empty)) == float("inf")
    assert 0 < float(m.ergas(1.01 * empty, empty)) < 1


def test_sam_by_hand_leaves_zero_spectra_out():
    gt = torch.tensor([[[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]])
    fused = torch.tensor([[[1.0, 2.0, 5.0]], [[1.0, 0.0, 5.0]]])
    assert float(m.sam(fused, gt)) == pytest.approx((45 + 0) / 2)
    assert float(m.sam(-gt[:, :, :1], gt[:, :, :1])) == pytest.approx(180)


def test_q2n_rounds_halves_up_and_loses_negatives():
    gt = _image(4, 32, 32)
    gt[:, 0] = 0
    noise = torch.rand(gt.shape, generator=torch.Generator().manual_seed(2)) / 2
    rounded_back = torch.where(gt > 0, gt - noise, gt - 20 * noise)
    rounded_back[0, 5, 5] = gt[0, 5, 5] - 0.5
    assert float(m.q2n(rounded_back, gt)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("bands", [1, 2, 3, 5, 8, 16])
def test_q2n_of_any_number_of_bands(bands):
    fused, gt = _pair(bands, 64, 64)
    good, bad = float(m.q2n(fused, gt)), float(m.q2n(gt + 4 * (fused - gt), gt))
    assert 0.5 < bad < good < 1


def test_q2n_of_one_band_is_the_universal_quality_index_of_the_normalised_tile():
    fused, gt = _pair(1, 32, 32)
    fused = fused.round()
    a, b = ((x - gt.mean()) / gt.std() + 1 for x in (gt, fused))
    covariance = ((a - a.mean()) * (b - b.mean())).sum() / (a.numel() - 1)
    expected = 4 * covariance * a.mean() * b.mean()
    expected = expected / ((a.var() + b.var()) * (a.mean() ** 2 + b.mean() ** 2))
    assert float(m.q2n(fused, gt)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1000.0, 65535.1])
def test_flat_images_are_equal(value):
    x = torch.full((4, 64, 64), value, dtype=torch.float64)
    assert float(m.q2n(x, x)) == float(REDUCED["scc"](x, x)) == 1
    assert float(REDUCED["q"](x, x)) == pytest.approx(1, abs=1e-12)
    assert float(FULL["d_lambda"](x, x, x[:1])) == 0
    assert float(FULL["d_s"](x, x, x[:1])) == pytest.approx(0, abs=1e-12)


def test_flat_images_compare_their_means_and_resemble_no_texture():
    # Values whose sums float64 must round: what is left of the variance is not texture.
    a, b = torch.rand(2, 200, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fused, gt = (x[:, None, None, None].expand(-1, 1, 40, 40) for x in (a, b))
    torch.testing.assert_close(REDUCED["q"](fused, gt), 2 * a * b / (a**2 + b**2))
    x, flat = _image(4, 64, 64), torch.full((4, 64, 64), 700.0)
    assert float(REDUCED["scc"](0 * flat, x)) == 0
    for index in (m.q2n, REDUCED["q"]):
        assert float(index(flat, x)) == pytest.approx(0, abs=1e-9)
        assert float(index(x, flat)) == pytest.approx(0, abs=1e-9)


def test_d_lambda_of_one_band_and_of_incomplete_tiles():
    one = _image(2, 1, 64, 64)
    assert FULL["d_lambda"](one, _image(2, 1, 64, 64, seed=1), one).tolist() == [0, 0]
    images = *_pair(3, 64, 96), _image(1, 64, 96)
    wide = [torch.nn.functional.pad(x, (0, 8, 0, 12), value=9.0) for x in images]
    assert FULL["d_lambda"](*wide) == FULL["d_lambda"](*images)


# --------------------------------------------------------------------------- batches and masks


def test_batch_is_its_images_one_by_one():
    fused, gt = _pair(2, 3, 64, 48)
    for name, index in REDUCED.items():
        both = index(fused, gt)
        assert both.dtype == torch.float64 and both.shape == (2,)
        alone = [float(index(f, g)) for f, g in zip(fused, gt, strict=True)]
        assert both.tolist() == pytest.approx(alone, rel=1e-12), name
    pan = _image(2, 1, 64, 48)
    fused, gt = fused[..., :48], gt[..., :48]
    for name, index in FULL.items():
        both = index(fused, gt, pan)
        alone = [float(index(*images)) for images in zip(fused, gt, pan, strict=True)]
        assert both.tolist() == pytest.approx(alone, rel=1e-9), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int16, torch.float32])
def test_any_dtype_is_measured_in_float64(dtype):
    fused, gt = (_image(4, 40, 40, seed=s, low=1, high=255) for s in (0, 1))
    for index in REDUCED.values():
        assert torch.equal(index(fused.to(dtype), gt.to(dtype)), index(fused, gt))


ANY = {name: lambda f, g, pan, i=index, **k: i(f, g, **k) for name, index in REDUCED.items()} | FULL


@pytest.mark.parametrize("name", ANY)
@pytest.mark.parametrize("hole", [(slice(70, 75), slice(90, 94)), (slice(5), slice(-4, None))])
def test_masked_pixels_do_not_count(name, hole):
    fused, lms = _pair(3, 192, 192)
    pan = fused.mean(0, keepdim=True).round()
    mask = torch.zeros(192, 192, dtype=torch.bool)
    mask[hole] = True
    scores = []
    for garbage in (0.0, float("nan"), 60000.0):
        images = [torch.where(mask, garbage, x) for x in (fused, lms, pan)]
        scores.append(float(ANY[name](*images, mask=mask)))
    assert scores[0] == scores[1] == scores[2]
    assert scores[0] != float(ANY[name](fused, lms, pan))


def test_khan_counts_tiles_that_the_blur_kept_clean():
    fused, lms = _pair(3, 192, 192)
    mask = torch.zeros(192, 192, dtype=torch.bool)
    mask[20:28, :12] = True
    # The blur carries nodata over 20 pixels: rows 0..47, columns 0..31.
    tiles = q2n_tiles(mtf_filter(fused, [0.3])[None], lms[None], 32)[0]
    expected = 1 - torch.cat([tiles[2:].flatten(), tiles[:2, 1:].flatten()]).mean()
    result = FULL["d_lambda_k"](fused, lms, fused[:1], mask=mask)
    assert float(result) == pytest.approx(float(expected), rel=1e-9)


def test_scc_leaves_out_gradients_that_touch_nodata():
    images = _pair(2, 24, 20)
    mask = torch.zeros(24, 20, dtype=torch.bool)
    mask[5:8, 9] = mask[0, 0] = True
    sobel = np.array([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    away = ~binary_dilation(mask.numpy()[1:-1, 1:-1], np.ones((3, 3)))
    f, g = (
        np.stack(
            [
                np.hypot(*(correlate(band, k, mode="constant") for k in (sobel, sobel.T)))[away]
                for band in image[:, 1:-1, 1:-1].numpy()
            ]
        )
        for image in images
    )
    expected = (f * g).sum() / np.sqrt((f**2).sum() * (g**2).sum())
    assert float(REDUCED["scc"](*images, mask=mask)) == pytest.approx(expected, rel=1e-12)


def test_d_s_counts_tiles_that_the_low_pass_of_pan_kept_clean():
    fused, lms = _pair(3, 192, 192)
    pan = fused.mean(0, keepdim=True).round()
    mask = torch.zeros(192, 192, dtype=torch.bool)
    mask[28:36, :32] = True
    # Nodata reaches 42 pixels far, across the circular borders too: rows 0..77 and 178..191,
    # columns 0..73 and 150..191. Beyond are tile rows 3 and 4, and tile column 3.
    low = interp23tap(imresize(pan))
    span = [slice(start, start + 32) for start in range(0, 192, 32)]
    tiles = [(span[r], span[c]) for r in range(6) for c in range(6) if r in (3, 4) or c == 3]

    def likeness(x, y):
        return sum(REDUCED["q"](x[:, r, c], y[:, r, c]) for r, c in tiles) / len(tiles)

    bands = zip(fused.split(1), lms.split(1), strict=True)
    expected = sum((likeness(f, pan) - likeness(ms, low)).abs() for f, ms in bands) / 3
    assert float(FULL["d_s"](fused, lms, pan, mask=mask)) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["q2n", "q", "sam", "ergas", "psnr", "ssim"])
def test_masking_rows_is_cropping_them(name):
    fused, gt = _pair(4, 96, 64)
    mask = torch.zeros(96, 64, dtype=torch.bool)
    mask[64:] = True
    cropped = REDUCED[name](fused[:, :64], gt[:, :64])
    assert float(REDUCED[name](fused, gt, mask=mask)) == pytest.approx(float(cropped), rel=1e-12)


# --------------------------------------------------------------------------------------- tools


def test_crop_border_is_the_toolbox_s():
    x = torch.arange(256).expand(256, 256)
    assert m.crop_border(x).shape == (215, 215)
    assert m.crop_border(x)[0, [0, -1]].tolist() == [20, 234]
    assert m.crop_border(x, 0) is x


@pytest.mark.parametrize("size", [(9, 70), (64, 45)])
def test_mtf_filter_is_a_correlation_with_replicated_borders(size):
    x = _image(2, 2, *size)
    blurred = mtf_filter(x, [0.2, 0.36], ratio=2)
    for band, gain in enumerate([0.2, 0.36]):
        kernel = mtf_kernel(gain, 2).numpy()
        for image in range(2):
            expected = correlate(x[image, band].numpy(), kernel, mode="nearest")
            np.testing.assert_allclose(blurred[image, band].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(("gain", "ratio"), [(0.15, 4), (0.3, 4), (0.3, 3), (0.35, 2)])
def test_mtf_kernel_has_the_gain_at_the_nyquist_frequency(gain, ratio):
    kernel = mtf_kernel(gain, ratio)
    wave = torch.cos(torch.pi / ratio * torch.arange(-20, 21, dtype=torch.float64))
    assert float((kernel.sum(0) * wave).sum()) == pytest.approx(gain, abs=0.02)


@pytest.mark.parametrize(("ratio", "first"), [(2, 1), (4, 2), (8, 4)])
def test_interp23tap_keeps_the_samples(ratio, first):
    x = _image(3, 12, 16)
    # Even taps of the half-band filter vanish, and its centre is exactly 1.
    torch.testing.assert_close(interp23tap(x, ratio)[..., first::ratio, first::ratio], x)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5])
def test_imresize_centres_its_pixels(ratio):
    ramp = torch.arange(20.0 * ratio, dtype=torch.float64).expand(1, 20 * ratio, -1)
    reduced = imresize(ramp, ratio)
    assert reduced.shape == (1, 20, 20)
    centres = ratio * torch.arange(20.0, dtype=torch.float64) + (ratio - 1) / 2
    torch.testing.assert_close(reduced[0, 5, 3:-3], centres[3:-3])


# -------------------------------------------------------------------------------------- errors

X = torch.ones(2, 64, 64)
ALL = torch.ones(64, 64, dtype=torch.bool)
ONE_PER_TILE = torch.zeros(64, 64, dtype=torch.bool)
ONE_PER_TILE[::32, ::32] = True


@pytest.mark.parametrize("name", REDUCED)
def test_nothing_left_to_measure(name):
    with pytest.raises(ValueError, match="all 4096 pixels are masked"):
        REDUCED[name](X, X, mask=ALL)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: m.sam(X, X[:, :60]), r"\(2, 64, 64\) and \(2, 60, 64\)"),
        (lambda: m.ergas(X[0], X[0]), r"\(C, H, W\) or \(B, C, H, W\)"),
        (lambda: m.q2n(X, X, mask=ALL[:60]), r"bool \(64, 64\) .* bool \(60, 64\)"),
        (lambda: m.psnr(X, X, 1, mask=ALL.int()), "not int32"),
        (lambda: m.sam(0 * X, X), "no pixel of non-zero spectra"),
        (lambda: REDUCED["q"](X[:, :31], X[:, :31]), "31 x 64 .* one window of 32 x 32"),
        (lambda: m.q2n(X, X, mask=ONE_PER_TILE), "no window of 32 x 32 pixels without nodata"),
        (lambda: m.crop_border(X, 33), "border of 33 leaves nothing of 64 x 64"),
        (lambda: m.crop_border(X, -1), "border of -1"),
        (lambda: fr.full_resolution(X, X, X, [0.3]), r"PAN of one band .* \(2, 64, 64\)"),
        (lambda: fr.full_resolution(X, X, X[:1], [0.3], ratio=3), "cannot be reduced by 3; crop to 63 x 63"),
        (lambda: interp23tap(X, 3), "powers of two, not by 3"),
        (lambda: mtf_filter(X, [0.3] * 3), "3 MTF gains for an image of 2 bands"),
        (lambda: mtf_kernel(1.0), "between 0 and 1, not at 1.0"),
    ],
)
def test_errors_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()
