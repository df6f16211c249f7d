from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from textures import make_pair

from uknowpan.models.architectures import name_of
from uknowpan.models.checkpoints import Card, network_of, save_checkpoint
from uknowpan.models.denoising import StudentSharpener, UNetSharpener
from uknowpan.models.diffusion import position_noise
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import SCENE_FEATURES, StreamsConfig
from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.models.resample import crop, degrade, mirrored, upsample
from uknowpan.models.sharpeners import AS_MS, ClassicalSharpener, ConsistentSharpener, load_sharpener, sharpen_array
from uknowpan.models.statistics import USUAL_SOFTNESS, scene_statistics
from uknowpan.models.types import Denoised

TINY = LiteConfig(width=8, deep_width=8, deep_blocks=1)
STREAMS = StreamsConfig(pan_width=8, trunk_width=8, band_width=8, head_width=4)
CARD = Card("tiny", "fsa-s-lite", asdict(TINY), "fsa-s")
SCENES = {4: (40, 48), 3: (40, 44), 2: (48, 40)}
"""ratio -> MS pixels: 160 x 192 PAN pixels and the like"""


def network(config=TINY):
    """Random weights, those that start at zero too: noise and all bands reach the answer."""
    torch.manual_seed(1)
    model = network_of(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sharpener(card=CARD, **options):
    return StudentSharpener(network(), card, **options)


def test_a_student_that_was_told_softness_minds_it():
    config = replace(TINY, scene_features=SCENE_FEATURES)
    torch.manual_seed(1)
    model = FSAStudentLite(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    card = replace(CARD, config=asdict(config))
    pan, ms, _ = scene(4)
    own = scene_statistics([(pan, ms)], 4, soft=True).softness
    assert 0.25 < own < 0.8
    told = (None, USUAL_SOFTNESS, AS_MS, own, 0.8)
    tools = {s: StudentSharpener(model, card, softness=s) for s in told}
    made = {s: sharpen_array(tool, pan, ms).hrms for s, tool in tools.items()}
    assert torch.equal(made[None], made[USUAL_SOFTNESS])
    assert torch.equal(made[AS_MS], made[own])
    assert len({float(x.std()) for x in made.values()}) == 3
    assert tools[0.8].provenance()["SOFTNESS"] == "0.8"
    assert tools[AS_MS].provenance()["SOFTNESS"] == "ms"
    statistics = scene_statistics([(pan, ms)], 4)
    for found, meant in ((None, USUAL_SOFTNESS), (0.1, 0.25), (1.5, 0.9)):
        pixels = read(tools[AS_MS], 4, 0, 0, 8, 8)[:2]
        one, other = (
            StudentSharpener(model, card, softness=s).sharpen(*pixels, st, [(0, 0)]).hrms
            for s, st in ((AS_MS, replace(statistics, softness=found)), (meant, statistics))
        )
        assert torch.equal(one, other)


def test_a_student_that_was_not_told_softness_refuses_it():
    assert "SOFTNESS" not in sharpener().provenance()
    with pytest.raises(ModelMismatch, match="tiny was not trained with the softness"):
        sharpener(softness=0.4)


def scene(ratio):
    """pan, ms, statistics"""
    pair = make_pair(ratio, SCENES[ratio], sigma=0.45 * ratio, shift=(0.8, -0.4), seed=2)
    return pair.pan, pair.ms, scene_statistics([(pair.pan, pair.ms)], ratio)


def window_of(tool, pan, ms, row, col, rows, cols, statistics=None):
    """PAN and MS of a window with its margin, mirrored at the scene's edges; MS pixels."""
    ratio = pan.shape[-1] // ms.shape[-1]
    m = tool.margin(statistics or SimpleNamespace(field=None, psf=None, ratio=ratio))
    index = [
        mirrored((at - m) * k, (n + 2 * m) * k, x.shape[axis])
        for x, k in ((ms, 1), (pan, ratio))
        for at, n, axis in ((row, rows, -2), (col, cols, -1))
    ]
    return pan[:, index[2]][:, :, index[3]][None], ms[:, index[0]][:, :, index[1]][None]


def read(tool, ratio, row, col, rows, cols):
    """A window of `scene`, and the statistics."""
    pan, ms, statistics = scene(ratio)
    return *window_of(tool, pan, ms, row, col, rows, cols, statistics), statistics


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
        lines = [torch.cat([parts[r, c] for c in range(0, w, tile[1])], -1) for r in range(0, h, tile[0])]
        return torch.cat(lines, -2)

    return joined("hrms"), joined("sigma")


@pytest.mark.parametrize(
    "ratio, tile, steps",
    [(4, (13, 20), 1), (4, (40, 7), 1), (4, (20, 20), 2), (4, (20, 20), 4), (3, (16, 24), 1), (3, (20, 40), 2),
     (2, (10, 22), 1)],
)  # fmt: skip
@pytest.mark.parametrize("config", [TINY, STREAMS], ids=["lite", "streams"])
def test_result_does_not_depend_on_how_the_scene_was_cut(ratio, tile, steps, config):
    card = replace(CARD, architecture=name_of(config), config=asdict(config))
    tool = StudentSharpener(network(config), card, steps=steps)
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
    noise = (noisy - lms) / torch.from_numpy(statistics.detail_std[:-1]).float().view(-1, 1, 1)
    torch.testing.assert_close(noise, position_noise(9, 20, 32, 24, 28, 4), rtol=0, atol=1e-4)


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


@pytest.mark.parametrize("ratio", [2, 4])
def test_the_bundled_model_sharpens(ratio):
    pair = make_pair(ratio, (40, 40), sigma=0.45 * ratio, seed=3)
    gain = 1 / float(pair.ms.max())

    def error(tool):
        hrms = sharpen_array(tool, gain * pair.pan, gain * pair.ms).hrms / gain
        return float(crop(hrms - pair.gt, 4 * ratio).square().mean().sqrt())

    assert error(load_sharpener("generic")) < 0.7 * error(ClassicalSharpener("bicubic"))


# The published form ---------------------------------------------------------------------------

SMALL = StudentConfig(bands=2, width=8, blocks=1, heads=2, dropout=0.0)
PAPER = Card("paper", "fsa-s", asdict(SMALL), "fsa-s", bands=2, residual_std=[0.02, 0.05])


def unet(card=PAPER, **options):
    torch.manual_seed(2)
    return UNetSharpener(FSAStudent(SMALL), card, **options)


def pair_of(ratio, size, seed=2):
    """pan and ms of 2 bands, about [0, 1]."""
    pair = make_pair(ratio, size, bands=2, seed=seed)
    return pair.pan / 12, pair.ms / 12


class NoiseBack(torch.nn.Module):
    """Says that the noise is the residual."""

    config, pixel_multiple = SMALL, 8

    def forward(self, x_t, t, condition):
        assert x_t.shape[-2] % 8 == x_t.shape[-1] % 8 == 0
        return Denoised(x0=x_t)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6])
