from dataclasses import asdict, replace

import pytest
import torch
from textures import make_pair

from uknowpan_models.checkpoint import Card, save_checkpoint
from uknowpan_models.errors import CheckpointError, ModelMismatch
from uknowpan_models.noise import position_noise
from uknowpan_models.pansharpener import (
    ClassicalSharpener,
    StudentSharpener,
    load_sharpener,
    sharpen_array,
)
from uknowpan_models.resample import crop, mirrored, upsample
from uknowpan_models.statistics import scene_statistics
from uknowpan_models.student import FSAStudent, StudentConfig
from uknowpan_models.student_lite import FSAStudentLite, LiteConfig
from uknowpan_models.types import Denoised

TINY = LiteConfig(width=8, deep_width=8, deep_blocks=1)
CARD = Card("tiny", "fsa-s-lite", asdict(TINY), "fsa-s")
SCENES = {4: (40, 48), 3: (40, 44), 2: (48, 40)}
"""ratio -> MS pixels: 160 x 192 PAN pixels and the like"""


def network():
    """Random weights, those that start at zero too: noise and all bands reach the answer."""
    torch.manual_seed(1)
    model = FSAStudentLite(TINY)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sharpener(card=CARD, **options):
    return StudentSharpener(network(), card, **options)


def scene(ratio):
    """pan, ms, statistics"""
    pair = make_pair(ratio, SCENES[ratio], sigma=0.45 * ratio, shift=(0.8, -0.4), seed=2)
    return pair.pan, pair.ms, scene_statistics([(pair.pan, pair.ms)], ratio)


def read(tool, ratio, row, col, rows, cols):
    """A window of PAN and MS with its margin, mirrored at the scene's edges; MS pixels."""
    pan, ms, statistics = scene(ratio)
    m = tool.margin(statistics)
    (h, w), (height, width) = ms.shape[-2:], pan.shape[-2:]
    ms = ms[:, mirrored(row - m, rows + 2 * m, h)][:, :, mirrored(col - m, cols + 2 * m, w)]
    ys = mirrored((row - m) * ratio, (rows + 2 * m) * ratio, height)
    xs = mirrored((col - m) * ratio, (cols + 2 * m) * ratio, width)
    return pan[:, ys][:, :, xs][None], ms[None], statistics


def tiled(tool, ratio, tile):
    """The scene sharpened in tiles of `tile` MS pixels."""
    (h, w), done = SCENES[ratio], {}
    for row in range(0, h, tile[0]):
        for col in range(0, w, tile[1]):
            rows, cols = min(tile[0], h - row), min(tile[1], w - col)
            pan, ms, statistics = read(tool, ratio, row, col, rows, cols)
            done[row, col] = tool.sharpen(pan, ms, statistics, [(row * ratio, col * ratio)])

    def joined(name):
        parts = {k: getattr(v, name) for k, v in done.items()}
        lines = [
            torch.cat([parts[r, c] for c in range(0, w, tile[1])], -1) for r in range(0, h, tile[0])
        ]
        return torch.cat(lines, -2)

    return joined("hrms"), joined("sigma")


@pytest.mark.parametrize(
    "ratio, tile, steps",
    [(4, (13, 20), 1), (4, (40, 7), 1), (4, (20, 20), 2), (3, (16, 24), 1), (3, (20, 40), 2),
     (2, (10, 22), 1)],
)  # fmt: skip
def test_result_does_not_depend_on_how_the_scene_was_cut(ratio, tile, steps):
    tool = sharpener(steps=steps)
    scale = float(scene(ratio)[1].max())
    whole, whole_sigma = tiled(tool, ratio, SCENES[ratio])
    assert whole.shape == (1, 4, SCENES[ratio][0] * ratio, SCENES[ratio][1] * ratio)
    parts, parts_sigma = tiled(tool, ratio, tile)
    assert (parts - whole).abs().max() < 1e-4 * scale
    torch.testing.assert_close(parts_sigma, whole_sigma, rtol=1e-3, atol=0)


def test_noise_starts_from_the_place_in_the_scene():
    class Echo(torch.nn.Module):
        pixel_multiple, reach = 4, 8

        def forward(self, x_t, t, condition):
            return Denoised(x0=x_t)

    tool = StudentSharpener(Echo(), CARD, seed=9)
    pan, ms, statistics = read(tool, 4, 5, 8, 6, 7)
    noisy = tool.sharpen(pan, ms, statistics, [(20, 32)]).hrms[0]
    lms = crop(upsample(ms, 4), 4 * tool.margin(statistics))[0]
    noise = (noisy - lms) / statistics.detail_std[:-1].float().view(-1, 1, 1)
    torch.testing.assert_close(noise, position_noise(9, 20, 32, 24, 28, 4), rtol=0, atol=1e-4)


def test_a_batch_is_its_windows():
    tool = sharpener()
    corners = [(0, 0), (16, 8), (8, 24)]
    windows = [read(tool, 4, row, col, 12, 16) for row, col in corners]
    statistics = windows[0][2]
    origins = [(row * 4, col * 4) for row, col in corners]
    pans, mss = torch.cat([w[0] for w in windows]), torch.cat([w[1] for w in windows])
    together = tool.sharpen(pans, mss, statistics, origins).hrms
    for i, (pan, ms, _) in enumerate(windows):
        alone = tool.sharpen(pan, ms, statistics, [origins[i]]).hrms
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_seeds_and_steps_change_something_but_little():
    pan, ms, _ = scene(4)
    detail = float(make_pair(4, SCENES[4], sigma=1.8, shift=(0.8, -0.4), seed=2).gt.std())
    results = [
        sharpen_array(sharpener(seed=seed, steps=steps), pan, ms).hrms
        for seed, steps in ((0, 1), (1, 1), (2**40, 1), (0, 2))
    ]
    again = sharpen_array(sharpener(seed=0, steps=1), pan, ms).hrms
    assert torch.equal(results[0], again)
    for other in results[1:]:
        difference = float((other - results[0]).square().mean().sqrt())
        assert 1e-6 * detail < difference < detail


