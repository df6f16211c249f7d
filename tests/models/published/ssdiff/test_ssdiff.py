"""SSDiff: the network against formulas, its stage, and L-BAF."""

import importlib
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from patch_files import QUICK, assert_resumes, patch_data, run, stirred, write_patches
from safetensors.torch import load_file

from uknowpan.models.checkpoints import load_model
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.published.ssdiff.network import Apfm, SSDiff, SSDiffConfig, lowest_frequencies
from uknowpan.models.published.ssdiff.stage import BRANCHES, LowRankBranches, SSDiffOptions, SSDiffStage
from uknowpan.models.training.loop import Interrupted
from uknowpan.models.training.parallel import World
from uknowpan.models.types import Condition

GOLDEN = Path(__file__).parents[3] / "golden"


def _golden_script():
    sys.path.insert(0, str(GOLDEN))  # it takes its weights from make_golden.py beside it
    try:
        return importlib.import_module("make_golden_ssdiff")
    finally:
        sys.path.remove(str(GOLDEN))


make_golden = _golden_script()

TINY = SSDiffConfig(4, width=8, head_width=4, time_width=4, grid=2, window=4, frequency_window=32)


def inputs(bands=4, size=(32, 32), batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator)

    lms = uniform(batch, bands, *size)
    condition = Condition(lms, uniform(batch, 1, *size), ms=uniform(batch, bands, size[0] // 4, size[1] // 4))
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return torch.randn(batch, bands, *size, generator=generator), t, condition


def network(config=TINY):
    torch.manual_seed(1)
    return stirred(SSDiff(config))


def answer(model, *given):
    with torch.no_grad():
        return model(*given).x0


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("bands", "published"), [(8, 1_426_616), (4, 1_413_940)])
def test_the_published_widths_have_the_published_parameters_that_are_used(bands, published):
    """126,592 of the 8-band release's are never used. Of them 288 C depend on the bands, or the
    4-band total could not be met; the rest is what one more set of Down and Up, for a stream of
    its own, and 4128 would come to."""
    model = SSDiff(SSDiffConfig(bands))
    own_set = count(model.downs) + count(model.ups)
    unused = 288 * bands + 4128 + own_set
    assert count(model) + unused == published
    if bands == 8:
        assert unused == 126_592
    flags = {"batch_norm": True, "group_norm": True, "window": 0, "frequency_window": 0}
    assert count(SSDiff(SSDiffConfig(bands, measured_ms=True, **flags))) == count(model)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def hand_apfm(block, x, y):
    """The formulas of METHODS 3.2 on tokens (N, a), head by head."""
    weights = {k: v.detach().double().numpy() for k, v in block.state_dict().items()}
    x, y = (v.double().numpy() for v in (x, y))

    def norm(v, name):
        v = (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + 1e-5)
        return v * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(v, name):
        return v @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    n, a = x.shape
    d = block.head_width
    y1, y2 = np.split(linear(norm(y, "norm_y"), "from_y"), 2, -1)
    x1, x2 = np.split(linear(norm(x, "norm_x"), "from_x"), 2, -1)
    heads = []
    for k in range(0, a, d):
        q, p, u, v = (m[:, k : k + d] for m in (y1, y2, x1, x2))
        spatial = softmax(q @ p.T / math.sqrt(d))
        spectral = softmax(u.T @ v / math.sqrt(d) / (n / d))
        heads.append((spatial @ u) * (q @ spectral))
    x = x + linear(np.concatenate(heads, -1), "out")
    h = linear(x, "feed.0")
    return x + linear(np.where(h > 0, h, 0.01 * h), "feed.2")


def streams(size, channels=8):
    generator = torch.Generator().manual_seed(3)
    return (2 * torch.randn(1, channels, *size, generator=generator) for _ in range(2))


def tokens(x):
    return x[0].flatten(1).T


@pytest.mark.parametrize("window", [0, 6, 16])
def test_attention_of_the_whole_image_is_the_formula(window):
    torch.manual_seed(0)
    block = stirred(Apfm(8, 4, window), 0.3)
    x, y = streams((6, 6))
    with torch.no_grad():
        result = tokens(block(x, y)).numpy()
    np.testing.assert_allclose(result, hand_apfm(block, tokens(x), tokens(y)), atol=1e-4)


def test_attention_in_windows_is_the_formula_in_each_also_in_the_smaller_last_ones():
    torch.manual_seed(0)
    block = stirred(Apfm(8, 4, 4), 0.3)
    x, y = (v.expand(2, -1, -1, -1) * torch.tensor([1.0, -2]).view(2, 1, 1, 1)
            for v in streams((6, 11)))  # fmt: skip
    with torch.no_grad():
        result = block(x, y)
    for i in range(2):
        for top in range(0, 6, 4):
            for left in range(0, 11, 4):
                cut = (slice(i, i + 1), slice(None), slice(top, top + 4), slice(left, left + 4))
                by_hand = hand_apfm(block, tokens(x[cut]), tokens(y[cut]))
                np.testing.assert_allclose(tokens(result[cut]).numpy(), by_hand, atol=1e-4)


def by_fft(x):
    """The part of an image in the 2 x 2 middle places of its shifted spectrum."""
    height, width = x.shape[-2:]
    spectrum = np.fft.fftshift(np.fft.fft2(x), axes=(-2, -1))
    mask = np.zeros((height, width))
    mask[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = 1
    return np.fft.ifft2(np.fft.ifftshift(spectrum * mask, axes=(-2, -1))).real


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (9, 7), (2, 4)])
def test_lowest_frequencies_are_those_of_an_fft(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(lowest_frequencies(x).numpy(), by_fft(x.numpy()), atol=1e-5)
    same = lowest_frequencies(x, max(size))
    torch.testing.assert_close(same, lowest_frequencies(x))


def test_lowest_frequencies_of_windows_are_blended_without_seams():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    level = lowest_frequencies(torch.full((1, 1, 64, 40), 3.0), 16)
    torch.testing.assert_close(level, torch.full_like(level, 3.0))
    steps = lowest_frequencies(ramp, 16).diff(dim=-1)[..., 8:-8]
    cut = torch.cat([lowest_frequencies(part) for part in ramp.split(16, -1)], -1)
    assert float(steps.abs().max()) < 0.5 * float(cut.diff(dim=-1).abs().max())
    # A window answers for its middle alone, wherever the image ends.
    wide = torch.randn(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    near, far = (lowest_frequencies(x, 16) for x in (wide[..., :64], wide))
    torch.testing.assert_close(near[..., :48], far[..., :48])


def test_one_window_damps_as_the_release_does():
    """The network's spatial stream at the first stage, against an FFT."""
    seen = {}
    model = network(SSDiffConfig(4, width=8, head_width=4, time_width=4, frequency_window=32))
    model.projections[0].register_forward_pre_hook(lambda module, given: seen.update(x=given[0], y=given[1]))
    model.spectral_in.register_forward_hook(lambda module, given, out: seen.update(x0=out))
    model.spatial_in.register_forward_hook(lambda module, given, out: seen.update(y0=out))
    answer(model, *inputs())
    torch.testing.assert_close(seen["x"][:, :4], 1.2 * seen["x0"][:, :4])
    torch.testing.assert_close(seen["x"][:, 4:], seen["x0"][:, 4:])
    y = seen["y0"].numpy()
    np.testing.assert_allclose(seen["y"].numpy(), y + (0.9 - 1) * by_fft(y), atol=1e-5)


def test_untrained_it_answers_with_nothing():
    model = SSDiff(TINY).eval()
    assert not answer(model, *inputs()).any()
    assert not answer(SSDiff(SSDiffConfig(4)).eval(), *inputs()).any()


def test_the_skip_sees_what_is_averaged_or_measured():
    x_t, t, condition = inputs()
    model, given = network(), network(replace(TINY, measured_ms=True))
    with torch.no_grad():
        for m in (model, given):
            m.head[2].weight.zero_()
            m.head[2].bias.zero_()
        for m, ms in ((model, F.avg_pool2d(condition.lms, 4)), (given, condition.ms)):
            expected = F.pixel_shuffle(F.conv2d(ms, m.skip.weight, padding=1), 4)
            torch.testing.assert_close(answer(m, x_t, t, condition), expected)
    with pytest.raises(ValueError, match="ms"):
        given(x_t, t, replace(condition, ms=None))


@pytest.mark.parametrize(
    "change",
    [
        *({"window": w} for w in (0, 8)),
        {"frequency_window": 16},
        {"frequency_modulation": False},
        {"detail_gain": 1.0},
        {"noise_gain": 1.0},
        {"batch_norm": True},
        {"group_norm": True},
        {"measured_ms": True},
    ],
)
def test_each_setting_changes_the_answer(change):
    config = replace(TINY, width=32)
    given = inputs()
    here, there = (answer(network(config), *given), answer(network(replace(config, **change)), *given))
    assert (here - there).abs().max() > 1e-5


def test_the_answer_depends_on_everything_it_is_told():
    model, (x_t, t, condition) = network(), inputs()
    output = answer(model, x_t, t, condition)
    others = [
        (x_t + 1, t, condition),
        (x_t, 999 - t, condition),
        (x_t, t, replace(condition, lms=condition.lms + 0.1)),
        (x_t, t, replace(condition, pan=condition.pan * 0.5)),
    ]
    for given in others:
        assert (answer(model, *given) - output).abs().max() > 1e-5


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (72, 136)])
def test_tiles_of_any_size(size):
    output = answer(network(), *inputs(size=size))
    assert output.shape == (1, 4, *size) and bool(output.isfinite().all())


