"""The geometry of displaced windows: exact at no displacement, and the same pixels for any cut."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from textures import make_pair

from uknowpan.models.blur import default_psf
from uknowpan.models.denoising import load_network
from uknowpan.models.geometry import Displaced
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import degrade, mirrored, upsample
from uknowpan.models.sharpeners import ClassicalSharpener, ConsistentSharpener, Sharpener
from uknowpan.models.statistics import SceneStatistics, scene_statistics

SIZE = (30, 36)


def field_of(ratio: int, bands: int = 4, kind: str = "local", *, own: bool = True) -> Registration:
    """A field of up to about 2 PAN pixels over a scene of `SIZE`."""
    rng = np.random.default_rng(7)
    height, width = (float(n * ratio) for n in SIZE)
    off = rng.uniform(-0.6, 0.6, (bands, 2))
    return Registration(
        kind,
        own,
        off - off.mean(0) if own else np.zeros((bands, 2)),
        np.array([[0.6, 0.3, -0.2], [-0.4, 0.2, 0.3]]) if kind != "none" else np.zeros((2, 3)),
        rng.uniform(-0.7, 0.7, (2, 5, 5)) if kind == "local" else None,
        ((height - 1) / 2, (width - 1) / 2),
        max(height, width) / 2,
        (height, width),
    )


def scene(ratio: int, field: Registration) -> tuple[torch.Tensor, torch.Tensor, SceneStatistics]:
    pair = make_pair(ratio, SIZE, bands=4)
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio, default_psf(ratio))
    return pair.pan, pair.ms, replace(statistics, field=field)


@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_no_displacement_is_the_nested_geometry(ratio: int) -> None:
    pan, ms, statistics = scene(ratio, field_of(ratio, kind="none", own=False))
    geometry = Displaced(statistics, [(12 * ratio, 24 * ratio)], 3, SIZE)
    torch.testing.assert_close(geometry.enlarged(ms[None]), upsample(ms[None], ratio), rtol=0, atol=2e-5)
    near = degrade(pan[None], ratio, default_psf(ratio).sigma)
    torch.testing.assert_close(geometry.degraded(pan[None]), near, rtol=0, atol=5e-3 * float(pan.std()))


def test_a_displaced_ms_is_enlarged_by_the_kernel_of_the_nested_one() -> None:
    """Cubic convolution of the doubled MS comes within 0.3 of the kernels' difference."""
    _, ms, statistics = scene(4, field_of(4, kind="none", own=False))
    geometry = Displaced(statistics, [(48, 96)], 3, SIZE, kernel="23 taps")
    inner = (..., slice(40, -40), slice(40, -40))
    nested = upsample(ms[None], 4, 0.0, "23 taps")[inner]
    miss, apart = (float((nested - x[inner]).std()) for x in (geometry.enlarged(ms[None]), upsample(ms[None], 4)))
    assert miss < 0.3 * apart


def test_whole_pixels_are_a_shift_of_the_grid() -> None:
    _, ms, statistics = scene(4, replace(field_of(4, kind="none", own=False), model="shift"))
    assert statistics.field is not None
    by = replace(statistics.field, coefficients=np.array([[4.0, 0, 0], [-8.0, 0, 0]]))
    geometry = Displaced(replace(statistics, field=by), [(0, 0)], 0, SIZE)
    inner = (..., slice(16, -16), slice(16, -16))
    moved = torch.roll(upsample(ms[None], 4), (-4, 8), (2, 3))
    torch.testing.assert_close(geometry.enlarged(ms[None])[inner], moved[inner], rtol=0, atol=2e-5)


@pytest.mark.parametrize("own", [False, True])
def test_windows_are_parts_of_the_whole_to_the_bit(own: bool) -> None:
    """Fault: coordinates that depend on the window. Two windows in a batch have their own places."""
    ratio = 3
    pan, ms, statistics = scene(ratio, field_of(ratio, own=own))
    whole = Displaced(statistics, [(0, 0)], 0, SIZE)
    large = whole.enlarged(ms[None]), whole.degraded(pan[None])
    places = [(4, 6), (9, 2)]
    parts = [ms[:, r : r + 18, c : c + 20] for r, c in places]
    pans = [pan[:, r * ratio : (r + 18) * ratio, c * ratio : (c + 20) * ratio] for r, c in places]
    margin, rim = 1, 4 * ratio
    origins = [((r + margin) * ratio, (c + margin) * ratio) for r, c in places]
    geometry = Displaced(statistics, origins, margin, (18, 20), rim)
    small = geometry.enlarged(torch.stack(parts)), geometry.degraded(torch.stack(pans))
    for k, (r, c) in enumerate(places):
        top, left = r * ratio + rim, c * ratio + rim
        height, width = small[0].shape[-2:]
        assert torch.equal(small[0][k], large[0][0, :, top : top + height, left : left + width])
        inner = slice(4, -4)
        assert torch.equal(small[1][k, :, inner, inner], large[1][0, :, r + 4 : r + 14, c + 4 : c + 16])