def test_unet_adds_its_residual_to_the_lms_of_the_place(ratio):
    pan, ms = pair_of(ratio, (32, 32))
    tool = UNetSharpener(NoiseBack(), PAPER, seed=9)
    read = window_of(tool, pan, ms, 8, 16, 16, 8)
    noisy = tool.sharpen(*read, SimpleNamespace(field=None, psf=None, ratio=ratio), [(8 * ratio, 16 * ratio)])
    assert noisy.sigma is None
    lms = upsample(ms[None], ratio)[..., 8 * ratio : 24 * ratio, 16 * ratio : 24 * ratio]
    noise = (noisy.hrms - lms) / torch.tensor([0.02, 0.05]).view(1, 2, 1, 1)
    expected = position_noise(9, 8 * ratio, 16 * ratio, 16 * ratio, 8 * ratio, 2)
    torch.testing.assert_close(noise[0], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("registration", ["area", "pancollection"])
def test_unet_enlarges_as_its_training_did(registration):
    """Kind of fault: networks of PanCollection's files got an MS enlarged by another kernel than theirs."""
    pan, ms = pair_of(4, (32, 32))
    tool = UNetSharpener(NoiseBack(), replace(PAPER, registration=registration))
    tool._sample = lambda condition, _, halo: Denoised(x0=torch.zeros_like(condition.lms)).shrink(halo)
    made = sharpen_array(tool, pan, ms).hrms
    kernel = "keys" if registration == "area" else "23 taps"
    wanted = upsample(ms[None], 4, 0.0, kernel)[0]
    torch.testing.assert_close(made[..., 40:-40, 40:-40], wanted[..., 40:-40, 40:-40], rtol=0, atol=1e-5)


def test_unet_sees_real_pixels_around_the_core():
    tool, statistics = unet(), SimpleNamespace(field=None, psf=None, ratio=4)
    pan, ms = pair_of(4, (40, 40))
    pan_window, ms_window = window_of(tool, pan, ms, 16, 16, 8, 8)
    border = (pan_window.shape[-1] - 32) // 2
    assert border >= 4 * tool.context
    plain = tool.sharpen(pan_window, ms_window, statistics, [(64, 64)]).hrms
    pan_window[..., border - 30, :] += 0.5
    assert (tool.sharpen(pan_window, ms_window, statistics, [(64, 64)]).hrms != plain).any()


def test_unet_samples_as_its_card_says():
    pan, ms = pair_of(4, (16, 16))
    carried = replace(PAPER, self_conditioning=True)
    results = [
        sharpen_array(unet(card, steps=steps, seed=seed), pan, ms).hrms
        for card, steps, seed in (
            (PAPER, 1, 0), (carried, 1, 0), (PAPER, 2, 0), (carried, 2, 0), (PAPER, 1, 5),
        )
    ]  # fmt: skip
    assert torch.equal(results[0], results[1])  # one step has none before it
    assert not torch.equal(results[2], results[3])
    assert not torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[4])
    rough = sharpen_array(unet(carried, steps=2, dtype=torch.bfloat16), pan, ms).hrms
    assert rough.dtype == torch.float32
    assert 0 < (rough - results[3]).abs().mean() < 0.1 * 0.05