def test_far_away_nothing_changes():
    """Windows are bounded, and no layer looks at the whole tile."""
    x_t, t, condition = inputs(size=(32, 512))
    model = network()
    pan = condition.pan.clone()
    pan[..., 400:] += 1
    here, there = (answer(model, x_t, t, c) for c in (condition, replace(condition, pan=pan)))
    moved = (here - there).abs().amax((0, 1, 2))
    assert moved[400:].min() > 1e-6
    assert moved[:160].max() < 1e-6


def test_memory_grows_with_the_pixels_not_with_their_square():
    """Twice the width, twice the activations that a backward pass needs."""

    def kept(width):
        total = 0

        def pack(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            network()(*inputs(size=(64, width)))
        return total

    assert kept(512) < 2.2 * kept(256)


def test_what_does_not_fit_is_refused():
    model, (x_t, t, condition) = network(), inputs()
    with pytest.raises(ValueError, match="multiples of 8; pad it to 32 x 24"):
        model(*inputs(size=(32, 20)))
    with pytest.raises(ValueError, match="3 bands"):
        model(*inputs(bands=3))
    with pytest.raises(ValueError, match="pan must be"):
        model(x_t, t, replace(condition, pan=condition.pan[..., :16]))
    for wrong in ({"bands": 0}, {"window": 1}, {"head_width": 3}, {"group_norm": True}):
        with pytest.raises(ValueError, match=r"must be|divide"):
            replace(TINY, **wrong)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ssdiff")
    return [write_patches(folder / f"{n}.h5", seed=n) for n in range(2)]


def stage(files, network=TINY, **options):
    return SSDiffStage(network, patch_data(files[:1], files[1:]), SSDiffOptions(**options))


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    """A checkpoint of few steps."""
    out = tmp_path_factory.mktemp("base") / "run"
    run(stage(files), out, replace(QUICK, iterations=6, learning_rate=1e-2, validate_every=6))
    return out / "last.safetensors"


def test_the_loss_is_the_mean_distance_from_the_residual(files):
    made = stage(files, terminal_share=0.5)
    model, batch = network(), next(made.batches(0, 1))
    result = made.losses(model, batch, torch.Generator().manual_seed(5))
    patches, generator = batch.patches, torch.Generator().manual_seed(5)
    x0 = (patches.gt - patches.lms) / made.residual_std.view(1, -1, 1, 1)
    t = torch.randint(0, 1000, (4,), generator=generator)
    t = torch.where(torch.rand(4, generator=generator) < 0.5, 999, t)
    noise = torch.randn(x0.shape, generator=generator)
    left = NoiseSchedule.cosine(1000).alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = (left.sqrt() * x0 + (1 - left).sqrt() * noise).float()
    output = answer(model, x_t, t, Condition(patches.lms, patches.pan))
    assert list(result) == ["l1"]
    assert float(result["l1"].detach()) == pytest.approx(float((output - x0).abs().mean()), rel=1e-4)


def test_a_few_steps_learn(files, tmp_path):
    config = replace(QUICK, iterations=40, learning_rate=5e-3, validate_every=40, ema=0.9)
    losses = run(stage(files, terminal_share=1.0), tmp_path / "run", config)
    first, last = (sum(losses[i]["l1"] for i in steps) for steps in (range(1, 5), range(37, 41)))
    assert last < 0.85 * first


def test_resumed_equals_unbroken(files, tmp_path):
    assert_resumes(lambda: stage(files), tmp_path)


def test_the_card_tells_how_to_sample(files):
    card = stage(files, steps=3).card("n", 7, {"ergas": 1.0})
    assert (card.architecture, card.stage, card.steps, card.bands) == ("ssdiff", "ssdiff", 3, 4)
    assert card.config == asdict(TINY) and card.config["timesteps"] == 1000
    assert len(card.residual_std) == 4 and not card.self_conditioning


def test_other_ratios_and_sizes_are_refused(files):
    with pytest.raises(ModelMismatch, match="ratio"):
        stage(files, replace(TINY, ratio=2))
    with pytest.raises(ModelMismatch, match="multiples"):
        stage(files, replace(TINY, grid=16))
    with pytest.raises(ModelMismatch, match="bands"):
        stage(files, replace(TINY, bands=8))


def test_the_published_clamp_goes_on_from_the_image(files):
    """S3, written out for two steps; the answer itself is clamped rightly."""
    made = stage(files, steps=2, clamped_hrms=True, raw_residual=True)
    plain = stage(files, steps=2, raw_residual=True)
    model, (noise, _, condition) = network(), inputs()
    schedule = made.schedule
    steps = schedule.respace(2)
    t = [torch.tensor([s]) for s in steps]
    with torch.no_grad():
        image = (condition.lms + answer(model, noise, t[0], condition)).clamp(0, 1)
        rest = (noise - schedule.signal(t[0]) * image) / schedule.noise(t[0])
        x_t = schedule.signal(t[1]) * image + schedule.noise(t[1]) * rest
        expected = (condition.lms + answer(model, x_t, t[1], condition)).clamp(0, 1)
        output = made.sample(model, noise, condition).x0
        torch.testing.assert_close(condition.lms + output, expected)
        usual = plain.sample(model, noise, condition).x0
        torch.testing.assert_close(usual, ddim_sample(model, noise, steps, schedule, condition).x0)
    assert (usual - output).abs().max() > 1e-3


def test_the_published_time_index_changes_validation(files):
    scores = [stage(files, steps=2, respaced_time_index=flag).validate(network())["score"] for flag in (False, True)]
    assert scores[0] != scores[1]


TURNS = {"lbaf_rank": 2, "lbaf_period": 2, "terminal_share": 0.5}


def branches(rank=2):
    model = LowRankBranches(network(), rank)
    torch.manual_seed(4)
    with torch.no_grad():
        for addition in model.additions:
            addition.second.normal_(0, 0.1)
    return model.eval()


def test_both_branches_are_found_and_share_nothing():
    model = LowRankBranches(network(), 2)
    names = {k: {name for own, name in model.places if own == k} for k in BRANCHES}
    assert not names["spectral"] & names["spatial"]
    convolved = [n for n, p in SSDiff(TINY).named_parameters() if p.ndim > 1]
    left = {n.split(".")[0] for n in set(convolved) - names["spectral"] - names["spatial"]}
    assert left == {"time", "downs", "ups", "skip"}


def test_it_begins_as_the_network_and_merged_it_says_the_same():
    given = inputs()
    begun = LowRankBranches(network(), 2)
    torch.testing.assert_close(answer(begun, *given), answer(network(), *given))
    assert begun.merged() is begun.base
    model = branches()
    plain = model.merged()
    assert isinstance(plain, SSDiff) and plain.state_dict().keys() == network().state_dict().keys()
    torch.testing.assert_close(answer(plain, *given), answer(model, *given))
    assert (answer(plain, *given) - answer(network(), *given)).abs().max() > 1e-3


@pytest.mark.parametrize("branch", BRANCHES)
def test_only_one_branch_has_gradients(branch):
    model = branches()
    model(*inputs(), branch).x0.square().sum().backward()
    for (own, _), addition in zip(model.places, model.additions, strict=True):
        for parameter in (addition.first, addition.second):
            assert (parameter.grad is not None) == (own == branch)
    assert all(p.grad is None for p in model.base.parameters())


def test_with_several_processes_gradients_are_their_means():
    class Two(World):
        def mean(self, values):
            return 3 * values

    grads = []
    for world in (World(), Two(0, 2)):
        model = LowRankBranches(network(), 2, world)
        model(*inputs(), "spatial").x0.square().sum().backward()
        grads.append([a.second.grad for a in model.additions if a.second.grad is not None])
    assert grads[0]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, 3 * one)


