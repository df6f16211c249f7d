"""Scores of test files: the toolbox's values, what is clipped and cut, checkpoints on patches."""

from dataclasses import asdict, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from patch_files import guided_config
from testfiles import draw_truth, store, write_images

from uknowpan.models.checkpoints import Card, save_checkpoint, sha256
from uknowpan.models.denoising import load_network
from uknowpan.models.diffusion import NoiseSchedule, position_noise
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.metrics.evaluation import EXP, Results, evaluate_file, scored_size
from uknowpan.models.metrics.sensors import SENSORS
from uknowpan.models.metrics.toolbox import interp23tap
from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.pancollection.condition import PatchConditioner, image_sharpener
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.uknow import prior, student
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.resample import upsample
from uknowpan.models.types import Condition, Denoised, PatchBatch

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
REDUCED = ["q2n", "q", "sam", "ergas", "scc", "psnr", "ssim"]
FULL = ["d_lambda_k", "d_s", "hqnr", "d_lambda", "qnr"]
GENERIC, SCALE = SENSORS["generic"], 2047.0


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: value.astype("f8") if value.ndim > 2 else value for key, value in file.items()}


def score(path, methods=None, **options):
    options = {"scale": SCALE, "sensor": GENERIC, "cut": 0} | options
    with PanCollectionFile(path) as file:
        return evaluate_file(file, methods or {}, **options)


# --------------------------------------------------------------------------- published protocol


