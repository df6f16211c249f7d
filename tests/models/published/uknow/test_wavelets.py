import numpy as np
import pytest
import pywt
import torch

from uknowpan.models.published.uknow.wavelets import haar_swt2, teacher_wavelets


def _reference(x):
    """LL, H, V, D of (H, W) by PyWavelets; odd sizes by repeating the image, which is periodic."""
    approximation, details = pywt.swt2(np.tile(x, (2, 2)), "db1", level=1)[0]
    return [part[: x.shape[0], : x.shape[1]] for part in (approximation, *details)]


@pytest.mark.parametrize("size", [(8, 6), (7, 6), (8, 5), (9, 11), (1, 1), (2, 3)])
def test_equals_pywavelets(size):
    x = np.random.default_rng(0).random((2, 3, *size))
    ours = haar_swt2(torch.from_numpy(x).float())
    for image in range(2):
        for band in range(3):
            for got, expected in zip(ours, _reference(x[image, band]), strict=True):
                np.testing.assert_allclose(got[image, band].numpy(), expected, atol=1e-5)


def test_details_are_named_as_in_pywavelets():
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    rows_differ, columns_differ = stripes[:, None].repeat(1, 8), stripes.repeat(8, 1)
    assert [bool(part.any()) for part in haar_swt2(rows_differ)] == [False, True, False, False]
    assert [bool(part.any()) for part in haar_swt2(columns_differ)] == [False, False, True, False]
    both = rows_differ * columns_differ
    assert [bool(part.any()) for part in haar_swt2(both)] == [False, False, False, True]


def test_teacher_is_shown_the_mean_of_lms_and_the_details_of_pan():
    rng = np.random.default_rng(1)
    lms, pan = rng.random((2, 3, 6, 8)), rng.random((2, 1, 6, 8))
    shown = teacher_wavelets(torch.from_numpy(lms), torch.from_numpy(pan)).numpy()
    assert shown.shape == (2, 6, 6, 8)
    for image in range(2):
        _, horizontal, vertical, diagonal = _reference(pan[image, 0])
        means = [_reference(band)[0] for band in lms[image]]
        expected = np.stack([*means, horizontal, diagonal, vertical])
        np.testing.assert_allclose(shown[image], expected, atol=1e-12)
