"""The displacement of an MS against its PAN, planted and measured."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from uknowpan.models.registration import Registration, Sample, gain_to_sigma, margin_of, register, register_samples

RATIO, SIDE = 4, 256
GAINS = ((0.5, 0.3), (0.8, -0.2), (0.6, 0.4))
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def texture(seed: int) -> np.ndarray:
    """(H, W) noise with structure at all sizes."""
    rng = np.random.default_rng(seed)
    return sum(gaussian_filter(rng.standard_normal((SIDE, SIDE)), s, mode="wrap") * s for s in (1, 2, 4, 8))


def flat(dy: float, dx: float) -> Field:
    return lambda rows, cols: np.stack([dy + 0 * rows + 0 * cols, dx + 0 * rows + 0 * cols])


def stretched(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    u, v = rows / (SIDE / 2) - 1, cols / (SIDE / 2) - 1
    return np.stack([1 + 1.5 * u - 0.7 * v, -0.5 + 0.6 * u + 1.2 * v])


def bent(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    u, v = rows / (SIDE / 2) - 1, cols / (SIDE / 2) - 1
    return np.stack([2 * np.sin(2.2 * u) * np.cos(1.7 * v), 1.8 * np.cos(1.9 * u) * np.sin(2.4 * v)])


def winding(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return np.stack([2 * np.sin(cols / SIDE) + 0 * rows, 1.5 * np.cos(cols / SIDE) + 0 * rows])


def pair(fields: Field | list[Field], seed: int = 0, wide: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """PAN (H, W) and MS (3, h, w) whose content lies off by the fields, `wide` times as wide as high."""
    fields = fields if isinstance(fields, list) else [fields] * 3
    one, two = texture(seed), texture(seed + 100)
    y = np.stack(np.meshgrid(*(np.arange(SIDE // RATIO * n) * RATIO + 1.5 for n in (1, wide)), indexing="ij"))
    bands = []
    for (a, b), field in zip(GAINS, fields, strict=True):
        x = y - field(*y)
        for _ in range(5):
            x = y - field(*x)
        blurred = gaussian_filter(a * one + b * two, gain_to_sigma(0.3, RATIO), mode="wrap")
        bands.append(map_coordinates(blurred, x, order=3, mode="grid-wrap"))
    return np.tile(sum(a * one + b * two for a, b in GAINS), (1, wide)), np.stack(bands)


def error(found: Registration, field: Field, band: int | None = None) -> float:
    rows, cols = (np.arange(int(n)) * 1.0 for n in found.span)
    rows, cols = rows[:, None], cols[None, :]
    return float(np.sqrt(((found.at(rows, cols, band) - field(rows, cols)) ** 2).sum(0).mean()))


@pytest.mark.parametrize(
    ("field", "model", "most"),
    [
        (flat(0.5, -0.6), "shift", 0.05),
        (flat(-3.3, 3.7), "shift", 0.05),
        (flat(6.2, -7.1), "shift", 0.05),
        (stretched, "affine", 0.08),
        (bent, "local", 0.35),
    ],
)
def test_takes_the_simplest_model_that_fits(field: Field, model: str, most: float) -> None:
    found = register(*pair(field), RATIO)
    assert found.model == model and not found.own_bands
    assert error(found, field) < most
    assert found.share > 0.8


def test_a_strip_has_a_local_field() -> None:
    """Its left-out parts were half of it, so that no local field foretold them: an affine map, off by pixels, won."""
    found = register(*pair(winding, wide=5), RATIO)
    assert found.model == "local"
    assert error(found, winding) < 0.1


def test_below_a_third_of_a_pixel_nothing_is_moved() -> None:
    found = register(*pair(flat(0.15, -0.1)), RATIO)
    assert found.model == "none" and found.measured == "shift"
    assert not found.at(np.arange(3.0), np.arange(3.0)).any()


def test_bands_have_their_own_shifts() -> None:
    fields = [flat(1.1, 0.2), flat(-0.6, -0.9), flat(0.1, 0.8)]
    found = register(*pair(fields), RATIO)
    assert found.own_bands
    assert max(error(found, field, band) for band, field in enumerate(fields)) < 0.15


@pytest.mark.parametrize("seed", range(6))
def test_unlike_content_has_no_displacement(seed: int) -> None:
    pan, _ = pair(flat(0, 0), seed + 1)
    assert register(pan, pair(flat(0, 0), seed + 40)[1], RATIO).model == "none"


def test_flat_and_missing_scenes_have_no_displacement() -> None:
    pan, ms = pair(flat(2, 2))
    assert register(np.ones_like(pan), ms, RATIO).model == "none"
    assert register(pan, np.ones_like(ms), RATIO).model == "none"
    assert register(pan, ms, RATIO, valid_ms=np.zeros(ms.shape[1:], bool)).model == "none"
    assert register(pan[:32, :32], ms[:, :8, :8], RATIO).model == "none"


def test_few_windows_show_a_shift_at_most() -> None:
    """Fault: seven overlapping windows of a small registered scene agreed on a stretched one."""
    pan, ms = pair(stretched)
    found = register(pan[:96, :96], ms[:, :24, :24], RATIO)
    assert found.model in ("none", "shift") and found.voters < 10


def test_pixels_without_data_have_no_say() -> None:
    pan, ms = pair(flat(-1.2, 1.6))
    valid_pan, valid_ms = np.ones(pan.shape, bool), np.ones(ms.shape[1:], bool)
    valid_pan[:90], valid_ms[:, 40:] = False, False
    pan, ms = np.where(valid_pan, pan, -999.0), np.where(valid_ms, ms, -999.0)
    found = register(pan, ms, RATIO, valid_pan=valid_pan, valid_ms=valid_ms)
    assert found.model == "shift"
    assert error(found, flat(-1.2, 1.6)) < 0.08


def test_windows_suffice_and_gain_and_offset_do_not_matter() -> None:
    pan, ms = pair(flat(1.5, -2))
    whole = register(pan, ms, RATIO)
    sigma = gain_to_sigma(0.3, RATIO)
    side = 16 + 2 * margin_of(RATIO, sigma, 8)
    samples = []
    for row in range(0, len(ms[0]) - side + 1, 6):
        for col in range(0, len(ms[0]) - side + 1, 6):
            large = (slice(k * RATIO, (k + side) * RATIO) for k in (row, col))
            part = ms[:, row : row + side, col : col + side]
            samples.append(Sample(row, col, pan[*large] * 7 + 90, part * 3 + 20))
    found = register_samples(samples, RATIO, ms.shape[1:])
    assert np.allclose(found.shift, whole.shift, atol=1e-3)


def test_places_on_the_pan_undo_the_field() -> None:
    found = register(*pair(bent), RATIO)
    rows, cols = np.arange(8, 250, 20.0)[:, None], np.arange(8, 250, 20.0)[None, :]
    place = found.pan_places(rows, cols)
    back = place + found.at(place[0], place[1])
    assert np.abs(back - np.stack(np.broadcast_arrays(rows, cols))).max() < 1e-2
