from dataclasses import replace

import pytest
import torch
from textures import make_pair

from uknowpan.models.blur import default_psf
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.resample import crop, upsample
from uknowpan.models.sharpeners import ClassicalSharpener, sharpen_array
from uknowpan.models.statistics import scene_statistics

GAINS = torch.tensor([0.4, 1.0, 2.5]).view(-1, 1, 1)
SHARPENING = ["brovey", "gsa", "mtf-glp", "awlp"]


def multiples(ratio):
    """Bands that are multiples of PAN; PAN, MS, truth."""
    pair = make_pair(ratio, (32, 36), bands=1, sigma=default_psf(ratio).sigma)
    return pair.pan, GAINS * pair.ms, GAINS * pair.gt


@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
@pytest.mark.parametrize("method", SHARPENING)
def test_bands_that_are_multiples_of_pan_come_out_true(method, ratio):
    pan, ms, truth = multiples(ratio)
    hrms = sharpen_array(ClassicalSharpener(method), pan, ms).hrms
    blurred = upsample(ms[None], ratio)[0]
    error, before = (crop(x - truth, 6 * ratio).square().mean().sqrt() for x in (hrms, blurred))
    assert error < 0.05 * before


@pytest.mark.parametrize("method", ["gsa", "mtf-glp"])
def test_offsets_of_pan_and_bands_are_no_matter(method):
    pan, ms, truth = multiples(4)
    sharpener = ClassicalSharpener(method)
    plain = sharpen_array(sharpener, pan, ms).hrms
    offset = torch.tensor([5.0, -3.0, 40.0]).view(-1, 1, 1)
    moved = sharpen_array(sharpener, pan + 7, ms + offset).hrms - offset
    torch.testing.assert_close(moved, plain, rtol=0, atol=0.005 * float(truth.std()))


def test_bicubic_does_not_see_pan():
    pan, ms, _ = multiples(4)
    sharpener = ClassicalSharpener("bicubic")
    plain = sharpen_array(sharpener, pan, ms).hrms
    assert torch.equal(sharpen_array(sharpener, pan.flip(-1), ms).hrms, plain)
    torch.testing.assert_close(crop(plain, 8), crop(upsample(ms[None], 4)[0], 8))


@pytest.mark.parametrize("shift", [(0.0, 0.0), (3.3, -2.1)])
@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
@pytest.mark.parametrize("method", list(CLASSICAL_METHODS))
def test_tiles_agree(method, ratio, shift):
    pair = make_pair(ratio, (34, 34))
    sharpener = ClassicalSharpener(method)
    psf = replace(default_psf(ratio), shift=shift)
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio, psf)
    margin = sharpener.margin(statistics)

    def window(row, col, rows, cols):
        """A core at MS pixel (row, col), read with its margin."""
        ys = slice(row - margin, row + rows + margin)
        xs = slice(col - margin, col + cols + margin)
        fine = [slice(s.start * ratio, s.stop * ratio) for s in (ys, xs)]
        done = sharpener.sharpen(pair.pan[None, :, fine[0], fine[1]], pair.ms[None, :, ys, xs], statistics, [(0, 0)])
        assert done.hrms.shape[-2:] == (rows * ratio, cols * ratio)
        return done.hrms

    whole = window(margin, margin, 34 - 2 * margin, 34 - 2 * margin)
    part = window(margin + 2, margin + 1, 5, 7)
    rows, cols = slice(2 * ratio, 7 * ratio), slice(ratio, 8 * ratio)
    torch.testing.assert_close(part, whole[..., rows, cols], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", list(CLASSICAL_METHODS))
def test_flat_and_dark_scenes_stay_finite(method):
    for value in (0.0, 0.5):
        pan, ms = torch.full((1, 80, 80), value), torch.full((2, 20, 20), value)
        hrms = sharpen_array(ClassicalSharpener(method), pan, ms).hrms
        torch.testing.assert_close(hrms, torch.full((2, 80, 80), value), rtol=1e-3, atol=1e-6)


def test_haze_of_the_bands_does_not_bend_the_injection():
    """Each band is a multiple of the PAN plus its own haze: awlp is right, the ratio without haze is not."""
    pan, ms, truth = multiples(4)
    haze = torch.tensor([0.3, 0.1, 0.02]).view(-1, 1, 1)
    low = float(pan.min())
    hrms = sharpen_array(ClassicalSharpener("awlp"), pan - low, ms - GAINS * low + haze).hrms
    wanted = truth - GAINS * low + haze
    error, before = (
        crop(x - wanted, 24).square().mean().sqrt() for x in (hrms, upsample((ms - GAINS * low + haze)[None], 4)[0])
    )
    assert error < 0.15 * before