@pytest.mark.parametrize("gain", [1 / 255, 2047.0])
def test_bit_depth_does_not_matter(gain):
    pan, ms, _ = scene(4)
    plain, scaled = (sharpen_array(sharpener(), k * pan, k * ms) for k in (1.0, gain))
    torch.testing.assert_close(scaled.hrms / gain, plain.hrms, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(scaled.sigma / gain, plain.sigma, rtol=0.02, atol=1e-4)


def test_card_scales_residual_and_uncertainty():
    pan, ms, _ = scene(4)
    lms = sharpen_array(ClassicalSharpener("bicubic"), pan, ms).hrms
    plain = sharpen_array(sharpener(), pan, ms)
    card = replace(CARD, residual_scale=2.0, sigma_scale=3.0)
    other = sharpen_array(sharpener(card), pan, ms)
    torch.testing.assert_close(other.hrms - lms, 2 * (plain.hrms - lms), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.sigma, 6 * plain.sigma)
    assert plain.sigma.min() > 0


@pytest.mark.parametrize(
    "ratio, size", [(4, (9, 6)), (3, (7, 5)), (2, (9, 9)), (5, (6, 7)), (6, (5, 5))]
)
def test_arrays_of_any_size(ratio, size):
    pair = make_pair(ratio, size, bands=2)
    done = sharpen_array(sharpener(), pair.pan, pair.ms)
    assert done.hrms.shape == done.sigma.shape == (2, size[0] * ratio, size[1] * ratio)
    assert torch.isfinite(done.hrms).all()


@pytest.mark.parametrize("pan_size", [(15, 16), (16, 12), (2, 2)])
def test_pan_that_is_no_multiple(pan_size):
    height, width = pan_size
    with pytest.raises(ValueError, match=f"PAN of {height} x {width} is no whole multiple of MS"):
        sharpen_array(sharpener(), torch.zeros(1, *pan_size), torch.zeros(1, 4, 4))


def test_models_refuse_scenes_they_do_not_serve():
    with pytest.raises(ModelMismatch, match="MS has 3 bands, but model tiny was trained for 8"):
        sharpener(replace(CARD, bands=8)).check(3, 4)
    with pytest.raises(ModelMismatch, match="ratio is 7, but model tiny serves 2 to 6"):
        sharpener().check(4, 7)
    pair = make_pair(8, (6, 6))
    with pytest.raises(ModelMismatch, match="ratio is 8"):
        sharpen_array(sharpener(), pair.pan, pair.ms)
    for bands in (1, 12):
        sharpener().check(bands, 6)
        ClassicalSharpener("gsa").check(bands, 8)


def test_half_precision_is_close():
    pan, ms, _ = scene(4)
    exact = sharpen_array(sharpener(), pan, ms).hrms
    rough = sharpen_array(sharpener(dtype=torch.bfloat16), pan, ms).hrms
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * float(ms.std())


def test_load_by_path_method_or_name(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_checkpoint(path, network(), replace(CARD, steps=3))
    pan, ms, _ = scene(4)
    loaded = load_sharpener(str(path), seed=5)
    assert loaded.provenance() == {
        "MODEL": "tiny", "SHA256": loaded.digest, "STEPS": "3", "SEED": "5",
            "PRECISION": "float32", "DEVICE": "cpu",
    }  # fmt: skip
    assert len(loaded.digest) == 64
    expected = sharpen_array(sharpener(steps=3, seed=5), pan, ms).hrms
    assert torch.equal(sharpen_array(loaded, pan, ms).hrms, expected)
    assert load_sharpener(None, "gsa").provenance() == {"METHOD": "gsa"}
    assert load_sharpener(None).name == "generic"
    with pytest.raises(CheckpointError, match="no model 'none'"):
        load_sharpener("none")


def test_the_paper_form_cannot_serve_windows(tmp_path):
    config = StudentConfig(bands=2, width=8, heads=2)
    path = tmp_path / "paper.safetensors"
    save_checkpoint(path, FSAStudent(config), Card("paper", "fsa-s", asdict(config), "fsa-s"))
    with pytest.raises(ModelMismatch, match=r"paper is of architecture fsa-s, .* fsa-s-lite"):
        load_sharpener(str(path))


@pytest.mark.parametrize("ratio", [2, 4])
def test_the_bundled_model_sharpens(ratio):
    pair = make_pair(ratio, (40, 40), sigma=0.45 * ratio, seed=3)
    gain = 1 / float(pair.ms.max())

    def error(tool):
        hrms = sharpen_array(tool, gain * pair.pan, gain * pair.ms).hrms / gain
        return float(crop(hrms - pair.gt, 4 * ratio).square().mean().sqrt())

    assert error(load_sharpener("generic")) < 0.7 * error(ClassicalSharpener("bicubic"))
