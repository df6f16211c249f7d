"""Tiles cover the frame once, and blending an identity gives the scene back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uknowpan.tiling import StripBlender, cut_strips, feather, plan_tiles, strip_window, strips_needed

frames = st.tuples(st.integers(1, 60), st.integers(1, 60))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[int, int, int]:
    """(size, overlap, multiple) that fit together."""
    multiple = draw(st.sampled_from([1, 2, 3]))
    size = multiple * draw(st.integers(1, 9))
    overlap = multiple * draw(st.integers(0, size // multiple // 2))
    return size, overlap, multiple


@given(frames, cuts())
def test_every_pixel_is_covered_as_often_as_planned(frame, cut):
    size, overlap, multiple = cut
    plan = plan_tiles(frame, size, overlap, multiple)
    tiles = [tile for row in plan for tile in row]
    assert len({(t.height, t.width) for t in tiles}) == 1
    assert all(t.row % multiple == 0 and t.col % multiple == 0 for t in tiles)
    assert max(tiles[0].height, tiles[0].width) <= size
    # An independent count: how many tiles lie over each pixel.
    count = np.zeros((frame[0] + size, frame[1] + size), int)
    for t in tiles:
        count[t.row : t.row + t.height, t.col : t.col + t.width] += 1
    inside = count[: frame[0], : frame[1]]
    assert inside.min() == 1
    assert inside.max() <= (1 if overlap == 0 else 4)
    # No tile lies wholly outside.
    assert all(t.row < frame[0] and t.col < frame[1] for t in tiles)


def blended(strips, across, frame, ratio, overlap, bands, result_of, dtype=np.float32):
    """All strips in one array; `result_of` gives the array of a tile."""
    blender = StripBlender(strips, frame, bands, ratio, overlap, dtype, across)
    whole, filled = np.zeros((bands, frame[0] * ratio, frame[1] * ratio), dtype), np.zeros(frame, int)
    for index, tiles in enumerate(strips):
        row, col, values = blender.add(index, [result_of(tile) for tile in tiles])
        final = strip_window(strips, across, index, frame)
        assert (row, col, *values.shape[1:]) == final.scaled(ratio)
        filled[final.row : final.row + final.height, final.col : final.col + final.width] += 1
        whole[:, row : row + values.shape[1], col : col + values.shape[2]] = values
    assert (filled == 1).all()
    return whole


@given(frames, cuts(), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_identity_blend(frame, cut, ratio, across, seed):
    size, overlap, multiple = cut
    rng = np.random.default_rng(seed)
    strips, across = cut_strips(plan_tiles(frame, size, overlap, multiple), across)
    wide = (frame[0] + size) * ratio, (frame[1] + size) * ratio
    scene = rng.normal(1000, 300, (2, *wide)).astype(np.float32)
    holes = rng.random((1, *wide)) < 0.5

    def core(array, tile):
        row, col, height, width = tile.scaled(ratio)
        return array[:, row : row + height, col : col + width]

    result = blended(strips, across, frame, ratio, overlap, 2, lambda tile: core(scene, tile))
    expected = scene[:, : frame[0] * ratio, : frame[1] * ratio]
    if overlap:
        np.testing.assert_allclose(result, expected, rtol=2e-6)
    else:
        np.testing.assert_array_equal(result, expected)
    masks = blended(strips, across, frame, ratio, overlap, 1, lambda tile: core(holes, tile), bool)
    np.testing.assert_array_equal(masks, holes[:, : frame[0] * ratio, : frame[1] * ratio])


@given(frames, cuts(), st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_the_cut_into_strips_does_not_show(frame, cut, across):
    """Equal to the bit, where neighbours differ."""
    rows = plan_tiles(frame, *cut)

    def result(tile):
        return np.random.default_rng(tile).normal(0, 300, (1, tile.height, tile.width)).astype(np.float32)

    one, many = (blended(*cut_strips(rows, n), frame, 1, cut[1], 1, result) for n in (1, across))
    assert one.tobytes() == many.tobytes()


@given(st.integers(1, 40), st.integers(1, 4), st.data())
def test_feathers_of_neighbours_sum_to_one(size, ratio, data):
    overlap = data.draw(st.integers(0, size // 2))
    left = feather(size, overlap, ratio, first=True, last=False)
    right = feather(size, overlap, ratio, first=False, last=True)
    n = overlap * ratio
    if n:
        np.testing.assert_allclose(left[-n:] + right[:n], 1, atol=1e-7)
        assert (np.diff(left[-n:]) < 0).all()
    assert (left[: size * ratio - n] == 1).all() and (right[n:] == 1).all()


@pytest.mark.parametrize("across", [1, 3])
def test_skipped_strips_leave_later_ones_alone(across):
    frame, size, overlap = (40, 26), 10, 2
    strips, across = cut_strips(plan_tiles(frame, size, overlap), across)
    scene = np.random.default_rng(0).normal(size=(1, 60, 60)).astype(np.float32)
    blender = StripBlender(strips, frame, 1, 1, overlap, across=across)
    wanted = len(strips) - 2
    needed = strips_needed([wanted], across, overlap)
    assert needed == ([wanted - 1, wanted] if across == 1 else [wanted - 4, wanted - 3, wanted - 1, wanted])
    for index in needed:
        arrays = [scene[:, t.row : t.row + size, t.col : t.col + size] for t in strips[index]]
        row, col, values = blender.add(index, arrays)
    expected = scene[:, row : row + values.shape[1], col : col + values.shape[2]]
    np.testing.assert_allclose(values, expected, rtol=2e-6)
    assert strips_needed([0, 3], 1, 0) == [0, 3]
    assert strips_needed([0, 3], 1, 2) == [0, 2, 3]


def test_skipped_tiles_are_zero():
    _, _, values = StripBlender(plan_tiles((4, 8), 4), (4, 8), 1, 1).add(0, [None, np.ones((1, 4, 4))])
    assert values[0, :, :4].max() == 0 and values[0, :, 4:].min() == 1


def test_even_tiles_waste_little():
    # 130 in tiles of at most 128 is two of 65, not one full tile of 128 for two columns.
    assert plan_tiles((130, 130), 128)[0][0].height == 65
    assert plan_tiles((130, 130), 128, multiple=4)[0][0].height == 68


@pytest.mark.parametrize(("size", "overlap", "multiple"), [(0, 0, 1), (8, 5, 1), (9, 0, 2), (8, 1, 2), (8, -1, 1)])
def test_impossible_plans(size, overlap, multiple):
    with pytest.raises(ValueError, match=r"\d"):
        plan_tiles((10, 10), size, overlap, multiple)