@pytest.mark.parametrize("name", ["rr_8band", "rr_4band", "rr_real"])
def test_a_truth_gives_the_toolbox_s_values(name, tmp_path):
    data = golden(name)
    bands, height, width = data["gt"].shape
    ms, pan = np.zeros((bands, height // 4, width // 4)), np.zeros((1, height, width))
    images = {"gt": data["gt"], "lms": data["fused"], "ms": ms, "pan": pan}
    scale = 2.0 ** int(data["bits"]) - 1
    found = score(store(tmp_path / "t.h5", images), scale=scale, cut=int(data["cut"]))
    assert found.kind == "reduced" and found.images == 1
    assert list(found.scores[EXP]) == REDUCED
    for index in REDUCED:
        expected = pytest.approx(float(data[f"expected_{index}"]), rel=1e-9)
        assert found.mean(EXP, index) == expected, index


@pytest.mark.parametrize("name", ["fr_8band", "fr_4band", "fr_real"])
def test_no_truth_gives_the_toolbox_s_values(name, tmp_path):
    data = golden(name)
    lms = interp23tap(torch.from_numpy(data["ms"]), 4)
    fused = torch.from_numpy(data["fused"])[None]
    path = store(tmp_path / "t.h5", {"ms": data["ms"], "pan": data["pan"], "lms": lms})
    found = score(path, {"it": lambda _: fused / SCALE}, sensor=SENSORS[str(data["sensor"])], as_is=["it"])
    assert found.kind == "full"
    assert list(found.scores) == [EXP, "it"]
    for index in FULL:
        expected = pytest.approx(float(data[f"expected_{index}"]), rel=1e-6)
        assert found.mean("it", index) == expected, index
    assert found.mean(EXP, "d_lambda") == 0


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("t") / "test.h5", count=3)


def test_the_truth_itself_is_ideal(path):
    with PanCollectionFile(path) as file:
        truth = file.read([0, 1, 2], torch.float64).gt
    answers = iter(truth / SCALE)
    found = score(path, {"truth": lambda _: next(answers)[None]})
    for index in ("sam", "ergas"):
        assert found.scores["truth"][index].abs().max() < 2e-5  # degrees: acos near 1
    for index in ("q2n", "q", "scc", "ssim"):
        torch.testing.assert_close(found.scores["truth"][index], torch.ones(3).double())
    assert found.mean("truth", "psnr") > 200
    assert found.mean(EXP, "ergas") > 1


def test_results_of_models_are_clipped_but_those_that_are_as_they_are(path):
    beyond = lambda patches: patches.lms + 2  # noqa: E731
    full = lambda patches: torch.ones_like(patches.lms)  # noqa: E731
    found = score(path, {"beyond": beyond, "full": full, "raw": beyond}, as_is=["raw"], limit=1)
    assert found.scores["beyond"] == found.scores["full"]
    assert found.mean("raw", "ergas") > 2 * found.mean("full", "ergas")


def test_means_and_deviations_by_n_minus_1(path):
    found = score(path)
    values = found.scores[EXP]["sam"].numpy()
    assert values.shape == (3,) and np.ptp(values) > 0
    assert found.mean(EXP, "sam") == pytest.approx(values.mean())
    assert found.std(EXP, "sam") == pytest.approx(values.std(ddof=1))
    alone = score(path, limit=1)
    assert alone.images == 1 and alone.scores[EXP]["sam"][0] == values[0]
    assert np.isnan(alone.std(EXP, "sam"))


def test_images_are_handed_on_as_they_are_scored(path):
    seen = []
    fuse = lambda patches: patches.lms / 2  # noqa: E731
    found = score(path, {"half": fuse}, on_image=seen.append, limit=99)
    assert found.images == 3
    assert [(s.number, s.count) for s in seen] == [(0, 3), (1, 3), (2, 3)]
    for s in seen:
        assert torch.equal(s.fused[EXP], s.patch.lms)
        torch.testing.assert_close(s.fused["half"], s.patch.lms / 2)
        assert s.patch.gt.dtype == torch.float64 and s.patch.gt.mean() > 100  # DN


def test_full_resolution_takes_whole_tiles_only(tmp_path):
    large = write_images(tmp_path / "large.h5", size=80, gt=False)
    with PanCollectionFile(large) as file:
        assert scored_size(file, 21) == (64, 64)
        whole = file.read([0, 1], torch.float64)
    parts = {name: getattr(whole, name)[..., :64, :64].numpy() for name in ("pan", "lms")}
    small = store(tmp_path / "small.h5", parts | {"ms": whole.ms[..., :16, :16].numpy()})
    found, expected = score(large), score(small)
    for index in FULL:
        assert torch.equal(found.scores[EXP][index], expected.scores[EXP][index])


def test_what_cannot_be_scored(path, tmp_path):
    with pytest.raises(DataError, match=r"64 x 64 pixels leave 23 x 23, fewer .*\(--cut\)"):
        score(path, cut=21)
    tiny = write_images(tmp_path / "tiny.h5", size=16, gt=False)
    with pytest.raises(DataError, match=r"16 x 16 pixels leave 0 x 0, .* take larger images"):
        score(tiny)
    with pytest.raises(ValueError, match="call the method something else"):
        score(path, {EXP: lambda patches: patches.lms})
    with pytest.raises(DataError, match=r"image 0, m: the result is \(1, 3, 64, 64\), the lms"):
        score(path, {"m": lambda patches: patches.lms[:, :3]})
    with pytest.raises(DataError, match="image 0, m: the result holds values that are not finite"):
        score(path, {"m": lambda patches: patches.lms.log().sqrt() * float("nan")})
    with pytest.raises(ValueError, match="WV3 has 8 bands, not 3"):
        score(write_images(tmp_path / "3.h5", bands=3, gt=False), sensor=SENSORS["WV3"])
    zero = write_images(tmp_path / "zero.h5", count=2)
    with h5py.File(zero, "a") as file:
        file["gt"][1] = 0
    with pytest.raises(DataError, match=r"zero\.h5, image 1, EXP: no pixel of non-zero spectra"):
        score(zero)


def test_flat_images_give_numbers(tmp_path):
    flat = {"gt": np.full((4, 64, 64), 500.0), "pan": np.full((1, 64, 64), 500.0)}
    flat |= {"lms": flat["gt"], "ms": np.full((4, 16, 16), 500.0)}
    found = score(store(tmp_path / "rr.h5", flat)).scores[EXP]
    assert not any(values.isnan().any() for values in found.values())
    del flat["gt"]
    found = score(store(tmp_path / "fr.h5", flat)).scores[EXP]
    assert not any(values.isnan().any() for values in found.values())


def test_results_of_one_image_have_no_deviation():
    one = Results("full", 1, {"a": {"qnr": torch.tensor([0.5], dtype=torch.float64)}})
    assert one.mean("a", "qnr") == 0.5 and np.isnan(one.std("a", "qnr"))


# ------------------------------------------------------------------------------- checkpoints


STD = [0.02, 0.03, 0.04, 0.05]
LITE = LiteConfig(width=4, deep_width=8, blocks=1, deep_blocks=1)
PAPER = student.StudentConfig(bands=4, width=4)
GUIDED = guided_config(patch=2)
PRIOR = GUIDED.prior
NETWORKS = {
    "fsa-s-lite": (FSAStudentLite, LITE),
    "fsa-s": (student.FSAStudent, PAPER),
    "fsa-t": (GuidedTeacher, GUIDED),
    "prior": (prior.PriorNet, PRIOR),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Architecture -> (file, network, card); every layer has a say."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name, (kind, config) in NETWORKS.items():
        torch.manual_seed(0)
        network = kind(config).eval()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        card = Card(
            name, name, asdict(config), name, bands=None if name == "fsa-s-lite" else 4,
            ratios=[4], residual_std=STD, sigma_scale=1.5, residual_scale=2.0, steps=2,
        )  # fmt: skip
        save_checkpoint(folder / f"{name}.safetensors", network, card)
        made[name] = folder / f"{name}.safetensors", network, card
    return made


def images_of(file, numbers, scale=SCALE):
    scaled = file.read(numbers, torch.float64).map(lambda x: x / scale)
    return replace(scaled, origin=torch.tensor([[int(file.sources[i]), 0, 0] for i in numbers]))


def sharpener_of(where, file, scale=SCALE, **options):
    return image_sharpener(load_network(str(where), needless=True, **options), file, scale)


def sampled(network, condition, steps):
    """DDIM, written out."""
    schedule = NoiseSchedule.cosine(500)
    noise = position_noise(3, 0, 0, *condition.lms.shape[-2:], condition.lms.shape[1])
    x_t, times = noise.expand_as(condition.lms), schedule.respace(steps)
    for now, after in zip(times, [*times[1:], None], strict=True):
        t = torch.full((len(x_t),), now)
        said = network(x_t, t, condition)
        if after is None:
            return said
        eps = (x_t - schedule.signal(t) * said.x0) / schedule.noise(t)
        t = torch.full((len(x_t),), after)
        x_t = schedule.signal(t) * said.x0 + schedule.noise(t) * eps


@torch.no_grad()
@pytest.mark.parametrize("name", ["fsa-s", "fsa-t", "prior"])
def test_networks_of_the_published_form_see_the_stored_lms(checkpoints, path, name):
    where, network, card = checkpoints[name]
    with PanCollectionFile(path) as file:
        tool = load_network(str(where), needless=True, seed=3, steps=2, softness=0.5)
        batch = images_of(file, [0, 1])
        done = image_sharpener(tool, file, SCALE)(batch)
    lms, pan = batch.lms.float(), batch.pan.float()
    assert (tool.name, tool.digest, tool.steps) == (card.name, sha256(where), 1 if name == "prior" else 2)
    if name == "fsa-s":
        std = torch.tensor(STD).view(1, -1, 1, 1)
        hrms, sigma = lms + std * sampled(network, Condition(lms, pan), 2).x0, None
    elif name == "fsa-t":
        answer = FrozenTeacher(where, steps=2, seed=3).answer(PatchBatch(pan, lms, lms))
        hrms, sigma = answer.sr, 1.5 * answer.variance.sqrt()
    else:
        hrms, variance = network(lms, pan)
        sigma = variance.sqrt()
    torch.testing.assert_close(done.hrms, hrms, rtol=1e-4, atol=1e-5)
    assert (done.sigma is None) == (sigma is None)
    if sigma is not None:
        torch.testing.assert_close(done.sigma, sigma, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_small_patches_have_the_statistics_of_their_scene(checkpoints, path):
    tool = load_network(str(checkpoints["fsa-s-lite"][0]), steps=1, seed=3)
    with PanCollectionFile(path) as file:
        batch = images_of(file, [1, 0])
        done = image_sharpener(tool, file, SCALE)(batch)
        scenes = PatchConditioner(PanCollectionDataset([file], max_value=SCALE)).statistics
        single = batch.to(torch.float32)
        for i, (scene, *_) in enumerate(batch.origin.tolist()):
            part = PatchBatch(*(x[i : i + 1] for x in (single.pan, single.ms, single.lms)))
            one = tool.sharpen_images(part, scenes[scene], 0.5)
            assert torch.equal(done.hrms[i : i + 1], one.hrms) and torch.equal(done.sigma[i : i + 1], one.sigma)
        tool.model.forward = lambda x_t, t, condition: Denoised(torch.zeros_like(x_t))
        lms = image_sharpener(tool, file, SCALE)(batch).hrms
    off, nested_off = ((x - batch.lms)[..., 12:-12, 12:-12].abs().mean() for x in (lms, upsample(batch.ms, 4)))
    assert off < 0.7 * nested_off  # it lies on the stored lms


def test_the_full_scale_does_not_matter_to_a_student_with_statistics(checkpoints, tmp_path):
    path = write_images(tmp_path / "t.h5")
    with PanCollectionFile(path) as file:
        images = [
            sharpener_of(checkpoints["fsa-s-lite"][0], file, scale)(images_of(file, [0], scale)).hrms * scale
            for scale in (2047.0, 4095.0)
        ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=0.2)


def test_a_large_image_is_a_scene_of_its_own(checkpoints, tmp_path):
    truth = draw_truth(0, size=256)
    alone = write_images(tmp_path / "alone.h5", count=1, size=256)
    where = checkpoints["fsa-s-lite"][0]
    with PanCollectionFile(alone) as file:
        first = file.read([0], torch.float64)
        expected = sharpener_of(where, file)(images_of(file, [0])).hrms
    other = first.map(lambda x: torch.cat([x, 300 + 0.1 * x.flip(-1)]))
    images = {name: getattr(other, name).numpy() for name in ("pan", "ms", "lms", "gt")}
    with PanCollectionFile(store(tmp_path / "both.h5", images)) as file:
        found = sharpener_of(where, file)
        assert torch.equal(found(images_of(file, [0])).hrms, expected)
        turned = (found(images_of(file, [1])).hrms * SCALE - 300) * 10
    assert 0 < (turned.flip(-1)[0] - truth).abs().mean() < 200


def test_checkpoints_that_do_not_serve_a_file(checkpoints, tmp_path, path):
    def load(name, file, **options):
        return sharpener_of(checkpoints[name][0], file, **options)

    with PanCollectionFile(write_images(tmp_path / "5.h5", bands=5)) as file:
        load("fsa-s-lite", file)
        for name in ("fsa-s", "fsa-t", "prior"):
            with pytest.raises(ModelMismatch, match=r"trained for 4 bands, but .* holds 5"):
                load(name, file)
    with PanCollectionFile(write_images(tmp_path / "68.h5", size=68)) as file:
        for name in ("fsa-s", "fsa-t"):
            with pytest.raises(ModelMismatch, match=r"takes multiples of \d+ pixels, .* 68 x 68"):
                load(name, file)
        load("prior", file)
    halves = {"pan": (1, 64), "ms": (4, 32), "lms": (4, 64), "gt": (4, 64)}
    images = {name: np.full((bands, n, n), 9.0) for name, (bands, n) in halves.items()}
    with PanCollectionFile(store(tmp_path / "2.h5", images)) as file:
        for name in NETWORKS:
            with pytest.raises(ModelMismatch, match=r"serves the ratio 4, but .* is 2"):
                load(name, file)
    with PanCollectionFile(path) as file, pytest.raises(ValueError, match="501"):
        load("fsa-s", file, steps=501)


@pytest.mark.parametrize("ratio", [3, 6])
def test_full_resolution_has_no_definition_for_other_ratios(tmp_path, ratio):
    n = 96
    sizes = {"pan": (1, n), "lms": (4, n), "ms": (4, n // ratio)}
    path = store(tmp_path / "t.h5", {k: np.full((c, s, s), 9.0) for k, (c, s) in sizes.items()})
    with pytest.raises(DataError, match=rf"ratio of {ratio} and no truth: .* score a raster"):
        score(path)