def stopped_after(steps, files, init, out):
    """The weights of a run of fine-tuning that was stopped."""
    left = iter([False] * (steps - 1))
    config = replace(QUICK, iterations=6, milestones=(99,), validate_every=6)
    with pytest.raises(Interrupted):
        run(stage(files, **TURNS), out, config, init=init, should_stop=lambda: next(left, True))
    return torch.load(out / "state.pt", weights_only=True)["model"]


def test_branches_take_turns_while_the_base_stands_still(files, trained, tmp_path):
    base = load_file(trained)
    states = [stopped_after(n, files, trained, tmp_path / str(n)) for n in (1, 2, 4, 5)]
    for result in states:
        assert all(torch.equal(result[f"base.{name}"], weight) for name, weight in base.items())
    places = LowRankBranches(SSDiff(TINY), 2).places
    turns = ("spectral", "spatial", "spectral")
    for before, after, branch in zip(states, states[1:], turns, strict=False):
        moved = {name for name in after if not torch.equal(after[name], before[name])}
        own = [f"additions.{i}" for i, (k, _) in enumerate(places) if k == branch]
        assert moved == {f"{place}.{part}" for place in own for part in ("first", "second")}


def test_fine_tuning_resumed_equals_unbroken_and_deploys_a_plain_network(files, trained, tmp_path):
    whole = assert_resumes(lambda: stage(files, **TURNS), tmp_path, replace(QUICK, iterations=5), init=trained)
    merged, card = load_model(whole / "last.safetensors")
    assert isinstance(merged, SSDiff) and card.architecture == "ssdiff"
    before = load_file(trained)
    changed = [k for k, v in merged.state_dict().items() if not torch.equal(v, before[k])]
    assert sorted(changed) == sorted(name for _, name in LowRankBranches(SSDiff(TINY), 2).places)


def test_fine_tuning_wants_a_trained_network(files, tmp_path):
    with pytest.raises(ModelMismatch, match="--init"):
        run(stage(files, **TURNS), tmp_path / "run")


def test_options_that_make_no_sense_are_refused():
    for wrong in ({"lbaf_rank": -1}, {"lbaf_period": 0}):
        with pytest.raises(ValueError, match="lbaf"):
            SSDiffOptions(**wrong)


@pytest.mark.parametrize("case", make_golden.CASES)
def test_forward_equals_golden(case):
    result = make_golden.answer(make_golden.CASES[case]).x0[:, :, ::4, ::4].numpy()
    golden = np.load(GOLDEN / "ssdiff.npz")[case]
    np.testing.assert_allclose(result, golden, rtol=1e-4, atol=1e-5 * golden.std())