@pytest.mark.parametrize(
    "max_value, pan, ms, expected",
    [
        (2047.0, 1200.0, 900.0, (2047.0, 2047.0)),  # the sensor of the training data
        (2047.0, 512.0, 400.0, (2047.0, 2047.0)),
        (2047.0, 500.0, 400.0, (1000.0, 1000.0)),
        (2047.0, 255.0, 250.0, (510.0, 510.0)),  # 8 bits are not a dark scene of 11
        (2047.0, 9000.0, 6000.0, (18000.0, 18000.0)),
        (None, 1200.0, 900.0, (2400.0, 2400.0)),
        (2047.0, 1200.0, 0.3, (2400.0, 0.6)),  # DN and reflectance
    ],
)
def test_unet_scale_where_nobody_knows_it(max_value, pan, ms, expected):
    tool = unet(replace(PAPER, max_value=max_value))
    assert tool.full_scale(pan, ms) == pytest.approx(expected)
    assert sharpener().full_scale(pan, ms) is ClassicalSharpener("gsa").full_scale(pan, ms) is None


@pytest.mark.parametrize("gain", [1 / 255, 40.0])
def test_unet_arrays_in_any_units(gain):
    pan, ms = pair_of(4, (16, 16))
    plain, scaled = (sharpen_array(unet(), k * pan, k * ms).hrms for k in (1.0, gain))
    torch.testing.assert_close(scaled / gain, plain, rtol=1e-3, atol=1e-4)
    known = [sharpen_array(unet(), k * pan, k * ms, max_value=k).hrms for k in (1.0, gain)]
    torch.testing.assert_close(known[1] / gain, known[0], rtol=1e-3, atol=1e-4)
    assert (known[0] - plain).abs().max() > 1e-3


def test_unet_refuses_what_it_was_not_trained_for():
    tool = unet(replace(PAPER, ratios=[4], bands=None))
    with pytest.raises(ModelMismatch, match="MS has 4 bands, but model paper was trained for 2"):
        tool.check(4, 4)
    with pytest.raises(ModelMismatch, match="ratio is 2, but model paper serves 4;"):
        tool.check(2, 2)
    with pytest.raises(CheckpointError, match=r"paper has residual_std of 1 bands.* has 2"):
        unet(replace(PAPER, residual_std=[0.02]))


def test_unet_by_path(tmp_path):
    path = tmp_path / "paper.safetensors"
    card = replace(PAPER, registration="pancollection", ratios=[4], steps=2)
    save_checkpoint(path, unet().model, card)
    loaded = load_sharpener(str(path), seed=3)
    assert not loaded.local and not loaded.has_uncertainty
    assert loaded.provenance()["MODEL"] == "paper"
    assert (loaded.provenance()["STEPS"], loaded.provenance()["SEED"]) == ("2", "3")
    pan, ms = pair_of(4, (12, 12))
    expected = sharpen_array(unet(card, steps=2, seed=3), pan, ms).hrms
    torch.testing.assert_close(sharpen_array(loaded, pan, ms).hrms, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "architecture, says",
    [
        ("fsa-t", r"model paper is a teacher \(fsa-t\); distil a student with `uknowpan train"),
        ("prior", r"model paper is the prior of a teacher \(prior\); train the teacher"),
    ],
)
def test_teachers_do_not_sharpen(tmp_path, architecture, says):
    path = tmp_path / "teacher.safetensors"
    save_checkpoint(path, unet().model, replace(PAPER, architecture=architecture))
    with pytest.raises(ModelMismatch, match=says):
        load_sharpener(str(path))