@pytest.mark.parametrize("own", [False, True])
def test_arrays_that_lie_off_alike_take_one_axis_after_the_other(own: bool) -> None:
    """A batch of two windows equals the tensors' sums over whole neighbourhoods, and each window by itself."""
    field = field_of(4, own=own, kind="shift")
    pan, ms, statistics = scene(4, replace(field, coefficients=field.coefficients * [1, 0, 0]))
    origins, rim = [(0, 0), (64, 32)], 8
    pans, parts = (torch.stack([x, x.flip(1)]) for x in (pan, ms))
    geometry = Displaced(statistics, origins, 2, SIZE, rim)
    for way, x in ((Displaced.enlarged, parts), (Displaced.degraded, pans)):
        both, alone = way(geometry, x.numpy()), way(Displaced(statistics, origins[1:], 2, SIZE, rim), x[1:].numpy())
        torch.testing.assert_close(torch.from_numpy(both), way(geometry, x), rtol=1e-5, atol=2e-5)
        assert np.array_equal(both[1:], alone)


@pytest.mark.parametrize("name", ["brovey", "mtf-glp", "consistent", "network"])
def test_tiles_agree(name: str, tiny_model: Path) -> None:
    ratio = 4
    pan, ms, statistics = scene(ratio, field_of(ratio))
    tools: dict[str, Sharpener] = {"consistent": ConsistentSharpener(ClassicalSharpener("gsa"), 1)}
    tool = tools.get(name) or (load_network(str(tiny_model)) if name == "network" else ClassicalSharpener(name))
    margin = tool.margin(statistics)

    def sharpened(row: int, col: int, rows: int, cols: int) -> torch.Tensor:
        index = [
            mirrored((at - margin) * k, (n + 2 * margin) * k, length * k)
            for k in (1, ratio)
            for at, n, length in ((row, rows, SIZE[0]), (col, cols, SIZE[1]))
        ]
        window = pan[:, index[2]][:, :, index[3]][None], ms[:, index[0]][:, :, index[1]][None]
        return tool.sharpen(*window, statistics, [(row * ratio, col * ratio)]).hrms

    whole, part = sharpened(0, 0, *SIZE), sharpened(8, 12, 7, 9)
    same = whole[..., 8 * ratio : 15 * ratio, 12 * ratio : 21 * ratio]
    torch.testing.assert_close(part, same, rtol=1e-5, atol=2e-5)


def test_a_field_survives_json() -> None:
    field = field_of(4)
    again = Registration.from_dict(field.as_dict())
    assert np.array_equal(again.over(3, 5, 20, 30, 1), field.over(3, 5, 20, 30, 1))
    assert (again.over(3, 5, 20, 30, 1) == np.round(field.at(*np.ogrid[3.0:23, 5.0:35], 1) * 256) / 256).mean() > 0.999
    assert np.abs(field.over(-10, -10, 150, 170, 2)).max() < field.bound


@pytest.mark.parametrize("method", ["brovey", "mtf-glp", "awlp"])
def test_a_displaced_window_takes_no_more_memory_than_declared(method: str) -> None:
    """A forecast that is too small: the places and weights of displaced pixels did not count."""
    field, tool = field_of(4), ClassicalSharpener(method)
    rng = np.random.default_rng(3)
    pan, ms = rng.random((1, 1, 256, 256), np.float32), rng.random((1, 4, 64, 64), np.float32)
    statistics = replace(scene_statistics([(pan[0], ms[0])], 4, default_psf(4)), field=field)
    origins = [(4 * tool.margin(statistics),) * 2]
    tracemalloc.start()
    try:
        tool.sharpen(pan, ms, statistics, origins)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < tool.floats_per_pixel(field) * 4 * ms.shape[1] * pan.size
