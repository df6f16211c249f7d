"""Tiles cover the frame once, and blending an identity gives the scene back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uknowpan.tiling import StripBlender, feather, plan_tiles, strip_rows, tile_rows_needed

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


@given(frames, cuts(), st.sampled_from([1, 2, 4]), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_identity_blend(frame, cut, ratio, seed):
    size, overlap, multiple = cut
    rng = np.random.default_rng(seed)
    plan = plan_tiles(frame, size, overlap, multiple)
    wide = (frame[0] + size) * ratio, (frame[1] + size) * ratio
    scene = rng.normal(1000, 300, (2, *wide)).astype(np.float32)
    holes = rng.random((1, *wide)) < 0.5
    blender = StripBlender(plan, frame, 2, ratio, overlap)
    masks = StripBlender(plan, frame, 1, ratio, overlap, dtype=bool)

    def cores(array, row):
        return [
            array[:, t.row * ratio : (t.row + t.height) * ratio,
                  t.col * ratio : (t.col + t.width) * ratio]
            for t in row
        ]  # fmt: skip

    done, done_masks, at = [], [], 0
    for index, row in enumerate(plan):
        first, rows = blender.add_row(row, cores(scene, row))
        assert first == at
        at += rows.shape[1]
        assert (first, at) == tuple(r * ratio for r in strip_rows(plan, index, frame))
        done.append(rows)
        done_masks.append(masks.add_row(row, cores(holes, row))[1])
    result = np.concatenate(done, axis=1)
    expected = scene[:, : frame[0] * ratio, : frame[1] * ratio]
    if overlap:
        np.testing.assert_allclose(result, expected, rtol=2e-6)
    else:
        np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(np.concatenate(done_masks, axis=1), holes[:, : frame[0] * ratio, : frame[1] * ratio])


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


def test_a_skipped_tile_row_leaves_later_strips_alone():
    frame, size, overlap = (40, 10), 10, 2
    plan = plan_tiles(frame, size, overlap)
    scene = np.random.default_rng(0).normal(size=(1, 60, 30)).astype(np.float32)
    wanted = len(plan) - 2
    rows_to_run = tile_rows_needed([wanted], overlap)
    assert rows_to_run == [wanted - 1, wanted]
    blender = StripBlender(plan, frame, 1, 1, overlap)
    for index in rows_to_run:
        tiles = plan[index]
        arrays = [scene[:, t.row : t.row + size, t.col : t.col + size] for t in tiles]
        first, rows = blender.add_row(tiles, arrays)
    np.testing.assert_allclose(rows, scene[:, first : first + rows.shape[1], :10], rtol=2e-6)
    assert tile_rows_needed([0, 3], 0) == [0, 3]
    assert tile_rows_needed([0, 3], 2) == [0, 2, 3]


def test_skipped_tiles_are_zero():
    plan = plan_tiles((4, 8), 4)
    _, rows = StripBlender(plan, (4, 8), 1, 1).add_row(plan[0], [None, np.ones((1, 4, 4))])
    assert rows[0, :, :4].max() == 0 and rows[0, :, 4:].min() == 1


def test_even_tiles_waste_little():
    # 130 in tiles of at most 128 is two of 65, not one full tile of 128 for two columns.
    assert plan_tiles((130, 130), 128)[0][0].height == 65
    assert plan_tiles((130, 130), 128, multiple=4)[0][0].height == 68


@pytest.mark.parametrize(("size", "overlap", "multiple"), [(0, 0, 1), (8, 5, 1), (9, 0, 2), (8, 1, 2), (8, -1, 1)])
def test_impossible_plans(size, overlap, multiple):
    with pytest.raises(ValueError, match=r"\d"):
        plan_tiles((10, 10), size, overlap, multiple)
