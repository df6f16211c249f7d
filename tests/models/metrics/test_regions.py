"""Sums over regions against `metrics` of the whole image."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from uknowpan.models.metrics import full_resolution as fr
from uknowpan.models.metrics import indices as m
from uknowpan.models.metrics.full_resolution import Coarse, Enlargement, WithoutReference, reduce_pan
from uknowpan.models.metrics.indices import AgainstReference
from uknowpan.models.metrics.regions import Region, regions, whole_tiles
from uknowpan.models.metrics.toolbox import imresize, interp23tap
from uknowpan.models.metrics.windows import window_quality
from uknowpan.models.resample import crop, upsample

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
RTOL = 1e-9
GAINS = (0.34, 0.32, 0.30)


def _images(*shape, seed=0):
    """A smooth field with texture, and a noisy copy of it, in DN."""
    generator = torch.Generator().manual_seed(seed)
    small = 1500 * torch.rand(shape[0], shape[1] // 8 + 1, shape[2] // 8 + 1, generator=generator)
    gt = F.interpolate(small[None], shape[1:], mode="bilinear")[0] + 100
    gt = (gt + 40 * torch.randn(shape, generator=generator)).clamp(0, 2047).round().double()
    return (gt + 30 * torch.randn(shape, generator=generator)).round(), gt


def _hole(shape, *boxes):
    mask = torch.zeros(shape, dtype=torch.bool)
    for rows, cols in boxes:
        mask[slice(*rows), slice(*cols)] = True
    return mask


def _cut(x, region):
    return x[..., *region.within(Region(0, 0, *x.shape[-2:]))]


def _against(fused, gt, mask=None, rows=64, cols=96):
    sums = AgainstReference(fused.shape[1:], ratio=4, peak=2047)
    for region in regions(sums.shape, rows=rows, cols=cols):
        outer = sums.needed(region)
        holes = None if mask is None else _cut(mask, outer)
        sums.add(region, _cut(fused, outer), _cut(gt, outer), holes)
    return sums.scores()


def _same(scores, expected, index, **tolerance):
    expected = float(getattr(expected, index))
    assert float(getattr(scores, index)) == pytest.approx(expected, rel=RTOL, **tolerance), index


@pytest.mark.parametrize("shape", [(64, 96), (40, 35), (131, 203), (32, 300), (150, 33)])
def test_regions_cover_the_image_once(shape):
    seen = torch.zeros(shape, dtype=torch.int)
    for region in regions(shape, rows=64, cols=96):
        assert region.row % 64 == 0 and region.col % 96 == 0
        assert min(region.height, region.width) >= 32
        seen[region.within(Region(0, 0, *shape))] += 1
    assert bool((seen == 1).all())
    widths = {bands: {r.width for r in regions((64, 1280), bands)} for bands in (4, 64, 5000)}
    assert widths == {4: {640}, 64: {64}, 5000: {32}}  # for 64 bands 80 pixels, in whole tiles


@pytest.mark.parametrize("shape", [(4, 131, 203), (3, 96, 130), (1, 64, 128), (8, 33, 200)])
def test_against_a_reference_equals_the_whole_image(shape):
    fused, gt = _images(*shape)
    expected = m.reduced_resolution(fused, gt, ratio=4, peak=2047)
    scores = _against(fused, gt)
    for index in m.ReducedResolution._fields:
        _same(scores, expected, index)


def test_against_a_reference_equals_the_toolbox():
    with np.load(GOLDEN / "rr_8band.npz") as data:
        fused, gt = (m.crop_border(torch.from_numpy(data[k].astype("f8")), int(data["cut"])) for k in ("fused", "gt"))
        scores = _against(fused, gt, rows=32, cols=64)
        for index in ("q2n", "q", "sam", "ergas", "scc", "ssim", "psnr"):
            assert float(getattr(scores, index)) == pytest.approx(float(data[f"expected_{index}"]), rel=RTOL), index


def test_nodata_against_a_reference():
    fused, gt = _images(4, 200, 230)
    # At a border of regions, inside of one, over whole regions, and at the image's corner.
    mask = _hole(
        fused.shape[1:], ((60, 70), (90, 99)), ((20, 22), (50, 51)), ((100, 200), (0, 110)),
        ((0, 3), (225, 230)),
    )  # fmt: skip
    expected = m.reduced_resolution(fused, gt, ratio=4, peak=2047, mask=mask)
    scores = _against(fused.masked_fill(mask, torch.nan), gt.masked_fill(mask, 9e9), mask)
    for index in m.ReducedResolution._fields:
        _same(scores, expected, index)


def test_equal_images_and_empty_ones():
    gt = _images(3, 70, 70)[1]
    same = _against(gt, gt)
    assert same.ergas == 0 and same.psnr == float("inf")
    assert float(same.q2n) == pytest.approx(1) and float(same.scc) == pytest.approx(1)
    assert float(_against(torch.full_like(gt, 7), torch.full_like(gt, 7)).scc) == 1
    outermost = torch.zeros_like(gt)
    outermost[:, 0] = 5
    assert float(_against(outermost, gt + 1).scc) == 0


def test_nothing_left_to_measure_against_a_reference():
    fused, gt = _images(2, 64, 64)
    with pytest.raises(ValueError, match="no pixel without nodata is left"):
        _against(fused, gt, torch.ones(64, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="no pixel of non-zero spectra"):
        _against(fused, 0 * gt)
    stripes = torch.zeros(64, 64, dtype=torch.bool)
    stripes[::5] = True
    with pytest.raises(ValueError, match="no window of 32 x 32 pixels without nodata"):
        _against(fused, gt, stripes)
    with pytest.raises(ValueError, match="20 x 64 pixels are fewer than one window"):
        _against(fused[:, :20], gt[:, :20])


# --------------------------------------------------------------------------- full resolution


def _padded(x, margin, mode):
    if mode == "circular":
        rows, cols = (torch.arange(-margin, n + margin) % n for n in x.shape[-2:])
        return x[..., rows, :][..., cols]
    return torch.from_numpy(np.pad(x, [(0, 0)] * (x.ndim - 2) + [(margin, margin)] * 2, mode="symmetric"))


def _without(fused, ms, pan, registration, ratio=4, masks=None, rows=64, cols=96, gains=GAINS):
    """`masks`: of fused, ms and pan."""
    bad = masks or [torch.zeros(x.shape[-2:], dtype=torch.bool) for x in (fused, ms, pan)]
    enlargement = Enlargement(ratio, registration)
    margin = enlargement.margin
    # Beyond the border lies a reflection for PAN's reduction, for the rest as it is enlarged.
    pan, pan_bad = (_padded(x, 2 * ratio, "symmetric") for x in (pan, bad[2]))
    coarse = ms, bad[1], *reduce_pan(pan, pan_bad, ratio)
    mode = "circular" if enlargement.circular else "symmetric"
    coarse = [_padded(x, margin, mode) for x in coarse]
    pan, pan_bad = crop(pan, 2 * ratio), crop(pan_bad, 2 * ratio)
    sums = WithoutReference(fused.shape[1:], gains, ratio=ratio)
    for region in regions(sums.shape, rows=rows, cols=cols):
        outer = sums.needed(region)
        top, left = region.row // ratio, region.col // ratio
        h, w = region.height // ratio + 2 * margin, region.width // ratio + 2 * margin
        images = enlargement(Coarse(*(x[..., top : top + h, left : left + w] for x in coarse)))
        sums.add(region, _cut(fused, outer), _cut(bad[0], outer), _cut(pan, region), _cut(pan_bad, region), images)
    return sums.scores()


def _scene(ratio=4, height=160, width=224, bands=3):
    fused, other = _images(bands, height, width)
    ms = F.avg_pool2d(other, ratio).round()
    return fused, ms, (fused.mean(0, keepdim=True) + 50).round()


FULL = ("d_lambda_k", "d_lambda", "d_s", "hqnr", "qnr")


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_the_toolbox_s_registration_equals_the_whole_image(ratio):
    fused, ms, pan = _scene(ratio)
    expected = fr.full_resolution(fused, interp23tap(ms, ratio), pan, GAINS, ratio=ratio)
    scores = _without(fused, ms, pan, "pancollection", ratio)
    for index in FULL:
        _same(scores, expected, index)


def test_without_a_reference_equals_the_toolbox():
    with np.load(GOLDEN / "fr_4band.npz") as data:
        fused, ms, pan = (torch.from_numpy(data[k].astype("f8")) for k in ("fused", "ms", "pan"))
        expected = {index: float(data[f"expected_{index}"]) for index in FULL}
    gains = (0.34, 0.32, 0.30, 0.22)
    scores = _without(fused, ms, pan, "pancollection", rows=32, cols=64, gains=gains)
    for index in FULL:
        assert float(getattr(scores, index)) == pytest.approx(expected[index], rel=RTOL, abs=1e-7)


@pytest.mark.parametrize("ratio", [2, 4])
def test_measuring_by_area_equals_the_whole_image(ratio):
    fused, ms, pan = _scene(ratio)

    def enlarged(x):
        return upsample(_padded(x, 4, "symmetric")[None], ratio)[0, :, 4 * ratio : -4 * ratio, 4 * ratio : -4 * ratio]

    lms, low = enlarged(ms), enlarged(imresize(pan, ratio))
    scores = _without(fused, ms, pan, "area", ratio)
    expected = fr.full_resolution(fused, lms, pan, GAINS, ratio=ratio)
    _same(scores, expected, "d_lambda_k")
    _same(scores, expected, "d_lambda")
    to_pan, to_low = (
        window_quality(x[None], y[None].expand_as(x[None]), 32, 32).mean((0, 2, 3))
        for x, y in ((fused, pan), (lms, low))
    )
    assert float(scores.d_s) == pytest.approx(float((to_pan - to_low).abs().mean()), rel=RTOL)


@pytest.mark.parametrize("hole", [((100, 104), (60, 63)), ((0, 5), (0, 40)), ((60, 70), (90, 99))])
def test_nodata_without_a_reference(hole):
    """The toolbox's registration, so that the low-pass of PAN mixes across the image's border."""
    fused, ms, pan = _scene(height=320, width=352)
    mask = _hole(pan.shape[1:], hole)
    expected = fr.full_resolution(fused, interp23tap(ms), pan, GAINS, mask=mask)
    whole = torch.zeros(ms.shape[1:], dtype=torch.bool)
    spoiled = fused.masked_fill(mask, torch.nan), ms, pan.masked_fill(mask, 0)
    scores = _without(*spoiled, "pancollection", masks=(mask, whole, mask))
    for index in FULL:
        _same(scores, expected, index)


@pytest.mark.parametrize("registration", ["area", "pancollection"])
@pytest.mark.parametrize("which", [1, 2])
def test_masked_pixels_of_ms_or_pan_do_not_count(registration, which):
    scene = list(_scene(height=256, width=256))
    masks = [torch.zeros(x.shape[-2:], dtype=torch.bool) for x in scene]
    size = scene[which].shape[-1]
    masks[which][size // 2 : size // 2 + 3, size // 3 : size // 3 + 2] = True
    answers = []
    for value in (0.0, 60_000.0):
        filled = list(scene)
        filled[which] = scene[which].masked_fill(masks[which], value)
        answers.append(_without(*filled, registration, masks=masks))
    for index in FULL:
        _same(*answers, index)
    assert float(answers[0].d_s) != float(_without(*scene, registration).d_s)


@pytest.mark.parametrize("rows, cols", [(32, 32), (96, 64), (256, 640)])
def test_scores_do_not_depend_on_the_regions(rows, cols):
    fused, ms, pan = _scene(height=192, width=256)
    masks = [_hole(x.shape[-2:], ((20, 22), (8, 9))) for x in (fused, ms, pan)]
    expected = _without(fused, ms, pan, "area", masks=masks)
    scores = _without(fused, ms, pan, "area", masks=masks, rows=rows, cols=cols)
    for index in FULL:
        _same(scores, expected, index)


def test_area_is_where_the_ms_lies_and_pancollection_half_a_pixel_on():
    ms = torch.arange(40.0).double().expand(1, 40, 40)  # values are positions
    good = torch.zeros(40, 40, dtype=torch.bool)
    for registration, at in (("area", 1.5), ("pancollection", 2.0)):
        enlargement = Enlargement(4, registration)
        lms = enlargement(Coarse(ms, good, ms, good)).ms
        place = (torch.arange(160.0).double() - at)[None, None] / 4
        expected = crop(place.expand_as(torch.empty(1, 160, 160)), 4 * enlargement.margin)
        torch.testing.assert_close(lms, expected, rtol=0, atol=1e-3)


def test_incomplete_tiles_and_bad_arguments():
    assert whole_tiles((70, 95)) == (64, 64)
    with pytest.raises(ValueError, match="31 x 400 pixels are fewer than one window"):
        whole_tiles((31, 400))
    with pytest.raises(ValueError, match="powers of two, not by 3"):
        Enlargement(3, "pancollection")
    with pytest.raises(ValueError, match="take area or pancollection"):
        Enlargement(4, "elsewhere")
    sums = AgainstReference((64, 64), ratio=4, peak=255)
    with pytest.raises(ValueError, match=r"an image \(C, 64, 64\) is needed"):
        sums.add(Region(0, 0, 64, 64), torch.zeros(2, 32, 64), torch.zeros(2, 32, 64))


def test_all_masked_without_a_reference():
    fused, ms, pan = _scene(height=64, width=64)
    masks = [torch.ones(x.shape[-2:], dtype=torch.bool) for x in (fused, ms, pan)]
    with pytest.raises(ValueError, match="no window of 32 x 32 pixels"):
        _without(fused, ms, pan, "area", masks=masks)


def test_one_band_has_no_spectral_distortion_between_bands():
    fused, ms, pan = _scene(height=64, width=64, bands=1)
    assert float(_without(fused, ms, pan, "area", gains=(0.3,)).d_lambda) == 0