# ------------------------------------------------------------------------------------ both forms


@pytest.mark.parametrize("ratio, size", [(4, (1, 1)), (4, (9, 6)), (3, (7, 5)), (2, (3, 9)), (5, (6, 7)), (6, (5, 5))])
@pytest.mark.parametrize("form", [sharpener, unet])
def test_arrays_of_any_size(form, ratio, size):
    pan, ms = pair_of(ratio, size)
    done = sharpen_array(form(), pan, ms)
    assert done.hrms.shape == (2, size[0] * ratio, size[1] * ratio)
    assert torch.isfinite(done.hrms).all()
    assert (done.sigma is None) == (form is unet) and (form is unet or done.sigma.shape == done.hrms.shape)


@pytest.mark.parametrize("form", [sharpener, unet])
def test_a_batch_is_its_windows(form):
    tool, corners = form(steps=2), [(0, 0), (8, 16)]
    pan, ms = pair_of(4, (24, 24))
    statistics = scene_statistics([(pan, ms)], 4)
    windows = [window_of(tool, pan, ms, *corner, 8, 8, statistics) for corner in corners]
    origins = [(4 * row, 4 * col) for row, col in corners]
    together = tool.sharpen(*(torch.cat([w[i] for w in windows]) for i in (0, 1)), statistics, origins).hrms
    for i, window in enumerate(windows):
        alone = tool.sharpen(*window, statistics, [origins[i]]).hrms
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------- consistency


def spectral_gap(hrms, ms, statistics):
    """RMS of what the MS lacks, away from the borders."""
    psf = statistics.psf
    degraded = degrade(hrms[None], statistics.ratio, psf.sigma, psf.shift)[0]
    return float((degraded - ms)[:, 3:-3, 3:-3].square().mean().sqrt())


@pytest.mark.parametrize("method", ["bicubic", "brovey"])
def test_passes_make_the_result_agree_with_the_ms(method):
    pair = make_pair(4, (20, 24), bands=3)
    plain = load_sharpener(None, method)
    statistics = scene_statistics([(pair.pan, pair.ms)], 4, plain.assumed_psf(4))
    gaps = [
        spectral_gap(
            sharpen_array(load_sharpener(None, method, consistency=n), pair.pan, pair.ms).hrms,
            pair.ms,
            statistics,
        )
        for n in (0, 1, 3)
    ]
    assert gaps[1] < 0.6 * gaps[0] and gaps[2] < 0.6 * gaps[1]


@pytest.mark.parametrize("ratio, tile", [(4, (13, 20)), (3, (16, 24))])
def test_consistency_does_not_see_how_a_scene_is_cut(ratio, tile):
    tool = ConsistentSharpener(sharpener(), 2)
    scale = float(scene(ratio)[1].max())
    whole, whole_sigma = tiled(tool, ratio, SCENES[ratio])
    plain, plain_sigma = tiled(sharpener(), ratio, SCENES[ratio])
    assert whole.shape == plain.shape and (whole - plain).abs().max() > 1e-3 * scale
    parts, _ = tiled(tool, ratio, tile)
    assert (parts - whole).abs().max() < 1e-4 * scale
    torch.testing.assert_close(whole_sigma, plain_sigma, rtol=1e-3, atol=0)
    assert tool.provenance() == {**sharpener().provenance(), "CONSISTENCY": "2"}


def test_no_passes_are_no_sharpener():
    with pytest.raises(ValueError, match="0 passes change nothing"):
        ConsistentSharpener(sharpener(), 0)
    assert isinstance(load_sharpener(None, "gsa", consistency=0), ClassicalSharpener)


@pytest.mark.parametrize("consistency", [0, 1])
def test_all_work_is_done_on_the_device(monkeypatch, consistency):
    """The meta device knows shapes and no values, but refuses tensors that lie elsewhere."""
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # it knows no meta
    sharpener = load_sharpener("generic", consistency=consistency, device="meta")
    pan, ms = torch.rand(1, 256, 256), torch.rand(4, 64, 64)
    statistics = scene_statistics([(pan, ms)], 4)
    side = 16 + 2 * sharpener.margin(statistics)
    done = sharpener.sharpen(
        torch.rand(2, 1, 4 * side, 4 * side),
        torch.rand(2, 4, side, side),
        statistics,
        [(0, 0), (0, 64)],
    )
    assert sharpener.device == done.hrms.device.type == "meta" and done.hrms.shape == (2, 4, 64, 64)
